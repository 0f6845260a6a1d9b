"""Heads of every kind against the definition, patch by patch in float64; and those that are refused."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from timm_lossattn import explain, loss_attention

C, K = 6, 5


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(2, 3))


class Max(nn.Module):
    def forward(self, x):
        return x.amax(dim=(2, 3))


class AvgMax(nn.Module):
    def forward(self, x):
        return 0.5 * (x.amax(dim=(2, 3)) + x.mean(dim=(2, 3)))


class Tiny(nn.Module):
    """A model as timm builds them: a 4×4 patch is a position of the features."""

    def __init__(self, *head):
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = K, C, 3
        self.stem = nn.Conv2d(3, C, 4, stride=4)
        self.head = nn.Sequential(*head)

    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x, pre_logits: bool = False):
        return self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class Tokens(Tiny):
    """Features are tokens behind ``prefix`` others, which the images decide."""

    def __init__(self, prefix, pool, *head):
        super().__init__(*head)
        self.num_prefix_tokens, self.global_pool = prefix, pool

    def forward_features(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return torch.cat([x[:, :1] * (i + 2) for i in range(self.num_prefix_tokens)] + [x], dim=1)

    def forward_head(self, x, pre_logits: bool = False):
        x = x[:, 0] if self.global_pool == 'token' else x[:, self.num_prefix_tokens:].mean(dim=1)
        return self.head(x)

    def forward_intermediates(self, x, indices=None, output_fmt='NCHW', intermediates_only=True):
        return [self.stem(x)]


class HardSwishByHand(nn.Module):
    def forward(self, x):
        return x * F.relu6(x + 3) / 6


class LayerNormByHand(nn.Module):
    def forward(self, x):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / torch.sqrt(centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5)


def linear(a, b):
    return nn.Linear(a, b)


def batch_norm():
    norm = nn.BatchNorm1d(C)
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    return norm


HEADS = {
    'linear': ('A', lambda: [Mean(), linear(C, K)]),
    'batch norm': ('A', lambda: [Mean(), batch_norm(), nn.Dropout(0.5), linear(C, K)]),
    'affine before pooling': ('A', lambda: [nn.BatchNorm2d(C), nn.Conv2d(C, C, 1), Mean(), linear(C, K)]),
    'layer norm': ('B', lambda: [Mean(), nn.LayerNorm(C), linear(C, K)]),
    'RMS norm': ('B', lambda: [Mean(), nn.RMSNorm(C), linear(C, K)]),
    'group norm': ('B', lambda: [Mean(), nn.GroupNorm(2, C), linear(C, K)]),
    'two layer norms': ('B', lambda: [Mean(), nn.LayerNorm(C), linear(C, 7), nn.LayerNorm(7), linear(7, K)]),
    'hardswish': ('C', lambda: [Mean(), linear(C, 7), nn.Hardswish(), linear(7, K)]),
    'relu in place': ('C', lambda: [Mean(), linear(C, 7), nn.ReLU(inplace=True), linear(7, K)]),
    'sigmoid': ('C', lambda: [Mean(), linear(C, 7), nn.Sigmoid(), linear(7, K)]),
    'hardswish by hand': ('C', lambda: [Mean(), linear(C, 7), HardSwishByHand(), linear(7, K)]),
    'layer norm by hand': ('C', lambda: [Mean(), LayerNormByHand(), linear(C, K)]),
    'norm, GELU, norm': ('C', lambda: [
        Mean(), nn.LayerNorm(C), linear(C, 7), nn.GELU(), nn.LayerNorm(7), linear(7, K)]),
}
REFUSED = {
    'max': ([Max(), linear(C, K)], 'not average'),
    'avgmax': ([AvgMax(), linear(C, K)], 'not average'),
    'ReLU before pooling': ([nn.ReLU(), Mean(), linear(C, K)], 'not average'),
    'softmax': ([Mean(), linear(C, K), nn.Softmax(dim=1)], 'cannot be held'),
    'flattened map': ([nn.Flatten(), linear(C * 4, K)], 'single patches'),
    'dense': ([nn.Conv2d(C, K, 1)], r'\(B, K\)'),
}


def model_of(name, seed=0):
    torch.manual_seed(seed)
    return Tiny(*HEADS[name][1]()).double().eval()


def held(steps, h, pooled):
    """A head's steps on one patch, those that are not affine with the state of the pooled vector; by the definition."""
    for step in steps:
        if isinstance(step, nn.LayerNorm):
            sigma = ((pooled - pooled.mean()) ** 2).mean().add(step.eps).sqrt()
            h = step.weight * (h - h.mean()) / sigma + step.bias
        elif isinstance(step, nn.RMSNorm):
            h = step.weight * h / ((pooled ** 2).mean() + torch.finfo(h.dtype).eps).sqrt()
        elif isinstance(step, nn.GroupNorm):
            groups = [slice(0, 3), slice(3, 6)]
            h = torch.cat([(h[g] - h[g].mean()) / (pooled[g].var(unbiased=False) + step.eps).sqrt() for g in groups])
            h = step.weight * h + step.bias
        elif isinstance(step, (nn.Hardswish, nn.GELU, nn.ReLU)):
            h = h * (step(pooled.clone()) / pooled)
        elif isinstance(step, nn.Sigmoid):
            h = 0.5 + h * (step(pooled) - 0.5) / pooled
        elif isinstance(step, nn.BatchNorm1d):
            h = (h - step.running_mean) / (step.running_var + step.eps).sqrt() * step.weight + step.bias
        elif isinstance(step, nn.Linear):
            h = step.weight @ h + step.bias
        pooled = step(pooled.clone()[None])[0]
    return h


def alpha_of(p, xi):
    """Eqs. 5a, 5b."""
    sizes = [math.sqrt(sum(float(v) ** 2 for v in row)) for row in p]
    alpha = [s / sum(sizes) for s in sizes]
    kept = [max(a - xi / len(alpha), 0.) for a in alpha]
    return torch.tensor([k / sum(kept) for k in kept], dtype=torch.float64)


@pytest.mark.parametrize('name', [name for name in HEADS if 'by hand' not in name and 'before' not in name])
@pytest.mark.parametrize('pool', ['lossattn', 'avg'])
def test_definition(name, pool):
    """α, patch logits, contributions and logits as the definitions give them, patch by patch."""
    model = model_of(name)
    patches = loss_attention(model, pool, xi=0.5)
    assert patches.patch_kind == HEADS[name][0]
    steps = list(model.head)[1:]
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    with torch.no_grad():
        out = patches.forward_patches(x)
        for i, features in enumerate(model.forward_features(x)):
            h = features.flatten(1).T
            p = torch.stack([model.head[1:](row[None])[0] for row in h])
            alpha = alpha_of(p, 0.5) if pool == 'lossattn' else torch.full((6,), 1 / 6, dtype=torch.float64)
            pooled = sum(a * row for a, row in zip(alpha, h))
            parts = torch.stack([a * held(steps, row, pooled) for a, row in zip(alpha, h)])
            torch.testing.assert_close(out.patch_logits[i], p)
            torch.testing.assert_close(out.alpha[i], alpha)
            torch.testing.assert_close(out.contributions[i], parts)
            torch.testing.assert_close(out.logits[i], model.head[1:](pooled[None])[0])
        torch.testing.assert_close(out.logits, patches(x))
        torch.testing.assert_close(out.contributions.sum(dim=1), out.logits)
        if pool == 'avg':
            assert torch.equal(patches(x), model(x))


@pytest.mark.parametrize(('by_hand', 'known'), [
    ('hardswish by hand', 'hardswish'), ('affine before pooling', None), ('layer norm by hand', 'layer norm')])
def test_composed_steps(by_hand, known):
    """Steps that a head spells out are exact as well, and give the same shares as the function of that name."""
    model = model_of(by_hand)
    out = loss_attention(model).forward_patches(x := torch.randn(2, 3, 8, 8, dtype=torch.float64))
    torch.testing.assert_close(out.contributions.sum(dim=1), out.logits)
    if known:
        other = model_of(known)
        other.load_state_dict(model.state_dict(), strict=False)
        torch.testing.assert_close(out.contributions, loss_attention(other).forward_patches(x).contributions)


@given(
    name=st.sampled_from(list(HEADS)), seed=st.integers(0, 2**16), xi=st.floats(0, 1), rows=st.integers(1, 4),
    cols=st.integers(1, 4), scale=st.sampled_from([1e-3, 1., 1e3]), double=st.booleans(),
    pool=st.sampled_from(['lossattn', 'avg']))
@settings(max_examples=60, deadline=None)
def test_completeness(name, seed, xi, rows, cols, scale, double, pool):
    """Contributions sum to the logits for whatever head, weights, ξ, grid and scale."""
    dtype = torch.float64 if double else torch.float32
    model = model_of(name, seed).to(dtype)
    patches = loss_attention(model, pool, xi)
    with torch.no_grad():
        out = patches.forward_patches(scale * torch.randn(2, 3, 4 * rows, 4 * cols, dtype=dtype))
    parts = out.contributions
    size = float(parts.abs().sum(dim=1).max()) + float(out.logits.abs().max())  # parts may cancel
    assert float((parts.sum(dim=1) - out.logits).abs().max()) <= (1e-12 if double else 1e-5) * size
    assert bool((out.alpha >= 0).all())
    torch.testing.assert_close(out.alpha.sum(dim=1), torch.ones(2, dtype=out.alpha.dtype))


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    head, reason = REFUSED[name]
    model = Tiny(*head).eval()
    if name == 'flattened map':
        model.pretrained_cfg = {'input_size': (3, 8, 8)}
    with pytest.raises(ValueError, match=reason):
        loss_attention(model)


def test_refused_by_explain():
    with pytest.raises(ValueError, match='global_pool="avg"'):
        explain(Tokens(1, 'token', linear(C, K)).eval(), torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize('prefix', [0, 1, 2, 5])
def test_prefix_tokens(prefix):
    """They are not read; a class token that decides is found out, whatever stands in the weights."""
    torch.manual_seed(0)
    model = Tokens(prefix, 'avg', nn.LayerNorm(C), linear(C, K)).double().eval()
    patches = loss_attention(model)
    assert (patches.patch_layout, patches.patch_prefix, patches.patch_kind) == ('NLC', prefix, 'B')
    x = torch.randn(2, 3, 8, 12, dtype=torch.float64)
    out = patches.forward_patches(x)
    assert patches.patch_grid(8, 12) == (2, 3)
    torch.testing.assert_close(out.contributions.sum(dim=1), out.logits)
    torch.testing.assert_close(loss_attention(model, 'avg')(x), model(x))
    if prefix:
        token = Tokens(prefix, 'token', linear(C, K)).eval()
        nn.init.zeros_(token.head[0].weight)  # says nothing as yet
        with pytest.raises(ValueError, match='class token'):
            loss_attention(token)


def test_grid_that_nobody_says():
    """A model whose maps cannot be made without numbers takes the image all the same."""
    class Silent(Tokens):
        def forward_intermediates(self, x, **kwargs):
            return [self.stem(x) * x.sum().item()]
    new = loss_attention(Silent(0, 'avg', linear(C, K)).eval())
    assert new.forward_patches(torch.randn(1, 3, 8, 12)).alpha.shape == (1, 6)
    with pytest.raises(ValueError, match='does not say how its 6 tokens lie'):
        new.patch_grid(8, 12)


def test_zero_head_is_no_proof():
    """Weights that are zero before training hide what a head does; the probe has weights of its own."""
    model = Tiny(Max(), linear(C, K)).eval()
    nn.init.zeros_(model.head[1].weight)
    with pytest.raises(ValueError, match='not average'):
        loss_attention(model)


def test_forward_that_is_something_else():
    class Scaled(Tiny):
        def forward(self, x):
            return 2 * super().forward(x)
    with pytest.raises(ValueError, match='forward is not'):
        loss_attention(Scaled(Mean(), linear(C, K)))


class Masked(Tiny):
    """Its head takes a mask of positions, as those of timm for images of any size, before pre_logits."""

    def forward_head(self, x, mask=None, pre_logits: bool = False):
        x = x.mean(dim=(2, 3)) if mask is None else (x * mask).sum(dim=(2, 3)) / mask.sum(dim=(2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x, mask=None):
        return self.forward_head(self.forward_features(x), mask=mask)


def test_head_with_a_mask():
    """Without one the model is as any other; with one, positions would count that are none."""
    model = Masked(linear(C, K)).eval()
    new, mean = loss_attention(model), loss_attention(model, 'avg')
    x, mask = torch.randn(2, 3, 8, 8), torch.eye(2).expand(2, 1, 2, 2)
    out = new.forward_patches(x)
    assert torch.equal(new(x), out.logits)
    assert torch.equal(mean(x), model(x))
    assert torch.equal(mean(x, mask), model(x, mask))
    features = new.forward_features(x)
    pooled = new.forward_head(features, pre_logits=True)
    assert torch.equal(pooled, new.forward_head(features, None, True))
    torch.testing.assert_close(new.head(pooled), out.logits)
    for use in (lambda: new(x, mask), lambda: new.forward_head(features, mask)):
        with pytest.raises(ValueError, match='mask must be None'):
            use()
    with pytest.raises(TypeError, match='got a dict'):
        new.forward_patches({'patches': x, 'mask': mask})


def test_forward_that_always_hands_on_a_mask():
    class Always(Masked):
        def forward(self, x):
            return self.forward_head(self.forward_features(x), x.new_ones(1, 1, 1, 1))
    with pytest.raises(ValueError, match='something else beside the features'):
        loss_attention(Always(linear(C, K)).eval())


@pytest.mark.filterwarnings('ignore:var.* degrees of freedom:UserWarning')  # of no numbers
@pytest.mark.parametrize('name', ['linear', 'layer norm', 'two layer norms', 'hardswish', 'batch norm'])
def test_empty_batch(name):
    new = loss_attention(model_of(name))
    x = torch.zeros(0, 3, 8, 8, dtype=torch.float64)
    assert new(x).shape == (0, K)
    assert [tuple(value.shape) for value in new.forward_patches(x)] == [(0, K), (0, 4, K), (0, 4), (0, 4, K)]


@pytest.mark.parametrize('name', ['linear', 'layer norm', 'hardswish', 'batch norm'])
def test_train_mode(name):
    """Masks and batch statistics are those of the pooled vectors; patches leave the running statistics alone."""
    model = model_of(name).train()
    patches = loss_attention(model)
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    out = patches.forward_patches(x)
    torch.testing.assert_close(out.contributions.sum(dim=1), out.logits)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            assert int(module.num_batches_tracked) == 1
            assert module.training
    (out.logits.square().sum() + (out.alpha.unsqueeze(-1) * out.patch_logits).sum()).backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('name', ['linear', 'two layer norms', 'norm, GELU, norm'])
def test_gradients(name):
    """Through weights, held states and contributions, against finite differences."""
    patches = loss_attention(model_of(name))
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(patches.forward_patches(x)), x)
