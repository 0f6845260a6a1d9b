"""Loss attention in a timm model, published and read again: by timm from a folder and from the Hub, by transformers."""
import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from timm.models import save_for_hf

from timm_lossattn import load_model, loss_attention

BACKBONES = {'test_resnet': 'A', 'test_convnext': 'B', 'mobilenetv3_small_050': 'C'}
REPO = 'tester/mine'
ROOT = Path(__file__).parents[2]
LOGITS = """
import sys
import timm, timm_lossattn, torch
model = timm.create_model(sys.argv[1], pretrained=True).eval()
torch.save((model(torch.load(sys.argv[2])), model.xi, model.patch_kind), sys.argv[3])
"""


@pytest.fixture(params=BACKBONES)
def trained(request):
    """(name of the backbone, model of five classes whose ξ is not the default one, batch, its prediction)."""
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone=request.param, num_classes=5, xi=0.95)
    with torch.no_grad():
        model(torch.randn(8, 3, 64, 64))  # batch norm's statistics are no longer those of a new model
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        model.eval()
        x = torch.randn(3, 3, 96, 64)
        prediction = model.forward_patches(x)
    assert model.patch_kind == BACKBONES[request.param]
    assert (prediction.alpha == 0).any()
    return request.param, model, x, prediction


def save(model, folder, labels=('a', 'b', 'c', 'd', 'e')):
    """What timm pushes to the Hub; transformers looks for the labels where model_config puts them."""
    save_for_hf(model, str(folder), model_config=dict(label_names=list(labels)), safe_serialization=True)


def assert_same(prediction, other, tolerance=0.):
    """Every tensor of two predictions, bit for bit unless a tolerance is given."""
    for name in ('logits', 'patch_logits', 'alpha', 'contributions'):
        a, b = getattr(prediction, name), getattr(other, name)
        torch.testing.assert_close(a, b, rtol=0., atol=tolerance, msg=lambda text, name=name: f'{name}: {text}')


@torch.no_grad()
@pytest.mark.parametrize('create', [lambda name: timm.create_model(name, pretrained=True).eval(), load_model],
                         ids=['timm', 'load_model'])
def test_folder(trained, tmp_path, create):
    """local-dir: the same model with its ξ, classes and labels; saved and read once more as well."""
    name, model, x, prediction = trained
    save(model, tmp_path / 'first')
    first = create(f'local-dir:{tmp_path / "first"}')
    save(first, tmp_path / 'second')
    for loaded in (first, create(f'local-dir:{tmp_path / "second"}')):
        assert_same(loaded.forward_patches(x), prediction)
        assert torch.equal(loaded(x), model(x))
        assert (loaded.xi, loaded.patch_kind, loaded.num_classes) == (0.95, BACKBONES[name], 5)
        assert list(loaded.pretrained_cfg['label_names']) == list('abcde')
        assert type(loaded) is type(model)


@pytest.mark.parametrize('create', [
    lambda: timm.create_model('lossattn.test_resnet'), lambda: timm.create_model('resnet18_lossattn_conv_nano'),
    lambda: loss_attention(timm.create_model('test_resnet'))])
def test_xi_that_was_set(create, tmp_path):
    """It is the model's from then on: in its logits, in a copy, with a new classifier, in config.json."""
    model, x = create().eval(), torch.randn(1, 3, 48, 48)
    before = model(x)
    with pytest.raises(ValueError, match=r'xi must lie in \[0, 1\], got 2'):
        model.xi = 2
    model.xi = 1
    assert model.patch_weights.xi == copy.deepcopy(model).xi == 1.
    assert not torch.equal(model(x), before)
    model.reset_classifier(5)
    save(model, tmp_path)
    loaded = load_model(f'local-dir:{tmp_path}')
    assert loaded.xi == 1.
    assert torch.equal(loaded(x), model(x))


@torch.no_grad()
def test_model_made_by_hand(tmp_path):
    """loss_attention of a model that one has is published as the entry point with its backbone."""
    torch.manual_seed(0)
    model = loss_attention(timm.create_model('test_resnet', num_classes=5), pool='avg').eval()
    save(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    x = torch.randn(2, 3, 64, 64)
    assert_same(loaded.forward_patches(x), model.forward_patches(x))
    assert not loaded.patches_differ


def test_hub(trained, hub, tmp_path):
    """hf-hub: another process with an empty cache downloads config and weights, and computes the same logits."""
    name, model, x, _ = trained
    save(model, tmp_path / 'folder')
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=tmp_path / 'folder')
    torch.save(x, tmp_path / 'x.pt')
    done = subprocess.run(
        [sys.executable, '-c', LOGITS, f'hf-hub:{REPO}', str(tmp_path / 'x.pt'), str(tmp_path / 'out.pt')],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT)})
    assert done.returncode == 0, done.stderr
    logits, xi, kind = torch.load(tmp_path / 'out.pt')
    with torch.no_grad():
        assert torch.equal(logits, model(x))
    assert (xi, kind) == (0.95, BACKBONES[name])
    fetched = {r.path.split('/')[-1] for r in hub.log if r.method == 'GET' and '/resolve/' in r.path}
    assert 'model.safetensors' in fetched
    assert not any(r.path.startswith('/timm/') for r in hub.log)  # the backbone's own weights are not asked for


@torch.no_grad()
def test_transformers(trained, tmp_path):
    """AutoModelForImageClassification: the same logits, patches, labels; and back to timm."""
    transformers = pytest.importorskip('transformers')
    name, model, x, prediction = trained
    # where weights lie in memory decides which kernel a 1×1 convolution gets, and MobileNetV3's then rounds otherwise
    tolerance = 1e-6 if BACKBONES[name] == 'C' else 0.
    save(model, tmp_path / 'timm')
    config = transformers.AutoConfig.from_pretrained(tmp_path / 'timm')
    config.model_args.pop('num_classes', None)  # timm 1.0.31 writes it twice, and transformers 5.23 passes both on
    read = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / 'timm', config=config)
    assert not read.training
    weights = read.timm_model.state_dict()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
    torch.testing.assert_close(read(x).logits, model(x), rtol=0., atol=tolerance)
    assert_same(read.timm_model.forward_patches(x), prediction, tolerance)
    assert list(read.config.id2label.values()) == list('abcde')
    read.save_pretrained(tmp_path / 'transformers')
    again = timm.create_model(f'local-dir:{tmp_path / "transformers"}', pretrained=True).eval()
    assert_same(again.forward_patches(x), prediction)
    assert again.xi == 0.95


@pytest.mark.parametrize('source', ['local-dir', 'hf-hub'])
def test_stock_timm_refuses(tmp_path, hub, source):
    """Without this package timm says that it does not know the architecture, and does not load the backbone instead."""
    save(timm.create_model('lossattn', backbone='test_resnet', num_classes=5), tmp_path / 'folder')
    name = f'local-dir:{tmp_path / "folder"}'
    if source == 'hf-hub':
        api = HfApi(endpoint=hub.endpoint, token=hub.token)
        api.create_repo(REPO)
        api.upload_folder(repo_id=REPO, folder_path=tmp_path / 'folder')
        name = f'hf-hub:{REPO}'
    script = 'import sys, timm; timm.create_model(sys.argv[1], pretrained=True)'
    done = subprocess.run([sys.executable, '-c', script, name], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == 'RuntimeError: Unknown model (lossattn)'
