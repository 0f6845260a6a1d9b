"""cli.py in-process: images of every kind in, files out, and those that fail among them."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from cli_run import CAT, SHIP, error_line, written
from timm_lossattn.files import fitting, unique_stems


@pytest.mark.parametrize(('size', 'frame'), [
    ((32, 32), (0, 0, 32, 32)), ((400, 100), (150, 0, 250, 100)), ((100, 400), (0, 150, 100, 250)),
    ((3000, 5), (1497.5, 0, 1502.5, 5)), ((1, 1), (0, 0, 1, 1))])
def test_shapes_of_images(run, tmp_path, size, frame):
    """Pictures stay between 200 and 2600 pixels whatever the image; boxes are in its pixels, within the crop."""
    path = tmp_path / 'photo.png'
    Image.open(CAT).resize(size).save(path)
    assert run(path) == 0
    with Image.open(tmp_path / 'out' / 'photo.png') as picture:
        picture.load()
        assert all(200 <= side <= 2600 for side in picture.size)
        low, high = picture.convert('L').getextrema()
    assert low < 50
    assert high == 255
    numbers = json.loads((tmp_path / 'out' / 'photo.json').read_text())
    assert numbers['image_size'] == list(size)
    boxes = torch.tensor(numbers['patch_boxes']).view(-1, 4)
    assert boxes[0].tolist() == pytest.approx([
        frame[0], frame[1], frame[0] + 9 / 32 * (frame[2] - frame[0]), frame[1] + 9 / 32 * (frame[3] - frame[1])],
        abs=min(size) / 32)
    boxes = torch.cat([boxes, torch.tensor([numbers['box']])])
    slack = min(size) / 32
    assert (boxes[:, :2] >= torch.tensor(frame[:2]) - slack).all()
    assert (boxes[:, 2:] <= torch.tensor(frame[2:]) + slack).all()
    assert (boxes >= 0).all()
    assert (boxes[:, 2:] <= torch.tensor(size)).all()
    assert (boxes[:, 2:] > boxes[:, :2]).all()


def test_equal_stems(run, tmp_path):
    """Images of the same name from different folders, or with different endings, each get files of their own."""
    sources = {'a/photo.png': CAT, 'b/photo.png': SHIP, 'b/photo.bmp': CAT, 'photo-2.png': SHIP}
    for name, source in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.open(source).save(tmp_path / name)
    assert run(*(tmp_path / name for name in sources)) == 0
    documents = [json.loads((tmp_path / 'out' / n).read_text()) for n in written(tmp_path) if n.endswith('.json')]
    assert sorted(d['image'] for d in documents) == sorted(str(tmp_path / name) for name in sources)
    assert len(written(tmp_path)) == 2 * len(sources)


def test_foreign_files_are_kept(run, tmp_path, capsys):
    """A picture or numbers of the same name that are no explanation are not replaced; older explanations are."""
    for name in ('cat.jpg', 'cat.png'):
        Image.open(CAT).save(tmp_path / name)
    out = tmp_path / 'out'
    assert run(tmp_path / 'cat.jpg') == 0
    assert run(tmp_path / 'cat.jpg') == 0
    for foreign, content in (('cat.json', b'[1]'), ('cat.json', b'{"shapes": []}'), ('cat.png', b'a mask')):
        for file in out.iterdir():
            file.unlink()
        (out / foreign).write_bytes(content)
        capsys.readouterr()
        assert run(tmp_path / 'cat.jpg') == 2
        assert f'--out: {out / foreign} is there and no explanation' in error_line(capsys)
        assert [(file.name, file.read_bytes()) for file in out.iterdir()] == [(foreign, content)]


def test_names_of_files(run, tmp_path, capsys):
    """That are no UTF-8, or as long as names can be; one that is a line of pixels is one error."""
    names = [b'caf\xe9.png'.decode(errors='surrogateescape'), 'aa' + '図' * 83 + '.png']
    for name in names:
        Image.open(CAT).save(tmp_path / name)
    Image.new('RGB', (1_000_000, 1)).save(tmp_path / 'line.png')
    assert run(*(tmp_path / name for name in names), tmp_path / 'line.png') == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(written(tmp_path)) == 4
    assert 'aa' + '図' * 82 + '.json' in written(tmp_path)
    assert lines[0].startswith('caf\ufffd.png: ')
    assert 'error image: 1000000×1 pixels are too long and thin for the model' in lines[-1]
    for name, ending in ((names[1], 'jpg'), (names[1], 'bmp'), ('aa' + '図' * 82 + 'b.png', 'png')):
        Image.open(CAT).save(tmp_path / Path(name).with_suffix(f'.{ending}'))
    images = [file for file in tmp_path.iterdir() if file.name.startswith('aa')]
    assert run(*images, '--target', 'cat', '--against', 'truck') == 0
    asked = [name for name in written(tmp_path) if '-cat-vs-truck.' in name]
    assert len(images) == 4
    assert len(asked) == 8
    assert max(len(os.fsencode(name)) for name in asked) <= 255


@pytest.mark.parametrize(('encoding', 'command', 'text'), [
    ('cp1252', ['explain', '--help'], r'\u03be of loss attention'), ('ascii', ['list', '*caps_nano'], r'32\xd732')])
def test_terminals_without_greek(encoding, command, text):
    """Letters that the encoding lacks are written as escapes."""
    done = subprocess.run([sys.executable, '-m', 'timm_lossattn.cli', *command], capture_output=True,
                          encoding=encoding, env=dict(os.environ, PYTHONIOENCODING=encoding))
    assert (done.returncode, done.stderr) == (0, '')
    assert text in done.stdout


def test_unique_stems():
    """Numbers never collide with names that look numbered, nor names with each other where case does not count."""
    paths = [Path(p) for p in ('x/a.png', 'a.jpg', 'a-2.png', 'A.png', 'b.png', 'a.gif')]
    stems = unique_stems(path.stem for path in paths)
    assert stems[0] == 'a'
    assert stems[4] == 'b'
    assert len({s.casefold() for s in stems}) == len(paths)
    assert unique_stems(['a', 'b'], taken=['A', 'a-2']) == ['a-3', 'b']
    assert unique_stems(['x' * 251] * 2, ending='-cat.json') == ['x' * 246, 'x' * 244 + '-2']
    assert fitting('aü図', 5) == 'aü'


def test_folder_of_images(run, tmp_path, capsys):
    """All images of a folder in the order of their names; what else it holds is named; without images an error."""
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    for name, source in (('b.png', CAT), ('a.JPG', SHIP)):
        Image.open(source).save(folder / name)
    (folder / 'notes.txt').write_text('a ship and a cat')
    Image.open(CAT).save(folder / 'page.pdf')  # Pillow writes such files, but does not read them
    assert run(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{folder}: 2 images; left out: more/, notes.txt, page.pdf'
    assert [line.split(':')[0] for line in lines[1:]] == ['a.JPG', 'b.png']
    assert written(tmp_path) == ['a.json', 'a.png', 'b.json', 'b.png']
    assert run(folder / 'more') == 2
    assert f'no images in the folder {folder / "more"}' in error_line(capsys)
    assert run(tmp_path) == 2
    assert f'{tmp_path}/*/* are those of its folders' in error_line(capsys)


def test_photo_for_thumbnails(run, tmp_path, capsys):
    """A photo for a model of ten classes of thumbnails is answered with a hint, once; a thumbnail is not."""
    for name in ('a.png', 'b.png'):
        Image.open(CAT).resize((400, 300)).save(tmp_path / name)
    assert run(CAT, tmp_path / 'a.png', tmp_path / 'b.png') == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('hint: ')]
    assert hint.startswith(
        'hint: a.png: This image has 400×300 pixels; the model reads 32×32 and knows 10 classes of CIFAR-10:')


def test_unreadable_image_among_good_ones(run, tmp_path, capsys):
    """Good images are written all the same; each bad one is a line; the exit code says that something failed."""
    text = tmp_path / 'text [red].png'  # what rich would take for markup
    text.write_text('not an image')
    missing = tmp_path / 'missing.png'
    assert run(CAT, text, missing, SHIP) == 1
    out = capsys.readouterr().out
    errors = [line for line in out.splitlines() if line.startswith('error ')]
    assert len(errors) == 2
    assert str(text) in errors[0]
    assert str(missing) in errors[1]
    assert written(tmp_path) == sorted(f'{p.stem}.{e}' for p in (CAT, SHIP) for e in ('json', 'png'))


@pytest.mark.parametrize('name', ['[bold]a.png', 'a [/].png', ':smile: $x$ 50%.png', '$\\frac.$.png', '図.png'])
@pytest.mark.filterwarnings('ignore:Glyph')
def test_odd_file_names(run, tmp_path, capsys, name):
    """Brackets, dollar signs and colons in a file name are just that, on the terminal and in the picture."""
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(CAT.read_bytes())
    missing = f'{path}.missing'
    assert run(path, missing) == 1
    out = capsys.readouterr().out
    assert out.startswith(f'{path.name}: ')
    assert f'no such file: {missing}\n' in out
    assert written(tmp_path) == sorted(f'{path.stem}.{e}' for e in ('json', 'png'))


def test_nothing_half_written(run, tmp_path, capsys, monkeypatch):
    """A rename that fails leaves neither a new file nor a temporary one, and the old file as it was."""
    assert run(CAT) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()}

    def fail(source, target):
        raise OSError('disk on fire')
    monkeypatch.setattr(os, 'replace', fail)
    capsys.readouterr()
    assert run(CAT, '--all-classes') == 2
    assert 'disk on fire' in error_line(capsys)
    assert {file.name: file.read_bytes() for file in (tmp_path / 'out').iterdir()} == before


def test_output_folder_is_a_file(run, tmp_path, capsys):
    """An error line, not a traceback."""
    (tmp_path / 'out').write_text('')
    assert run(CAT) == 2
    assert str(tmp_path / 'out') in error_line(capsys)


def test_inputs_are_not_overwritten(run, tmp_path, capsys):
    """An output that would fall on an input is refused before anything is written."""
    (tmp_path / 'out').mkdir()
    image = tmp_path / 'out' / 'a.png'
    image.write_bytes(CAT.read_bytes())
    assert run(image) == 2
    assert 'would overwrite' in error_line(capsys)
    assert image.read_bytes() == CAT.read_bytes()
