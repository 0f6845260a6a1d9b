"""lossattn.BACKBONE.TAG: weights of this package that were trained with loss attention, beside those of timm."""
import json
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import timm_lossattn
from timm_lossattn import explain, load_model
from timm_lossattn.cli import main
from timm_lossattn.loading import full_name
from timm_lossattn.models import pretrained
from timm_lossattn.models.lossattn import TRAINED

NAME = 'lossattn.tf_efficientnet_lite0.pbc'
DATA = Path(__file__).parents[1] / 'data'
CELLS = {re.match(r'pbc_test_([a-z]+)_', path.name)[1]: path for path in sorted(DATA.glob('pbc_test_*.jpg'))}
LABELS = TRAINED['tf_efficientnet_lite0.pbc'][0]['label_names']


def test_weights_are_in_the_package():
    """So that a wheel has them; float16 but for normalisation, and small."""
    file = pretrained.packaged_file(NAME)
    assert file.parent.parent == Path(timm_lossattn.__file__).parent
    assert file.stat().st_size < 10_000_000
    state = load_file(file)
    assert state['conv_stem.weight'].dtype == state['classifier.weight'].dtype == torch.float16
    assert state['bn2.weight'].dtype == state['bn2.running_var'].dtype == torch.float32
    assert timm.models.is_model_pretrained(NAME)
    assert NAME in timm.list_pretrained()
    assert not timm.models.is_model_pretrained('lossattn.tf_efficientnet_lite0.in1k')


@pytest.mark.parametrize('create', [
    lambda: timm.create_model(NAME, pretrained=True).eval(), lambda: load_model(NAME),
    lambda: timm.create_model('lossattn', backbone='tf_efficientnet_lite0.pbc', pretrained=True).eval()],
    ids=['timm', 'load_model', 'backbone'])
def test_loads_and_classifies(create, monkeypatch):
    """Without the network and without the ImageNet weights, by each of its names: held-out cells of three kinds."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    monkeypatch.setattr('timm_lossattn.models.lite_weights.lite_file', lambda name: None)
    model = create()
    assert full_name(model) == NAME
    assert model.xi == TRAINED['tf_efficientnet_lite0.pbc'][1]
    assert tuple(model.pretrained_cfg['label_names']) == LABELS
    assert len(CELLS) == 3
    for label, path in CELLS.items():
        explanation = explain(model, path)
        assert explanation.labels[int(explanation.target)] == label
        prediction = explanation.prediction
        torch.testing.assert_close(prediction.contributions.sum(1), prediction.logits, rtol=1e-5, atol=1e-5)


def test_other_uses(monkeypatch):
    """Another ξ, other classes, features; without weights it has none of their class names."""
    assert timm.create_model(NAME, pretrained=True, xi=0.5).xi == 0.5
    adapted = timm.create_model(NAME, pretrained=True, num_classes=3)
    weights = load_file(pretrained.packaged_file(NAME))
    assert adapted.classifier.weight.shape[0] == 3
    assert torch.equal(adapted.conv_head.weight, weights['conv_head.weight'].float())
    timm.create_model(NAME, pretrained=True, features_only=True)
    new = timm.create_model(NAME)
    assert new.num_classes == len(LABELS)
    assert new.pretrained_cfg.get('label_names') is None


def test_published_form(tmp_path):
    """config.json names the entry point; the folder loads as the same model, also where the tag is not known."""
    model = load_model(NAME)
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['architecture'] == 'lossattn'
    config['model_args']['backbone'] = config['model_args']['backbone'].replace('.pbc', '.other')
    (tmp_path / 'config.json').write_text(json.dumps(config))
    x = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(load_model(f'local-dir:{tmp_path}')(x), model(x))


def test_other_weights_of_a_file(tmp_path):
    """pretrained_cfg_overlay wins, as for every model of timm."""
    state = load_model(NAME).state_dict()
    state['classifier.bias'] = state['classifier.bias'] + 1.
    save_file(state, tmp_path / 'model.safetensors')
    overlay = {'file': str(tmp_path / 'model.safetensors')}
    model = timm.create_model(NAME, pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.classifier.bias, state['classifier.bias'])


def test_cfg_beside_the_name():
    """timm drops the tag then: the cfg says which backbone it is, or else nothing is taken in its place."""
    cfg = timm.get_pretrained_cfg('test_resnet.r160_in1k')
    stock = sum(p.numel() for p in timm.create_model('test_resnet').parameters())
    for given in (cfg, cfg.to_dict()):
        model = timm.create_model('lossattn.test_resnet', pretrained_cfg=given)
        assert sum(p.numel() for p in model.parameters()) == stock
        assert full_name(model) == 'lossattn.test_resnet.r160_in1k'
    with pytest.raises(ValueError, match='give backbone=NAME'):
        timm.create_model('lossattn.test_resnet', pretrained_cfg={'num_classes': 7, 'input_size': (3, 64, 64)})


def test_missing_file(monkeypatch):
    """An installation without the weights says so."""
    monkeypatch.setattr('timm_lossattn.models.lossattn.with_published', lambda cfgs: cfgs)
    with pytest.raises(RuntimeError, match=f'No pretrained weights exist for {NAME}'):
        timm.create_model(NAME, pretrained=True)


def test_command_line(tmp_path, capsys):
    """explain by name; list shows them."""
    path = next(iter(CELLS.values()))
    assert main(['explain', str(path), '--model', NAME, '--out', str(tmp_path)]) == 0
    numbers = json.loads((tmp_path / f'{path.stem}.json').read_text())
    assert numbers['labels'] == list(LABELS)
    capsys.readouterr()
    assert main(['list', 'lossattn.*']) == 0
    assert re.search(r'lossattn\.tf_efficientnet_lite0 .*224×224 .* 8 .* pbc', capsys.readouterr().out)
