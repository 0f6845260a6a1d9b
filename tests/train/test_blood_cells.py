"""prepare.py pbc on a small set in the published layout: splits, copies, windows around the boxes."""
import io
import shutil

import numpy as np
import pytest
from datasets import Image as ImageFeature
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import prepare
from lib.blood_cells import CLASSES, WINDOW, random_window

SIZE = (360, 363)
BOXES = {'neutrophil/BNE_0.jpg': [[120, 100, 240, 266]], 'basophil/BA_1.jpg': [[10, 20, 90, 100], [150, 60, 222, 140]]}
NAMES = {'basophil': 'BA', 'neutrophil': 'BNE'}


def encoded(image, quality=92):
    buffer = io.BytesIO()
    image.save(buffer, 'JPEG', quality=quality)
    return buffer.getvalue()


def picture(seed):
    """Blots that no other seed has."""
    blots = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(blots).resize(SIZE, Image.Resampling.BICUBIC)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """Twenty pictures of each class; copies beside them, see the test of each."""
    root = tmp_path_factory.mktemp('pbc') / 'PBC_dataset_normal_DIB'
    for k, label in enumerate(CLASSES):
        (root / label).mkdir(parents=True)
        for i in range(20):
            (root / label / f'{NAMES.get(label, label)}_{i}.jpg').write_bytes(encoded(picture(100 * k + i)))
    for i in range(20):  # each of them twice
        shutil.copy(root / 'ig' / f'ig_{i}.jpg', root / 'ig' / f'copy_{i}.jpg')
    shutil.copy(root / 'monocyte' / 'monocyte_3.jpg', root / 'platelet' / 'stray.jpg')  # which of the two is it?
    boxed = Image.open(root / 'neutrophil' / 'BNE_0.jpg')
    (root / 'neutrophil' / 'written_anew.jpg').write_bytes(encoded(boxed, quality=70))
    (root / 'neutrophil' / '.DS_1.jpg').write_bytes(b'no picture')
    return root


@pytest.fixture(scope='module')
def table(tmp_path_factory):
    file = tmp_path_factory.mktemp('boxes') / 'boxes.csv'
    rows = [','.join([f'PBC_dataset_normal_DIB/{name}', *map(str, b)]) for name, boxes in BOXES.items() for b in boxes]
    file.write_text('\n'.join(['pbc_path,x0,y0,x1,y1', *rows]))
    return file


def prepared(folder, table, out):
    """All splits with the files' bytes, as {split: rows}."""
    assert prepare.main(['pbc', str(folder), str(out), '--boxes', str(table)]) == 0
    found = load_dataset(str(out), cache_dir=str(out / 'cache'))
    return {split: list(rows.cast_column('image', ImageFeature(decode=False))) for split, rows in found.items()}


@pytest.fixture(scope='module')
def splits(folder, table, tmp_path_factory):
    return prepared(folder, table, tmp_path_factory.mktemp('out') / 'set')


def test_corrected_boxes(folder, table, tmp_path, capsys):
    """Another table of boxes is another data set: nothing of the old one is kept under its name."""
    prepared(folder, table, tmp_path / 'set')
    other = tmp_path / 'boxes.csv'
    other.write_text(table.read_text().replace('.jpg,', '.jpg,1', 1))
    assert prepare.main(['pbc', str(folder), str(tmp_path / 'set'), '--boxes', str(other)]) == 2
    assert 'was begun with' in capsys.readouterr().err


def contents(rows):
    return {row['image']['bytes'] for row in rows}


def test_splits(folder, splits):
    """A seventh or so of each class is held out; every file is in one split, as it was, but for the odd copies."""
    assert list(splits) == ['train', 'test', 'boxed', 'boxed_crops']
    for k, label in enumerate(CLASSES):
        train, test = (sum(row['label'] == k for row in splits[split]) for split in ('train', 'test'))
        assert test == pytest.approx(0.15 * (train + test), abs=2), label
        for split in ('train', 'test', 'boxed'):
            for row in splits[split]:
                if row['label'] == k:
                    assert row['image']['bytes'] == (folder / label / row['image']['path']).read_bytes()
    names = [row['image']['path'] for split in ('train', 'test', 'boxed') for row in splits[split]]
    every = {path.name for path in folder.rglob('*.jpg')}
    assert every - set(names) == {'.DS_1.jpg', 'stray.jpg', 'monocyte_3.jpg', 'written_anew.jpg'}
    assert len(names) == len(set(names))
    assert [row['boxes'] for row in splits['train'] + splits['test'] if row['boxes']] == []


def test_no_picture_on_both_sides(folder, splits):
    """Copies share their side, images with boxes and their copies are neither trained nor tested on."""
    train, test, boxed = (contents(splits[split]) for split in ('train', 'test', 'boxed'))
    assert not train & test
    assert not boxed & (train | test)
    assert {(folder / name).read_bytes() for name in BOXES} == boxed
    copies = {(folder / 'ig' / f'ig_{i}.jpg').read_bytes() for i in range(20)}
    assert copies <= train | test
    assert copies & train
    assert copies & test


def test_split_is_by_content(folder, table, splits, tmp_path):
    """Other names of the files, and so another order: the same pictures are held out, in the same order."""
    other = tmp_path / 'renamed' / 'PBC_dataset_normal_DIB'
    shutil.copytree(folder, other)
    for i, path in enumerate(sorted((other / 'platelet').glob('*.jpg'))):
        path.rename(path.with_name(f'p{100 - i}.jpg'))
    again = prepared(other, table, tmp_path / 'set')
    for split in splits:
        assert [row['image']['bytes'] for row in again[split]] == [row['image']['bytes'] for row in splits[split]]


def test_windows(folder, splits):
    """The crop is a square of the image, and its boxes frame the same pixels as those of the whole image."""
    whole = {row['image']['path']: row for row in splits['boxed']}
    for row in splits['boxed_crops']:
        source = Image.open(io.BytesIO(whole[row['image']['path']]['image']['bytes']))
        crop = Image.open(io.BytesIO(row['image']['bytes']))
        assert crop.width == crop.height
        assert WINDOW[0] <= crop.width <= WINDOW[1]
        assert len(row['boxes']) == len(whole[row['image']['path']]['boxes'])
        for box, original in zip(row['boxes'], whole[row['image']['path']]['boxes']):
            assert np.array_equal(np.asarray(crop.crop(box)), np.asarray(source.crop(original)))
            assert min(box) >= 0
            assert max(box) <= crop.width
    assert any(a['boxes'] != whole[a['image']['path']]['boxes'] for a in splits['boxed_crops'])


@given(st.text(max_size=5), st.lists(st.tuples(*[st.integers(0, 360)] * 4), min_size=1, max_size=3))
def test_random_window(seed, corners):
    """It holds every box, lies in the image, and is a square, or the whole image where no square does."""
    boxes = [[min(a, c), min(b, d), max(a, c) + 0.0, max(b, d) + 0.5] for a, b, c, d in corners]
    window = random_window(seed, SIZE, boxes)
    left, top, right, bottom = window
    assert 0 <= left < right <= SIZE[0]
    assert 0 <= top < bottom <= SIZE[1]
    assert all(left <= x0 and top <= y0 and x1 <= right and y1 <= bottom for x0, y0, x1, y1 in boxes)
    assert right - left == bottom - top or window == (0, 0, *SIZE)
    assert random_window(seed, SIZE, boxes) == window


def test_windows_are_everywhere():
    """Over many seeds the cell of a centred box is about as often in each quarter, and no two sides are the same."""
    windows = [random_window(str(i), SIZE, [[150, 150, 210, 210]]) for i in range(400)]
    left = np.mean([180 - x0 < (x1 - x0) / 2 for x0, _, x1, _ in windows])
    above = np.mean([180 - y0 < (y1 - y0) / 2 for _, y0, _, y1 in windows])
    assert (left, above) == (pytest.approx(0.5, abs=0.1), pytest.approx(0.5, abs=0.1))
    assert {x1 - x0 for x0, _, x1, _ in windows} >= {*range(WINDOW[0] + 30, WINDOW[0] + 40)}


@pytest.mark.parametrize(('rows', 'message'), [
    (['a,b', '1,2'], 'must have the columns pbc_path, x0, y0, x1, y1'),
    (['pbc_path,x0,y0,x1,y1'], 'has no row'),
    (['pbc_path,x0,y0,x1,y1', 'x/basophil/no.jpg,0,0,9,9'], 'has basophil/no.jpg, which is not in'),
    (['pbc_path,x0,y0,x1,y1', 'x/basophil/BA_2.jpg,0,0,9,400'], 'are not inside of an image of 360×363 pixels'),
])
def test_bad_tables(folder, tmp_path, rows, message, capsys):
    file = tmp_path / 'boxes.csv'
    file.write_text('\n'.join(rows))
    assert prepare.main(['pbc', str(folder), str(tmp_path / 'out'), '--boxes', str(file)]) == 2
    assert message in capsys.readouterr().err


def test_bad_folders(folder, table, tmp_path, capsys):
    """No folder, a class without images, an image that is none."""
    other = tmp_path / 'copy'
    shutil.copytree(folder, other)
    shutil.rmtree(other / 'monocyte')
    broken = tmp_path / 'broken'
    shutil.copytree(folder, broken)
    (broken / 'ig' / 'ig_0.jpg').write_bytes(b'no picture')
    for source, message in ((tmp_path / 'nothing', 'no such folder'), (other, 'no image in monocyte/'),
                            (broken, 'ig/ig_0.jpg is no readable image')):
        assert prepare.main(['pbc', str(source), str(tmp_path / 'out'), '--boxes', str(table)]) == 2
        assert message in capsys.readouterr().err
    assert prepare.main(['pbc', str(folder), str(tmp_path / 'out')]) == 2
    assert 'needed for imagenet and pbc' in capsys.readouterr().err
