"""compare_explanations.py, figures.py, receptive_field.py, mirror_images.py: files, numbers, known boxes and fields."""
import json
import re
from types import SimpleNamespace

import numpy
import pytest
import timm
import torch
from pytorch_grad_cam import GradCAM, HiResCAM, LayerCAM
from test_prepare import coco_folder, tiny_folder  # noqa: F401  (fixtures)

import additive_error
import compare_explanations
import figures
import mirror_images
import prepare
import randomization
import receptive_field
from lib.comparison import Judge, Settings
from lib.explainers import Answer, Question, create_tools, raw_cam
from lib.flags import parse
from lib.image_records import hits_to_text, text_to_hits
from lib.record import environment
from timm_lossattn import PatchPrediction, loss_attention
from timm_lossattn.evaluation.randomization import learned_modules
from timm_lossattn.explanation.evidence import direction
from timm_lossattn.models.probe import equal_boxes, split_patches

MODEL = 'resnet18_lossattn_conv_nano_s2'


@pytest.fixture(scope='module')
def flags(tiny_folder, tmp_path_factory):  # noqa: F811
    """Dataset with boxes and a random model of two classes."""
    root = tmp_path_factory.mktemp('compare')
    assert prepare.main(['tiny-imagenet', str(tiny_folder), str(root / 'set')]) == 0
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2)
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(model.state_dict(), root / 'model.pt')
    return ['--model', MODEL, '--num-classes', '2', '--checkpoint', str(root / 'model.pt'), '--dataset',
            f'hfds/{root / "set"}', '--data-dir', str(root), '--workers', '0']


SMALL = ['--batch-size', '2', '--ig-steps', '8', '--rows', '2', '--steps', '4', '--workers', '0']


def test_compare(flags, tmp_path, capsys):
    """Every tool has every measure, ours adds up, pixel tools stand twice, and constant boxes stand beside them."""
    run = [*flags, *SMALL, '--images', '4', '--single-deletion', '--spread', '2', '--output', str(tmp_path)]
    assert compare_explanations.main(run) == 0
    table = json.loads((tmp_path / 'compare.json').read_text())['image']
    tools = ['ours', 'α alone', 'Grad-CAM', 'HiResCAM', 'LayerCAM', 'random', 'centre']
    pixels = ['integrated gradients (8 steps)', 'input × gradient']
    boxes = ['box: whole image', 'box: all patches', 'box: best centred square']
    patches = [*tools, *(f'{name}, by patch' for name in pixels)]
    assert sorted(table) == sorted([*pixels, *patches, *(f'{name}, spread' for name in patches), *boxes])
    assert table['ours, spread']['complete']['mean'] <= 1e-5
    for name in (*tools, *pixels):
        unit = 'pixels' if name in pixels else 'patches'
        for measure in ('pointing', 'energy', f'deletion, {unit}, mean', f'insertion, {unit}, blur'):
            assert 0 <= table[name][measure]['mean'] <= 1
        assert -1 <= table[name]['single']['mean'] <= 1
        assert 'ms' not in table[name]  # a time is that of a batch: no interval over images
    assert table['ours']['complete']['mean'] <= 1e-5
    assert 'complete' not in table['random']
    lines = (tmp_path / 'images.jsonl').read_text().splitlines()
    assert len(lines) == 1 + 1 + 4
    text = (tmp_path / 'compare.md').read_text()
    assert text in capsys.readouterr().out
    assert 'Ours less theirs' in text
    assert (tmp_path / 'compare.png').read_bytes().startswith(b'\x89PNG')

    # cut off in the middle of a line, it goes on and comes to the same numbers; another question is another file
    (tmp_path / 'images.jsonl').write_text('\n'.join(lines[:4]) + '\n' + lines[4][:40])
    assert compare_explanations.main(run) == 0
    again = json.loads((tmp_path / 'compare.json').read_text())
    assert again['image']['ours'] == table['ours']
    assert len(again['starts']) == 2
    assert set(again['starts'][0]) == set(environment())
    (tmp_path / 'images.jsonl').write_text(re.sub('.*"start".*\n', '', (tmp_path / 'images.jsonl').read_text()))
    (tmp_path / 'compare.json').write_text(json.dumps({'commit': 'of that time'}))
    assert compare_explanations.main(run) == 0  # a record from before starts were noted: tables are made again
    assert json.loads((tmp_path / 'compare.json').read_text())['commit'] == 'of that time'
    assert compare_explanations.main([*run, '--scalar', 'logit']) == 2
    assert "was begun with another scalar, 'lead'" in capsys.readouterr().err
    assert compare_explanations.main([*run, '--data-dir', str(tmp_path)]) == 2
    assert 'was begun with another data_dir' in capsys.readouterr().err


def test_compare_grids(flags, tmp_path, capsys):
    """Two classes make no 2×2 grid; a stock timm model does, and with its mean pooling Grad-CAM says what we say."""
    torch.manual_seed(0)
    stock = timm.create_model('test_efficientnet', num_classes=2).eval()
    torch.save(stock.state_dict(), tmp_path / 'stock.pt')
    own = [*flags, *SMALL, '--images', '6', '--removal', '--grids', '1', '2', '--tools', 'Grad-CAM', 'random',
           '--model', 'test_efficientnet', '--checkpoint', str(tmp_path / 'stock.pt'),
           '--output', str(tmp_path / 'out')]
    assert compare_explanations.main(own) == 0
    result = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert result['tools'] == ['ours', 'Grad-CAM', 'random']
    assert result['grid 2'] == {}
    assert result['grid 1']['random']['grid']['mean'] == 1.
    records = [json.loads(line) for line in (tmp_path / 'out' / 'images.jsonl').read_text().splitlines()[1:]]
    for entry in (entry for entry in records if entry['kind'] == 'image'):
        assert entry['rows']['Grad-CAM']['energy'] == pytest.approx(entry['rows']['ours']['energy'], abs=1e-3)

    # grids are of the images that were asked for: more images want another folder, and other weights too
    fewer = [*own, '--images', '2', '--output', str(tmp_path / 'fewer')]
    assert compare_explanations.main(fewer) == 0
    assert compare_explanations.main([*fewer, '--images', '4']) == 2
    assert 'has grids of fewer images' in capsys.readouterr().err
    assert compare_explanations.main(fewer) == 0
    torch.save({name: value + 1e-6 for name, value in stock.state_dict().items()}, tmp_path / 'stock.pt')
    capsys.readouterr()
    assert compare_explanations.main(own) == 2
    assert 'was begun with another weights_sha256' in capsys.readouterr().err
    assert compare_explanations.main([*flags, *SMALL, '--tools', 'gradcam', '--output', str(tmp_path / 'none')]) == 2
    assert "--tools: 'gradcam' is part of none of ours, " in capsys.readouterr().err


def test_one_blank():
    """--blanks takes one of the two."""
    assert parse(compare_explanations.CompareOptions, None, ['--blanks', 'blur']).blanks == ['blur']


def test_compare_multi_label(coco_folder, tmp_path):  # noqa: F811
    """An image with several labels is explained for the one with the largest logit, by that logit."""
    assert prepare.main(['coco', str(coco_folder), str(tmp_path / 'set'), '--size', '64']) == 0
    torch.manual_seed(0)
    model = timm.create_model(MODEL, num_classes=2)
    torch.nn.init.normal_(model.head.fc.weight)
    torch.save(model.state_dict(), tmp_path / 'model.pt')
    assert compare_explanations.main([
        '--model', MODEL, '--num-classes', '2', '--checkpoint', str(tmp_path / 'model.pt'), '--multi-label',
        '--target-key', 'labels', '--dataset', f'hfds/{tmp_path / "set"}', '--data-dir', str(tmp_path), *SMALL,
        '--images', '3', '--tools', 'random', '--removal', 'patches', '--output', str(tmp_path / 'out')]) == 0
    first, _, *images = [json.loads(line) for line in (tmp_path / 'out' / 'images.jsonl').read_text().splitlines()]
    assert first['scalar'] == 'logit'
    assert first['boxes'] == 'of the target'
    options = compare_explanations.parse(compare_explanations.CompareOptions, '', [
        '--model', MODEL, '--num-classes', '2', '--checkpoint', str(tmp_path / 'model.pt'), '--multi-label',
        '--target-key', 'labels', '--dataset', f'hfds/{tmp_path / "set"}', '--data-dir', str(tmp_path), *SMALL])
    boxed = compare_explanations.open_patch_model(options)[2]
    model = model.eval()
    counted = set()
    for entry in images:
        x, y, boxes, classes = boxed[entry['index']]
        with torch.no_grad():
            logits = model(x[None])[0]
        own = logits.masked_fill(torch.as_tensor(y) < 0.5, -torch.inf)
        assert entry['target'] == int(own.argmax())
        assert entry['probability'] == pytest.approx(float(own.max().sigmoid()), abs=1e-3)
        ((_, _, (truth,)),) = compare_explanations.questions(options, model, boxed, [entry['index']])
        mine = boxes[classes == entry['target']]
        assert torch.equal(truth, mine)
        assert len(mine)
        counted.add(len(boxes) - len(mine))
    assert max(counted) > 0, 'some image has an object of the other class as well'


def test_only_the_answer_is_timed(flags, monkeypatch):
    """What a tool's parts should add up to is found out after the stopwatch."""
    options = compare_explanations.parse(compare_explanations.CompareOptions, '', flags)
    model, _, boxed, _ = compare_explanations.open_patch_model(options)
    boxes = model.patch_boxes(64, 64)
    called, clock = [], [100.]
    monkeypatch.setattr('lib.comparison.time', SimpleNamespace(perf_counter=lambda: clock[0]))

    def quick(question):
        def total():
            called.append(1)
            clock[0] += 1
            return torch.ones(1)
        clock[0] += 0.25
        scores = torch.ones(1, len(boxes))
        return Answer(torch.ones(1, 64, 64), scores, scores, total)

    judge = Judge(model, {'ours': quick}, Settings([], [], 1, False, False))
    question = Question(boxed[0][0][None], torch.tensor([0]), torch.tensor([[1., 0.]]), [0])
    [rows] = judge.images(question, [torch.zeros(0, 4)])
    assert called
    assert rows['ours']['ms'] == pytest.approx(250)
    assert rows['ours']['complete'] == pytest.approx(len(boxes) - 1)


def test_hits_as_text():
    hits = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(text_to_hits(hits_to_text(hits)), hits)
    assert len(hits_to_text(hits)) == 50


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext', 'resnet18_lossattn_conv_nano'])
def test_cam_by_hand(name):
    """The grad-cam package, asked through our wrapper, against gradient and features by hand: tokens and maps."""
    torch.manual_seed(0)
    kwargs = {'global_pool': 'avg'} if name == 'test_vit' else {}
    model = timm.create_model(name, num_classes=5, **kwargs).eval()
    model = model if hasattr(model, 'forward_patches') else loss_attention(model)
    x = torch.randn(2, 3, *model.default_cfg['input_size'][1:])
    v = torch.tensor([[1., -.5, -.5, 0., 0.], [0., 0., 1., 0., -1.]])
    question = Question(x, torch.tensor([0, 2]), v, [0, 1])
    features = model.forward_features(x).detach().requires_grad_()
    gradient, = torch.autograd.grad((model.forward_head(features) * v).sum(), features)
    h, g = (split_patches(t, getattr(model, 'patch_layout', 'NCHW'), getattr(model, 'patch_prefix', 0)).detach()
            for t in (features, gradient))
    torch.testing.assert_close(raw_cam(GradCAM, model, question), (h * g.mean(1, keepdim=True)).sum(2))
    torch.testing.assert_close(raw_cam(HiResCAM, model, question), (h * g).sum(2))
    torch.testing.assert_close(raw_cam(LayerCAM, model, question), (h * g.clamp(min=0)).sum(2))


def test_one_image_for_all_classes():
    """Every tool says of an image that is asked about two classes what it says of two copies of it."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18_lossattn_conv_nano', num_classes=5).eval()
    x, target = torch.randn(1, 3, 32, 32), torch.tensor([0, 3])
    v = direction(model(x).expand(2, -1), target)
    for tool in create_tools(model, 'rest', 4).values():
        once, twice = tool(Question(x, target, v, [0, 1])), tool(Question(x.repeat(2, 1, 1, 1), target, v, [0, 1]))
        torch.testing.assert_close(once.heat, twice.heat, equal_nan=True, rtol=1e-4, atol=1e-5)
        assert once.total is None or torch.allclose(once.total(), twice.total(), atol=1e-5)


def test_gradients_by_hand():
    """captum, asked along v: input × gradient against autograd, integrated gradients against a sum over the path."""
    torch.manual_seed(0)
    model = timm.create_model('resnet18_lossattn_conv_nano', num_classes=5).eval()
    x, v = torch.randn(2, 3, 32, 32), torch.randn(2, 5)
    tools = create_tools(model, 'rest', 4)
    question = Question(x, torch.tensor([0, 2]), v, [0, 1])

    def gradient(at):
        at = at.detach().requires_grad_()
        return torch.autograd.grad((model(at) * v).sum(), at)[0]
    torch.testing.assert_close(tools['input × gradient'](question).parts, x * gradient(x))
    nodes, weights = (torch.tensor(a).float() for a in numpy.polynomial.legendre.leggauss(4))
    path = sum(w / 2 * gradient(x * (t + 1) / 2) for t, w in zip(nodes, weights))
    torch.testing.assert_close(tools['integrated gradients (4 steps)'](question).parts, x * path, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('number', [4, 5, 6])
def test_figures(flags, tmp_path, number):
    """A picture for each of the paper's figures."""
    out = tmp_path / 'figure.png'
    assert figures.main([*flags, '--figure', str(number), '--images', '2', '--columns', '2', '--output',
                         str(out)]) == 0
    assert out.read_bytes().startswith(b'\x89PNG')


def test_randomization(flags, tmp_path, capsys):
    """A curve over all layers for evidence and for α, and a row of each in the table."""
    assert randomization.main([*flags, '--images', '3', '--output', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'randomization.json').read_text())
    model = timm.create_model(MODEL, num_classes=2)
    for name in ('evidence', 'α'):
        assert [step['layer'] for step in result[name]] == [layer for layer, _ in learned_modules(model)]
        assert all(-1 <= step['mean'] <= 1 and step['low'] is None for step in result[name])  # three say no interval
    text = (tmp_path / 'randomization.md').read_text()
    assert text in capsys.readouterr().out
    assert f"{result['evidence'][-1]['mean']:+.3f}" in text
    assert (tmp_path / 'randomization.png').read_bytes().startswith(b'\x89PNG')


class Displaced(torch.nn.Module):
    """4×4 patches of 8×8 pixels, whose evidence for class 1 is the light 3 pixels right of their box and 2 above it."""

    def forward_patches(self, x):
        seen = x.mean(dim=1).roll((-3, 2), dims=(-1, -2))
        value = torch.nn.functional.avg_pool2d(seen[:, None], 8).flatten(1)
        contributions = torch.stack([torch.zeros_like(value), value], dim=2)
        return PatchPrediction(contributions.sum(1), contributions, value / value.sum(1, True), contributions)

    def patch_boxes(self, height, width):
        return equal_boxes(4, 4, height, width)


def test_mirror_images(flags, tmp_path, capsys):
    """Found is how far a patch looks beside its box, on average over all places of a point of light."""
    x = torch.zeros(64, 3, 32, 32)
    for i in range(64):
        x[i, :, 11 + i % 8, 11 + i // 8] = 1.
    found = {name: values.mean().item() for name, values in mirror_images.offsets(
        Displaced(), x, torch.ones(64, dtype=torch.long)).items()}
    assert found == pytest.approx({
        'top1': 1, 'top1, right': 1, 'top1, down': 1, 'evidence, right': 3, 'evidence, down': -2, 'α, right': 3,
        'α, down': -2, 'evidence, moved right': 4, 'evidence, moved down': 4, 'α, moved right': 4, 'α, moved down': 4})

    assert mirror_images.main([*flags, '--images', '4', '--output', str(tmp_path / 'mirror')]) == 0
    result = json.loads((tmp_path / 'mirror.json').read_text())
    text = (tmp_path / 'mirror.md').read_text()
    assert text in capsys.readouterr().out
    assert f"| {100 * result['top1, right']['mean']:.1f} % | {result['evidence, right']['mean']:+.1f} |" in text
    assert mirror_images.main([*flags, '--multi-label']) == 2
    assert '--multi-label' in capsys.readouterr().err


def test_receptive_field(flags, tmp_path, capsys):
    """Without 3×3 convolutions that reach beyond it, a patch sees its box and nothing else; a real one sees more."""
    assert receptive_field.main([*flags, '--images', '2', '--output', str(tmp_path)]) == 0
    result = json.loads((tmp_path / 'receptive_field.json').read_text())
    assert result['patch_box'] == [24, 24, 42, 42]
    assert 0 < result['share_in_patch_box'] < 1
    assert (18 / 64) ** 2 < result['pixels_with_influence'] <= 1
    assert (tmp_path / 'receptive_field.png').read_bytes().startswith(b'\x89PNG')

    model = timm.create_model('resnet18_lossattn_conv_nano').eval()
    torch.nn.init.normal_(model.head.fc.weight)
    for stage in (model.backbone.stem, model.backbone.stages):
        for layer in stage.modules():
            if isinstance(layer, torch.nn.Conv2d) and layer.kernel_size == (3, 3):
                torch.nn.init.dirac_(layer.weight)
    field = receptive_field.influence(model, torch.rand(2, 3, 32, 32), 21)  # row 3, column 3
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[12:21, 12:21] = True
    assert float(field[:, inside].sum()) > 0
    assert float(field[:, ~inside].sum()) == 0


@pytest.mark.parametrize('script', [
    compare_explanations.main, receptive_field.main, lambda argv: figures.main([*argv, '--figure', '4'])])
def test_errors(script, capsys):
    assert script(['--model', 'resnet18_attn_conv']) == 2
    assert 'has no weights' in capsys.readouterr().err.strip().splitlines()[-1]


def test_additive_error(flags, tmp_path, capsys):
    """float64 is exact, float32 nearly, half precision to its rounding; the table is what the file holds."""
    assert additive_error.main([*flags, '--images', '3', '--output', str(tmp_path / 'error_xi0.1')]) == 0
    rows = json.loads((tmp_path / 'error_xi0.1.json').read_text())['precisions']
    assert rows['float64']['largest'] < 1e-13
    assert rows['float64']['largest'] < rows['float32']['largest'] < 1e-5 < rows['bfloat16']['largest'] < 0.1
    assert rows['float64']['agreement'] == 1.
    assert (tmp_path / 'error_xi0.1.md').read_text() in capsys.readouterr().out
