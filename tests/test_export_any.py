"""Export of any timm model, one backbone of each kind: ONNX and torch.export against eager, sizes, evidence, errors."""
import os
from functools import cache

import pytest
import timm
import torch
from torch import nn

from cli_run import error_line
from test_export import FILES, NANO, load, needs, read_metadata, run_cli, worst
from timm_lossattn import export
from timm_lossattn.export import OUTPUTS, export_model

CLASSES = 7
BACKBONES = {  # name of the test -> backbone, its arguments, the kind of its head, whether any size goes
    'A': ('test_efficientnet', {}, 'A', True),
    'A_ceil': ('test_resnet', {}, 'A', True),
    'B': ('test_convnext', {}, 'B', True),
    'B_tokens': ('test_vit', {'global_pool': 'avg', 'img_size': 64}, 'B', False),
    'C': ('test_mambaout', {}, 'C', True),
}


def create(case):
    """A model with random weights, batch norms as after training, and logits that differ from each other."""
    backbone, kwargs, kind, _ = BACKBONES[case]
    torch.manual_seed(0)
    model = timm.create_model('lossattn', backbone=backbone, num_classes=CLASSES, **kwargs).eval()
    assert model.patch_kind == kind
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    nn.init.normal_(model.get_classifier().weight, std=0.5)
    return model


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """(case, format) -> (model, file, report), written once, with free height and width."""
    @cache
    def export_once(case, format):
        needs(format)
        model = create(case)
        file = tmp_path_factory.mktemp('exported') / FILES[format]
        return model, file, export_model(model, file, format, img_size=64, dynamic_size=True)
    return export_once


@pytest.mark.parametrize(('case', 'format'), [
    *((case, 'onnx') for case in BACKBONES), ('A', 'torch.export'), ('B', 'torch.export'), ('C', 'torch.export')])
def test_outputs(case, format, exports):
    """Those of eager, evidence that of ``explain``: other batches, heights and widths than it was written at."""
    model, file, report = exports(case, format)
    assert report.dynamic_size
    assert max(max(values.values()) for values in report.differences.values()) <= 1e-4
    run = load(file, format)
    torch.manual_seed(1)
    sizes = [(64, 64), (64, 96), (128, 64)] + [(77, 71)] * BACKBONES[case][3]
    for batch, size in [(1, (64, 64)), *((3, size) for size in sizes)]:
        difference = worst(run, model, torch.randn(batch, 3, *size), batch)
        print(f'{case} {format} {batch}×{size}: {difference:.1e}')
        assert difference <= 1e-4
    assert os.listdir(file.parent) == [file.name]
    metadata = read_metadata(file, format)
    assert metadata['dynamic_size'] is True
    assert (metadata['architecture'], metadata['xi']) == (f'lossattn.{BACKBONES[case][0]}', 0.1)
    assert (metadata['held'] is None) == (model.patch_kind == 'A')
    assert metadata['patch_grid'] == list(model.patch_grid(64, 64))


def test_evidence_sums_to_the_lead(exports):
    """Of the top class over its rivals, in the file itself; at a size that the exporter did not see."""
    _, file, _ = exports('C', 'onnx')
    out = load(file, 'onnx')(torch.randn(4, 3, 96, 64))
    logits = out['logits'].double()
    top, rest = logits.sort(dim=1, descending=True).values.split([1, CLASSES - 1], dim=1)
    lead = (top - (rest.softmax(1) * rest).sum(1, keepdim=True)).squeeze(1)
    assert float((out['evidence'].sum(dim=1) - lead).abs().max()) <= 1e-5
    assert out['evidence'].shape == out['alpha'].shape == (4, 3 * 2)


def test_fixed_size_is_declared(tmp_path):
    """Without dynamic_size the file refuses other sizes."""
    needs('onnx')
    export_model(create('A'), tmp_path / 'model.onnx', 'onnx', img_size=64)
    with pytest.raises(Exception, match='image'):  # onnxruntime has its own classes
        load(tmp_path / 'model.onnx', 'onnx')(torch.zeros(1, 3, 96, 96))


def test_paper_model_of_any_size(tmp_path):
    needs('onnx')
    torch.manual_seed(0)
    model = timm.create_model(NANO, pretrained=True).eval()
    export_model(model, tmp_path / 'model.onnx', 'onnx', dynamic_size=True)
    run = load(tmp_path / 'model.onnx', 'onnx')
    assert max(worst(run, model, torch.randn(2, 3, *size), 2) for size in ((32, 32), (48, 40), (33, 71))) <= 1e-4


@pytest.mark.parametrize('format', ['onnx', 'torch.export', 'torchscript'])
def test_one_class(format, tmp_path):
    """A single class has no rest: its evidence are its contributions."""
    needs(format)
    model = timm.create_model(NANO, num_classes=1).eval()
    export_model(model, tmp_path / FILES[format], format)
    assert worst(load(tmp_path / FILES[format], format), model, torch.randn(2, 3, 32, 32), 2) <= 1e-4


def test_command(tmp_path, capsys):
    """lossattn.NAME with weights of one's own."""
    needs('onnx')
    torch.manual_seed(0)
    model = timm.create_model('lossattn.test_efficientnet').eval()
    torch.save({'state_dict': timm.create_model('test_efficientnet').state_dict() | model.state_dict()},
               tmp_path / 'weights.pth.tar')
    file = tmp_path / 'model.onnx'
    assert run_cli('lossattn.test_efficientnet', '--format', 'onnx', '--out', file, '--img-size', '64',
                   '--dynamic-size', '--checkpoint', tmp_path / 'weights.pth.tar') == 0
    lines = capsys.readouterr().out.splitlines()
    assert 'height and width free' in lines[0]
    assert all(f'{name} ' in line for line in lines[1:] for name in OUTPUTS)
    assert worst(load(file, 'onnx'), model, torch.randn(2, 3, 96, 64), 2) <= 1e-4


def test_errors(tmp_path, capsys, monkeypatch):
    """TorchScript, and a model of one size: one line, no file."""
    torch.save(timm.create_model('lossattn.test_efficientnet').state_dict(), tmp_path / 'weights.pth')
    monkeypatch.chdir(tmp_path)
    assert run_cli('lossattn.test_efficientnet', '--format', 'torchscript', '--out', 'a.pt', '--checkpoint',
                   'weights.pth') == 2
    assert 'torchscript cannot read LossAttentionEfficientNet' in error_line(capsys)
    model = timm.create_model(
        'lossattn', backbone='deit_tiny_patch16_224', global_pool='avg', embed_dim=24, depth=1, num_heads=2).eval()
    with pytest.raises(ValueError, match=r'dynamic_size: .* does not take images of 448×224 pixels'):
        export_model(model, 'a.pt2', 'torch.export', dynamic_size=True)
    with pytest.raises(ValueError, match=r'img_size: .* does not take images of 256×256 pixels'):
        export_model(model, 'a.pt2', 'torch.export', img_size=256)
    assert os.listdir() == ['weights.pth']


def test_padding_by_the_size(tmp_path):
    """TensorFlow's, in whose formulas the exporter loses itself: refused at once; one size goes."""
    model = timm.create_model('lossattn.tf_efficientnet_lite0', num_classes=3).eval()
    with pytest.raises(ValueError, match='dynamic_size: conv_stem pads by the size of the image'):
        export_model(model, tmp_path / 'model.pt2', 'torch.export', img_size=64, dynamic_size=True)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_says_little(tmp_path):
    """Neither in_chans nor a config: what explain does without, export does without."""
    needs('onnx')
    torch.manual_seed(0)
    model = timm.create_model('lossattn.test_efficientnet', num_classes=3).eval()
    del model.pretrained_cfg, model.default_cfg, model.in_chans
    report = export_model(model, tmp_path / 'model.onnx', 'onnx', img_size=64)
    assert report.input_size == (3, 64, 64)


@pytest.mark.parametrize('batch', [0, 1])
def test_evidence_that_is_no_number(tmp_path, monkeypatch, batch):
    """A single NaN in what the file computes is no rounding: it is refused, and nothing is written."""
    real = export.run_file

    def run_file(*args):
        outputs = real(*args)
        outputs[batch]['evidence'][0, 3] = float('nan')
        return outputs

    monkeypatch.setattr(export, 'run_file', run_file)
    with pytest.raises(RuntimeError, match=r'does not compute what the model does: evidence, \|Δ\| = nan'):
        export_model(timm.create_model(NANO).eval(), tmp_path / 'model.pt', 'torchscript')
    assert list(tmp_path.iterdir()) == []
