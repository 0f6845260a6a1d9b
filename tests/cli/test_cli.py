"""cli.py in-process: files, numbers, errors and exit codes."""
import argparse
import json
import os
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_lossattn.cli import main, unique_stems
from timm_lossattn.explanation.preprocessing import open_image, preprocess
from timm_lossattn.loading import MODEL_CONFIG, list_patch_models, model_config
from timm_lossattn.models.entrypoints import CIFAR10_LABELS

DATA = Path(__file__).parent / 'data'
CAT, SHIP = DATA / 'cifar10_test_00000_cat.png', DATA / 'cifar10_test_00001_ship.png'
NANO, CAPS = 'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'


def random_model(name):
    """Random weights, the same in every call, with logits that are not all alike."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    torch.nn.init.normal_(model.head.fc.weight)
    return model.eval()


@pytest.fixture(scope='module')
def models(tmp_path_factory):
    """Name -> (model, checkpoint file)."""
    folder = tmp_path_factory.mktemp('checkpoints')
    found = {}
    for name in (NANO, CAPS):
        model = random_model(name)
        torch.save({'state_dict': model.state_dict(), 'args': argparse.Namespace(lr=0.1),  # as timm's saver
                    MODEL_CONFIG: model_config(name, {}, list(CIFAR10_LABELS))}, folder / f'{name}.pth.tar')
        found[name] = model, str(folder / f'{name}.pth.tar')
    return found


@pytest.fixture
def run(models, tmp_path):
    """Run ``explain`` with a checkpoint into tmp_path/out."""
    def run_explain(*args, model=NANO):
        return main(['explain', *map(str, args), '--model', model, '--checkpoint', models[model][1],
                     '--out', str(tmp_path / 'out')])
    return run_explain


def written(tmp_path):
    """Names in the output folder, hidden ones too."""
    return sorted(os.listdir(tmp_path / 'out')) if (tmp_path / 'out').exists() else []


def error_line(capsys):
    """The one line on stderr; nothing on stdout."""
    out, err = capsys.readouterr()
    assert out == ''
    assert err.startswith('error ')
    assert err.count('\n') == 1
    return err


@pytest.mark.parametrize('name', [NANO, CAPS])
def test_explain_numbers(run, models, tmp_path, capsys, name):
    """The JSON holds what the model computes when it is called directly."""
    assert run(CAT, model=name) == 0
    assert written(tmp_path) == [f'{CAT.stem}.json', f'{CAT.stem}.png']
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    model = models[name][0]
    with torch.no_grad():
        expected = model.forward_patches(preprocess(model, open_image(CAT)).x[None])

    logits = torch.tensor(numbers['logits'])
    best = int(logits.argmax())
    shares = torch.tensor(numbers['contributions']['target'])
    torch.testing.assert_close(logits, expected.logits[0])
    torch.testing.assert_close(torch.tensor(numbers['alpha']).flatten(), expected.alpha[0])
    torch.testing.assert_close(shares, expected.contributions[0, :, best].view(6, 6))
    torch.testing.assert_close(shares.sum(), logits[best])
    assert numbers['patch_grid'] == [6, 6]
    assert numbers['image_size'] == numbers['input_size'] == [32, 32]
    assert numbers['labels'] == list(CIFAR10_LABELS)
    assert numbers['selected'] == (expected.alpha[0] > 0).view(6, 6).tolist()
    assert numbers['model'] == name
    assert numbers['image'] == str(CAT)

    assert numbers['target'] == {'class': best, 'label': numbers['labels'][best]}
    assert numbers['against'] == 'rest'
    rivals = logits[torch.arange(10) != best]
    lead = logits[best] - (rivals.softmax(0) * rivals).sum()
    assert sum(map(sum, numbers['evidence'])) == pytest.approx(float(lead), abs=1e-4)
    top = numbers['top5']
    assert [t['class'] for t in top] == logits.topk(5).indices.tolist()
    assert [t['label'] for t in top] == [numbers['labels'][t['class']] for t in top]
    assert [t['logit'] for t in top] == pytest.approx(logits.topk(5).values.tolist())
    assert [t['probability'] for t in top] == pytest.approx(logits.softmax(0).topk(5).values.tolist())
    assert f'{CAT.name}: {top[0]["label"]} {100 * top[0]["probability"]:.1f} %' in capsys.readouterr().out


def test_all_classes(run, models, tmp_path):
    """On request the JSON holds the contributions to every class."""
    assert run(CAT, '--all-classes') == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    contributions = torch.tensor(numbers['contributions'])
    assert contributions.shape == (6, 6, 10)
    torch.testing.assert_close(contributions.sum((0, 1)), torch.tensor(numbers['logits']))


def test_checkpoint_names_its_model(models, tmp_path):
    """A checkpoint that says what it is of needs no --model."""
    assert main(['explain', str(CAT), '--checkpoint', models[CAPS][1], '--out', str(tmp_path / 'out')]) == 0
    assert json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())['model'] == CAPS


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


def test_unique_stems():
    """Numbers never collide with names that look numbered, nor names with each other where case does not count."""
    paths = [Path(p) for p in ('x/a.png', 'a.jpg', 'a-2.png', 'A.png', 'b.png', 'a.gif')]
    stems = unique_stems(paths)
    assert stems[0] == 'a'
    assert stems[4] == 'b'
    assert len({s.casefold() for s in stems}) == len(paths)


@pytest.mark.parametrize(('target', 'index'), [('truck', 9), ('Truck', 9), ('0', 0), ('9', 9)])
def test_target(run, tmp_path, target, index):
    """A class by name, in any case, and by index; the file says which."""
    assert run(CAT, '--target', target) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}-{CIFAR10_LABELS[index]}.json').read_text())
    assert numbers['target'] == {'class': index, 'label': numbers['labels'][index]}


def test_target_name_before_index(run, tmp_path, monkeypatch):
    """Where a class is called '7', '--target 7' means that class."""
    for module in ('cli', 'explanation.explain'):
        monkeypatch.setattr(
            sys.modules[f'timm_lossattn.{module}'], 'class_labels', lambda model, classes: ['9', '8', '7', *'abcdefg'])
    assert run(CAT, '--target', '7') == 0
    assert json.loads((tmp_path / 'out' / f'{CAT.stem}-7.json').read_text())['target'] == {'class': 2, 'label': '7'}


def test_against(run, tmp_path, capsys):
    """Why not another class: evidence that sums to the difference of the logits, in a file of its own and in a line."""
    assert run(CAT) == 0
    assert run(CAT, '--target', 'cat', '--against', 'truck') == 0
    assert written(tmp_path) == [f'{CAT.stem}{q}.{e}' for q in ('-cat-vs-truck', '') for e in ('json', 'png')]
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}-cat-vs-truck.json').read_text())
    evidence = [value for row in numbers['evidence'] for value in row]
    positive = sum(value > 0 for value in evidence)
    answer = f'cat over truck: {sum(evidence):+.2f}; {positive} of 36 patches for it'
    assert capsys.readouterr().out.splitlines()[-1].strip() == answer
    assert numbers['against'] == {'class': 9, 'label': 'truck'}
    difference = numbers['logits'][3] - numbers['logits'][9]
    assert sum(map(sum, numbers['evidence'])) == pytest.approx(difference, abs=1e-4)


def test_against_itself(run, models, tmp_path, capsys):
    """An image that is classified as that class is reported and skipped; the others are explained."""
    model = models[NANO][0]
    best, other = (int(model(preprocess(model, open_image(f)).x[None]).argmax()) for f in (CAT, SHIP))
    assert run(CAT, '--against', best) == 1
    assert f'--against: {CAT.name}: {CIFAR10_LABELS[best]} is what it is classified as; ' in capsys.readouterr().out
    assert run(CAT, '--target', 'cat', '--against', 'CAT') == 2
    assert '--against: cat is --target as well; choose another class.' in error_line(capsys)
    assert written(tmp_path) == []
    assert run(CAT, SHIP, '--against', best) == 1
    assert len(written(tmp_path)) == (0 if other == best else 2)


@pytest.mark.parametrize('label', ['truck', 'folder', 'name'])
def test_label(run, models, tmp_path, capsys, label):
    """What an image shows, as a class or from a name: in the file, and in the line if the prediction is another."""
    (tmp_path / 'truck').mkdir()
    image = tmp_path / 'truck' / 'photo_7_truck.png'
    image.write_bytes(CAT.read_bytes())
    assert run(image, '--label', label) == 0
    numbers = json.loads((tmp_path / 'out' / f'{image.stem}.json').read_text())
    assert numbers['true_class'] == {'class': 9, 'label': 'truck'}
    assert (', wrong: truck' in capsys.readouterr().out) == (numbers['target']['class'] != 9)


def test_label_that_is_no_class(run, capsys):
    """A folder that is no class of the model is said to be none."""
    assert run(CAT, '--label', 'folder') == 1
    assert "--label: no class 'data'" in capsys.readouterr().out


def test_panels(run, tmp_path, capsys):
    """More panels make a wider picture, stacked ones a higher one; one that does not exist is refused."""
    sizes = []
    for flags in (['--panels', 'outline'], ['--panels', 'outline,alpha'], ['--panels', 'outline,alpha', '--stacked']):
        assert run(CAT, *flags) == 0
        sizes.append(Image.open(tmp_path / 'out' / f'{CAT.stem}.png').size)
    assert sizes[0][0] < sizes[1][0]
    assert sizes[2][0] == sizes[0][0]
    assert sizes[0][1] < sizes[2][1]
    capsys.readouterr()
    assert run(CAT, '--panels', 'outline,heat') == 2
    assert "--panels: no panel 'heat'" in error_line(capsys)


def test_folder_of_a_run(tmp_path, capsys):
    """What train.py and publish.py leave, by local-dir:; a folder without a model is one clear line."""
    from timm.models import save_for_hf
    save_for_hf(random_model(NANO), str(tmp_path / 'hub'), safe_serialization=True)
    assert main(['explain', str(CAT), '--model', f'local-dir:{tmp_path / "hub"}', '--out', str(tmp_path / 'out')]) == 0
    assert len(written(tmp_path)) == 2
    capsys.readouterr()
    assert main(['explain', str(CAT), '--model', f'local-dir:{tmp_path}', '--out', str(tmp_path / 'out')]) == 2
    assert 'cannot load local-dir:' in error_line(capsys)


@pytest.mark.parametrize('target', ['zebra', '10', '-1', '1.5', ''])
@pytest.mark.parametrize('flag', ['--target', '--against'])
def test_bad_class(run, tmp_path, capsys, flag, target):
    """Names the option and the classes; nothing is written."""
    assert run(CAT, f'{flag}={target}') == 2
    message = error_line(capsys)
    assert f"{flag}: no class '{target}'" in message
    assert 'airplane' in message
    assert written(tmp_path) == []


@pytest.mark.parametrize(('model', 'what'), [
    ('no_such_model', "model: timm has no model 'no_such_model'"),
    ('vgg11_bn_lossattn_caps_nano', 'model: vgg11_bn_lossattn_caps_nano has no weights yet'),
])
def test_bad_model(tmp_path, capsys, model, what):
    """Unknown, or without weights."""
    assert main(['explain', str(CAT), '--model', model, '--out', str(tmp_path / 'out')]) == 2
    assert what in error_line(capsys)
    assert written(tmp_path) == []


def test_folder_of_images(run, tmp_path, capsys):
    """All images of a folder in the order of their names; what else it holds is named; without images an error."""
    folder = tmp_path / 'images'
    (folder / 'more').mkdir(parents=True)
    for name, source in (('b.png', CAT), ('a.JPG', SHIP)):
        Image.open(source).save(folder / name)
    (folder / 'notes.txt').write_text('a ship and a cat')
    assert run(folder) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{folder}: 2 images; left out: more/, notes.txt'
    assert [line.split(':')[0] for line in lines[1:]] == ['a.JPG', 'b.png']
    assert written(tmp_path) == ['a.json', 'a.png', 'b.json', 'b.png']
    assert run(folder / 'more') == 2
    assert f'no images in the folder {folder / "more"}' in error_line(capsys)


def test_photo_for_thumbnails(run, tmp_path, capsys):
    """A photo for a model of ten classes of thumbnails is answered with a hint, once; a thumbnail is not."""
    for name in ('a.png', 'b.png'):
        Image.open(CAT).resize((400, 300)).save(tmp_path / name)
    assert run(CAT, tmp_path / 'a.png', tmp_path / 'b.png') == 0
    (hint,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith('hint: ')]
    assert hint.startswith(
        'hint: a.png: This image has 400×300 pixels; the model reads 32×32 and knows 10 classes of CIFAR-10:')


def test_name_of_a_backbone(tmp_path):
    """A published model of loss attention is called after its backbone."""
    from timm.models import save_for_hf
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone='test_resnet', num_classes=3)
    save_for_hf(model, str(tmp_path / 'hub'), safe_serialization=True)
    source = f'local-dir:{tmp_path / "hub"}'
    assert main(['explain', str(CAT), '--model', source, '--out', str(tmp_path / 'out')]) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    assert (numbers['model'], numbers['architecture']) == (source, 'lossattn.test_resnet')


@pytest.mark.parametrize(
    'kind', ['missing', 'directory', 'empty.pth', 'text.png', 'text.safetensors', 'other model.safetensors'])
def test_bad_checkpoint(models, tmp_path, capsys, kind):
    """One line that names the file, for all that is no checkpoint of the model."""
    path = tmp_path / kind
    if kind == 'directory':
        path.mkdir()
    elif kind == 'empty.pth':
        path.touch()
    elif kind.startswith('text'):
        path.write_text('not a checkpoint')
    elif kind.startswith('other'):
        path.write_bytes(Path(models[CAPS][1]).read_bytes())
    assert main(['explain', str(CAT), '--model', NANO, '--checkpoint', str(path), '--out', str(tmp_path / 'out')]) == 2
    message = error_line(capsys)
    assert message.startswith('error checkpoint: ')
    assert str(path) in message
    assert len(message) < 1000
    assert written(tmp_path) == []


def test_bad_device(run, tmp_path, capsys):
    """The message names the option."""
    assert run(CAT, '--device', 'abacus') == 2
    assert "device: cannot use 'abacus'" in error_line(capsys)
    assert written(tmp_path) == []


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
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / f'{CAT.stem}.png').write_text('old')

    def fail(source, target):
        raise OSError('disk on fire')
    monkeypatch.setattr(os, 'replace', fail)
    assert run(CAT) == 2
    assert 'disk on fire' in error_line(capsys)
    assert written(tmp_path) == [f'{CAT.stem}.png']
    assert (tmp_path / 'out' / f'{CAT.stem}.png').read_text() == 'old'


def test_output_folder_is_a_file(run, tmp_path, capsys):
    """An error line, not a traceback."""
    (tmp_path / 'out').write_text('')
    assert run(CAT) == 2
    assert str(tmp_path / 'out') in error_line(capsys)


@pytest.mark.parametrize('argv', [[], ['explain'], ['unknown'], ['explain', 'a.png', '--no-such-option']])
def test_usage(argv, capsys):
    """argparse's exit code and usage line."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert 'usage: timm-lossattn' in capsys.readouterr().err


def test_list_with_filter(capsys):
    """Names, input sizes, classes and parameters, untruncated."""
    assert main(['list', '*resnet18*nano*']) == 0
    out = capsys.readouterr().out
    assert '…' not in out
    rows = {cells[0]: cells[1:4] for cells in map(str.split, out.splitlines()) if len(cells) == 5 and '_' in cells[0]}
    assert sorted(rows) == list_patch_models('*resnet18*nano*')
    for name in (NANO, CAPS):
        parameters = sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6
        assert rows[name][:3] == ['32×32', '10', f'{parameters:.2f}']
    assert rows['resnet18_lossattn_conv_nano_s2'][0] == '64×64'


def test_list_without_filter(capsys):
    """Every registered model, once, with the whole name; into a pipe without a frame, for grep."""
    assert main(['list']) == 0
    out = capsys.readouterr().out
    assert '│' not in out
    names = [line.split()[0] for line in out.splitlines() if '×' in line]
    assert [name for name in names if not name.startswith('lossattn.')] == list_patch_models()
    assert 'lossattn.tf_efficientnet_lite0' in names  # which was trained with it
    assert {'resnet18_lossattn_conv', 'vgg11_bn_lossattn_caps', 'googlenet_lossattn_conv', NANO} <= set(names)


def test_list_nothing(capsys):
    """A filter that nothing matches is an error."""
    assert main(['list', 'zebra*']) == 2
    assert "no model matches 'zebra*'" in error_line(capsys)


def test_inputs_are_not_overwritten(run, tmp_path, capsys):
    """An output that would fall on an input is refused before anything is written."""
    (tmp_path / 'out').mkdir()
    image = tmp_path / 'out' / 'a.png'
    image.write_bytes(CAT.read_bytes())
    assert run(image) == 2
    assert 'would overwrite' in error_line(capsys)
    assert image.read_bytes() == CAT.read_bytes()


def test_hints(run, capsys):
    """A near miss gets a suggestion; a plain word filters by part of the name."""
    assert main(['explain', str(CAT), '--model', 'resnet18_lossattn_con']) == 2
    assert 'did you mean resnet18_lossattn_conv?' in error_line(capsys)
    assert main(['list', 'nano']) == 0
    assert 'vgg11_bn_lossattn_caps_nano' in capsys.readouterr().out


def test_bare_weights_have_no_labels(models, tmp_path):
    """A safetensors file says nothing about classes: they are numbered, whatever the model's own weights mean."""
    file = tmp_path / 'weights.safetensors'
    save_file(models[NANO][0].state_dict(), file)
    assert main(['explain', str(CAT), '--model', NANO, '--checkpoint', str(file), '--out', str(tmp_path / 'out')]) == 0
    numbers = json.loads((tmp_path / 'out' / f'{CAT.stem}.json').read_text())
    assert numbers['labels'] == [f'class {k}' for k in range(10)]


def test_checkpoint_arguments(tmp_path):
    """ξ, stride and the number of classes of a training checkpoint are those of the explained model."""
    model = timm.create_model(NANO, num_classes=3, xi=1., backbone_stride=2).eval()
    config = model_config(NANO, {'num_classes': 3, 'xi': 1., 'backbone_stride': 2}, ['a', 'b', 'c'])
    torch.save({'state_dict': model.state_dict(), MODEL_CONFIG: config}, tmp_path / 'last.pth.tar')
    flags = ['explain', str(CAT), '--checkpoint', str(tmp_path / 'last.pth.tar')]
    assert main([*flags, '--out', str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / f'{CAT.stem}.json').read_text())
    with torch.no_grad():
        expected = model(preprocess(model, open_image(CAT)).x[None])[0]
    assert numbers['patch_grid'] == [2, 2]
    assert numbers['labels'] == ['a', 'b', 'c']
    assert numbers['logits'] == pytest.approx(expected.tolist(), abs=1e-5)
