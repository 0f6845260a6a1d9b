"""hub/bundle.py: from a run to weights that ``pretrained=True`` finds; and what lies in hub/weights today."""
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file

import bundle
import card
import folder as hub_folder
import publish
from timm_lossattn import list_patch_models, load_model
from timm_lossattn.files import sha256_of
from timm_lossattn.models import pretrained
from timm_lossattn.models.entrypoints import CIFAR10_LABELS

NANO = 'resnet18_lossattn_conv_nano'
NAME = f'{NANO}.cifar10'
ROOT = Path(bundle.__file__).parents[1]
DATA = os.environ.get('LOSSATTN_DATA')


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Empty places for weights, in place of the package's and the checkout's."""
    package, weights = tmp_path / 'package', tmp_path / 'weights'
    weights.mkdir()

    def packaged_file(name):
        return package / f'{name}.safetensors'
    monkeypatch.setattr(bundle, 'packaged_file', packaged_file)
    monkeypatch.setattr(bundle, 'WEIGHTS', weights)
    return weights


@pytest.fixture
def run(tmp_path):
    """Folder of a finished run on ten classes with two images each; its EMA weights are those that ship."""
    images, output = tmp_path / 'images', tmp_path / 'run'
    for k, label in enumerate(CIFAR10_LABELS):
        (images / 'validation' / label).mkdir(parents=True)
        for i in range(2):
            Image.new('RGB', (32, 32), (25 * k, 100, 120 * i)).save(images / 'validation' / label / f'{i}.png')
    result = json.loads((hub_folder.WEIGHTS / NAME / 'result.json').read_text())
    for key in ('shipped', 'card'):
        result.pop(key)
    result['args'] |= {'dataset': None, 'data_dir': str(images), 'val_split': 'validation', 'input_key': None,
                       'initial_checkpoint': ''}
    output.mkdir()
    (output / 'result.json').write_text(json.dumps(result))
    torch.manual_seed(0)
    torch.save({'epoch': 9, 'state_dict': timm.create_model(NANO).state_dict(), 'optimizer': {},
                'state_dict_ema': timm.create_model(NANO, pretrained=True).state_dict()}, output / 'model_best.pth.tar')
    return output


def change(run, **args):
    """Change flags in the run's result.json."""
    result = json.loads((run / 'result.json').read_text())
    result['args'] |= args
    (run / 'result.json').write_text(json.dumps(result))


def test_bundle(run, place, capsys):
    """The EMA weights in float16 and float32, measured, with everything that goes up."""
    assert bundle.main([str(run), NAME, '--dataset-id', 'me/images', '--note', 'Grey squares.', '--device', 'cpu']) == 0
    folder = place / NAME
    assert {p.name for p in folder.iterdir()} == set(hub_folder.FILES)
    assert (folder / 'model.safetensors').read_bytes() == pretrained.packaged_file(NAME).read_bytes()
    state = load_file(folder / 'model.safetensors')
    assert {state[k].dtype for k in state if k.endswith('.conv.weight')} == {torch.float16}
    assert {state[k].dtype for k in state if 'bn' in k and 'batches' not in k} == {torch.float32}

    result = json.loads((folder / 'result.json').read_text())
    shipped = result['shipped']
    assert shipped['sha256'] == sha256_of(folder / 'model.safetensors')
    assert shipped['images'] == 20
    assert shipped['command'].startswith(f'python hub/bundle.py {run}')
    assert shipped['checkpoint'] == 'model_best.pth.tar'
    model = load_model(NANO)
    images = sorted((run.parent / 'images' / 'validation').rglob('*.png'))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        logits = model(torch.stack([transform(Image.open(path)) for path in images]))
    wanted = torch.tensor([CIFAR10_LABELS.index(path.parent.name) for path in images])
    assert shipped['top1'] == pytest.approx(100 * float((logits.argmax(1) == wanted).float().mean()))

    model_card = ModelCard.load(folder / 'README.md')
    assert model_card.data.datasets == ['me/images']
    for text in ('Grey squares.', shipped['sha256'], f"'{NAME}'", 'bundle.py', '# the picture above',
                 'float16; the best epoch (17 in all) by top1 on this split.'):
        assert text in model_card.text
    loaded = load_model(f'local-dir:{folder}')
    assert tuple(loaded.pretrained_cfg['label_names']) == CIFAR10_LABELS
    capsys.readouterr()


def test_in_package(run, place):
    """Small weights may ship; then the file is nowhere else, and back again."""
    arguments = [str(run), NAME, '--device', 'cpu']
    packaged, bundled = bundle.packaged_file(NAME), place / NAME / 'model.safetensors'
    for flags, file, other in (([], bundled, packaged), (['--in-package'], packaged, bundled), ([], bundled, packaged)):
        assert bundle.main(arguments + flags) == 0
        assert file.is_file()
        assert not other.exists()


def test_other_arguments_than_in_training(run, place, capsys):
    """A run with another ξ is refused, unless the model that ships is said to have the registered one."""
    change(run, model_kwargs={'xi': 0.5})
    expect(capsys, 'in xi', run, NAME)
    assert bundle.main([str(run), NAME, '--model-kwargs', 'xi=0.1', '--device', 'cpu']) == 0
    assert load_model(f'local-dir:{place / NAME}').xi == 0.1
    assert '--model-kwargs xi=0.1' in json.loads((place / NAME / 'result.json').read_text())['shipped']['command']


def test_checkpoint_that_was_not_chosen(run, place):
    """The last epoch is not said to be the best one, nor is the only one."""
    (run / 'model_best.pth.tar').rename(run / 'last.pth.tar')
    assert bundle.main([str(run), NAME, '--checkpoint', 'last.pth.tar', '--device', 'cpu']) == 0
    assert 'the best epoch' not in (place / NAME / 'README.md').read_text()
    result = json.loads((place / NAME / 'result.json').read_text())
    result['shipped']['checkpoint'] = 'model_best.pth.tar'
    assert 'the best epoch' in card.measures(result)[1]
    assert 'the best epoch' not in card.measures(result | {'epochs': result['epochs'][:1]})[1]


def test_where_the_data_lie_now(run, place, monkeypatch, capsys):
    """--dataset names the run's data elsewhere, not others: split and keys stay, and what the card says of them."""
    given = []
    monkeypatch.setattr(bundle, 'evaluate_dataset', lambda model, data, device: given.append(data) or {
        'loss': 1., 'top1': 50., 'top5': 90., 'images': 20})
    change(run, val_split='test', input_key='img', target_key='fine_label')
    assert bundle.main([str(run), NAME, '--dataset', 'hfds/elsewhere', '--device', 'cpu']) == 0
    [data] = given
    assert (data.dataset, data.data_dir, data.val_split, data.input_key, data.target_key) == (
        'hfds/elsewhere', None, 'test', 'img', 'fine_label')
    assert 'On the split `test` of the images in `images` (20 images)' in (place / NAME / 'README.md').read_text()
    for flag in ('--val-split', '--input-key', '--target-key'):
        with pytest.raises(SystemExit):
            bundle.main([str(run), NAME, flag, 'x'])
    capsys.readouterr()


def test_average(run, place, tmp_path, capsys):
    """The mean of the weights, in float16, and batch norms of the training images."""
    change(run, train_split='validation')
    state = torch.load(run / 'model_best.pth.tar')['state_dict']
    torch.save(state, tmp_path / 'other.pth')
    assert bundle.main([str(run), NAME, '--average', str(tmp_path / 'other.pth'), '--device', 'cpu']) == 0
    found, own = load_file(place / NAME / 'model.safetensors'), timm.create_model(NANO, pretrained=True).state_dict()
    for key, value in found.items():
        if value.dtype == torch.float16:
            torch.testing.assert_close(value.float(), (own[key] + state[key]) / 2, rtol=1e-3, atol=1e-6)
    assert not torch.allclose(found['backbone.stem.bn.running_mean'], own['backbone.stem.bn.running_mean'])
    result = json.loads((place / NAME / 'result.json').read_text())
    assert '--average' in result['shipped']['command']
    torch.save(timm.create_model('resnet18_lossattn_caps_nano').state_dict(), tmp_path / 'other.pth')
    assert bundle.main([str(run), NAME, '--average', str(tmp_path / 'other.pth'), '--device', 'cpu']) == 2
    assert 'error: --average: ' in capsys.readouterr().err


def test_classes_in_another_order(run, place, monkeypatch, capsys):
    """Data whose classes are numbered otherwise than the model's are no measure of it."""
    monkeypatch.setattr('lib.evaluate.class_names', lambda dataset: list(CIFAR10_LABELS[::-1]))
    expect(capsys, 'has the classes of the model in another order', run, NAME)


def contents(*folders):
    """Files below folders, and what is in them."""
    return {path: path.read_bytes() for folder in folders for path in folder.rglob('*') if path.is_file()}


def test_errors_change_nothing(run, place, monkeypatch, capsys):
    """Whatever fails, the bundle that is there stays whole, and in a new place nothing appears."""
    package = bundle.packaged_file(NAME).parent
    expect(capsys, '--example', run, NAME, '--example', 'no.png')
    assert not contents(place, package)
    assert bundle.main([str(run), NAME, '--in-package', '--device', 'cpu']) == 0
    before = contents(place, package)
    expect(capsys, '--example', run, NAME, '--example', 'no.png')
    assert contents(place, package) == before

    def fail(*args):
        raise ValueError('no card')
    monkeypatch.setattr(bundle, 'write_card', fail)
    expect(capsys, 'no card', run, NAME)
    assert contents(place, package) == before


def test_picture_is_of_these_weights(run, place, monkeypatch):
    """Drawn anew with the weights, or gone with those before; --rewrite keeps the one that is there."""
    arguments, folder = [str(run), NAME, '--device', 'cpu'], place / NAME
    picture, readme = folder / hub_folder.EXAMPLE, folder / 'README.md'
    assert bundle.main([*arguments, '--example', str(ROOT / 'tests/data/cifar10_test_00013_horse.png')]) == 0
    horse = picture.read_bytes()
    assert bundle.main(arguments) == 0
    ship = picture.read_bytes()
    assert ship != horse
    monkeypatch.setattr(bundle, 'list_bundles', lambda: [NAME])
    monkeypatch.setattr(bundle, 'bundled_weights', lambda name: str(folder / 'model.safetensors'))
    readme.unlink()
    assert bundle.main(['--rewrite']) == 0
    assert picture.read_bytes() == ship
    assert '(example.png)' in readme.read_text()
    monkeypatch.setattr(hub_folder, 'CIFAR10_LABELS', ())  # so that these classes have no image of their own
    assert bundle.main(arguments) == 0
    assert not picture.exists()
    assert 'picture above' not in readme.read_text()
    assert 'example.png' not in readme.read_text()


def test_rewrite_takes_nothing_else(run, capsys, monkeypatch):
    """Other arguments would be ignored; and without weights there is nothing to describe."""
    monkeypatch.setattr(bundle, 'write_card', None)  # which would rewrite a card of this checkout
    monkeypatch.setattr(bundle, 'write_config', None)
    expect(capsys, '--rewrite: takes no other argument, got --rewrite --device cpu', '--rewrite')
    expect(capsys, '--rewrite: takes no other argument', run, NAME, '--rewrite')
    monkeypatch.setattr(bundle, 'bundled_weights', lambda name: None)
    assert bundle.main(['--rewrite']) == 2
    assert f'has no model.safetensors; make it with `bundle.py RUN {hub_folder.list_bundles()[0]}`' in (
        capsys.readouterr().err)


def expect(capsys, text, *args):
    """One line with the error, exit code 2."""
    assert bundle.main([*map(str, args), '--device', 'cpu']) == 2
    assert text in capsys.readouterr().err.splitlines()[-1]


def test_refusals(run, place, capsys, monkeypatch):
    """What ``pretrained=True`` could not restore, or what is too large; nothing is written then."""
    expect(capsys, 'give both', run)
    expect(capsys, 'is the run finished?', run / 'nothing', NAME)
    expect(capsys, f'the run is of {NANO}', run, 'resnet18_lossattn_caps_nano.cifar10')
    expect(capsys, f'{NANO}.mine is not registered', run, f'{NANO}.mine')
    expect(capsys, 'no such file', run, NAME, '--checkpoint', 'other.pth.tar')
    for key, value, text in (
            ('xi', 0.5, 'in xi'), ('backbone_stride', 2, 'in backbone_stride'), ('patch_stride', 2, 'in patch_stride'),
            ('num_classes', 11, 'does not fit'),
            ('label_names', list('abcdefghij'), 'in label_names'), ('model_kwargs', {'xi': 0.}, 'in xi'),
            ('multi_label', True, 'multi-label')):
        copy = run.with_name(f'{key}{len(list(run.parent.iterdir()))}')
        shutil.copytree(run, copy)
        change(copy, **{key: value})
        expect(capsys, text, copy, NAME)
    result = json.loads((run / 'result.json').read_text())
    other = run.with_name('mean')
    shutil.copytree(run, other)
    result['data_config']['mean'] = [0.5, 0.5, 0.5]
    (other / 'result.json').write_text(json.dumps(result))
    expect(capsys, 'in mean', other, NAME)
    monkeypatch.setattr(bundle, 'MAX_BYTES', 1000)
    expect(capsys, 'the repository takes 1,000', run, NAME)
    monkeypatch.setattr(bundle, 'MAX_PACKAGE', 1000)
    expect(capsys, 'at most 1,000', run, NAME, '--in-package')
    assert not list(place.iterdir())


def test_weights_are_where_they_are_declared():
    """timm says that exactly those have weights that lie in the package or in hub/weights, within the limits."""
    declared = {tag for name in [*list_patch_models(), 'lossattn.*'] for tag in timm.list_pretrained(name)}
    published = set(pretrained.HUB_WEIGHTS)
    assert declared - published == set(hub_folder.list_bundles()) - published
    assert timm.models.is_model_pretrained(NANO)
    assert not timm.models.is_model_pretrained('resnet50_lossattn_conv_s8')
    files = list((ROOT / 'timm_lossattn' / 'weights').glob('*.safetensors'))
    assert sum(f.stat().st_size for f in files) < bundle.MAX_PACKAGE
    assert {f.stem for f in files} <= declared
    for file in hub_folder.WEIGHTS.rglob('*.*'):
        assert file.stat().st_size <= bundle.MAX_BYTES


def test_evaluated_by_winograd(run, place, monkeypatch, capsys):
    """--winograd changes the model that is measured, and is in the recorded command."""
    changed, evaluate = [], bundle.evaluate_dataset

    def evaluate_changed(model, *args):
        assert changed == [model]
        return evaluate(model, *args)

    monkeypatch.setattr('lib.winograd.use_winograd', changed.append)
    monkeypatch.setattr(bundle, 'evaluate_dataset', evaluate_changed)
    assert bundle.main([str(run), NAME, '--device', 'cpu', '--winograd']) == 0
    assert len(changed) == 1
    assert json.loads((place / NAME / 'result.json').read_text())['shipped']['command'].endswith('--winograd')
    assert bundle.main([str(run), NAME, '--device', 'cuda', '--winograd']) == 2
    assert '--winograd: is for the CPU' in capsys.readouterr().err


@pytest.mark.parametrize('name', hub_folder.list_bundles())
def test_bundles_are_current(name, tmp_path):
    """config.json and card are what ``bundle.py --rewrite`` would write; publish.py takes them."""
    folder = hub_folder.WEIGHTS / name
    assert publish.main([name, '--repo-id', 'me/x', '--dry-run', '--folder', str(tmp_path / 'out')]) == 0
    out = tmp_path / 'out'
    model = load_model(name)
    hub_folder.write_config(out / 'config.json', model)
    assert (out / 'config.json').read_text() == (folder / 'config.json').read_text()
    hub_folder.write_card(out, name, model)
    assert (out / 'README.md').read_text() == (folder / 'README.md').read_text()
    before = json.loads((folder / 'result.json').read_text()).get('initial', {}).get('shipped')
    if before:  # not "started from the weights that ship": those are these
        text = f'The last run went on from weights with {before["top1"]:.2f} % (`{before["file"]}` of that time, '
        assert f'{text}SHA-256 `{before["sha256"]}`)' in (out / 'README.md').read_text()
    if name == f'{NANO}.cifar100':
        assert f'The backbone started from the weights that `{NANO}` had' in (out / 'README.md').read_text()


def test_weights_that_were_trained_on(run, place):
    """--pretrained: the record of the weights that it began with stays, also where the run is bundled twice."""
    earlier = json.loads((hub_folder.WEIGHTS / NAME / 'result.json').read_text()) | {'commands': ['python earlier.py']}
    (place / NAME).mkdir()
    (place / NAME / 'result.json').write_text(json.dumps(earlier))
    change(run, pretrained=True)
    result = json.loads((run / 'result.json').read_text())
    for _ in range(2):
        assert bundle.beginning(result) == earlier
        (place / NAME / 'result.json').write_text(json.dumps(result | {'initial': earlier}))
    assert bundle.beginning(result | {'commands': [*result['commands'], 'python went_on.py']}) == earlier
    for other in ({'pretrained_path': 'file.pth'}, {'model': f'local-dir:{place}'}):
        assert bundle.beginning(result | {'args': result['args'] | other}) is None
    hub = {'args': result['args'] | {'model': f'local-dir:{run}/hub'}}
    assert bundle.beginning(result | hub) == result
    hub['args']['pretrained'] = False  # its architecture alone
    assert bundle.beginning(result | hub) is None
    assert bundle.beginning(result | {'args': result['args'] | {'pretrained': False}}) is None
    for start in ('initial_checkpoint', 'resume'):  # of a run, or of a file that stands alone
        args = result['args'] | {'output': str(run.parent), 'experiment': 'other', 'pretrained': False}
        assert bundle.beginning({'args': args | {start: f'{run}/last.pth.tar'}}) == result
        for own in (f'{run.parent}/other/last.pth.tar', f'{run.parent}/run/../other/last.pth.tar'):
            own = {'resume': own, 'initial_checkpoint': ''}
            assert bundle.beginning(result | {'args': args | own}) is None
            starts = [{'resume': f'{run}/last.pth.tar'}, {}]  # of another run, then in place
            assert bundle.beginning({'args': args | own, 'starts': starts}) == result
        (run.parent / 'alone').mkdir(exist_ok=True)
        assert bundle.beginning({'args': args | {start: f'{run.parent}/alone/weights.safetensors'}}) is None
    assert bundle.beginning(result | {'model': 'lossattn.tf_efficientnet_lite0'}) is None  # the backbone's


@pytest.mark.parametrize(('name', 'example'), [
    (NAME, 'tests/data/cifar10_test_00013_horse.png'),
    (f'{NANO}.cifar100', 'tests/data/photo_rocket.jpg'),
    ('lossattn.tf_efficientnet_lite0.pbc', 'tests/data/pbc_test_eosinophil_EO_170787.jpg')])
def test_examples_are_current(name, example, tmp_path):
    """The card's picture is what is drawn today: same size, hardly another pixel."""
    model = timm.create_model(name, pretrained=True).eval()
    hub_folder.draw_example(tmp_path, model, example and str(ROOT / example), multi_label=False)
    there = hub_folder.WEIGHTS / name / hub_folder.EXAMPLE
    with Image.open(tmp_path / hub_folder.EXAMPLE) as again, Image.open(there) as kept:
        assert again.size == kept.size
        assert np.abs(np.asarray(again, dtype=float) - np.asarray(kept)).mean() < 1  # fonts differ a little


def test_error_names_the_command():
    """Weights that nobody has trained: what would train them."""
    name = 'resnet50_lossattn_conv_s8'
    with pytest.raises(RuntimeError, match='No pretrained weights exist') as caught:
        timm.create_model(name, pretrained=True)
    assert f'train/train.py --recipe fast --data-dir FOLDER --model {name}' in str(caught.value)
    with pytest.raises(RuntimeError, match=r'--recipe fast/cifar10 --model vgg16_bn_cifar'):
        timm.create_model('vgg16_bn_cifar', pretrained=True)


def test_tags_with_a_recipe():
    """The recipes that the error names are there."""
    recipes = (ROOT / 'train' / 'recipes.yaml').read_text()
    for tag in pretrained.RECIPES:
        assert f'\n  {tag}:' in recipes


@pytest.mark.skipif('LOSSATTN_SLOW' not in os.environ, reason='LOSSATTN_SLOW is not set: evaluates 10,000 images')
@pytest.mark.skipif(DATA is None or not Path(DATA or '', 'cifar10').is_dir(), reason='needs LOSSATTN_DATA')
def test_shipped_weights_again(place, tmp_path, monkeypatch):
    """The shipped weights as a run on CIFAR-10: the same bytes and the accuracy that result.json states."""
    stated = json.loads((hub_folder.WEIGHTS / NAME / 'result.json').read_text())
    run = tmp_path / 'run'
    run.mkdir()
    torch.save({'state_dict': timm.create_model(NANO, pretrained=True).state_dict()}, run / 'model_best.pth.tar')
    (run / 'result.json').write_text(json.dumps(stated | {'args': stated['args'] | {'initial_checkpoint': ''}}))
    (tmp_path / 'data').symlink_to(DATA)
    monkeypatch.chdir(tmp_path)  # the run's data are below it
    assert bundle.main([str(run), NAME, '--device', 'cpu']) == 0
    found = json.loads((place / NAME / 'result.json').read_text())['shipped']
    for key in ('sha256', 'top1', 'top5', 'images'):
        assert found[key] == stated['shipped'][key]
