"""``lossattn`` models through folders, the Hub's HTTP and transformers: the same bits; timm alone refuses them."""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from timm.models import save_for_hf
from torch import nn

import timm_lossattn  # noqa: F401  (registers the models)

REPO = 'tester/model'
BACKBONES = {'A': ('test_resnet', {}), 'B': ('test_convnext', {}), 'C': ('mobilenetv3_small_050', {}),
             'tokens': ('test_vit', {'global_pool': 'avg'})}


@pytest.fixture(params=BACKBONES)
def saved(request, tmp_path):
    """A model with five classes that says something, and what ``save_for_hf`` makes of it."""
    backbone, args = BACKBONES[request.param]
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone=backbone, num_classes=5, xi=0.7, **args).eval()
    for parameter in model.get_classifier().parameters():
        nn.init.normal_(parameter, std=0.3)
    assert model.patch_kind == request.param or request.param == 'tokens'
    names = ['a', 'b', 'c', 'd', 'e']
    save_for_hf(model, tmp_path / 'folder', model_config={'label_names': names}, model_args=args,
                safe_serialization=True)
    return model, tmp_path / 'folder'


@torch.no_grad()
def assert_same(model, expected, tolerance=0.):
    x = torch.randn(2, *expected.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(1))
    assert model.xi == expected.xi
    assert model.state_dict().keys() == expected.state_dict().keys()
    assert all(torch.equal(t, expected.state_dict()[key]) for key, t in model.state_dict().items())
    for name, a, b in zip(('logits', 'patch_logits', 'alpha', 'contributions'),
                          model.forward_patches(x), expected.forward_patches(x)):
        torch.testing.assert_close(a, b, rtol=0., atol=tolerance, msg=lambda m, n=name: f'{n}: {m}')
    torch.testing.assert_close(model(x), expected(x), rtol=0., atol=tolerance)


def test_folder(saved):
    expected, folder = saved
    assert_same(timm.create_model(f'local-dir:{folder}', pretrained=True).eval(), expected)


def test_hub(saved, hub, monkeypatch, tmp_path):
    """Uploaded and loaded over HTTP."""
    expected, folder = saved
    monkeypatch.setattr('huggingface_hub.constants.ENDPOINT', hub.endpoint)
    monkeypatch.setattr('huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE',
                        hub.endpoint + '/{repo_id}/resolve/{revision}/{filename}')
    api = HfApi(endpoint=hub.endpoint, token=hub.token)
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert_same(
        timm.create_model(f'hf-hub:{REPO}', pretrained=True, cache_dir=str(tmp_path / 'cache')).eval(), expected)
    assert [r for r in hub.log if r.method == 'GET' and r.path.endswith('model.safetensors')]


def test_transformers(saved, monkeypatch):
    """TimmWrapper: weights to the bit, and labels. Its tensors lie elsewhere in memory, so that sums may round anew."""
    transformers = pytest.importorskip('transformers')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    expected, folder = saved
    config = transformers.AutoConfig.from_pretrained(folder)
    config.model_args.pop('num_classes', None)  # timm writes it twice, transformers would pass both on
    model = transformers.AutoModelForImageClassification.from_pretrained(folder, config=config)
    assert model.config.id2label == dict(enumerate('abcde'))
    assert_same(model.timm_model, expected, tolerance=1e-6)


def test_timm_alone_refuses(saved):
    """Without this package timm says that it does not know ``lossattn``, and loads nothing as something else."""
    _, folder = saved
    assert json.loads((Path(folder) / 'config.json').read_text())['architecture'] == 'lossattn'
    script = 'import sys, timm; timm.create_model(f"local-dir:{sys.argv[1]}", pretrained=True)'
    done = subprocess.run([sys.executable, '-c', script, str(folder)], capture_output=True, text=True)
    assert done.returncode != 0
    assert 'Unknown model (lossattn)' in done.stderr
