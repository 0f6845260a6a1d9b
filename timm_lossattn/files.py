"""Files that appear whole or not at all, checksums of files and weights, and names that are free."""
import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

import torch

__all__ = [
    'fitting', 'replace_file', 'replacing', 'sha256_of', 'unique_stems', 'weights_digest', 'write_csv', 'write_json',
]

NAME_BYTES = 255  # of a file's name, at most


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside it, this thread's own, that takes its place at the end of the block.

    A kill leaves the old file or the new one, and perhaps the temporary one (.NAME.….tmp), which nothing reads; an
    error in the block leaves the old one.
    """
    path = Path(path)
    temporary = path.with_name(f'.{fitting(path.name, 200)}.{os.getpid()}.{get_ident()}.tmp')
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # where nothing can be written there is nothing to remove
            temporary.unlink()


def replace_file(path: str | Path, content: bytes) -> None:
    """Write a file as a whole, see ``replacing``.

    Raises:
        OSError: the folder does not exist, or cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """A value as JSON, see ``replace_file``."""
    replace_file(path, (json.dumps(value, indent=2) + '\n').encode())


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows, whose keys become the header, empty where a row has no such key; see ``replace_file``."""
    content = io.StringIO(newline='')
    writer = csv.DictWriter(content, fieldnames=list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, content.getvalue().encode())


def sha256_of(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 of a model's weights, by their names: what was measured with others is not gone on with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def fitting(name: str, size: int) -> str:
    """The beginning of a name that fits into so many bytes, in whole letters."""
    name = name[:size]
    while len(os.fsencode(name)) > size:
        name = name[:-1]
    return name


def unique_stems(stems: Iterable[str], taken: Iterable[str] = (), ending: str = '.json') -> list[str]:
    """File stems, with a number behind those that are taken or equal (some file systems do not tell case).

    Long ones are cut, so that the file's name is none that file systems refuse.

    Args:
        stems: of the files.
        taken: stems that are not free.
        ending: what comes behind the stems, the longest of it.
    """
    seen = {stem.casefold() for stem in taken}
    room = NAME_BYTES - len(os.fsencode(ending))
    unique = []
    for stem in stems:
        name, count = fitting(stem, room), 1
        while name.casefold() in seen:
            count += 1
            name = fitting(stem, room - len(f'-{count}')) + f'-{count}'
        seen.add(name.casefold())
        unique.append(name)
    return unique
