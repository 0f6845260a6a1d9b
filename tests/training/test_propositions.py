"""What the loss of the image says of its patches: lower bounds of the patch terms of Eqs. 9 and 10, proved and tried.

Notation as in the paper: p_m the logits of patch m, α_m ≥ 0 its weight with Σ_m α_m = 1, z = Σ_m α_m p_m the logits of
the image. CE(p, y) = log Σ_k exp(p_k) − p_y, ℓ(v) = −log σ(v) = log(1 + exp(−v)). Each docstring states a bound and
proves it; the statements and proofs are ours. All is computed in float64 from features through the heads.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from naive_heads import create_head
from timm_lossattn import LossAttentionLoss
from timm_lossattn.evaluation.metrics import label_consistent

CHANNELS = 5
inputs = st.fixed_dictionaries({
    'seed': st.integers(0, 2 ** 31), 'classes': st.integers(2, 6), 'rows': st.integers(1, 3), 'cols': st.integers(1, 4),
    'scale': st.sampled_from([1e-3, 0.3, 1., 5., 40.]), 'xi': st.sampled_from([0., 0.1, 0.5, 1.])})
pools = st.sampled_from(['lossattn', 'avg', 'attn', 'gatedattn'])


def predict(pool, seed, classes, rows, cols, scale, xi, images=3):
    """Prediction of a head with random weights for random features, and a generator for the targets."""
    generator = torch.Generator().manual_seed(seed)
    head = create_head('conv', CHANNELS, classes, pool, xi=xi, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        features = scale * torch.randn(images, CHANNELS, rows, cols, generator=generator, dtype=torch.float64)
        return head.forward_patches(features), generator


def at_least(value, bound):
    """Value ≥ bound, but for rounding."""
    return bool((value - bound >= -1e-9 * (1 + bound.abs())).all())


@settings(max_examples=60, deadline=None)
@given(inputs, pools, st.booleans())
def test_patch_term_is_at_least_the_image_term(drawn, pool, soft):
    """Single label (Eq. 9), any weights: Σ_m α_m CE(p_m, y) ≥ CE(z, y), so that Eq. 9 ≥ (1 + γ) CE(z, y).

    Proof. CE(·, y) is a log-sum-exp minus a linear function. Log-sum-exp is convex: for λ in (0, 1), Hölder's
    inequality with exponents 1/λ and 1/(1 − λ) gives Σ_k e^{λ a_k} e^{(1−λ) b_k} ≤ (Σ_k e^{a_k})^λ (Σ_k e^{b_k})^{1−λ},
    whose logarithm is the claim. z is a convex combination of the p_m, so Jensen's inequality gives
    CE(Σ_m α_m p_m, y) ≤ Σ_m α_m CE(p_m, y). With soft targets, the term is the mean over y of such functions. ∎

    Hence a small patch term is a small image term, whatever the network; the converse does not hold.
    """
    out, generator = predict(pool, **drawn)
    shape = out.logits.shape
    target = (torch.rand(shape, generator=generator, dtype=torch.float64).softmax(1) if soft
              else torch.randint(shape[1], shape[:1], generator=generator))
    for image in range(len(target)):  # the bound holds for each image
        one, y = type(out)(*(part[image:image + 1] for part in out)), target[image:image + 1]
        total, image_term, patch_term = LossAttentionLoss()(one, y, 0.3)
        assert at_least(patch_term, image_term)
        assert at_least(total, 1.3 * image_term)
        assert image_term.item() == pytest.approx(F.cross_entropy(one.logits, y).item())


@settings(max_examples=30, deadline=None)
@given(inputs)
def test_equality_if_the_patches_agree(drawn):
    """All patches with the same logits: both terms are equal, as the proof says (a mean of equal numbers)."""
    out, generator = predict('lossattn', **drawn)
    p = out.patch_logits[:, :1].expand_as(out.patch_logits)
    same = out._replace(patch_logits=p, logits=(out.alpha.unsqueeze(-1) * p).sum(1))
    y = torch.randint(p.shape[2], (len(p),), generator=generator)
    _, image_term, patch_term = LossAttentionLoss()(same, y, 0.1)
    assert patch_term.item() == pytest.approx(image_term.item(), rel=1e-9, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(inputs)
def test_capsules_are_bounded_as_patches_are(drawn):
    """Capsules (Eq. 6): Σ_{c,m} a_cm CE(p_cm, y) ≥ CE(z, y).

    Proof. Eq. 6c leaves a_cm ≥ 0 with Σ_{c,m} a_cm = 1 and Eq. 6e z = Σ_{c,m} a_cm p_cm: Jensen's inequality, as above,
    over capsules in place of patches. ∎
    """
    generator = torch.Generator().manual_seed(drawn['seed'])
    capsules, D = 3, 4
    head = create_head('caps', capsules * D, drawn['classes'], 'lossattn', capsules=capsules, xi=drawn['xi'],
                       dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        x = drawn['scale'] * torch.randn(
            1, capsules * D, drawn['rows'], drawn['cols'], generator=generator, dtype=torch.float64)
        h = head.split(x)
        p = head.fc(h)
        _, a = head.weigh(h, p)
        z = head(x)
    y = torch.randint(drawn['classes'], (1,), generator=generator)
    terms = F.cross_entropy(p.flatten(0, 2), y.expand(p[..., 0].numel()), reduction='none')
    assert at_least((a.flatten() * terms).sum(), F.cross_entropy(z, y))


@settings(max_examples=60, deadline=None)
@given(inputs, pools)
def test_multi_label_patch_term(drawn, pool):
    """Multi-label (Eq. 10), labels Y: Σ_m α_m min_{k∈Y} ℓ(p_mk) ≥ ℓ(Σ_m α_m max_{k∈Y} p_mk); of one label k, ≥ ℓ(z_k).

    Proof. ℓ falls, so min_k ℓ(p_mk) = ℓ(max_k p_mk). ℓ'' = σ(v) σ(−v) > 0, so ℓ is convex, and Jensen's inequality over
    m gives the bound. If Y = {k}, the maximum is p_mk itself and Σ_m α_m p_mk = z_k. ∎

    With more labels, ℓ(max_{k∈Y} z_k) is no lower bound: different patches may each show another label.
    """
    out, generator = predict(pool, **drawn)
    target = torch.randint(2, out.logits.shape, generator=generator).double()
    target[:, 0] = 1.
    single = torch.zeros_like(target)
    single[:, 0] = 1.
    loss = LossAttentionLoss(multi_label=True)
    for image in range(len(target)):
        one = type(out)(*(part[image:image + 1] for part in out))
        best = one.patch_logits[0].masked_fill(target[image] < 0.5, -math.inf).amax(1)
        bound = -F.logsigmoid((one.alpha[0] * best).sum())
        assert at_least(loss.patch_loss(one, target[image:image + 1]), bound)
        assert at_least(loss.patch_loss(one, single[image:image + 1]), -F.logsigmoid(one.logits[0, 0]))


def test_different_patches_may_show_different_labels():
    """Why the bound above has no z: two patches, each sure of one of two labels, have a patch term of almost zero."""
    p = torch.tensor([[[9., -9.], [-9., 9.]]], dtype=torch.float64)
    alpha = torch.full((1, 2), 0.5, dtype=torch.float64)
    contributions = alpha.unsqueeze(-1) * p
    out = predict('avg', 0, 2, 1, 2, 1., 0.)[0]._replace(
        patch_logits=p, alpha=alpha, contributions=contributions, logits=contributions.sum(1))
    term = LossAttentionLoss(multi_label=True).patch_loss(out, torch.ones(1, 2, dtype=torch.float64))
    assert term.item() < 2e-4 < -F.logsigmoid(out.logits.max()).item()


@settings(max_examples=60, deadline=None)
@given(inputs, pools, st.booleans(), st.sampled_from([0., 2., 8.]))
def test_weight_of_the_consistent_patches(drawn, pool, multi_label, lead):
    """Weight of the label-consistent patches, with L the patch term of an image: Σ_{m consistent} α_m ≥ 1 − L / log 2.

    Proof. A patch that is not consistent has a loss of at least log 2. Single label: some j ≠ y has p_j ≥ p_y, so the
    softmax of y is at most that of j, hence at most 1/2. Multi-label: σ(p_k) ≤ 1/2 for all labels k. All losses are
    non-negative, so L ≥ log 2 · Σ_{m not consistent} α_m, and the weights sum to 1 (Markov's inequality). ∎

    This is what the patch term buys: once it is small, nearly all attention lies on patches that are right alone.
    """
    out, generator = predict(pool, **drawn)
    K = drawn['classes']
    y = torch.randint(K, (len(out.logits),), generator=generator)
    target = F.one_hot(y, K).double() if multi_label else y
    out = out._replace(patch_logits=out.patch_logits + lead * F.one_hot(y, K).double().unsqueeze(1))
    consistent = label_consistent(out.patch_logits, target)
    for image in range(len(y)):
        one = type(out)(*(part[image:image + 1] for part in out))
        term = LossAttentionLoss(multi_label=multi_label).patch_loss(one, target[image:image + 1])
        assert at_least((one.alpha[0] * consistent[image]).sum(), 1 - term / math.log(2))


@settings(max_examples=60, deadline=None)
@given(inputs)
def test_attention_prefers_large_logits(drawn):
    """Loss attention with any ξ: Σ_m α_m ‖p_m‖ ≥ 1/M Σ_m ‖p_m‖, the mean of mean pooling.

    Proof. With s_m = ‖p_m‖, Eqs. 5a and 5b make α_m a function of s_m that nowhere falls: a division by a positive
    number, a subtraction, max(·, 0), a division again; or all are equal. So (α_m − α_j)(s_m − s_j) ≥ 0 for all m and j;
    the sum over all pairs, 2M Σ_m α_m s_m − 2 Σ_m α_m Σ_j s_j ≥ 0, with Σ_m α_m = 1 is the claim (Chebyshev). ∎
    """
    out, _ = predict('lossattn', **drawn)
    s = out.patch_logits.norm(dim=2)
    assert at_least((out.alpha * s).sum(1), s.mean(1))
