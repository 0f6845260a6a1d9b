"""hub/space/app.py: files that visitors upload, broken, huge, or of a rare kind."""
import json
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image

from space_app import CAT, CONV, error_message, shown


def png(width, height):
    """The beginning of a PNG, all there is to it in a file that lies about its size."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0' * 100))


@pytest.mark.parametrize(('name', 'content', 'what'), [
    ('text.png', b'not an image\n', 'text.png is no image that can be read'),
    ('empty.png', b'', 'empty.png is no image that can be read'),
    ('cut.png', CAT.read_bytes()[:800], 'cut.png is no image that can be read'),
    ('large.png', png(9000, 9000), 'large.png is too large: at most 60 megapixels'),
    ('bomb.png', png(100_000, 100_000), 'bomb.png is too large: at most 60 megapixels'),  # Pillow refuses by itself
    ('line.png', png(5_000_000, 1), 'line.png is 5000000×1: at most 100 times as long as wide'),
    ('drawing.svg', b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'drawing.svg is no image that can be read'),
    ('<b>&.png', b'not an image\n', '&lt;b&gt;&amp;.png is no image that can be read'),
])
@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_bad_files(app, tmp_path, name, content, what):
    """One message that names the file, in words for a visitor."""
    (tmp_path / name).write_bytes(content)
    assert what in error_message(app, tmp_path / name)


def test_50_megapixels(app, tmp_path):
    """Works, in seconds."""
    with Image.open(CAT) as cat:
        cat.resize((8660, 5774)).save(tmp_path / 'a.jpg')
    begin = time.monotonic()
    outputs = app.answer(CONV, str(tmp_path / 'a.jpg'), '', '')
    answer = shown(next(outputs))
    assert time.monotonic() - begin < 60
    assert answer.message == ''
    assert next(iter(answer.top)) == 'cat'
    assert json.loads(Path(answer.numbers).read_text())['image_size'] == [8660, 5774]
