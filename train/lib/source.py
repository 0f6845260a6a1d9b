"""Where prepare.py reads from: a folder, or a zip without unpacking it, and tables of boxes."""
import hashlib
import zipfile
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Any

from timm_lossattn.report.dataset import read_boxes

__all__ = ['MD5', 'Row', 'Source', 'boxes_by_image']

MD5 = {  # of the archives that the publishers serve
    'tiny-imagenet-200.zip': '90528d7ca1a48142e341f4ef8d21d0de',
    'train2014.zip': '0da8c0bd3d6becc4dcb32757491aca88',
    'val2014.zip': 'a3d79f5ed8d289b7a7554ce06a5782b3',
    'annotations_trainval2014.zip': '0a379cfc70b0e71301e0f377548639bd',
}
Row = dict[str, Any]  # as stored, with a file name in place of the image


class Source:
    """Files of a folder, or of a zip without unpacking it, by their path below the top folder.

    Args:
        path: folder or zip.
        top: folder inside the zip that names are relative to.

    Raises:
        ValueError: no such path, or a truncated or changed archive.
    """

    def __init__(self, path: Path, top: str) -> None:
        self.path, self.zip, self.top = path, None, top
        if path.is_dir():
            self.folder = path / top if (path / top).is_dir() else path
            return
        if not path.is_file():
            raise ValueError(f'SOURCE: no such file or folder: {path}')
        try:
            self.zip = zipfile.ZipFile(path)
        except zipfile.BadZipFile as error:
            raise ValueError(f'{path}: truncated, or no zip file ({error}); download it again') from error
        expected = MD5.get(path.name)
        if expected:
            digest = hashlib.md5()
            with path.open('rb') as file:
                while block := file.read(2 ** 20):
                    digest.update(block)
            found = digest.hexdigest()
            if found != expected:
                raise ValueError(f'{path}: MD5 is {found}, the published archive has {expected}; download it again')

    def read(self, name: str) -> bytes:
        """Contents of a file.

        Raises:
            ValueError: it is missing or damaged.
        """
        try:
            if self.zip is not None:
                return self.zip.read(f'{self.top}/{name}')
            return (self.folder / name).read_bytes()
        except (KeyError, FileNotFoundError):
            raise ValueError(f'{self.path}: has no {name}') from None
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f'{self.path}: {name} is damaged ({error})') from error


def boxes_by_image(table: Path, column: str) -> dict[str, list[list[float]]]:
    """Boxes of a CSV by the last two parts of their image's path, its folder and name.

    Args:
        table, column: see ``read_boxes``.

    Raises:
        ValueError: it is no such table, or has no row.
    """
    found: dict[str, list[list[float]]] = defaultdict(list)
    for path, boxes in read_boxes(table, column).items():
        found['/'.join(Path(path).parts[-2:])] += boxes
    if not found:
        raise ValueError(f'--boxes: {table} has no row')
    return dict(found)
