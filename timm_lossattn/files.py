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

__all__ = ['replace_file', 'replacing', 'sha256_of', 'unique_stems', 'weights_digest', 'write_csv', 'write_json']


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file beside it, this thread's own, that takes its place at the end of the block.

    A kill leaves the old file or the new one, and perhaps the temporary one (.NAME.….tmp), which nothing reads; an
    error in the block leaves the old one.
    """
    path = Path(path)
    name = os.fsencode(path.name)[:200].decode(errors='ignore')  # a name has at most 255 bytes
    temporary = path.with_name(f'.{name}.{os.getpid()}.{get_ident()}.tmp')
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


def unique_stems(stems: Iterable[str], taken: Iterable[str] = ()) -> list[str]:
    """File stems, with a number behind those that are taken or equal (some file systems do not tell case)."""
    seen = {stem.casefold() for stem in taken}
    unique = []
    for stem in stems:
        name, count = stem, 1
        while name.casefold() in seen:
            count += 1
            name = f'{stem}-{count}'
        seen.add(name.casefold())
        unique.append(name)
    return unique
