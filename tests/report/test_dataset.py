"""report/dataset.py: folders, tar files, hfds/ and torch/ data sets, with labels and boxes and without."""
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_lossattn  # noqa: F401  (registers the models)
from timm_lossattn.cli import main
from timm_lossattn.explanation import Preprocessing, class_labels, explain, input_config, preprocess
from timm_lossattn.models.entrypoints import CIFAR10_LABELS
from timm_lossattn.report.dataset import match_classes, open_images, read_boxes
from timm_lossattn.report.table import ReportTable

NANO = 'resnet18_lossattn_conv_nano'
LABELS = list(CIFAR10_LABELS)


@pytest.fixture(scope='module')
def model():
    """The small model that ships."""
    return timm.create_model(NANO, pretrained=True).eval()


def picture(seed, size=(40, 32)):
    """Noise of (width, height)."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def opened(model, name, labels=LABELS, **kwargs):
    """The images of a data set for a model with these classes."""
    return open_images(str(name), model, labels, Preprocessing(input_config(model)), **kwargs)


@pytest.fixture
def folder(tmp_path):
    """Three of the ten classes of the model, as sub-folders; in the order of names they are 0, 1, 2."""
    for k, name in enumerate(('bird', 'Frog', 'truck')):
        (tmp_path / 'images' / name).mkdir(parents=True)
        for i in range(2):
            picture(10 * k + i).save(tmp_path / 'images' / name / f'{i}.png')
    return tmp_path / 'images'


def test_classes_by_name(model, folder):
    """A folder with some of the model's classes: its labels are the model's, not 0, 1, 2."""
    images, labels, note = opened(model, folder)
    assert images.split == ''
    assert opened(model, folder.parent, split='images')[0].split == 'images'
    assert labels == LABELS
    assert note == ''
    found = {images[i].file: images[i].label for i in range(len(images))}
    assert found == {f'{name}/{i}.png': k for name, k in (('bird', 2), ('Frog', 6), ('truck', 9)) for i in range(2)}


@pytest.mark.parametrize(('names', 'labels', 'synsets', 'expected', 'noted'), [
    (['b', 'A'], ['a', 'b', 'c'], [], [1, 0], False),
    (['great white_shark'], ['tench', 'Great White Shark'], [], [1], False),
    (['n02', 'n01'], ['tench', 'shark'], ['n01', 'n02'], [1, 0], False),
    (['x', 'y'], ['class 0', 'class 1'], [], [0, 1], False),
    (['automobile', 'plane'], ['car', 'plane'], [], [0, 1], True),
    (['A', 'a'], ['A', 'a'], [], [0, 1], False),
    (['a-b', 'a_b'], ['a_b', 'a-b'], [], [1, 0], False),
])
def test_match_classes(names, labels, synsets, expected, noted):
    """By name, by WordNet id, or in their order, and then it is said unless the model has no names."""
    classes, note = match_classes(names, labels, synsets)
    assert classes == expected
    assert bool(note) == noted
    assert not noted or "'automobile' is the model's 'car'" in note


def test_order_that_cannot_be():
    """A name that the model has for another class says that they are not in the same order."""
    with pytest.raises(ValueError, match="'bird' is the model's class 1; rename them"):
        match_classes(['bird', 'plane'], ['airplane', 'bird'])


def test_split_of_a_folder(model, folder):
    """Without the split that was asked for, or with others alone, nothing is measured; classes may be called train."""
    for name in ('train', 'test'):
        shutil.copytree(folder, folder.parent / 'splits' / name)
    splits = folder.parent / 'splits'
    assert len(opened(model, splits, split='test')[0]) == 6
    for split in (None, 'validation', 'tset'):
        with pytest.raises(ValueError, match=rf'splits has no folder {split or "validation"}, but test, train'):
            opened(model, splits, split=split)
    (folder / 'bird').rename(folder / 'train')
    assert len(opened(model, folder, labelled=False)[0]) == 6


def test_images_of_other_kinds(model, folder):
    """All that Pillow opens, as explain takes them."""
    for k, name in enumerate(('c.webp', 'd.TIF', 'e.bmp')):
        picture(k).save(folder / 'bird' / name, format={'c.webp': 'WEBP', 'd.TIF': 'TIFF', 'e.bmp': 'BMP'}[name])
    (folder / 'bird' / 'notes.txt').write_text('no image')
    assert len(opened(model, folder)[0]) == 9


def test_unlabelled_folder(model, tmp_path):
    """Photos without sub-folders have no labels; sub-folders that are no classes are an error that says what to do."""
    (tmp_path / '2024').mkdir()
    picture(0).save(tmp_path / '2024' / 'a.png')
    images, _, _ = opened(model, tmp_path / '2024')
    assert images[0].label is None
    with pytest.raises(ValueError, match=r"no \['2024'\]; without labels: --no-labels"):
        opened(model, tmp_path)
    images, _, _ = opened(model, tmp_path, labelled=False)
    assert images[0].label is None
    assert images[0].file == '2024/a.png'


def test_names_of_the_data_set(model, tmp_path):
    """A model without names takes those of a data set with as many classes."""
    for name in ('cell', 'dust'):
        (tmp_path / name).mkdir()
        picture(0).save(tmp_path / name / 'a.png')
    _, labels, note = opened(model, tmp_path, ['class 0', 'class 1'])
    assert labels == ['cell', 'dust']
    assert note == ''


@pytest.mark.parametrize(('name', 'message'), [
    ('nowhere', 'no such folder: nowhere; or give hfds/NAME or torch/NAME'),
    ('hfids/x', 'is a stream, which cannot be resumed'),
    ('torch/nothing', "cannot open 'torch/nothing'"),
])
def test_bad_names(model, name, message):
    """One line that names the data set."""
    with pytest.raises(ValueError, match=message):
        opened(model, name)


def test_empty_folder(model, tmp_path):
    """A folder, or the split of it, without an image."""
    for searched in (tmp_path, tmp_path / 'validation'):
        searched.mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=rf'^DATASET: no images in the folder {searched}, nor in folders of it\.$'):
            opened(model, tmp_path)


def test_upright_and_opaque(model, tmp_path):
    """The same pixels as explain sees: EXIF rotation applied, 16 bits as eight, transparency over white."""
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, (48, 32)).save(tmp_path / 'a.jpg', exif=exif, quality=95)
    Image.fromarray(np.random.default_rng(1).integers(0, 65536, (40, 40), dtype=np.uint16)).save(tmp_path / 'b.png')
    Image.new('RGBA', (40, 40), (0, 100, 200, 51)).save(tmp_path / 'c.png')
    images, _, _ = opened(model, tmp_path)
    assert images[0].size == (32, 48)
    for i, name in enumerate(('a.jpg', 'b.png', 'c.png')):
        expected = explain(model, tmp_path / name)
        found = explain(model, images[i].x[None])
        assert torch.equal(found.prediction.logits, expected.prediction.logits)


def test_tar_and_torchvision(model, folder, tmp_path):
    """A tar file of the folder, and torchvision's reader of it, give the same items, 16-bit grey and alpha as well."""
    Image.fromarray(np.arange(1600, dtype=np.uint16).reshape(40, 40) * 40).save(folder / 'bird' / '2.png')
    Image.new('RGBA', (40, 40), (0, 100, 200, 51)).save(folder / 'Frog' / '2.png')
    with tarfile.open(tmp_path / 'images.tar', 'w') as tar:
        tar.add(folder, arcname='.')
    first, _, _ = opened(model, folder)
    for other in (opened(model, tmp_path / 'images.tar')[0],
                  opened(model, 'torch/image_folder', root=str(folder), split='train')[0]):
        items = {Path(item.file).as_posix().removeprefix('./'): item for item in map(other.__getitem__, range(8))}
        for item in map(first.__getitem__, range(8)):
            assert items[item.file].label == item.label
            assert torch.equal(items[item.file].x, item.x)


def test_imagenet_of_torchvision(tmp_path):
    """Two of its classes are called crane: they are told by their WordNet ids."""
    model = timm.create_model('test_resnet').eval()
    wnids = ['n02012849', 'n03126707']
    for wnid in wnids:
        (tmp_path / 'val' / wnid).mkdir(parents=True)
        picture(0).save(tmp_path / 'val' / wnid / f'{wnid}.png')
    torch.save((dict.fromkeys(wnids, ('crane',)), []), tmp_path / 'meta.bin')
    images, _, note = opened(model, 'torch/imagenet', class_labels(model, 1000), root=str(tmp_path))
    assert [(images[i].file, images[i].label) for i in range(2)] == [
        (str(Path('val', wnid, f'{wnid}.png')), k) for wnid, k in zip(wnids, (134, 517))]
    assert note == ''


@pytest.mark.parametrize('label', [0.7, 2., '1', 'cat', [1], None, float('nan')])
def test_labels_that_are_no_class_numbers(model, folder, label):
    """A float or text is no class, whatever int() makes of it."""
    with pytest.raises(ValueError, match=r'a label must be one class for each image, got .*--no-labels'):
        opened(model, folder)[0].label(label)


def test_labels_of_other_types(model, folder):
    """Integers of NumPy and PyTorch, and bool."""
    label = opened(model, folder)[0].label  # bird, Frog, truck
    assert [label(np.int64(2)), label(torch.tensor(1)), label(False)] == [9, 6, 2]
    assert label(-1) is None


def hub_dataset(path, **columns):
    """A parquet data set of four images as the Hub stores them; the name for timm."""
    features = {'image': datasets.Image()}
    if 'label' in columns:
        features['label'] = datasets.ClassLabel(names=LABELS)
    if 'boxes' in columns:
        features['boxes'] = datasets.List(datasets.List(datasets.Value('float32'), length=4))
    rows = {'image': [picture(i) for i in range(4)], **columns}
    data = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    (path / 'data').mkdir(parents=True)
    data.to_parquet(str(path / 'data' / 'test-00000-of-00001.parquet'))
    return f'hfds/{path}'


@pytest.fixture
def cache(tmp_path):
    """Where datasets unpacks."""
    return str(tmp_path / 'cache')


def test_hub_data_set(model, tmp_path, cache):
    """Labels and boxes are found; a label of -1 is none; boxes are in pixels of the image."""
    boxes = [[[0, 0, 10, 20]], [], [[1, 2, 3, 4], [5, 6, 7, 8]], [[0, 0, 40, 32]]]
    name = hub_dataset(tmp_path / 'boxed', label=[3, -1, 0, 9], boxes=boxes)
    images, labels, _ = opened(model, name, split='test', root=cache)
    assert labels == LABELS
    assert images.boxed
    assert [images[i].label for i in range(4)] == [3, None, 0, 9]
    assert [images[i].boxes.tolist() for i in range(4)] == boxes
    assert torch.equal(images[2].x, preprocess(model, picture(2)).x)


def test_hub_data_set_without_labels(model, tmp_path, cache):
    """No column of labels, or one that is not to be looked at."""
    images, _, _ = opened(model, hub_dataset(tmp_path / 'bare'), split='test', root=cache)
    assert not images.labelled
    assert torch.equal(images[3].x, preprocess(model, picture(3)).x)
    name = hub_dataset(tmp_path / 'labelled', label=[0, 1, 2, 3])
    images, _, _ = opened(model, name, split='test', root=cache, labelled=False)
    assert images[3].label is None
    with pytest.raises(ValueError, match="split 'validation'"):
        opened(model, name, root=cache)
    with pytest.raises(ValueError, match='its 10 classes are not those of the model, which has 2'):
        opened(model, name, ['cat', 'dog'], split='test', root=cache)


def test_boxes_from_a_file(model, folder, tmp_path, monkeypatch):
    """--boxes: the share in the box against a loop over pixels; images that are not in the file have none."""
    rows = ['file,x0,y0,x1,y1', 'bird/0.png,4,0,20,32', 'bird/0.png,20,0,36,10', 'truck/1.png,0,0,2,32']
    (tmp_path / 'boxes.csv').write_text('\n'.join(rows))
    monkeypatch.chdir(tmp_path)
    assert main(['report', str(folder), '--model', NANO, '--boxes', 'boxes.csv', '--workers', '0', '--out', 'out']) == 0
    table = ReportTable('out/report.parquet')
    rows = {row['file']: row for row in table.rows(range(len(table)))}
    source = preprocess(model, Image.open(folder / 'bird' / '0.png'))
    assert source.offset == (4., 0.)  # the crop: the first box is the left half of the input, the second begins there
    heat = explain(model, source).pixel_map(explain(model, source).evidence)[0].nan_to_num(0.).clamp(min=0)
    inside = sum(float(heat[y, x]) for y in range(32) for x in range(32) if x < 16 or y < 10)
    assert rows['bird/0.png']['evidence_in_box'] == pytest.approx(inside / float(heat.sum()), rel=1e-4)
    assert rows['bird/0.png']['boxes'] == [[4, 0, 20, 32], [20, 0, 36, 10]]
    assert rows['truck/1.png']['evidence_in_box'] is None  # cropped away
    assert rows['bird/1.png']['boxes'] == []
    assert rows['bird/1.png']['evidence_in_box'] is None
    page = Path('out/index.html').read_text()
    assert 'id="filter-outside"' in page
    assert page.count('<u style=') == 3
    assert 'left:0.0%;top:0.0%;width:50.0%;height:100.0%' in page


def test_boxes_of_other_files(model, folder, tmp_path):
    """A CSV with names that the data set has not is an error if none fits, else a note; a BOM is no part of a name."""
    def with_boxes(*names):
        rows = ['file,x0,y0,x1,y1', *(f'{name},0,0,9,9' for name in names)]
        (tmp_path / 'boxes.csv').write_text('\n'.join(rows), encoding='utf-8-sig')
        return opened(model, folder, boxes=tmp_path / 'boxes.csv')

    with pytest.raises(ValueError, match=r'--boxes: .*boxes.csv is of other files, such as .*0.png; those of the'):
        with_boxes(folder / 'bird' / '0.png')
    images, _, note = with_boxes('bird/0.png', 'none.png', 'bird/./1.png')
    assert '1 of the 3 files with boxes are not in the data set' in note
    assert [i for i in range(len(images)) if len(images[i].boxes)] == [
        i for i in range(len(images)) if images.file(i).startswith('bird')]


def test_fingerprint(model, folder, tmp_path):
    """Names and sizes of files count, whether timm or torchvision reads the folder; where it lies does not."""
    def found(where):
        readers = opened(model, where), opened(model, 'torch/folder', root=str(where))
        return [images.fingerprint() for images, *_ in readers]

    first = found(folder)
    moved = folder.rename(tmp_path / 'moved')
    assert found(moved) == first
    content = (moved / 'bird' / '0.png').read_bytes()
    (moved / 'bird' / '0.png').write_bytes(content + b'.')
    assert all(a != b for a, b in zip(found(moved), first))
    (moved / 'bird' / '0.png').write_bytes(content)
    assert found(moved) == first
    (moved / 'bird' / '0.png').rename(moved / 'bird' / 'other.png')
    assert all(a != b for a, b in zip(found(moved), first))


@pytest.mark.parametrize('content', ['name,x0\na,1\n', 'file,x0,y0,x1,y1\na,1,2,x,4\n', 'file,x0,y0,x1,y1\na,1,2\n'])
def test_bad_boxes(tmp_path, content):
    """One error that names the file and the columns."""
    (tmp_path / 'b.csv').write_text(content)
    with pytest.raises(ValueError, match=r'--boxes: .*b.csv must have the columns file, x0, y0, x1, y1'):
        read_boxes(tmp_path / 'b.csv')
    with pytest.raises(ValueError, match='--boxes'):
        read_boxes(tmp_path / 'nothing.csv')


def test_broken_images(folder, tmp_path, monkeypatch, capsys):
    """They are left out and named; the others keep their numbers. Nothing but broken images is an error."""
    (folder / 'bird' / '0.png').write_bytes((folder / 'bird' / '0.png').read_bytes()[:300])
    (folder / 'Frog' / '1.png').write_bytes(b'')
    monkeypatch.chdir(tmp_path)
    assert main(['report', str(folder), '--model', NANO, '--workers', '0', '--out', 'out']) == 0
    out = capsys.readouterr().out
    assert 'bird/0.png' in out
    assert 'Frog/1.png' in out
    table = ReportTable('out/report.parquet')
    rows = {row['file']: row for row in table.rows(range(len(table)))}
    assert len(rows) == 4
    assert {file for _, file, _ in table.notes['unreadable']} == {'bird/0.png', 'Frog/1.png'}
    assert all(' at 0x' not in reason for *_, reason in table.notes['unreadable'])  # or two runs would differ
    assert rows['truck/1.png']['label'] == 9
    assert '2 left out' in Path('out/index.html').read_text()
    (tmp_path / 'broken').mkdir()
    (tmp_path / 'broken' / 'a.png').write_bytes(b'no image')
    assert main(['report', 'broken', '--model', NANO, '--workers', '0', '--out', 'none']) == 2
    assert 'none of the 1 images in broken can be read' in ' '.join(capsys.readouterr().err.split())
    picture(0).save(tmp_path / 'broken' / 'a.png')  # mended, and the same command again
    assert main(['report', 'broken', '--model', NANO, '--workers', '0', '--out', 'none']) == 0
    assert len(ReportTable('none/report.parquet')) == 1


def test_a_row_without_image(tmp_path, cache, monkeypatch, capsys):
    """It is left out, like an image that cannot be read."""
    name = hub_dataset(tmp_path / 'hub', image=[picture(0), None, picture(2), picture(3)], label=[0, 1, 2, 3])
    monkeypatch.chdir(tmp_path)
    assert main(['report', name, '--split', 'test', '--model', NANO, '--workers', '0', '--out', 'out']) == 0
    table = ReportTable('out/report.parquet')
    assert [row['label'] for row in table.rows(range(len(table)))] == [0, 2, 3]
    assert [index for index, *_ in table.notes['unreadable']] == [1]


def test_a_label_that_the_model_has_not(tmp_path, monkeypatch, capsys):
    """Found by a worker, and still one line."""
    path = tmp_path / 'hub'
    name = hub_dataset(path)
    data = datasets.load_dataset('parquet', data_files=str(path / 'data' / '*'), cache_dir=str(tmp_path / 'c'))['train']
    data.add_column('label', [0, 1, 12, 3]).to_parquet(str(path / 'data' / 'test-00000-of-00001.parquet'))
    monkeypatch.chdir(tmp_path)
    assert main(['report', name, '--split', 'test', '--model', NANO, '--workers', '1', '--out', 'out']) == 2
    said = ' '.join(capsys.readouterr().err.split())
    assert 'DATASET: label 12 outside [0, 9]' in said
    assert 'Traceback' not in said


def test_a_file_name_that_is_no_utf8(model, folder):
    """Its bytes are replaced where the name is written down."""
    odd = folder / 'bird' / b'caf\xe9.png'.decode(errors='surrogateescape')
    (folder / 'bird' / '0.png').rename(odd)
    images, _, _ = opened(model, folder)
    names = {images[i].file for i in range(len(images))}
    assert 'bird/caf\ufffd.png' in names
    assert all(name.encode() for name in names)


def test_stock_model_and_its_errors(folder, tmp_path, monkeypatch, capsys):
    """A stock timm model is explained as it is; NaN and a single class are one error each."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    stock = timm.create_model('test_resnet', num_classes=10)
    torch.nn.init.normal_(stock.fc.weight)
    torch.save(stock.state_dict(), 'stock.pth')
    common = ['report', str(folder), '--no-labels', '--workers', '0']
    from timm_lossattn import loading
    load = loading.load_model
    monkeypatch.setattr(loading, 'load_model', lambda name, file, device: load(name, file, device, num_classes=10))
    assert main([*common, '--model', 'test_resnet', '--checkpoint', 'stock.pth', '--out', 'stock']) == 0
    table = ReportTable('stock/report.parquet')
    assert table.grid == (5, 5)
    assert table.rows([0])[0]['alpha'] == pytest.approx([1 / 25] * 25, rel=1e-3)
    stock.fc.weight.data[0] = float('nan')
    torch.save(stock.state_dict(), 'nan.pth')
    assert main([*common, '--model', 'test_resnet', '--checkpoint', 'nan.pth', '--out', 'nan']) == 2
    assert 'of image bird/0.png is not finite' in ' '.join(capsys.readouterr().err.split())
    monkeypatch.setattr(loading, 'load_model', lambda *args: timm.create_model('test_resnet', num_classes=1).eval())
    assert main([*common, '--model', 'test_resnet', '--out', 'one']) == 2
    assert 'must have two classes or more, got 1' in ' '.join(capsys.readouterr().err.split())
