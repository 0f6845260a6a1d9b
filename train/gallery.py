#!/usr/bin/env python3
"""Draw the pictures of docs/gallery.md and README.md anew: run every command that the gallery prints.

    python train/gallery.py [--only PART]

Each command explains one image; its picture becomes a JPEG under the name that the gallery shows below the command.
"""
import argparse
import re
import shlex
import tempfile
from pathlib import Path

from PIL import Image

from timm_lossattn import cli
from timm_lossattn.files import replacing

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / 'docs' / 'gallery.md'


def commands(text: str) -> dict[str, list[str]]:
    """File of each picture, relative to docs/, and the arguments of the command that stands before it."""
    found = re.findall(r'```bash\n((?:(?!```).)*?)```\s*!\[[^\]]*\]\(([^)]+)\)', text, flags=re.DOTALL)
    return {picture: shlex.split(command.replace('\\\n', ' '))[1:] for command, picture in found}


def draw(arguments: list[str], picture: Path) -> None:
    """Run one command, in a folder of its own, and store what it drew as a JPEG."""
    with tempfile.TemporaryDirectory() as folder:
        if cli.main([*arguments, '--out', folder]):
            raise ValueError(f'{picture.name}: the command failed')
        (drawn,) = Path(folder).glob('*.png')
        picture.parent.mkdir(exist_ok=True)
        with Image.open(drawn) as image, replacing(picture) as temporary:
            image.convert('RGB').save(temporary, 'jpeg', quality=86, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', default='', metavar='PART', help='pictures with this in their name')
    args = parser.parse_args()
    for picture, arguments in commands(GALLERY.read_text()).items():
        if args.only in picture:
            draw(arguments, GALLERY.parent / picture)


if __name__ == '__main__':
    main()
