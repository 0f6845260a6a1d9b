"""Heads against naive loops written from the equations (DESIGN.md section 2)."""
import math

import pytest
import torch

from naive_heads import linear, naive_capsules, naive_conv, naive_routing, softmax
from random_heads import SHAPES, XIS, assert_near, make, patch_shares
from timm_lossattn.attention import ConvPatchHead


def assert_prediction(head, x, naive, tolerance):
    """Compare all outputs, and the classifier on pooled features, with (p, α, contributions, z, θ(pre)) per image."""
    with torch.no_grad():
        out = head.forward_patches(x)
        torch.testing.assert_close(head(x), out.logits, rtol=tolerance, atol=tolerance)  # the short way, logits alone
        pre_logits = head.fc(head.pool(x))
    for i, (p, alpha, contributions, z, from_pre) in enumerate(naive):
        assert_near(out.patch_logits[i], p, tolerance)
        assert_near(out.alpha[i], alpha, tolerance)
        assert_near(out.contributions[i], contributions, tolerance)
        assert_near(out.logits[i], z, tolerance)
        assert_near(pre_logits[i], from_pre, tolerance)
    assert out.logits.dtype == x.dtype
    assert out.alpha.dtype == x.dtype


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('xi', XIS)
@pytest.mark.parametrize(('batch', 'grid'), SHAPES)
def test_eq5_equals_loops(batch, grid, xi, dtype, tolerance):
    """Eq. 5: every output equals the per-patch loops."""
    head, x = make('lossattn', batch, grid, xi=xi, dtype=dtype)
    assert isinstance(head, ConvPatchHead)
    weight, bias = head.fc.weight.tolist(), head.fc.bias.tolist()
    assert_prediction(head, x, [naive_conv(image, weight, bias, xi=xi) for image in x], tolerance)


@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize('xi', XIS)
@pytest.mark.parametrize(('batch', 'grid'), SHAPES)
def test_eq6_equals_loops(batch, grid, xi, dtype, tolerance):
    """Eq. 6: every output equals the loops over capsules and patches."""
    head, x = make('caps', batch, grid, xi=xi, dtype=dtype, seed=3)
    M = grid[0] * grid[1]
    assert M == 1 or (patch_shares(head, x) - xi / M).abs().min() > 1e-4, 'pick another seed: 6c jumps at ξ/M'
    weight, bias = head.fc.weight.tolist(), head.fc.bias.tolist()
    assert_prediction(head, x, [naive_capsules(image, 3, weight, bias, xi) for image in x], tolerance)


@pytest.mark.parametrize('name', ['avg', 'attn', 'gatedattn'])
@pytest.mark.parametrize(('batch', 'grid'), SHAPES)
def test_mean_and_attention_equal_loops(name, batch, grid):
    """Mean pooling, and attention and gated attention of Ilse et al. with 128 hidden units, equal the loops."""
    head, x = make(name, batch, grid)

    def weights(hs):
        if name == 'avg':
            return [1. / len(hs)] * len(hs)
        scores = []
        for h in hs:
            hidden = [math.tanh(t) for t in linear(head.attn.v.weight.tolist(), head.attn.v.bias.tolist(), h)]
            assert len(hidden) == 128
            if name == 'gatedattn':
                gates = linear(head.attn.u.weight.tolist(), head.attn.u.bias.tolist(), h)
                hidden = [t / (1 + math.exp(-g)) for t, g in zip(hidden, gates)]
            scores.append(linear(head.attn.w.weight.tolist(), head.attn.w.bias.tolist(), hidden)[0])
        return softmax(scores)

    weight, bias = head.fc.weight.tolist(), head.fc.bias.tolist()
    assert_prediction(head, x, [naive_conv(image, weight, bias, weights=weights) for image in x], 1e-10)


@pytest.mark.parametrize(('batch', 'grid'), SHAPES)
def test_routing_equals_loops(batch, grid):
    """Dynamic routing equals Procedure 1 in loops: lengths of 16-d class capsules, each patch's part in them."""
    head, x = make('routing', batch, grid)
    out = head.forward_patches(x)
    weight = head.fc.weight.tolist()
    assert len(weight[0][0]) == 16
    for i, image in enumerate(x):
        p, contributions, z = naive_routing(image, 2, weight)
        assert_near(out.patch_logits[i], p, 1e-10)
        assert_near(out.contributions[i], contributions, 1e-10)
        assert_near(out.logits[i], z, 1e-10)
    assert_near(out.alpha, torch.full((batch, grid[0] * grid[1]), 1. / (grid[0] * grid[1])), 1e-7)
    assert_near(out.alpha.sum(1), torch.ones(batch), 1e-12)
