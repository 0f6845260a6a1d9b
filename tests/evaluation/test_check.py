"""check.py and the command: exact models by kind, refused ones with a reason."""
import json
import os
import re
import signal

import pytest
import timm
import torch

from timm_lossattn import PatchPrediction, loss_attention
from timm_lossattn.cli import main
from timm_lossattn.evaluation import check_all as check_all_module
from timm_lossattn.evaluation.check import check_model
from timm_lossattn.evaluation.check_all import check_all, models_to_check, read_checks
from timm_lossattn.evaluation.receptive_field import influence, middle_patch, share_in_box, side_for, square_shares
from timm_lossattn.models.probe import NoPatchSum


@pytest.mark.parametrize(('name', 'kind', 'layout'), [
    ('test_resnet', 'A', 'NCHW'), ('test_convnext', 'B', 'NCHW'), ('mobilenetv3_small_050', 'C', 'NCHW')])
def test_exact(name, kind, layout):
    """Kind, errors at rounding, the stock state dict."""
    state = torch.random.get_rng_state()
    found = check_model(name)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert (found.kind, found.layout, found.strict) == (kind, layout, True)
    assert 0 <= found.additive_error <= 1e-5
    assert 0 <= found.stock_error <= 1e-5
    assert found.grid == ('7×7' if kind == 'C' else '5×5')


@pytest.mark.parametrize('pretrained', [False, True])
def test_weights_of_our_own(pretrained):
    """Those that were trained for loss attention are checked like any others, under their tag."""
    found = check_model('lossattn.tf_efficientnet_lite0.pbc', pretrained, receptive_field=False)
    assert (found.kind, found.strict, found.name) == ('A', True, 'tf_efficientnet_lite0.pbc')
    assert found.additive_error <= 1e-5
    assert found.stock_error <= 1e-5


def test_refused_and_with_average_pooling():
    """A class token decides: refused, with the way out; with average pooling the same model is exact."""
    found = check_model('test_vit')
    assert found.kind == 'D'
    assert 'global_pool="avg"' in found.reason
    assert found.additive_error is None
    assert check_model('test_vit', global_pool='avg').kind in ('A', 'B')


def test_way_out_of_trained_weights():
    """With what is advised the weights of a model with a class token load, all of them."""
    stock = timm.create_model('test_vit')
    with pytest.raises(NoPatchSum, match=r'Create the model with global_pool="avg", fc_norm=False, so that'):
        loss_attention(stock)
    model = timm.create_model('lossattn', backbone='test_vit', global_pool='avg', fc_norm=False)
    model.load_state_dict(stock.state_dict())
    assert model.patch_kind == 'A'
    with pytest.raises(RuntimeError, match='fc_norm'):
        timm.create_model('test_vit', global_pool='avg').load_state_dict(stock.state_dict())


@pytest.mark.parametrize('name', ['pit_ti_224', 'deit_tiny_distilled_patch16_224', 'coat_tiny', 'volo_d1_224'])
def test_refused_without_a_way(name):
    """Of these timm makes no average-pooled head, or one that is no sum either: no advice that leads nowhere."""
    with pytest.raises((ValueError, AssertionError)):
        loss_attention(timm.create_model(name, device='meta', global_pool='avg'))
    with pytest.raises(NoPatchSum, match=r'has no head whose logits are a sum over patches: choose a .*\.$') as found:
        loss_attention(timm.create_model(name, device='meta'))
    assert 'global_pool' not in str(found.value)
    assert not re.search('Error|dim', str(found.value))  # nor what timm's own code raised on the way


@pytest.mark.parametrize('name', ['convnext_atto', 'regnetx_002'])
def test_refused_for_its_arguments(name):
    """Models that keep their pooling in the head, and average unless they are told otherwise: the way out is theirs."""
    with pytest.raises(NoPatchSum, match=r'does not average .*\. Create the model with global_pool="avg"'):
        loss_attention(timm.create_model(name, device='meta', global_pool='max'))
    assert loss_attention(timm.create_model(name, device='meta', global_pool='avg')).patch_kind in ('A', 'B')


@pytest.mark.parametrize('pool', ['token', 'max'])
def test_refused_without_a_name(pool):
    """Of a model that was made by hand nothing is known to promise or to deny."""
    model = timm.models.VisionTransformer(depth=1, embed_dim=24, num_heads=1, global_pool=pool, device='meta')
    with pytest.raises(NoPatchSum, match=r'If it can be made with global_pool="avg"') as found:
        loss_attention(model)
    assert 'has no head' not in str(found.value)


def test_a_way_of_a_loss_attention_model():
    """A head that ``reset_classifier`` brings is refused with the same advice."""
    model = timm.create_model('lossattn', backbone='test_vit', global_pool='avg')
    model.reset_classifier(3, 'token')
    with pytest.raises(ValueError, match=r'class token decides.*global_pool="avg"'):
        model.forward_patches(torch.zeros(1, 3, 160, 160))


@pytest.mark.parametrize(('args', 'message'), [
    ({'no_such_argument': 1}, 'TypeError: .*no_such_argument'), ({'pretrained': True}, 'Error: ')])
def test_errors_are_no_refusal(monkeypatch, args, message):
    """What a model's own code raises, and a download that fails, says nothing about its head."""
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    found = check_model('test_resnet', **args)
    assert found.kind == 'error'
    assert re.search(message, found.reason)


@pytest.mark.parametrize('box', [[8, 8, 16, 16], [3, 10, 8, 14]])
def test_receptive_field_of_one_pixel_patches(box):
    """Against a loop over pixels; all that is seen is in the largest square."""
    seen = torch.rand(24, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    inside = sum(float(seen[y, x]) for y in range(box[1], box[3]) for x in range(box[0], box[2]))
    assert share_in_box(seen, box) == pytest.approx(inside / float(seen.sum()))
    shares = square_shares(seen, box)
    middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    for side in list(shares)[::5]:
        held = sum(float(seen[y, x]) for y in range(24) for x in range(20)
                   if max(abs(x + 0.5 - middle[0]), abs(y + 0.5 - middle[1])) < side / 2)
        assert shares[side] == pytest.approx(held / float(seen.sum()))
    assert side_for(shares, 0.95) == next(s for s in shares if shares[s] >= 0.95)
    assert max(shares.values()) == pytest.approx(1.)


def test_square_shares():
    """Evidence in the box's middle and in a corner of the image; of a flat field, squares of whole pixels."""
    field = torch.zeros(32, 32)
    field[16, 16], field[0, 0] = 3., 1.
    shares = square_shares(field, [12, 12, 21, 21])
    assert list(shares)[:3] == [1, 3, 5]
    assert shares[1] == shares[31] == 0.75
    assert shares[33] == 1
    assert side_for(shares, 0.75) == 1
    assert side_for(shares, 0.9) == 33
    flat = square_shares(torch.ones(64, 64), [16, 16, 34, 34])  # centre on a corner of pixels
    assert flat[18] == pytest.approx(18 ** 2 / 64 ** 2)


class OwnBox(torch.nn.Module):
    """Patches of 8×8 pixels that see their own pixels alone, all of them alike."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 4, 8, 8)
        torch.nn.init.constant_(self.embed.weight, 0.5)

    def forward_patches(self, x):
        p = self.embed(x).flatten(2).transpose(1, 2)
        alpha = torch.full(p.shape[:2], 1 / p.shape[1])
        return PatchPrediction(p.mean(1), p, alpha, p * alpha.unsqueeze(-1))

    def patch_grid(self, height, width):
        return height // 8, width // 8

    def patch_boxes(self, height, width):
        corners = [(8 * c, 8 * r) for r in range(height // 8) for c in range(width // 8)]
        return torch.tensor([(x, y, x + 8, y + 8) for x, y in corners])


def test_receptive_field_of_a_model():
    """Of patches that see their own box, all of it; of a network of 3×3 convolutions, more than the box."""
    model = OwnBox()
    patch, box = middle_patch(model, 40, 24)
    assert (patch, box) == (2 * 3 + 1, [8, 16, 16, 24])
    with torch.no_grad():
        seen = influence(model, torch.randn(2, 3, 40, 24), patch)
    assert share_in_box(seen[0], box) == 1.
    assert side_for(square_shares(seen[0], box), 0.95) == 8
    found = check_model('test_resnet')
    assert 0 < found.own_share < 0.9
    assert 0 < found.side_half < found.side_90 > 32
    assert check_model('test_resnet', receptive_field=False).side_90 is None


def test_command(capsys):
    """A table, exit code 1 for a refused model, one line for no model."""
    assert main(['check', 'lossattn.test_resnet']) == 0
    out = ' '.join(capsys.readouterr().out.split())
    assert 'A: the head is affine' in out
    assert 'of its weights: --pretrained' in ' '.join(out.split())
    assert main(['check', 'test_vit']) == 1
    assert 'class token decides' in ' '.join(capsys.readouterr().out.split())
    assert main(['check', 'test_vit', '--model-kwargs', 'global_pool=avg', 'fc_norm=False']) == 0
    capsys.readouterr()
    assert main(['check', 'test_vit', '--model-kwargs', 'pretrained=True']) == 2
    assert "--model-kwargs: pretrained is none of the model's arguments" in capsys.readouterr().err
    assert main(['check', 'lossattn.tf_efficientnet_lite0.pbc', '--pretrained']) == 0  # weights of the package
    assert re.search(r'\d+ % of the influence on the middle patch comes from its box, half from a square of \d+ pixels',
                     ' '.join(re.sub('[│┃]', ' ', capsys.readouterr().out).split()))
    assert main(['check', 'resnet18_lossattn_conv_nano']) == 2
    assert 'a patch model already, exact by its own head' in capsys.readouterr().err
    assert main(['check', 'nonsense']) == 2
    assert "timm has no model 'nonsense'" in capsys.readouterr().err


def test_all_is_resumable(tmp_path, capsys, monkeypatch):
    """A line for each model, its numbers those of one check; what a kill has cut off is done again, the rest is not."""
    file = tmp_path / 'new' / 'checks.jsonl'
    names = ['test_vit', 'test_resnet', 'resnet18']
    found = list(check_all(file, names, limit_million=1.))
    assert [(f.name, count, total) for f, count, total in found] == [(n, i + 1, 3) for i, n in enumerate(names)]
    rows = read_checks(file)
    assert [rows[n]['kind'] for n in names] == ['D', 'A', 'large']
    assert [rows[n]['why'] for n in names] == ['its class token decides', '', '']
    alone = check_model('test_resnet', receptive_field=False).to_dict()
    assert {**rows['test_resnet'], 'seconds': 0} == {**alone, 'seconds': 0}
    assert rows['resnet18']['additive_error'] is None
    assert [(rows[n]['with_avg'] or {}).get('kind') for n in names] == ['B', None, None]

    lines = file.read_text().splitlines()
    file.write_text('\n'.join([lines[0], lines[1], lines[2][:20]]))
    again = [(f.name, count) for f, count, _ in check_all(file, [*names, 'test_convnext'], limit_million=1.)]
    assert again == [('resnet18', 3), ('test_convnext', 4)]
    assert file.read_text().splitlines()[:2] == lines[:2]

    monkeypatch.setattr(check_all_module, 'models_to_check', lambda: names)
    assert main(['check', '--all', '--out', str(file)]) == 0
    assert '1 A, 1 B, 1 D, 1 large' in capsys.readouterr().out


def test_all_wrong_ways(tmp_path, capsys):
    """Another file is left as it is; flags that do not go together; our own models are not checked."""
    file = tmp_path / 'other.jsonl'
    file.write_text(json.dumps({'name': 'test_resnet', 'accuracy': 1}) + '\n')
    with pytest.raises(ValueError, match='line 1, is no check of a model'):
        list(check_all(file, ['test_resnet']))
    assert 'accuracy' in file.read_text()
    for foreign in ('{"accuracy":1}', '{"name": "x", "version": "1"}', '[1,', '{"name":"x', ' ', 'text'):
        file.write_text(foreign)  # a line without an end, which a kill does not leave
        with pytest.raises(ValueError, match='line 1, is no check of a model'):
            list(check_all(file, ['test_resnet']))
        assert file.read_text() == foreign
    for cut in ('', '{"na', '{"name": "test_res', '{"name": "test_resnet", "family": "byo'):
        file.write_text(cut)
        assert read_checks(file) == {}
    for args, message in (([], 'name a model, or give --all'), (['resnet18', '--all'], 'not both'),
                          (['--all'], 'needs --out'), (['resnet18', '--out', 'x'], 'belongs to --all')):
        assert main(['check', *args]) == 2
        assert message in ' '.join(capsys.readouterr().err.split())
    names = models_to_check()
    assert 'resnet18' in names
    assert not [name for name in names if 'lossattn' in name or name.endswith('_cifar')]


def test_all_survives_a_killed_process(tmp_path, monkeypatch):
    """Its model is an error, and the next one is checked."""
    monkeypatch.setattr(check_all_module, 'check_small', killed_for_resnet)
    found = [f for f, *_ in check_all(tmp_path / 'checks.jsonl', ['test_resnet', 'test_vit'])]
    assert [(f.kind, f.why) for f in found] == [('error', 'killed'), ('D', 'its class token decides')]


def killed_for_resnet(name, limit_million):
    if name == 'test_resnet':
        os.kill(os.getpid(), signal.SIGKILL)
    return check_model(name, receptive_field=False)
