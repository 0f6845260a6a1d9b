"""export.py: each format against the model on real images, what travels in the file, errors, nothing half-written."""
import io
import json
import os
import subprocess
import sys
import zipfile
from functools import cache, partial
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_lossattn
from cli_run import error_line
from timm_lossattn import ResNetBackbone, export
from timm_lossattn.cli import main
from timm_lossattn.explanation import explain
from timm_lossattn.explanation.preprocessing import open_image, preprocess
from timm_lossattn.export import FORMATS, METADATA_FILE, OUTPUTS, export_model
from timm_lossattn.models.patch_layers import PrimaryCapsules

IMAGES = sorted((Path(__file__).parent / 'data').glob('*.png'))
NANO, CAPS = 'resnet18_lossattn_conv_nano', 'resnet18_lossattn_caps_nano'
FILES = {'onnx': 'model.onnx', 'torch.export': 'model.pt2', 'torchscript': 'model.pt'}


def needs(format):
    """Skip where the extra ``export`` is not installed."""
    if format == 'onnx':
        for package in ('onnx', 'onnxscript', 'onnxruntime'):
            pytest.importorskip(package)


def load(file, format):
    """The file as a user loads it: images to a dictionary of outputs."""
    if format == 'onnx':
        import onnxruntime
        session = onnxruntime.InferenceSession(str(file))
        names = [o.name for o in session.get_outputs()]
        return lambda x: dict(zip(names, map(torch.from_numpy, session.run(None, {'image': x.numpy()}))))
    return torch.export.load(file).module() if format == 'torch.export' else torch.jit.load(file)


def read_metadata(file, format):
    """What travels in the file."""
    if format == 'onnx':
        import onnx
        return {p.key: json.loads(p.value) for p in onnx.load(file).metadata_props}
    extra = {METADATA_FILE: ''}
    if format == 'torch.export':
        torch.export.load(file, extra_files=extra)
    else:
        torch.jit.load(file, _extra_files=extra)
    return json.loads(extra[METADATA_FILE])


@torch.no_grad()
def worst(run, model, x, batch):
    """Max |Δ| over the outputs, x (N, C, H, W) in batches."""
    differences = []
    for part in x.split(batch):
        outputs, explanation = run(part), explain(model, part)
        assert list(outputs) == list(OUTPUTS)
        for name in OUTPUTS:
            wanted = explanation.evidence if name == 'evidence' else getattr(explanation.prediction, name)
            assert outputs[name].shape == wanted.shape
            assert outputs[name].isfinite().all()  # max() of a list passes over NaN
            differences.append(float((outputs[name] - wanted).abs().max()))
    return max(differences)


@torch.no_grad()
def rounding(model, x):
    """1e-4; of patch logits beyond 10, float32 rounds at 1e-5 of the largest."""
    return 1e-5 * max(10., float(model.forward_patches(x).patch_logits.abs().max()))


@pytest.fixture(scope='module')
def exports(tmp_path_factory):
    """(name, format) -> (model, file, format, report) of a model with weights; each is exported once."""
    @cache
    def export_once(name, format):
        needs(format)
        model = timm.create_model(name, pretrained=True).eval()
        file = tmp_path_factory.mktemp('exported') / FILES[format]
        return model, file, format, export_model(model, file, format)
    return export_once


@pytest.fixture(params=[(name, format) for name in (NANO, CAPS) for format in FORMATS], ids='-'.join)
def exported(request, exports):
    """The models with weights, in each format."""
    return exports(*request.param)


def test_real_images(exported):
    """The outputs of the model, one image or seven at a time; the report says what was measured and written."""
    model, file, format, report = exported
    x = torch.stack([preprocess(model, open_image(path)).x for path in IMAGES])
    assert len(x) == 10
    run, bound = load(file, format), rounding(model, x)
    for batch in (1, 7):
        assert worst(run, model, x, batch) <= bound
        assert set(report.differences[batch]) == set(OUTPUTS)
        assert max(report.differences[batch].values()) <= bound
    assert (report.format, report.size, report.input_size) == (format, file.stat().st_size, (3, 32, 32))
    assert (report.opset is None) == (format != 'onnx')
    assert os.listdir(file.parent) == [file.name]  # no external data, nothing temporary


@pytest.mark.skipif(not Path(os.environ.get('LOSSATTN_DATA', '/nonexistent'), 'cifar10').is_dir(),
                    reason='LOSSATTN_DATA is not set, or has no cifar10')
def test_cifar10_images(exported):
    """64 real test images."""
    from datasets import load_dataset
    model, file, format, _ = exported
    rows = load_dataset(f'{os.environ["LOSSATTN_DATA"]}/cifar10', split='test').select(range(64))['img']
    images = [i if isinstance(i, Image.Image) else Image.open(io.BytesIO(i['bytes'])) for i in rows]
    x = torch.stack([preprocess(model, image.convert('RGB')).x for image in images])
    assert len(x) == 64
    run, bound = load(file, format), rounding(model, x)
    for batch in (1, 7):
        assert worst(run, model, x, batch) <= bound


def test_metadata(exported):
    """Labels, patch boxes and all that the preprocessing needs, without the package."""
    model, file, format, _ = exported
    metadata = read_metadata(file, format)
    assert metadata['architecture'] == model.pretrained_cfg['architecture']
    assert metadata['labels'] == list(model.pretrained_cfg['label_names'])
    assert metadata['patch_grid'] == [6, 6]
    assert metadata['patch_boxes'] == model.patch_boxes(32, 32).tolist()
    keys = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    transform = timm.data.create_transform(**{key: metadata[key] for key in keys})
    image = open_image(IMAGES[0]).resize((50, 40))
    assert torch.equal(transform(image), preprocess(model, image).x)


def test_no_paths_of_this_machine(exported):
    """Stack traces that the exporters note stay out; TorchScript keeps them, in files for its debugger."""
    _, file, format, _ = exported
    content = file.read_bytes()
    if format == 'torchscript':
        archive = zipfile.ZipFile(file)
        content = b''.join(archive.read(n) for n in archive.namelist() if not n.endswith('.debug_pkl'))
    for module in (timm_lossattn, timm, torch):
        assert str(Path(module.__file__).parent).encode() not in content


def test_without_the_package(exports):
    """The files run where neither this package nor timm can be imported."""
    needs('onnx')
    script = '''
import sys
sys.modules.update({'timm': None, 'timm_lossattn': None})
import numpy, onnxruntime, torch
for file in sys.argv[1:]:
    if file.endswith('onnx'):
        outputs = onnxruntime.InferenceSession(file).run(
            ['logits', 'patch_logits', 'alpha', 'evidence'], {'image': numpy.zeros((2, 3, 32, 32), 'float32')})
    else:
        model = torch.export.load(file).module() if file.endswith('pt2') else torch.jit.load(file)
        outputs = map(model(torch.zeros(2, 3, 32, 32)).get, ('logits', 'patch_logits', 'alpha', 'evidence'))
    print(*(tuple(x.shape) for x in outputs))
'''
    files = [str(exports(NANO, format)[1]) for format in FORMATS]
    done = subprocess.run([sys.executable, '-c', script, *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == 3 * '(2, 10) (2, 36, 10) (2, 36) (2, 36)\n'


SMALL = partial(ResNetBackbone, depths=(1, 1, 1, 1), widths=(4, 8, 8, 16))
HEADS = {
    'avg': partial(timm.create_model, NANO, global_pool='avg', backbone=SMALL),
    'gatedattn': partial(timm.create_model, NANO, global_pool='gatedattn', backbone=SMALL),
    'routing': partial(timm.create_model, 'resnet18_routing_caps', backbone=SMALL,
                       patch_layers=partial(PrimaryCapsules, capsules=4)),
    'plain': partial(timm.create_model, 'resnet18_cifar', backbone=SMALL),
    'stride': partial(timm.create_model, f'{NANO}_s2', backbone=SMALL, in_chans=1, num_classes=3),
    'vgg': partial(timm.create_model, 'vgg11_bn_lossattn_caps_nano'),
}


@pytest.mark.parametrize('head', HEADS)
def test_every_head(head, tmp_path):
    """ONNX of the other heads and backbones, with random weights; batch, height and width are declared as they are."""
    needs('onnx')
    import onnx
    torch.manual_seed(0)
    model = HEADS[head]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training, not the identity
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    report = export_model(model, tmp_path / 'model.onnx', 'onnx')
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for graph in [onnx.load(tmp_path / 'model.onnx').graph] for value in (*graph.input, *graph.output)}
    K, M = model.num_classes, model.patch_boxes(*report.input_size[1:]).shape[0]
    assert shapes == {
        'image': ['batch', *report.input_size], 'logits': ['batch', K], 'patch_logits': ['batch', M, K],
        'alpha': ['batch', M], 'evidence': ['batch', M]}
    run = load(tmp_path / 'model.onnx', 'onnx')
    x = torch.randn(8, *report.input_size)
    assert max(worst(run, model, x, 1), worst(run, model, x, 7)) <= 1e-4


@pytest.mark.parametrize('format', ['torch.export', 'torchscript'])
@pytest.mark.parametrize('head', ['avg', 'gatedattn', 'routing', 'plain', 'vgg'])
def test_every_head_in_torch_formats(head, format, tmp_path):
    torch.manual_seed(0)
    model = HEADS[head]().eval()
    file = tmp_path / FILES[format]
    export_model(model, file, format)
    x = torch.randn(8, 3, 32, 32)
    run = load(file, format)
    assert max(worst(run, model, x, 1), worst(run, model, x, 7)) <= 1e-5


def test_size_and_opset(tmp_path):
    """Another size than that of the weights, another opset than the exporter's own."""
    needs('onnx')
    import onnx
    model = HEADS['avg']().eval()
    file = tmp_path / 'model.onnx'
    report = export_model(model, file, 'onnx', img_size=45, opset=18)
    assert report.input_size == (3, 45, 45)
    assert report.opset == 18
    assert [o.version for o in onnx.load(file).opset_import if not o.domain] == [18]
    metadata = read_metadata(file, 'onnx')
    assert metadata['input_size'] == [3, 45, 45]
    assert metadata['patch_grid'] == [10, 10]
    assert worst(load(file, 'onnx'), model, torch.randn(7, 3, 45, 45), 7) <= 1e-4
    with pytest.raises(Exception, match='image'):  # onnxruntime has its own classes
        load(file, 'onnx')(torch.zeros(1, 3, 32, 32))


def test_model_is_not_changed(tmp_path):
    """A training, half-precision, grey-level model with checkpointing stays that; its file is float32 in eval mode."""
    torch.manual_seed(0)
    model = timm.create_model(NANO, in_chans=1, num_classes=3, drop_rate=0.5).to(torch.bfloat16).train()
    model.set_grad_checkpointing()
    export_model(model, tmp_path / 'model.pt', 'torchscript')
    assert model.training
    assert model.backbone.grad_checkpointing
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    metadata = read_metadata(tmp_path / 'model.pt', 'torchscript')
    assert metadata['labels'] == ['class 0', 'class 1', 'class 2']
    assert metadata['mean'] == pytest.approx([sum(model.pretrained_cfg['mean']) / 3])
    assert worst(load(tmp_path / 'model.pt', 'torchscript'), model.float().eval(), torch.randn(7, 1, 32, 32), 7) <= 1e-5


def run_cli(*args):
    """Exit code of ``timm-lossattn export``."""
    return main(['export', *map(str, args)])


@pytest.mark.parametrize('format', FORMATS)
def test_command(format, tmp_path, capsys):
    """Another model's weights from a checkpoint; opset, size and differences on the terminal."""
    needs(format)
    torch.manual_seed(0)
    model = timm.create_model(NANO).eval()
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'weights.pth.tar')
    file = tmp_path / FILES[format]
    assert run_cli(NANO, '--format', format, '--out', file, '--checkpoint', tmp_path / 'weights.pth.tar') == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f'{file}: {format}')
    assert f'{file.stat().st_size:,} bytes; image (B, 3, 32, 32)' in lines[0]
    assert ('opset ' in lines[0]) == (format == 'onnx')
    assert [line.split(':')[0].split()[-1] for line in lines[1:]] == ['1', '7']
    assert all(f'{name} ' in line for line in lines[1:] for name in OUTPUTS)
    assert worst(load(file, format), model, torch.randn(2, 3, 32, 32), 2) <= 1e-4


@pytest.mark.parametrize(('args', 'what'), [
    ((NANO, '--format', 'tflite', '--out', 'a.tflite'), "format must be one of ['onnx', 'torch.export', '"),
    ((NANO, '--format', 'torchscript', '--out', 'a.onnx'), 'a.onnx must end in .pt or .ts'),
    ((NANO, '--format', 'torch.export', '--out', 'a'), 'a must end in .pt2'),
    ((NANO, '--format', 'torchscript', '--out', 'folder.pt'), 'folder.pt is a folder'),
    ((NANO, '--format', 'torchscript', '--out', 'missing/a.pt'), 'cannot write into missing'),
    ((NANO, '--format', 'torchscript', '--out', 'text/a.pt'), 'cannot write into text'),
    ((NANO, '--format', 'torchscript', '--out', 'a.pt', '--opset', '18'), 'opset: torchscript has none'),
    ((NANO, '--format', 'torchscript', '--out', 'a.pt', '--img-size', '0'), 'img_size must be positive'),
    ((NANO, '--format', 'torchscript', '--out', 'a.pt', '--img-size', '8'), 'Input too small for one patch'),
    ((NANO, '--format', 'torchscript', '--out', 'a.pt', '--checkpoint', 'no.pt'), 'checkpoint: no such file: no.pt'),
    ((NANO, '--format', 'torchscript', '--out', 'no/../a.pt', '--checkpoint', 'a.pt'), 'a.pt is the --checkpoint'),
    (('resnet18_attn_conv', '--format', 'torchscript', '--out', 'a.pt'), 'model: resnet18_attn_conv has no'),
    (('nonsense', '--format', 'torchscript', '--out', 'a.pt'), "model: timm has no model 'nonsense'"),
])
def test_errors(args, what, tmp_path, monkeypatch, capsys):
    """One line, exit code 2, no file."""
    monkeypatch.chdir(tmp_path)
    Path('folder.pt').mkdir()
    Path('text').touch()
    assert run_cli(*args) == 2
    assert what in error_line(capsys)
    assert sorted(os.listdir()) == ['folder.pt', 'text']


@pytest.mark.parametrize('opset', ['-1', '17', '99'])
def test_bad_opset(opset, tmp_path, capsys):
    needs('onnx')
    assert run_cli(NANO, '--format', 'onnx', '--out', tmp_path / 'a.onnx', '--opset', opset) == 2
    assert 'opset must lie in [18, ' in error_line(capsys)
    assert os.listdir(tmp_path) == []


def test_opset_that_the_exporter_does_not_give(tmp_path, monkeypatch):
    """Its fallback to another one is an error."""
    needs('onnx')
    real = torch.onnx.export
    monkeypatch.setattr(torch.onnx, 'export', lambda *args, **kwargs: real(*args, **dict(kwargs, opset_version=18)))
    with pytest.raises(ValueError, match='cannot write this model in 19, it gave 18'):
        export_model(HEADS['avg'](), tmp_path / 'a.onnx', 'onnx', opset=19)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('package', ['onnx', 'onnxscript'])
def test_missing_package(package, tmp_path, monkeypatch, capsys):
    """The line says what to install."""
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name == package else object())
    assert run_cli(NANO, '--format', 'onnx', '--out', tmp_path / 'a.onnx') == 2
    message = error_line(capsys)
    assert f'needs {package}: pip install "timm-lossattn[export]"' in message
    assert os.listdir(tmp_path) == []


def test_without_onnxruntime(tmp_path, monkeypatch, capsys):
    """The file is written all the same, and the missing comparison is said."""
    needs('onnx')
    monkeypatch.setattr(export, 'find_spec', lambda name: None if name == 'onnxruntime' else object())
    assert run_cli(NANO, '--format', 'onnx', '--out', tmp_path / 'a.onnx') == 0
    assert 'not compared with the model: onnxruntime is not installed' in capsys.readouterr().out
    torch.manual_seed(0)
    model = timm.create_model(NANO, pretrained=True).eval()
    assert worst(load(tmp_path / 'a.onnx', 'onnx'), model, torch.randn(2, 3, 32, 32), 2) <= 1e-4


def break_exporter(monkeypatch):
    def fail(module):
        raise KeyError('line one\nline two ' + 1000 * 'x')
    monkeypatch.setattr(torch.jit, 'script', fail)
    return 'torchscript: export failed: '


def break_numbers(monkeypatch):
    real, other = export.script_bytes, export.NamedOutputs(timm.create_model(CAPS, pretrained=True).eval())
    monkeypatch.setattr(export, 'script_bytes', lambda module, *args: real(other, *args))
    return 'does not compute what the model does: logits'


def break_loading(monkeypatch):
    monkeypatch.setattr(export, 'script_bytes', lambda *args: b'no archive')
    return 'torchscript: the exported file does not run: '


def break_rename(monkeypatch):
    def fail(source, target):
        raise OSError('disk on fire')
    monkeypatch.setattr(os, 'replace', fail)
    return 'disk on fire'


@pytest.mark.parametrize('breakage', [break_exporter, break_numbers, break_loading, break_rename])
def test_nothing_half_written(breakage, tmp_path, monkeypatch, capsys):
    """Whatever fails: one line, no temporary file, and the old file as it was."""
    file = tmp_path / 'model.pt'
    file.write_text('old')
    what = breakage(monkeypatch)
    assert run_cli(NANO, '--format', 'torchscript', '--out', file) == 2
    message = error_line(capsys)
    assert what in message
    assert len(message) < 500
    assert os.listdir(tmp_path) == ['model.pt']
    assert file.read_text() == 'old'


def test_not_a_patch_model(tmp_path):
    with pytest.raises(ValueError, match='no forward_patches'):
        export_model(nn.Linear(2, 2), tmp_path / 'a.pt', 'torchscript')
    with pytest.raises(ValueError, match='num_classes=0'):
        export_model(timm.create_model(NANO, num_classes=0), tmp_path / 'a.pt', 'torchscript')
    routing = HEADS['routing']()
    with pytest.raises(ValueError, match='patch grid'):
        export_model(routing, tmp_path / 'a.pt', 'torchscript', img_size=40)
    assert os.listdir(tmp_path) == []
