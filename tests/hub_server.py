"""A Hugging Face Hub on the loopback interface that the unmodified huggingface_hub client talks to, and its faults.

    with HubServer(token='hf_test', user='tester') as server:
        api = HfApi(endpoint=server.endpoint, token=server.token)
        api.create_repo('tester/model')
        server.fault('PUT', '/upload/', 'status', times=2, status=503)
        api.upload_folder(repo_id='tester/model', folder_path=folder)

The client must have Xet disabled. A subprocess gets all from ``HubServer.environment``. The client reads the endpoint
when it is imported, so a call in this process has to name it. The fixture ``hub`` does what can be done for both.
"""
import contextlib
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from hub_protocol import Hub, Reply

CHUNK = 1 << 16


class Request(NamedTuple):
    """A line of the log: path with query, status or None if no response was sent, headers with names in lower case."""
    method: str
    path: str
    status: int | None
    headers: dict[str, str]


@dataclass
class Fault:
    """What goes wrong with the next requests whose method and path match.

    Kinds:
        status: ``status`` and ``headers`` instead of an answer; nothing changes on the server.
        cut: the connection is reset after ``after`` bytes of the body; of a response, 0 means before its headers. A
            reset also drops what is under way, so the peer may have seen fewer bytes.
        truncate: the connection is closed in order after ``after`` bytes of the response, which promised more.
        corrupt: byte ``after`` of the body is flipped.
        slow: ``before`` seconds pass before the response, ``between`` seconds between its chunks of 64 KiB.

    Attributes:
        where: 'request' or 'response', the body to cut or corrupt; by default the response's of a GET and the request's
            of all others. The server has not acted on a request that was cut; it has acted if the response was.
        hits: paths of the requests that it struck.
    """
    method: str
    path: str
    kind: str
    times: int = 1
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    after: int = 0
    where: str = ''
    before: float = 0.
    between: float = 0.
    hits: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.kind not in ('status', 'cut', 'truncate', 'corrupt', 'slow'):
            raise ValueError(f'no such fault: {self.kind}')
        self.where = self.where or ('response' if self.method == 'GET' else 'request')

    def is_due(self, method: str, path: str) -> bool:
        return len(self.hits) < self.times and self.method == method and re.search(self.path, path) is not None

    def does(self, kind: str, where: str) -> bool:
        return (self.kind, self.where) == (kind, where)

    def flip(self, body: bytes) -> bytes:
        return body[:self.after] + bytes([body[self.after] ^ 255]) + body[self.after + 1:]


class HubServer(ThreadingHTTPServer):
    """An empty Hub on a free port of 127.0.0.1.

    Args:
        token: with write access to the repositories of ``user``; ``tokens`` takes more: token -> (user, 'read').
        part_size: LFS objects larger than this are uploaded in parts of this many bytes.
    """
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, token: str = 'hf_test', user: str = 'tester', part_size: int | None = None):
        super().__init__(('127.0.0.1', 0), Handler)
        self.endpoint = f'http://127.0.0.1:{self.server_port}'
        self.token, self.user = token, user
        self.hub = Hub(self.endpoint, token, user, part_size)
        self.repos, self.tokens = self.hub.repos, self.hub.tokens
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self.connections: set[Any] = set()

    def fault(self, method: str, path: str, kind: str, times: int = 1, **details: Any) -> Fault:
        """Let the next ``times`` requests fail in whose path, with its query, the regular expression is found."""
        self.faults.append(Fault(method, path, kind, times, **details))
        return self.faults[-1]

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """Variables that make a subprocess use this Hub, and a cache below ``home``."""
        return dict(HF_ENDPOINT=self.endpoint, HF_TOKEN=self.token, HF_HOME=str(home),
                    HF_HUB_CACHE=os.path.join(home, 'hub'), HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1',
                    HF_HUB_DISABLE_TELEMETRY='1', HF_HUB_DISABLE_PROGRESS_BARS='1',
                    NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')

    def __enter__(self) -> 'HubServer':
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *args: object) -> None:
        self.shutdown()
        self.server_close()
        for connection in list(self.connections):  # a pooled connection would reach this server behind a reused port
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def process_request(self, request, client_address):
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request):
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request, client_address):
        """A client that hangs up is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True
    server: HubServer

    def serve(self) -> None:
        with self.server.lock:
            fault = next((f for f in self.server.faults if f.is_due(self.command, self.path)), Fault('', '', 'slow'))
            fault.hits.append(self.path)
        length = int(self.headers.get('Content-Length', 0))
        if fault.does('cut', 'request'):
            self.rfile.read(min(length, fault.after))
            self.record(None)
            self.reset()
            return
        body = self.rfile.read(length)
        if len(body) < length:
            raise ConnectionAbortedError('the client hung up')
        if fault.does('corrupt', 'request'):
            body = fault.flip(body)
        if fault.kind == 'status':
            reply = Reply({}, fault.status, fault.headers)
        else:
            reply = self.server.hub.answer(self.command.replace('HEAD', 'GET'), self.path, self.headers, body)
        time.sleep(fault.before)
        if fault.does('cut', 'response') and not fault.after:
            self.record(None)
            self.reset()
            return
        self.send(reply, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def send(self, reply: Reply, fault: Fault) -> None:
        binary = isinstance(reply.body, bytes)
        body = reply.body if binary else json.dumps(reply.body).encode()
        self.record(reply.status)  # before the client can see the response
        self.send_response(reply.status)
        self.send_header('Content-Type', 'application/octet-stream' if binary else 'application/json')
        self.send_header('Content-Length', str(len(body)))
        for name, value in reply.headers.items():
            self.send_header(name, value)
        self.end_headers()
        if fault.does('corrupt', 'response'):
            body = fault.flip(body)
        cut = fault.does('cut', 'response')
        if cut or fault.kind == 'truncate':
            body = body[:fault.after]
            self.close_connection = True
        if self.command != 'HEAD':
            for start in range(0, len(body), CHUNK):
                time.sleep(fault.between if start else 0)
                self.wfile.write(body[start:start + CHUNK])
        if cut:
            self.reset()

    def record(self, status: int | None) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.log.append(Request(self.command, self.path, status, headers))

    def reset(self) -> None:
        """Close with a TCP reset, here: the base class would shut down in order first. The reader holds the socket."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        self.rfile.close()
        self.connection.close()

    def log_message(self, format, *args):
        """Nothing on stderr; the log is ``server.log``."""
