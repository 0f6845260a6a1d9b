"""hub/space/app.py: models, classes, answers and examples; its files and its page have tests of their own."""
import json
import shutil
import time
from pathlib import Path

import pytest
import timm
import yaml
from huggingface_hub import HfApi, constants
from packaging.requirements import Requirement
from PIL import Image
from timm.models import save_for_hf

from space_app import (
    CAPS,
    CAT,
    CONV,
    EXAMPLES,
    LITE,
    PHOTO,
    ROOT,
    SHIP,
    SPACE,
    STOCK,
    error_message,
    load_app,
    needs_imagenet,
    shown,
)
from timm_lossattn.explanation import explain
from timm_lossattn.loading import load_patch_model
from timm_lossattn.models import pretrained
from timm_lossattn.models.lite_weights import lite_file


def test_models(app):
    """All patch models with weights on this machine; each is loaded once, and says what it knows."""
    names = app.list_models()
    assert names[0] == (LITE if lite_file('tf_efficientnet_lite0') else min(name for name in names if '_conv' in name))
    assert set(names) >= {CONV, CAPS}
    for name in names:
        model = app.load_model(name)
        assert not model.training
        assert app.load_model(name) is model
        assert hasattr(model, 'forward_patches')
        assert f'knows {model.num_classes:,} classes' in app.describe(name)
    about = app.describe(CONV)
    assert 'Trained on CIFAR-10, thumbnails of 32×32 pixels; knows 10 classes: airplane, automobile' in about
    assert 'does not know "tabby"' in app.describe(CONV, 'tabby', 'cat')
    assert '"cat"' not in app.describe(CONV, 'tabby', 'cat')


def test_new_weights_are_offered(app, monkeypatch, tmp_path):
    """A file in the package or in the checkout is enough; plain networks have no patches to explain, weights or not."""
    monkeypatch.setattr(pretrained, 'PACKAGE', tmp_path / 'timm_lossattn')
    packaged, plain = (pretrained.packaged_file(name) for name in (
        'lossattn.tf_efficientnet_lite0.pbc', 'vgg11_bn_cifar.cifar10'))
    published = pretrained.bundle_folder('resnet18_lossattn_conv.cifar10') / pretrained.WEIGHTS_NAME
    for file in (packaged, plain, published):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    pretrained.bundle_folder('resnet18_attn_conv.cifar10').mkdir()  # a card, no weights
    names = app.list_models.__wrapped__()
    assert [name for name in names if lite_file(name.removeprefix('lossattn.')) is None] == [
        'lossattn.tf_efficientnet_lite0.pbc', 'resnet18_lossattn_conv.cifar10']
    monkeypatch.setattr(app, 'list_models', lambda: names)
    assert ('blood cells · lossattn.tf_efficientnet_lite0.pbc', names[-2]) in app.model_choices()


def test_size_of_the_input(app, monkeypatch):
    """A config that somebody wrote may ask for any size; an image is not resized to it."""
    model = load_patch_model(CONV)
    model.pretrained_cfg = {**model.pretrained_cfg, 'crop_pct': 0.001}
    monkeypatch.setattr(app, 'load_patch_model', lambda name: model)
    with pytest.raises(ValueError, match=r'wants images of 32,000 pixels: at most 2,048, please\.$'):
        app.load_model.__wrapped__(CONV)


@pytest.mark.parametrize(('name', 'what'), [
    ('nope', "timm has no model 'nope'"), ('lossattn.resnet51', 'did you mean lossattn.'),
    ('vit_tiny_patch16_224', 'its class token decides.</p>'),
    ('lossattn.vit_tiny_patch16_224', 'its class token decides.</p>'),
    ('resnet18_attn_conv', 'has no weights yet'), ('local-dir:/etc', 'local-dir:/etc is no name of a model.</p>'),
    ('resnet10t.c3_in1k', 'cannot load resnet10t.c3_in1k'), ('hf-hub:a/b', 'cannot load hf-hub:a/b'),
    ('vit_giant_patch14_dinov2', 'has 1,136 million parameters: at most 350')])
def test_models_that_cannot_be_had(app, monkeypatch, name, what):
    """One sentence, at once; the menus of classes are empty then."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    begin = time.monotonic()
    message = error_message(app, CAT, name)
    assert time.monotonic() - begin < 20
    assert what in message
    assert '. ' not in message
    for menu in app.class_menus(name, 'cat', 'dog'):
        assert len(menu.choices) == 1
        assert menu.value == ''


def test_classes_of_equal_name(app, monkeypatch):
    """Each can be chosen, and is the one that is explained."""
    model = load_patch_model(CONV)
    model.pretrained_cfg = {**model.pretrained_cfg, 'label_names': [*'abc', 'crane', *'defg', 'crane', 'h']}
    monkeypatch.setattr(app, 'load_model', lambda name: model)
    target, against = ([value for _, value in menu.choices if 'crane' in value] for menu in app.class_menus(CONV))
    assert len(set(target)) == 2
    for k, (chosen, other) in zip((3, 8), (target, against[::-1])):
        explanation = app.explain_file(CONV, str(CAT), chosen, other)
        assert (int(explanation.target), int(explanation.against)) == (k, 11 - k)


def test_hub_comes_and_goes(app, hub, waits, monkeypatch, tmp_path):
    """Whether it is there is found out for each model, not once."""
    save_for_hf(timm.create_model('test_resnet', num_classes=2), str(tmp_path / 'folder'), safe_serialization=True)
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo('tester/mine')
    api.upload_folder(repo_id='tester/mine', folder_path=tmp_path / 'folder')
    monkeypatch.setattr(constants, 'ENDPOINT', 'http://127.0.0.1:9')
    assert 'the Hub (http://127.0.0.1:9) is out of reach.</p>' in error_message(
        app, CAT, 'hf-hub:tester/mine')
    monkeypatch.setattr(constants, 'ENDPOINT', hub.endpoint)
    assert shown(next(app.answer('hf-hub:tester/mine', str(CAT), '', ''))).message == ''
    assert waits == []


@pytest.mark.parametrize(('setting', 'what'), [
    ({'device': 'cpu'}, 'sets device in its model_args: neither, please.'),
    ({'dtype': 'float64', 'device': 'cpu'}, 'sets device and dtype in its model_args: neither, please.'),
    (None, 'has a file of 2 MB: at most 1, please.')])
def test_repositories_that_are_refused(app, hub, monkeypatch, tmp_path, setting, what):
    """What would be made where it is not counted, or has a file too large, is refused before weights are downloaded."""
    folder = tmp_path / 'folder'
    save_for_hf(timm.create_model('test_resnet', num_classes=2), str(folder), safe_serialization=True)
    if setting:
        config = json.loads((folder / 'config.json').read_text())
        (folder / 'config.json').write_text(json.dumps(config | {'model_args': setting}))
    else:
        monkeypatch.setattr(app, 'MAX_BYTES', 1_000_000)
        (folder / 'other.bin').write_bytes(bytes(2_000_000))
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo('tester/theirs')
    commit = api.upload_folder(repo_id='tester/theirs', folder_path=folder)
    for name in ('hf-hub:tester/theirs', f'hf-hub:tester/theirs@{commit.oid}'):
        before = len(hub.log)
        assert f'{name} {what}</p>' in error_message(app, CAT, name)
        wanted = [request.path for request in hub.log[before:]]
        assert not [path for path in wanted if '/resolve/' in path and not path.endswith('config.json')]
        assert setting or not [path for path in wanted if '/resolve/' in path]


def test_model_is_loaded_once(app):
    """Menus and answers follow a newly chosen model one after the other."""
    waiting = [fn.concurrency_id for fn in app.demo.fns.values() if fn.fn in (app.answer, app.class_menus)]
    assert waiting == ['answer'] * 3


def test_class_menus(app):
    """All classes of the model; a choice stays where the model knows it."""
    target, against = app.class_menus(CONV, 'cat', 'tabby')
    labels = load_patch_model(CONV).pretrained_cfg['label_names']
    assert [choice for _, choice in target.choices] == [choice for _, choice in against.choices] == ['', *labels]
    assert (target.value, against.value) == ('cat', '')


@pytest.mark.parametrize(('name', 'target', 'against'), [
    (CONV, '', ''), (CONV, 'ship', 'airplane'), (CONV, 'lynx', 'tabby'), (CAPS, 'ship', ''),
    pytest.param(LITE, 'lynx', 'tabby', marks=needs_imagenet), pytest.param(STOCK, '', '', marks=needs_imagenet)])
def test_numbers_are_those_of_explain(app, name, target, against):
    """The JSON, the five classes and the pictures are those of the library; unknown classes are the default ones."""
    model = load_patch_model(name)
    path = CAT if 'nano' in name else PHOTO
    expected = explain(model, [path])
    if target in expected.labels:
        expected = explain(model, [path], target, against or 'rest')
    outputs = app.answer(name, str(path), target, against)
    answer = shown(next(outputs))
    assert answer.message == ''
    assert Path(answer.numbers).read_text() == expected.to_json(image=path.name, model=name)
    probabilities, classes = expected.probabilities[0].topk(5)
    assert list(answer.top) == [expected.labels[k] for k in classes]
    assert list(answer.top.values()) == pytest.approx(probabilities.tolist())
    assert expected.answer() in answer.says
    for label in filter(None, (target, against)):
        assert (f'does not know "{label}"' in answer.about) == (label not in expected.labels)
    with Image.open(answer.in_row) as row, Image.open(answer.stacked) as stacked:
        assert {row.format, stacked.format} == {'PNG'}
        assert row.width > row.height > 250
        assert stacked.height > stacked.width > 250
    assert list(outputs) == []
    assert not Path(answer.picture).parent.exists()


def test_no_image(app):
    """Removing the image empties the page; without a name, as that of the second model, the column goes."""
    for name in (CONV, ''):
        [outputs] = app.answer(name, None, '', '')
        answer = shown(outputs)
        assert (answer.message, answer.top, answer.picture, answer.numbers) == ('', None, None, None)
        assert answer.rest['visible'] is False
        assert answer.column['visible'] is bool(name)


def test_class_against_itself(app):
    """Whether the class was chosen or predicted."""
    assert '"truck"' in error_message(app, CAT, target='truck', against='truck')
    assert '"cat"' in error_message(app, CAT, against='cat')


@pytest.mark.parametrize('names', [[], [CAT.name, SHIP.name]])
def test_space_by_itself(app, tmp_path, names):
    """A Space has the folder alone: examples lie beside app.py, or there are none."""
    shutil.copy(SPACE / 'app.py', tmp_path)
    for name in names:
        (tmp_path / 'examples').mkdir(exist_ok=True)
        shutil.copy(EXAMPLES / name, tmp_path / 'examples')
    alone = load_app(tmp_path / 'app.py')
    assert [path.name for path in alone.list_examples()] == names
    [examples] = [block for block in alone.demo.blocks.values() if block.get_block_name() == 'dataset']
    assert examples.visible == bool(names)


def test_examples(app):
    """Photographs first, those of the tests too, each once, each of a kind that a model is for."""
    names = [path.name for path in app.list_examples()]
    assert len(set(names)) == len(names)
    assert set(names) >= {path.name for path in [*EXAMPLES.iterdir(), *(ROOT / 'tests' / 'data').glob('photo_*')]}
    kinds = [app.example_data(path) for path in app.list_examples()]
    assert kinds == sorted(kinds, key=list(app.DATA).index)
    assert kinds[0] == 'in1k'
    for path in (ROOT / 'tests' / 'data').glob('photo_*'):
        if (EXAMPLES / path.name).exists():
            assert (EXAMPLES / path.name).read_bytes() == path.read_bytes()


def test_front_matter():
    """What the Hub reads: the app and the Gradio it was tested with, which the requirements allow."""
    matter = yaml.safe_load((SPACE / 'README.md').read_text().split('---')[1])
    assert matter['sdk'] == 'gradio'
    assert (SPACE / matter['app_file']).is_file()
    assert matter['license'] == 'apache-2.0'
    assert len(matter['short_description']) <= 60  # the Hub's limit
    requirements = {r.name: r for r in map(Requirement, (SPACE / 'requirements.txt').read_text().split('\n')[:-1])}
    assert set(requirements) == {'timm-lossattn', 'gradio'}
    assert requirements['timm-lossattn'].extras >= {'viz', 'imagenet'}
    assert requirements['gradio'].specifier.contains(matter['sdk_version'])
