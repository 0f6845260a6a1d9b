"""The part of the Hugging Face Hub's protocol that a model repository needs, as a function of a request.

State is in memory. Every endpoint runs under one lock and changes a repository in its last statement, so a repository
changes as a whole or not at all. hub_server.py puts it behind HTTP.

Not as on the Hub: large files come from /resolve itself, not by a redirect to a CDN; models only, without tags,
organizations and .gitignore; a model card's metadata is not validated; a commit's hash does not depend on the time.
"""
import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cached_property
from math import ceil
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REGULAR_LIMIT = 10 * 10**6  # bytes; larger files are LFS whatever .gitattributes says
GIT_ATTRIBUTES = ''.join(f'*.{ext} filter=lfs diff=lfs merge=lfs -text\n'
                         for ext in ('bin', 'gz', 'npy', 'npz', 'onnx', 'pt', 'pth', 'safetensors', 'tar', 'zip'))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@dataclass
class Blob:
    """Content of a file; what git stores of an LFS file is its pointer."""
    data: bytes
    lfs: bool = False

    @cached_property
    def pointer(self) -> bytes:
        return (f'version https://git-lfs.github.com/spec/v1\noid sha256:{sha256(self.data)}\n'
                f'size {len(self.data)}\n').encode()

    @cached_property
    def git_oid(self) -> str:
        stored = self.pointer if self.lfs else self.data
        return hashlib.sha1(b'blob %d\0' % len(stored) + stored).hexdigest()

    @cached_property
    def oid(self) -> str:
        """ETag, and what the client compares with its own file to skip an upload."""
        return sha256(self.data) if self.lfs else self.git_oid

    def info(self, path: str) -> dict[str, Any]:
        """Entry of a listing; the key of the checksum is oid in a tree and sha256 in a model's information."""
        lfs = dict(oid=self.oid, sha256=self.oid, size=len(self.data), pointerSize=len(self.pointer))
        return dict(type='file', path=path, size=len(self.data), oid=self.git_oid, lfs=lfs if self.lfs else None)


@dataclass
class Repo:
    """Repository: refs maps a name to a commit, commits a hash to the files by path, lfs a sha256 to its bytes."""
    owner: str
    private: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)

    def add_commit(self, ref: str, parent: str, message: str, files: dict[str, Blob]) -> str:
        """Move ref to a commit whose hash is that of parent, message and tree, as in git but without the time."""
        tree = [f'{blob.git_oid} {path}' for path, blob in sorted(files.items())]
        sha = hashlib.sha1('\n'.join([parent, message, *tree]).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha

    def branch(self, name: str) -> str:
        """Commit at a ref."""
        if name not in self.refs:
            raise HubError(404, f'Invalid rev id: {name}', 'RevisionNotFound')
        return self.refs[name]

    def resolve(self, revision: str) -> str:
        """Commit at a ref, or the commit of that hash."""
        return revision if revision in self.commits else self.branch(revision)

    def stored(self, oid: str) -> Blob:
        if oid not in self.lfs:
            raise HubError(400, f'LFS object {oid} was not uploaded')
        return Blob(self.lfs[oid], lfs=True)


@dataclass
class Upload:
    """LFS object that the client announced, with the parts that have arrived."""
    repo: Repo
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)

    def store(self, data: bytes) -> 'Reply':
        if len(data) != self.size or sha256(data) != self.oid:
            raise HubError(400, 'The content is not of the announced size and sha256')
        self.repo.lfs[self.oid] = data
        return Reply()


@dataclass
class Reply:
    """Response; any body but bytes is sent as JSON."""
    body: Any = b''
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class HubError(Exception):
    """Error in the Hub's format; the client chooses its exception by X-Error-Code."""

    def __init__(self, status: int, message: str, code: str = '', headers: Mapping[str, str] = {}):
        super().__init__(message)
        headers = {'X-Error-Message': message, 'X-Error-Code': code, **headers}
        self.reply = Reply({'error': message}, status, {name: value for name, value in headers.items() if value})


class Hub:
    """Users and repositories.

    Args:
        endpoint: URL under which the client finds the Hub.
        token: with write access to the repositories of ``user``; ``tokens`` takes more.
        part_size: LFS objects larger than this are uploaded in parts of this many bytes.
    """

    def __init__(self, endpoint: str, token: str, user: str, part_size: int | None):
        self.endpoint, self.part_size = endpoint, part_size
        self.tokens = {token: (user, 'write')}  # or 'read'
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, Upload] = {}  # by the secret part of a presigned URL
        self.lock = threading.Lock()

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Reply:
        url = urlsplit(path)
        for known, pattern, endpoint in ROUTES:
            match = pattern.fullmatch(url.path)
            if match and known == method:
                names = {name: unquote(value) for name, value in match.groupdict().items()}
                try:
                    with self.lock:
                        return endpoint(Endpoints(self, headers, body, parse_qs(url.query)), **names)
                except HubError as error:
                    return error.reply
        return HubError(404, 'Not Found').reply


ROUTES: list[tuple[str, re.Pattern, Callable[..., Reply]]] = []


def route(method: str, template: str) -> Callable:
    """Endpoint of a path with the {id} of a repository, a {path} in it, and {names} without a slash."""
    kinds = dict(id='[^/]+/[^/]+?', path='.+')
    pattern = re.sub(r'{(\w+)}', lambda m: f'(?P<{m[1]}>{kinds.get(m[1], "[^/]+")})', template.replace('.', r'\.'))

    def register(endpoint: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint
    return register


@dataclass
class Endpoints:
    """The endpoints, for one request."""
    hub: Hub
    headers: Mapping[str, str]
    body: bytes
    query: dict[str, list[str]]

    def lines(self) -> list[Any]:
        """The values of an ndjson body."""
        try:
            return [json.loads(line) for line in self.body.splitlines()]
        except ValueError:
            raise HubError(400, 'The body is no JSON') from None

    def caller(self) -> tuple[str | None, str]:
        """User and role of the token; no user without one."""
        scheme, _, token = self.headers.get('Authorization', '').partition(' ')
        if scheme and token not in self.hub.tokens:
            raise HubError(401, 'Invalid credentials in Authorization header')
        return self.hub.tokens[token] if scheme else (None, 'read')

    def user(self) -> str:
        name, _ = self.caller()
        if name is None:
            raise HubError(401, 'Invalid username or password.')
        return name

    def check_write(self, owner: str) -> None:
        if (self.user(), self.caller()[1]) != (owner, 'write'):
            raise HubError(403, f'This token has no right to write to the repositories of {owner}')

    def repo(self, id: str, need: str = 'read') -> Repo:
        """A repository, to 'read', 'write' or, with a 'login', propose a change to. A hidden one is a missing one."""
        user, _ = self.caller()
        repo = self.hub.repos.get(id)
        if repo is None or (repo.private and user != repo.owner):
            # the code is for the 401: without it the client takes a 401 for a missing repository over https only
            raise HubError(404 if user else 401, 'Repository not found', 'RepoNotFound')
        if need == 'login':
            self.user()
        if need == 'write':
            self.check_write(repo.owner)
        return repo

    @route('GET', '/api/whoami-v2')
    def whoami(self) -> Reply:
        name = self.user()
        return Reply(dict(type='user', name=name, fullname=name, orgs=[],
                          auth=dict(accessToken=dict(displayName='test', role=self.caller()[1]))))

    @route('POST', '/api/validate-yaml')
    def validate_yaml(self) -> Reply:
        return Reply(dict(errors=[], warnings=[]))

    @route('POST', '/api/repos/create')
    def create_repo(self) -> Reply:
        [args] = self.lines()
        owner = args['organization'] or self.user()
        self.check_write(owner)
        id = f'{owner}/{args["name"]}'
        url = f'{self.hub.endpoint}/{id}'
        if id in self.hub.repos:  # the client reads the URL with exist_ok
            return Reply(dict(error='You already created this model repo', url=url), 409)
        repo = Repo(owner, args.get('visibility') == 'private' or args.get('private', False))
        repo.add_commit('main', '', 'initial commit', {'.gitattributes': Blob(GIT_ATTRIBUTES.encode())})
        self.hub.repos[id] = repo
        return Reply(dict(url=url, name=id, private=repo.private))

    @route('GET', '/api/models/{id}')
    @route('GET', '/api/models/{id}/revision/{rev}')
    def model_info(self, id: str, rev: str = 'main') -> Reply:
        repo = self.repo(id)
        sha = repo.resolve(rev)
        infos = [blob.info(path) for path, blob in sorted(repo.commits[sha].items())]
        siblings = [dict(info, rfilename=info['path'], blobId=info['oid']) if 'blobs' in self.query else
                    dict(rfilename=info['path']) for info in infos]
        return Reply(dict(id=id, modelId=id, author=repo.owner, sha=sha, private=repo.private, gated=False,
                          disabled=False, downloads=0, likes=0, tags=[], siblings=siblings))

    @route('GET', '/api/models/{id}/refs')
    def refs(self, id: str) -> Reply:
        refs = [dict(name=name, ref=name if name.startswith('refs/') else f'refs/heads/{name}', targetCommit=sha)
                for name, sha in self.repo(id).refs.items()]
        return Reply(dict(branches=[r for r in refs if r['ref'].startswith('refs/heads/')], converts=[], tags=[],
                          pullRequests=[r for r in refs if r['ref'].startswith('refs/pr/')]))

    @route('POST', '/api/models/{id}/branch/{branch}')
    def create_branch(self, id: str, branch: str) -> Reply:
        repo = self.repo(id, 'write')
        if branch in repo.refs:
            raise HubError(409, f'Reference already exists: {branch}')
        repo.refs[branch] = repo.resolve(self.lines()[0].get('startingPoint', 'main'))
        return Reply({})

    @route('GET', '/api/models/{id}/tree/{rev}')
    @route('GET', '/api/models/{id}/tree/{rev}/{path}')
    def tree(self, id: str, rev: str, path: str = '') -> Reply:
        """Files and folders below a folder, all in one page."""
        repo = self.repo(id)
        prefix = f'{path}/' if path else ''
        inside = {p: blob for p, blob in repo.commits[repo.resolve(rev)].items() if p.startswith(prefix)}
        if path and not inside:
            raise HubError(404, f'{path} does not exist on "{rev}"', 'EntryNotFound')
        folders = {p[:i] for p in inside for i, letter in enumerate(p) if letter == '/' and i >= len(prefix)}
        entries = [dict(type='directory', path=p, size=0, oid=hashlib.sha1(p.encode()).hexdigest()) for p in folders]
        entries += [blob.info(p) for p, blob in inside.items()]
        if self.query.get('recursive') != ['true']:
            entries = [entry for entry in entries if '/' not in entry['path'][len(prefix):]]
        return Reply(sorted(entries, key=lambda entry: entry['path']))

    @route('POST', '/api/models/{id}/paths-info/{rev}')
    def paths_info(self, id: str, rev: str) -> Reply:
        repo = self.repo(id)
        files = repo.commits[repo.resolve(rev)]
        paths = parse_qs(self.body.decode()).get('paths', [])
        return Reply([files[path].info(path) for path in paths if path in files])

    @route('POST', '/api/models/{id}/preupload/{rev}')
    def preupload(self, id: str, rev: str) -> Reply:
        """Regular or LFS, by .gitattributes and size, and the oid of what is there, so that equal files are skipped."""
        repo = self.repo(id, 'login' if 'create_pr' in self.query else 'write')
        files = repo.commits[repo.branch(rev)]
        attributes = files['.gitattributes'].data.decode().splitlines() if '.gitattributes' in files else []
        patterns = [line.split()[0] for line in attributes if 'filter=lfs' in line]
        modes = []
        for file in self.lines()[0]['files']:
            path = file['path']
            lfs = file['size'] > REGULAR_LIMIT or any(fnmatch(path, pattern) for pattern in patterns)
            modes.append(dict(path=path, uploadMode='lfs' if lfs else 'regular', shouldIgnore=False,
                              oid=files[path].oid if path in files else None))
        return Reply(dict(files=modes))

    @route('POST', '/{id}.git/info/lfs/objects/batch')
    def lfs_batch(self, id: str) -> Reply:
        """Where to put the objects that are missing; those that are there get no actions."""
        [args] = self.lines()
        repo = self.repo(id, 'write' if 'ref' in args else 'login')  # no ref: it will be a pull request
        return Reply(dict(transfer='basic', objects=[
            announced if announced['oid'] in repo.lfs else dict(announced, actions=self.upload_actions(id, **announced))
            for announced in args['objects']]))

    def upload_actions(self, id: str, oid: str, size: int) -> dict[str, Any]:
        secret = secrets.token_hex(8)
        self.hub.uploads[secret] = Upload(self.hub.repos[id], oid, size)
        href = f'{self.hub.endpoint}/upload/{secret}'
        header = {}
        if self.hub.part_size is not None and size > self.hub.part_size:
            header = {str(n): f'{href}/{n}' for n in range(1, ceil(size / self.hub.part_size) + 1)}
            header['chunk_size'] = str(self.hub.part_size)
        return dict(upload=dict(href=href, header=header),
                    verify=dict(href=f'{self.hub.endpoint}/{id}.git/info/lfs/objects/verify'))

    def upload(self, secret: str) -> Upload:
        """Like a presigned URL, its secret stands for the token, which the client does not send."""
        if secret not in self.hub.uploads:
            raise HubError(403, 'Unknown upload')
        return self.hub.uploads[secret]

    @route('PUT', '/upload/{secret}')
    def put_object(self, secret: str) -> Reply:
        return self.upload(secret).store(self.body)

    @route('PUT', '/upload/{secret}/{part}')
    def put_part(self, secret: str, part: str) -> Reply:
        self.upload(secret).parts[int(part)] = self.body
        return Reply(headers={'ETag': sha256(self.body)})

    @route('POST', '/upload/{secret}')
    def complete_parts(self, secret: str) -> Reply:
        upload = self.upload(secret)
        listed = [(part['partNumber'], part['etag']) for part in self.lines()[0]['parts']]
        if listed != [(n, sha256(data)) for n, data in sorted(upload.parts.items())]:
            raise HubError(400, 'The parts are not those that were uploaded')
        return upload.store(b''.join(upload.parts[n] for n, _ in listed))

    @route('POST', '/{id}.git/info/lfs/objects/verify')
    def verify(self, id: str) -> Reply:
        [args] = self.lines()
        if len(self.repo(id).stored(args['oid']).data) != args['size']:
            raise HubError(400, 'The object has another size')
        return Reply({})

    @route('POST', '/api/models/{id}/commit/{rev}')
    def commit(self, id: str, rev: str) -> Reply:
        pull_request = 'create_pr' in self.query
        repo = self.repo(id, 'login' if pull_request else 'write')
        parent = repo.branch(rev)
        header, *operations = [(line['key'], line['value']) for line in self.lines()]
        if not parent.startswith(header[1].get('parentCommit', '')):
            raise HubError(412, 'A commit has happened since. Please refresh and try again.')
        files = dict(repo.commits[parent])
        for key, value in operations:
            path = value['path']
            if key == 'file':
                files[path] = Blob(base64.b64decode(value['content']))
            elif key == 'lfsFile':
                files[path] = repo.stored(value['oid'])
            else:  # deletedFile or deletedFolder
                kept = {p: blob for p, blob in files.items() if p != path and
                        (key == 'deletedFile' or not p.startswith(path.rstrip('/') + '/'))}
                if kept == files:
                    raise HubError(404, "A file with this name doesn't exist", 'EntryNotFound')
                files = kept
        number = 1 + sum(name.startswith('refs/pr/') for name in repo.refs)
        sha = repo.add_commit(f'refs/pr/{number}' if pull_request else rev, parent, json.dumps(header), files)
        page = f'{self.hub.endpoint}/{id}'
        return Reply(dict(success=True, commitOid=sha, commitUrl=f'{page}/commit/{sha}',
                          pullRequestUrl=f'{page}/discussions/{number}' if pull_request else None))

    @route('GET', '/{id}/resolve/{rev}/{path}')
    def download(self, id: str, rev: str, path: str) -> Reply:
        repo = self.repo(id)
        sha = repo.resolve(rev)
        if path not in repo.commits[sha]:  # with the commit, the client remembers that the file is missing
            raise HubError(404, 'Entry not found', 'EntryNotFound', {'X-Repo-Commit': sha})
        blob = repo.commits[sha][path]
        size = len(blob.data)
        etag = f'"{blob.oid}"'
        linked = {'X-Linked-Etag': etag, 'X-Linked-Size': str(size)} if blob.lfs else {}
        headers = {'X-Repo-Commit': sha, 'ETag': etag, 'Accept-Ranges': 'bytes', **linked}
        bounds = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range', ''))
        if bounds is None:
            return Reply(blob.data, 200, headers)
        first, last = bounds.groups()
        if first:
            start, stop = int(first), min(int(last) + 1, size) if last else size
        else:
            start, stop = max(size - int(last or 0), 0), size
        if start >= stop:
            raise HubError(416, 'Requested range not satisfiable', headers={'Content-Range': f'bytes */{size}'})
        return Reply(blob.data[start:stop], 206, {**headers, 'Content-Range': f'bytes {start}-{stop - 1}/{size}'})
