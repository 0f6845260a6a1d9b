"""train/prepare.py on small copies of the official layouts, and what train.py and validate.py make of the result."""
import io
import json
import zipfile

import pytest
import torch
from datasets import load_dataset
from PIL import Image
from test_train import QUICK

import prepare
import train as train_script
import validate as validate_script
from lib import evaluate

WORDS = {'n01443537': 'goldfish, Carassius auratus', 'n02056570': 'king penguin'}


def picture(seed, size=(64, 64), mode='RGB'):
    pixels = torch.randint(256, (size[1], size[0], 3), generator=torch.Generator().manual_seed(seed))
    buffer = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).convert(mode).save(buffer, 'JPEG')
    return buffer.getvalue()


@pytest.fixture(scope='module')
def tiny_folder(tmp_path_factory):
    """Two classes of Tiny ImageNet's layout, six training and two validation images each, one greyscale."""
    root = tmp_path_factory.mktemp('tiny') / 'tiny-imagenet-200'
    validation = []
    for k, wnid in enumerate(WORDS):
        images = root / 'train' / wnid / 'images'
        images.mkdir(parents=True)
        lines = []
        for i in range(6):
            (images / f'{wnid}_{i}.JPEG').write_bytes(picture(10 * k + i, mode='L' if i == 0 else 'RGB'))
            lines.append(f'{wnid}_{i}.JPEG\t{k}\t{i}\t40\t63')
        (root / 'train' / wnid / f'{wnid}_boxes.txt').write_text('\n'.join(lines) + '\n')
        validation += [(f'val_{2 * k + i}.JPEG', wnid, picture(100 + 2 * k + i)) for i in range(2)]
    (root / 'val' / 'images').mkdir(parents=True)
    for name, _, content in validation:
        (root / 'val' / 'images' / name).write_bytes(content)
    (root / 'val' / 'val_annotations.txt').write_text(
        ''.join(f'{name}\t{wnid}\t0\t0\t63\t31\n' for name, wnid, _ in validation))
    (root / 'wnids.txt').write_text('\n'.join(reversed(WORDS)) + '\n')
    (root / 'words.txt').write_text(''.join(f'{k}\t{v}\n' for k, v in WORDS.items()))
    return root


@pytest.fixture(scope='module')
def coco_folder(tmp_path_factory):
    """COCO 2014's layout: eight training and four validation images, one without objects."""
    root = tmp_path_factory.mktemp('coco')
    (root / 'annotations').mkdir()
    for split, n in (('train', 8), ('val', 4)):
        (root / f'{split}2014').mkdir()
        images, objects = [], []
        for i in range(n):
            name = f'COCO_{split}2014_{i}.jpg'
            (root / f'{split}2014' / name).write_bytes(picture(i, size=(80, 40)))
            images.append({'id': i, 'file_name': name, 'width': 80, 'height': 40})
            if i:
                objects += [{'image_id': i, 'category_id': c, 'bbox': [8 * i, 4, 8, 20.], 'iscrowd': 0}
                            for c in {1 + 2 * (i % 2), 3}]
        content = {'images': images, 'annotations': objects,
                   'categories': [{'id': 3, 'name': 'car'}, {'id': 1, 'name': 'person'}]}
        (root / 'annotations' / f'instances_{split}2014.json').write_text(json.dumps(content))
    return root


def load(folder, split, tmp_path):
    return load_dataset(str(folder), split=split, cache_dir=str(tmp_path / 'cache'))


@pytest.mark.parametrize('zipped', [False, True])
def test_tiny_imagenet(tiny_folder, tmp_path, zipped, capsys):
    """Original bytes; labels follow the sorted wnids; boxes become exclusive. A second run redoes nothing."""
    source = tiny_folder
    if zipped:
        source = tmp_path / 'some.zip'
        with zipfile.ZipFile(source, 'w') as file:
            for path in sorted(tiny_folder.rglob('*')):
                file.write(path, f'tiny-imagenet-200/{path.relative_to(tiny_folder)}')
    out = tmp_path / 'out'
    command = ['tiny-imagenet', str(source), str(out), '--shard-size', '5']
    assert prepare.main(command) == 0
    files = sorted((out / 'data').iterdir())
    assert [f.name for f in files] == [*(f'train-0000{i}-of-00003.parquet' for i in range(3)),
                                      'validation-00000-of-00001.parquet']
    train, validation = (load(out, split, tmp_path) for split in ('train', 'validation'))
    assert train.features['label'].names == ['goldfish', 'king penguin']
    assert train['label'] == [0] * 6 + [1] * 6
    assert train[7]['boxes'] == [[1., 1., 41., 64.]]
    assert train[0]['image'].mode == 'L'
    assert validation['label'] == [0, 0, 1, 1]
    raw = validation.cast_column('image', validation.features['image'].__class__(decode=False))[3]['image']['bytes']
    assert raw == (tiny_folder / 'val' / 'images' / 'val_3.JPEG').read_bytes()
    times = [f.stat().st_mtime_ns for f in files]
    files[1].unlink()
    assert prepare.main(command) == 0
    assert [f.stat().st_mtime_ns == t for f, t in zip(files, times)] == [True, False, True, True]
    assert '12 train images, 4 validation images' in capsys.readouterr().out


def test_imagenet(tmp_path, capsys):
    """Images with a box, with the label of their synset among 1,000 and all their boxes; what is wrong is said."""
    folder, table, out = tmp_path / 'images', tmp_path / 'boxes.csv', tmp_path / 'out'
    for synset in ('n01440764', 'n02102040'):
        (folder / synset).mkdir(parents=True)
        (folder / synset / 'a.JPEG').write_bytes(picture(0))
    rows = ['path,x0,y0,x1,y1', 'train/n02102040/a.JPEG,1,2.5,30,40', 'train/n02102040/a.JPEG,0,0,9,9']
    table.write_text('\n'.join(rows))
    assert prepare.main(['imagenet', str(folder), str(out), '--boxes', str(table)]) == 0
    found = load_dataset(str(out))
    assert list(found) == ['validation']
    row, = found['validation']
    assert row['boxes'] == [[1., 2.5, 30., 40.], [0., 0., 9., 9.]]
    assert (row['label'], found['validation'].features['label'].num_classes) == (217, 1000)
    capsys.readouterr()

    # a table of more images than there are: those that are there
    table.write_text('\n'.join([*rows, 'train/n02102040/gone.JPEG,0,0,9,9']))
    assert prepare.main(['imagenet', str(folder), str(tmp_path / 'part'), '--boxes', str(table)]) == 0
    assert 'left out: 1 images of' in capsys.readouterr().out
    assert load_dataset(str(tmp_path / 'part'))['validation'].num_rows == 1
    for content, message in ((rows[0], 'has no row'), ('a,b\n1,2', 'must have the columns path, x0, y0, x1, y1'),
                             ('\n'.join([rows[0], 'x/dog/a.JPEG,0,0,1,1']), 'has dog, which is no synset'),
                             ('\n'.join([rows[0], 'x/n02102040/b.JPEG,0,0,1,1']), 'has none of the 1 images of')):
        table.write_text(content)
        assert prepare.main(['imagenet', str(folder), str(tmp_path / 'other'), '--boxes', str(table)]) == 2
        assert message in capsys.readouterr().err
    assert prepare.main(['imagenet', str(folder), str(out)]) == 2
    assert 'needed for imagenet and pbc' in capsys.readouterr().err


def test_coco(coco_folder, tmp_path):
    """Images without objects are left out; categories in the order of their ids; boxes follow the resize."""
    out = tmp_path / 'out'
    assert prepare.main(['coco', str(coco_folder), str(out), '--size', '64']) == 0
    train = load(out, 'train', tmp_path)
    assert len(train) == 7
    assert train.features['labels'].feature.names == ['person', 'car']
    assert train[1]['labels'] == [0, 1]
    assert train[0]['labels'] == [1]
    assert train[0]['image'].size == (64, 64)
    assert train[0]['boxes'][0] == pytest.approx([6.4, 6.4, 12.8, 38.4])


def damaged_zip(tmp_path, tiny_folder):
    path = tmp_path / 'a.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.write(tiny_folder / 'wnids.txt', 'tiny-imagenet-200/wnids.txt')
    path.write_bytes(path.read_bytes()[:-30])
    return path


def other_zip(tmp_path, tiny_folder):
    path = tmp_path / 'tiny-imagenet-200.zip'
    with zipfile.ZipFile(path, 'w') as file:
        file.write(tiny_folder / 'wnids.txt', 'tiny-imagenet-200/wnids.txt')
    return path


def missing_image(tmp_path, tiny_folder):
    import shutil
    shutil.copytree(tiny_folder, tmp_path / 'copy')
    next((tmp_path / 'copy' / 'val' / 'images').iterdir()).unlink()
    return tmp_path / 'copy'


@pytest.mark.parametrize(('make', 'message'), [
    (damaged_zip, 'truncated'), (other_zip, 'MD5 is'), (missing_image, 'has no val/images/'),
    (lambda tmp_path, _: tmp_path / 'nothing', 'no such file or folder'),
])
def test_bad_sources(make, message, tiny_folder, tmp_path, capsys):
    """One line that says what is wrong; exit code 2; no file that looks finished."""
    assert prepare.main(['tiny-imagenet', str(make(tmp_path, tiny_folder)), str(tmp_path / 'out')]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ')
    assert message in error
    assert not list(tmp_path.glob('out/data/validation*.parquet'))


@pytest.mark.parametrize('dataset', ['tiny-imagenet', 'coco'])
def test_train_and_validate(dataset, tiny_folder, coco_folder, tmp_path, capsys, monkeypatch):
    """prepare → train → validate, single and multi-label, with the patch measures; both mAPs of COCO's classes."""
    monkeypatch.setattr(evaluate, 'COCO_CLASSES', (2,))  # as many as this one has
    out, runs = tmp_path / 'set', tmp_path / 'runs'
    multi = dataset == 'coco'
    assert prepare.main([dataset, str(coco_folder if multi else tiny_folder), str(out), '--size', '64']) == 0
    common = ['--dataset', f'hfds/{out}', '--data-dir', str(tmp_path), '--batch-size', '4', '--workers', '0',
              '--device', 'cpu', *(['--multi-label', '--target-key', 'labels'] if multi else [])]
    quick = [f for f in QUICK if f not in ('--val-split', 'val')][:-4]  # without its size
    assert train_script.main([*quick, *common, '--model', 'resnet18_lossattn_conv_nano_s2', '--epochs', '1',
                              '--output', str(runs), '--experiment', 'x', '--crop-padding', '4',
                              *([] if multi else ['--cache-dataset'])]) == 0
    result = json.loads((runs / 'x' / 'result.json').read_text())
    assert result['metric'] == ('map' if multi else 'top1')
    file = tmp_path / 'validation.json'
    assert validate_script.main([*common, '--model', f'local-dir:{runs / "x" / "hub"}', '--results-file',
                                 str(file)]) == 0
    measured = json.loads(file.read_text())
    names = {'patch_precision', 'patch_recall', 'patch_f', 'localization_ap', 'top1_localization', 'images', 'command',
             'localization_ap_all_patches', 'localization_ap_centred_square', 'patches_in_object'}
    assert names | ({'map', 'map_voc11', 'map_public_code'} if multi else {'top1'}) <= set(measured)
    assert measured['images'] == (3 if multi else 4)
    if multi:  # two classes in 91 columns
        assert 2 / 91 * measured['map_voc11'] - 1e-6 <= measured['map_public_code'] <= 100 * 2 / 91
    assert validate_script.main([*common, '--model', f'local-dir:{runs / "x" / "hub"}', '--results-file',
                                 str(tmp_path / 'selecting_half.json'), '--xi', '1']) == 0
    half = json.loads((tmp_path / 'selecting_half.json').read_text())
    for name in ('patch_precision', 'patch_recall', 'patch_f'):  # ξ = 0.1 drops none of an untrained model's patches
        assert measured[f'{name}_all_patches'] == half[f'{name}_all_patches'] == pytest.approx(measured[name])
    assert half['patches_in_object'] == measured['patches_in_object']
    if not multi:  # there no patch lies in an object
        assert measured['patches_in_object'] > 0
        assert half['patch_recall'] < half['patch_recall_all_patches']
    assert 'patch_f' in capsys.readouterr().out
    assert measured[result['metric']] == pytest.approx(result['best'][result['metric']], abs=1e-3)


@pytest.mark.parametrize(('flags', 'message'), [
    (('--model', 'no_such_model'), 'no_such_model'),
    (('--model', 'resnet18_attn_conv'), 'has no weights'),
    (('--model', 'resnet18_lossattn_conv_nano', '--data-dir', '/no/such/folder'), '/no/such/folder'),
    (('--model', 'resnet18_lossattn_conv_nano', '--checkpoint', 'nothing.pt'), 'no such file: nothing.pt'),
])
def test_validate_errors(flags, message, capsys):
    assert validate_script.main(['--device', 'cpu', *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ')
    assert message in error
