"""What all heads promise: completeness, precision, pooling, invariances, gradients, degenerate cases, errors."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call

from naive_heads import create_head, threshold
from random_heads import HEADS, LOSS_ATTENTION, WIDTHS, XIS, assert_near, make, patch_shares, shares
from timm_lossattn.attention import LossAttentionWeights
from timm_lossattn.attention.weights import AttentionWeights, GatedAttentionWeights

PRE_LOGITS = ('lossattn', 'avg', 'attn', 'gatedattn', 'caps')  # heads whose classifier is linear in pooled features


class All(torch.nn.Module):
    """forward_patches as a forward, for functional_call."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, x):
        return self.head.forward_patches(x)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('name', HEADS)
def test_contributions_sum_to_logits(name, train):
    """Completeness to 1e-5 in float32, in eval mode and in train mode with dropout."""
    head, x = make(name, batch=4, grid=(3, 3), drop_rate=0.4, dtype=torch.float32)
    head.train(train)
    out = head.forward_patches(x)
    assert_near(out.contributions.sum(1), out.logits.detach(), 1e-5)
    same = torch.equal(head.forward_patches(x).patch_logits, out.patch_logits)
    assert same is not train, 'dropout must act in train mode only'


@pytest.mark.parametrize('name', ['lossattn', 'avg', 'attn', 'gatedattn'])
def test_logits_are_weighted_patch_logits_under_dropout(name):
    """Convolutional heads in train mode with dropout: z = Σ α p of the very α and p that are returned."""
    head, x = make(name, drop_rate=0.4, dtype=torch.float32)
    out = head.train().forward_patches(x)
    assert_near(out.logits, (out.alpha.unsqueeze(-1) * out.patch_logits).sum(1).detach(), 1e-5)


@pytest.mark.parametrize('train', [True, False])
@pytest.mark.parametrize('input_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('name', HEADS)
def test_autocast(name, input_dtype, train):
    """bf16 autocast: α and contributions float32, logits as the patch logits; completeness within bf16 rounding."""
    head, x = make(name, grid=(3, 3), drop_rate=0.4, dtype=torch.float32)
    head.train(train)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = head.forward_patches(x.to(input_dtype))
    assert out.alpha.dtype == torch.float32
    assert out.contributions.dtype == torch.float32
    assert out.logits.dtype == out.patch_logits.dtype
    if name != 'routing':
        assert out.logits.dtype == torch.bfloat16, 'the dtype of the classifier'
    difference = (out.contributions.sum(1) - out.logits.float()).abs()
    assert (difference <= 2. ** -8 * out.logits.float().abs() + 1e-6).all()
    if name in ('lossattn', 'avg', 'attn', 'gatedattn'):
        assert_near(out.contributions, (out.alpha.unsqueeze(-1) * out.patch_logits.float()).detach(), 1e-6)
    if name == 'lossattn':
        expected = [threshold(row, 0.1) for row in shares(out.patch_logits).tolist()]
        assert_near(out.alpha, expected, 1e-6)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('name', HEADS)
def test_half_precision_models(name, dtype):
    """Half-precision models: α in float32 and summing to 1, logits and patch logits in the classifier's dtype."""
    head, x = make(name, grid=(3, 3), dtype=dtype)
    out = head.forward_patches(x)
    assert out.alpha.dtype == torch.float32
    assert_near(out.alpha.sum(1), torch.ones(2), 1e-6)
    assert out.logits.dtype == out.patch_logits.dtype == dtype
    rounding = torch.finfo(dtype).eps / 2
    difference = (out.contributions.sum(1) - out.logits.float()).abs()
    assert (difference <= rounding * out.logits.float().abs() + 1e-6).all()
    if name == 'lossattn':
        expected = [threshold(row, 0.1) for row in shares(out.patch_logits).tolist()]
        assert_near(out.alpha, expected, 1e-6)


def test_float16_norms_do_not_overflow():
    """Patch logits of 1000 have squares beyond float16; α comes out as in float32."""
    p = torch.tensor([[[1000., 1000.], [500., 500.], [0., 0.]]])
    expected = [threshold([2 / 3, 1 / 3, 0.], 0.1)]
    assert_near(LossAttentionWeights(0.1)(p.half(), p.half()), expected, 1e-6)


@pytest.mark.parametrize('name', PRE_LOGITS)
def test_classifier_on_pooled_features_gives_logits(name):
    """head.fc(head.pool(x)) is the image logits in eval mode (Eq. 5d)."""
    head, x = make(name, grid=(3, 3), drop_rate=0.4)
    head.eval()
    pooled = head.pool(x)
    assert pooled.shape == (2, head.num_features)
    assert_near(head.fc(pooled), head.forward_patches(x).logits.detach(), 1e-12)


@pytest.mark.parametrize(('kind', 'global_pool'), [('conv', 'lossattn'), ('conv', 'avg'), ('caps', 'lossattn'),
                                                   ('primarycaps', 'routing')])
def test_no_classes_is_the_mean(kind, global_pool):
    """num_classes=0: pooling is the plain mean over patches (and over capsule channels for loss attention)."""
    capsules, channels = WIDTHS[kind]
    head = create_head(kind, channels, 0, global_pool, capsules=capsules, grid_size=(2, 3))
    x = torch.randn(2, channels, 2, 3)
    expected = x.mean((2, 3))
    if kind == 'caps':
        expected = expected.unflatten(1, (capsules, -1)).mean(1)
    assert_near(head.pool(x), expected, 1e-6)


@pytest.mark.parametrize('kind', ['conv', 'caps', 'primarycaps'])
def test_unpooled(kind):
    """global_pool='' returns the feature map itself."""
    capsules, channels = WIDTHS.get(kind, (0, 5))
    x = torch.randn(2, channels, 2, 3)
    head = create_head(kind, channels, 0, '', capsules=capsules, grid_size=(2, 3))
    assert torch.equal(head.pool(x), x)


@pytest.mark.parametrize('name', HEADS)
def test_alpha_is_the_output_of_attn(name):
    """A forward hook on the submodule ``attn`` sees α."""
    head, x = make(name)
    seen = []
    head.attn.register_forward_hook(lambda module, args, output: seen.append(output))
    out = head.forward_patches(x)
    assert len(seen) == 1
    assert torch.equal(seen[0], out.alpha)


@pytest.mark.parametrize('xi', XIS)
@pytest.mark.parametrize('name', HEADS)
def test_alpha_is_a_distribution(name, xi):
    """α >= 0, sums to 1; for loss attention it is exactly 0 under ξ/M, and only there."""
    head, x = make(name, batch=4, grid=(3, 4), xi=xi, dtype=torch.float32)
    alpha = head.forward_patches(x).alpha.detach()
    assert (alpha >= 0).all()
    assert_near(alpha.sum(1), torch.ones(4), 1e-6)
    if name in LOSS_ATTENTION:
        under = patch_shares(head.double(), x.double()) < xi / 12
        assert torch.equal(alpha == 0, under)
        assert under.any() or xi < 0.5, 'the case must have patches under the threshold'


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 2 ** 31), M=st.integers(1, 9), K=st.integers(1, 5), xi=st.floats(0, 1),
       scale=st.floats(1e-6, 1e6), capsules=st.integers(0, 3))
def test_loss_attention_weights_property(seed, M, K, xi, scale, capsules):
    """At any scale: α a distribution, unchanged by scaling the logits, zero below ξ/M and positive above it."""
    generator = torch.Generator().manual_seed(seed)
    shape = (2, capsules, M, K) if capsules else (2, M, K)
    p = torch.randn(shape, generator=generator)
    attn = LossAttentionWeights(xi)
    alpha = attn(p, p * scale)
    assert (alpha >= 0).all()
    assert_near(alpha.sum(1), torch.ones(2), 1e-5)
    share = shares(p)
    if M > 1:  # at M = 1 and ξ = 1 nothing is above ξ/M, and α is uniform
        assert (alpha[share < xi / M * (1 - 1e-5)] == 0).all()
        assert (alpha[share > xi / M * (1 + 1e-5) + 1e-6] > 0).all()


@pytest.mark.parametrize('name', HEADS)
def test_independent_of_the_batch(name):
    """An image's prediction does not depend on what else is in the batch."""
    head, x = make(name, batch=4, grid=(3, 3))
    together = head.forward_patches(x)
    swapped = head.forward_patches(torch.cat((x[2:3], 100 * x[:1])))
    for field, other in zip(together, swapped):
        assert_near(other[0], field[2].detach(), 1e-12)


@settings(deadline=None, max_examples=40)
@given(data=st.data(), name=st.sampled_from(list(HEADS)), seed=st.integers(0, 2 ** 31),
       grid=st.tuples(st.integers(1, 4), st.integers(1, 4)), xi=st.sampled_from(XIS))
def test_permuting_patches(data, name, seed, grid, xi):
    """Permuted patches: permuted α, patch logits, contributions; same logits (routing: its weights permuted too)."""
    head, x = make(name, grid=grid, xi=xi, seed=seed)
    M = grid[0] * grid[1]
    order = data.draw(st.permutations(range(M)))
    out = head.forward_patches(x)
    if name == 'routing':
        head.fc.weight.data = head.fc.weight.data.unflatten(0, (2, M))[:, order].flatten(0, 1)
    permuted = head.forward_patches(x.flatten(2)[:, :, order].reshape(x.shape))
    assert_near(permuted.logits, out.logits.detach(), 1e-10)
    for field in ('alpha', 'patch_logits', 'contributions'):
        assert_near(getattr(permuted, field), getattr(out, field).detach()[:, order], 1e-10)


@pytest.mark.parametrize(('name', 'xi'), [*((name, 0.5) for name in HEADS), *((name, 0.) for name in LOSS_ATTENTION)])
def test_gradcheck(name, xi):
    """Gradients of all outputs with respect to the features and the classifier's weight equal finite differences."""
    head, x = make(name, grid=(2, 2), num_classes=3, xi=xi, seed=4)
    if name in LOSS_ATTENTION:
        share = patch_shares(head, x)
        assert (share - xi / 4).abs().min() > 1e-3, 'pick another seed: not differentiable at ξ/M'
        assert xi == 0 or (share < xi / 4).any(), 'pick another seed: some patch should be under ξ/M'
    weight = head.fc.weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: tuple(functional_call(All(head), {'head.fc.weight': w}, (x,))), (x.requires_grad_(), weight))


@pytest.mark.parametrize('grid', [(1, 1), (2, 3)])
@pytest.mark.parametrize('xi', [0., 0.1, 1.])
@pytest.mark.parametrize('case', ['zero', 'equal', 'generic', 'zero_image'])
@pytest.mark.parametrize('name', HEADS)
def test_degenerate_cases_stay_finite(name, case, xi, grid):
    """Zero or equal patch logits, ξ = 0 or 1, one patch: finite outputs and gradients, uniform α if nothing is left."""
    head, x = make(name, grid=grid, xi=xi, dtype=torch.float32)
    M = grid[0] * grid[1]
    if case == 'zero':
        for parameter in head.fc.parameters():
            parameter.data.zero_()
    elif case == 'equal':
        x = x[..., :1, :1].expand(x.shape).clone()
        if name != 'routing':
            head.fc.weight.data.zero_()  # all patch logits are the bias
    elif case == 'zero_image':
        x[0] = 0
        if name != 'routing':
            head.fc.bias.data.zero_()
    x.requires_grad_()
    out = head.forward_patches(x)
    loss = sum((field.square() + field).sum() for field in out)
    loss.backward()
    for tensor in (*out, x.grad, *(p.grad for p in head.parameters() if p.grad is not None)):
        assert torch.isfinite(tensor).all()
    assert head.fc.weight.grad is not None
    assert (out.alpha >= 0).all()
    assert_near(out.alpha.sum(1), torch.ones(2), 1e-6)
    uniform = torch.full((2, M), 1. / M)
    if (name in LOSS_ATTENTION and case in ('zero', 'equal')) or M == 1:
        assert_near(out.alpha, uniform, 1e-7)
    if case == 'zero':
        assert (out.logits == 0).all()
    if case == 'zero_image' and name in LOSS_ATTENTION:
        assert_near(out.alpha[0], uniform[0], 1e-7)
        assert_near(out.alpha[1], head.forward_patches(x[1:]).alpha[0].detach(), 1e-6)


@pytest.mark.parametrize(('kind', 'global_pool'), [
    ('conv', 'max'), ('conv', 'routing'), ('caps', 'avg'), ('caps', 'attn'), ('primarycaps', 'lossattn'),
])
def test_create_head_unknown_pool(kind, global_pool):
    """A pooling that this kind of features has not: ValueError that names global_pool and the value."""
    with pytest.raises(ValueError, match=rf'global_pool.*{global_pool!r}'):
        create_head(kind, 12, 3, global_pool, capsules=3, grid_size=(2, 2))


@pytest.mark.parametrize('kind', ['conv', 'caps', 'primarycaps'])
def test_create_head_unpooled_with_classes(kind):
    """global_pool='' with a classifier: ValueError that names global_pool and num_classes."""
    with pytest.raises(ValueError, match=r'global_pool.*num_classes=0, got 3'):
        create_head(kind, 12, 3, '', capsules=3, grid_size=(2, 2))


@pytest.mark.parametrize('xi', [-0.1, 1.1, math.nan, math.inf])
@pytest.mark.parametrize('kind', ['conv', 'caps'])
def test_create_head_xi_out_of_range(kind, xi):
    """ξ outside [0, 1]: ValueError that names xi."""
    with pytest.raises(ValueError, match=r'^xi must'):
        create_head(kind, 12, 3, 'lossattn', capsules=3, xi=xi)


@pytest.mark.parametrize('grid', [(2, 2), (3, 2)])
def test_routing_needs_its_grid(grid):
    """Another patch grid than the routing weights were made for: ValueError that gives both grids and img_size."""
    head, _ = make('routing', grid=(2, 3))
    with pytest.raises(ValueError, match=r'\(2, 3\).*img_size'):
        head.forward_patches(torch.randn(1, 6, *grid, dtype=torch.float64))


@pytest.mark.parametrize('kind', [AttentionWeights, GatedAttentionWeights])
def test_something_is_always_selected(kind):
    """With ξ = 1 and equal weights nothing is above the mean: then it is all that have the largest weight."""
    weights = kind(8, xi=1.)
    assert weights.selected(torch.full((1, 4), 0.25)).tolist() == [[True] * 4]
    assert weights.selected(torch.tensor([[0.1, 0.2, 0.4, 0.3]])).tolist() == [[False, False, True, True]]
