"""A folder in timm's format, read by transformers: weights, preprocessing, labels, patch outputs."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import timm_lossattn  # noqa: F401  (registers the models)
from timm_lossattn.explanation.preprocessing import open_image, preprocess

transformers = pytest.importorskip('transformers')

IMAGES = sorted((Path(__file__).parents[1] / 'data').glob('*.png'))
NANO, CAPS = 'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')  # of other processes
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


def save(model, folder, labels=None, **model_args):
    """What timm pushes to the Hub. transformers looks for the labels beside pretrained_cfg, timm keeps them in it."""
    labels = labels or model.pretrained_cfg['label_names']
    save_for_hf(model, folder, model_config=dict(label_names=labels), model_args=model_args, safe_serialization=True)


def load(folder):
    """(model, image processor). timm 1.0.31 writes num_classes twice, and transformers 5.23 would pass both on."""
    config = transformers.AutoConfig.from_pretrained(folder)
    config.model_args.pop('num_classes', None)
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, config=config)
    return model, transformers.AutoImageProcessor.from_pretrained(folder)


@torch.no_grad()
def test_pretrained(tmp_path):
    """Logits, α and patch logits of a real image are timm's; so are weights, labels and preprocessing."""
    expected = timm.create_model(NANO, pretrained=True).eval()
    save(expected, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ['config.json', 'model.safetensors']
    model, processor = load(tmp_path)
    assert not model.training
    assert model.config.id2label == dict(enumerate(expected.pretrained_cfg['label_names']))
    assert model.config.label2id == {label: k for k, label in model.config.id2label.items()}

    weights = model.timm_model.state_dict()
    assert weights.keys() == expected.state_dict().keys()
    for key, value in expected.state_dict().items():
        assert torch.equal(weights[key], value), key

    image = open_image(IMAGES[0]).resize((60, 45))  # the processor has something to resize and crop
    inputs = processor(image)
    assert torch.equal(inputs['pixel_values'][0], preprocess(expected, image).x)
    torch.testing.assert_close(model(**inputs).logits, expected(inputs['pixel_values']), rtol=0, atol=1e-6)
    out, wanted = (m.forward_patches(inputs['pixel_values']) for m in (model.timm_model, expected))
    assert out.alpha.shape == (1, 36)
    for name in ('logits', 'patch_logits', 'alpha', 'contributions'):
        torch.testing.assert_close(getattr(out, name), getattr(wanted, name), rtol=0, atol=1e-6)


@torch.no_grad()
def test_batch_of_images(tmp_path):
    """All ten images in one call of the processor: timm's logits of each; the ship is called a ship."""
    expected = timm.create_model(NANO, pretrained=True).eval()
    save(expected, tmp_path)
    model, processor = load(tmp_path)
    images = [open_image(path) for path in IMAGES]
    logits = model(**processor(images)).logits
    wanted = expected(torch.stack([preprocess(expected, image).x for image in images]))
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-6)
    ship = [path.stem for path in IMAGES].index('cifar10_test_00001_ship')
    assert model.config.id2label[int(logits[ship].argmax())] == 'ship'


@torch.no_grad()
def test_constructor_arguments_and_round_trip(tmp_path):
    """ξ and other classes survive the way to transformers and from there back to timm."""
    torch.manual_seed(0)
    labels = ['left', 'right', 'up', 'down']
    expected = timm.create_model(CAPS, num_classes=4, xi=0.5).eval()
    torch.nn.init.normal_(expected.head.fc.weight)
    save(expected, tmp_path / 'timm', labels, xi=0.5)
    model, _ = load(tmp_path / 'timm')
    assert model.timm_model.xi == 0.5
    assert list(model.config.id2label.values()) == labels
    model.save_pretrained(tmp_path / 'transformers')
    again = timm.create_model(f'local-dir:{tmp_path / "transformers"}', pretrained=True).eval()
    assert again.xi == 0.5
    assert list(again.pretrained_cfg['label_names']) == labels
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(x).logits, expected(x), rtol=0, atol=1e-6)
    torch.testing.assert_close(again.forward_patches(x).alpha, expected.forward_patches(x).alpha, rtol=0, atol=1e-6)


def test_folder_without_the_repeated_argument(tmp_path):
    """A config.json that says num_classes once, as a publisher can write it, needs no help in transformers or timm."""
    model = timm.create_model(NANO, pretrained=True)
    save(model, tmp_path)
    file = tmp_path / 'config.json'
    config = json.loads(file.read_text())
    config['model_args'].pop('num_classes', None)
    file.write_text(json.dumps(config))
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    for other in (loaded.timm_model, again):
        assert other.num_classes == 10
        assert torch.equal(other.head.fc.weight, model.head.fc.weight)


def test_architecture_must_be_registered(tmp_path):
    """Without ``import timm_lossattn`` transformers says that it does not know the architecture."""
    save(timm.create_model(NANO), tmp_path)
    script = '''
import sys
from transformers import AutoConfig, AutoModelForImageClassification
config = AutoConfig.from_pretrained(sys.argv[1])
config.model_args.pop('num_classes', None)
try:
    AutoModelForImageClassification.from_pretrained(sys.argv[1], config=config)
except ImportError as error:
    assert 'resnet18_lossattn_conv_nano' in str(error)
else:
    raise SystemExit('the architecture was known before the import')
import timm_lossattn
print(type(AutoModelForImageClassification.from_pretrained(sys.argv[1], config=config).timm_model).__name__)
'''
    done = subprocess.run([sys.executable, '-c', script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == 'PatchClassifier'
