"""Losses against loops written from Eqs. 9 and 10, the margin loss, and the ramp-up."""
import math

import pytest
import timm.loss
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from naive_heads import create_head
from timm_lossattn import LossAttentionLoss, MarginLoss, PatchPrediction, gamma_rampup

B, M, K = 3, 4, 5
INDICES = torch.tensor([4, 0, 2])
MULTI_HOT = torch.tensor([[1., 0., 1., 0., 0.], [0., 0., 0., 0., 0.], [0., 1., 0., 1., 1.]])  # image 1: no label


def prediction(seed=0, dtype=torch.float64):
    """A random prediction; logits and patch logits are unrelated, so that each term is seen to use its own."""
    g = torch.Generator().manual_seed(seed)
    p = torch.randn(B, M, K, generator=g, dtype=torch.float64)
    alpha = torch.rand(B, M, generator=g, dtype=torch.float64).square()
    alpha = alpha / alpha.sum(1, keepdim=True)
    logits = torch.randn(B, K, generator=g, dtype=torch.float64)
    wide = dtype if dtype == torch.float64 else torch.float32
    return PatchPrediction(logits.to(dtype), p.to(dtype), alpha.to(wide), (alpha.unsqueeze(-1) * p).to(wide))


def soft_targets():
    return torch.rand(B, K, generator=torch.Generator().manual_seed(9), dtype=torch.float64).softmax(1)


def cross_entropy(logits, y):
    """−Σ_k y_k log softmax(logits)_k for lists."""
    log_sum = math.log(math.fsum(math.exp(v) for v in logits))
    return -math.fsum(t * (v - log_sum) for t, v in zip(y, logits))


def one_hot(index, smoothing):
    return [(1 - smoothing) * (k == index) + smoothing / K for k in range(K)]


def neg_log_sigmoid(v):
    return math.log1p(math.exp(-v))


def naive_patch_term(out, nll):
    """mean_i Σ_m α_im nll(i, p_im) for a function nll(i, list)."""
    return math.fsum(
        out.alpha[i, m].item() * nll(i, out.patch_logits[i, m].tolist())
        for i in range(B) for m in range(M)) / B


def naive_eq9(out, ys):
    image = math.fsum(cross_entropy(out.logits[i].tolist(), ys[i]) for i in range(B)) / B
    return image, naive_patch_term(out, lambda i, p: cross_entropy(p, ys[i]))


def naive_eq10(out, target):
    image = 0.
    for i in range(B):
        for k in range(K):
            z = out.logits[i, k].item()
            image += neg_log_sigmoid(z) if target[i, k] else neg_log_sigmoid(-z)

    def nll(i, p):
        positive = [k for k in range(K) if target[i, k]]
        return min(neg_log_sigmoid(p[k]) for k in positive) if positive else 0.

    return image / B, naive_patch_term(out, nll)


def assert_terms(terms, image, patch, gamma, tolerance=1e-10):
    assert [t.shape for t in terms] == [(), (), ()]
    assert terms[0].item() == pytest.approx(image + gamma * patch, abs=tolerance, rel=tolerance)
    assert terms[1].item() == pytest.approx(image, abs=tolerance, rel=tolerance)
    assert terms[2].item() == pytest.approx(patch, abs=tolerance, rel=tolerance)


@pytest.mark.parametrize('gamma', [0., 0.07])
@pytest.mark.parametrize('smoothing', [0., 0.1, 0.6])
def test_eq9_equals_loops(smoothing, gamma):
    """Single label with and without label smoothing, the same in the image and the patch term."""
    out = prediction()
    terms = LossAttentionLoss(smoothing=smoothing)(out, INDICES, gamma)
    assert_terms(terms, *naive_eq9(out, [one_hot(y, smoothing) for y in INDICES.tolist()]), gamma)


@pytest.mark.parametrize('criterion', [None, timm.loss.SoftTargetCrossEntropy()])
def test_soft_targets_equal_loops(criterion):
    """(B, K) class probabilities, as from mixup."""
    out, y = prediction(), soft_targets()
    assert_terms(LossAttentionLoss(criterion)(out, y, 0.07), *naive_eq9(out, y.tolist()), 0.07)


def test_smoothing_of_probabilities():
    """As torch's cross entropy smooths them, in both terms: a class is the same as its one-hot vector."""
    out, loss = prediction(), LossAttentionLoss(smoothing=0.2)
    rows = torch.tensor([one_hot(y, 0.) for y in INDICES.tolist()], dtype=torch.float64)
    assert_terms(loss(out, rows, 0.07), *(t.item() for t in loss(out, INDICES, 0.07)[1:]), 0.07)
    mixed = soft_targets()
    assert_terms(loss(out, mixed, 0.07), *naive_eq9(out, (0.8 * mixed + 0.2 / K).tolist()), 0.07)
    bce = LossAttentionLoss(timm.loss.BinaryCrossEntropy(smoothing=0.2))  # takes probabilities as they are
    assert bce.patch_loss(out, mixed).item() == pytest.approx(naive_eq9(out, mixed.tolist())[1])
    with pytest.raises(ValueError, match=r'smoothing: Eq\. 10 has none; leave it out with multi_label, got 0\.5'):
        LossAttentionLoss(multi_label=True, smoothing=0.5)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.int64, torch.bool])
@pytest.mark.parametrize('gamma', [0., 0.07])
def test_eq10_equals_loops(gamma, dtype):
    """Multi-label: BCE summed over classes; the cheapest positive label in the patch term; none without labels."""
    out = prediction()
    terms = LossAttentionLoss(multi_label=True)(out, MULTI_HOT.to(dtype), gamma)
    assert_terms(terms, *naive_eq10(out, MULTI_HOT), gamma)


def test_eq10_without_any_label():
    """A batch without positive labels: patch term zero and no NaN in any gradient."""
    leaves = [t.clone().requires_grad_() for t in prediction()]
    terms = LossAttentionLoss(multi_label=True)(PatchPrediction(*leaves), torch.zeros(B, K), 0.1)
    terms[0].backward()
    assert terms[2].item() == 0
    assert leaves[0].grad.abs().min() > 0
    assert (leaves[1].grad == 0).all()
    assert (leaves[2].grad == 0).all()


@pytest.mark.parametrize('criterion', [
    timm.loss.BinaryCrossEntropy(smoothing=0.2),
    timm.loss.BinaryCrossEntropy(smoothing=0., sum_classes=True),
    timm.loss.LabelSmoothingCrossEntropy(smoothing=0.2),
    nn.CrossEntropyLoss(label_smoothing=0.2),
    nn.CrossEntropyLoss(),
], ids=['bce', 'bce_sum', 'label_smoothing', 'torch_smoothing', 'torch'])
def test_criterion_is_the_image_term(criterion):
    """Any criterion gives the image term; the patch term is cross entropy with the criterion's smoothing."""
    out = prediction()
    smoothing = getattr(criterion, 'smoothing', None) or getattr(criterion, 'label_smoothing', 0.)
    _, patch = naive_eq9(out, [one_hot(y, smoothing) for y in INDICES.tolist()])
    terms = LossAttentionLoss(criterion)(out, INDICES, 0.07)
    assert_terms(terms, criterion(out.logits, INDICES).item(), patch, 0.07)


def test_soft_target_binary_cross_entropy():
    """timm's BinaryCrossEntropy on soft targets, as in timm's train.py with --bce-loss and mixup."""
    out, y = prediction(), soft_targets()
    criterion = timm.loss.BinaryCrossEntropy(target_threshold=0.2)
    _, patch = naive_eq9(out, y.tolist())
    assert_terms(LossAttentionLoss(criterion)(out, y, 0.07), criterion(out.logits, y).item(), patch, 0.07)


def test_multi_label_criterion():
    """Multi-label with a criterion of timm: its image term, Eq. 10's patch term."""
    out = prediction()
    criterion = timm.loss.AsymmetricLossMultiLabel()
    terms = LossAttentionLoss(criterion, multi_label=True)(out, MULTI_HOT.double(), 0.07)
    assert_terms(terms, criterion(out.logits, MULTI_HOT.double()).item(), naive_eq10(out, MULTI_HOT)[1], 0.07)


@pytest.mark.parametrize('criterion', [
    nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.2), timm.loss.LabelSmoothingCrossEntropy(0.2)])
def test_smoothing_is_said_once(criterion):
    """It is read from the criterion if that has it, zero as well; another one beside it is an error that names both."""
    out = prediction()
    own = getattr(criterion, 'label_smoothing', getattr(criterion, 'smoothing', None))
    for loss in (LossAttentionLoss(criterion), LossAttentionLoss(criterion, smoothing=own)):
        assert_terms(loss(out, INDICES, 0.07), *naive_eq9(out, [one_hot(y, own) for y in INDICES.tolist()]), 0.07)
    with pytest.raises(ValueError, match=rf'smoothing: 0.3 contradicts criterion\.\w+ = {own}'):
        LossAttentionLoss(criterion, smoothing=0.3)


@pytest.mark.parametrize(('multi_label', 'target'), [(False, INDICES), (False, soft_targets()), (True, MULTI_HOT)])
def test_gradient_through_alpha_is_the_patch_loss(multi_label, target):
    """∂loss/∂α_im = γ/B times the loss of the patch, from loops."""
    leaves = [t.clone().requires_grad_() for t in prediction()]
    out = PatchPrediction(*leaves)
    LossAttentionLoss(multi_label=multi_label)(out, target, 0.3)[0].backward()
    for i in range(B):
        for m in range(M):
            p = out.patch_logits[i, m].tolist()
            if multi_label:
                nll = min((neg_log_sigmoid(p[k]) for k in range(K) if target[i, k]), default=0.)
            else:
                nll = cross_entropy(p, one_hot(target[i].item(), 0.) if target.dim() == 1 else target[i].tolist())
            assert leaves[2].grad[i, m].item() == pytest.approx(0.3 * nll / B, abs=1e-12)


@pytest.mark.parametrize(('multi_label', 'target'), [(False, INDICES), (True, MULTI_HOT)])
def test_detached_alpha_has_other_gradients(multi_label, target):
    """Through a head, the classifier's gradient differs from that with a detached α."""
    torch.manual_seed(0)
    head = create_head('conv', 6, K, 'lossattn', dtype=torch.float64)
    out = head.forward_patches(torch.randn(B, 6, 2, 2, dtype=torch.float64))
    loss = LossAttentionLoss(multi_label=multi_label)
    attached, detached = (
        torch.autograd.grad(loss.patch_loss(o, target), head.fc.weight, retain_graph=True)[0]
        for o in (out, out._replace(alpha=out.alpha.detach())))
    assert (attached - detached).abs().max() > 1e-3


@pytest.mark.parametrize(('multi_label', 'smoothing', 'target'), [
    (False, 0., INDICES), (False, 0.1, INDICES), (False, 0., soft_targets()), (True, 0., MULTI_HOT)])
def test_gradcheck(multi_label, smoothing, target):
    """Gradients with respect to logits, patch logits and α equal finite differences."""
    loss = LossAttentionLoss(multi_label=multi_label, smoothing=smoothing)
    out = prediction()
    leaves = [t.clone().requires_grad_() for t in out[:3]]
    assert torch.autograd.gradcheck(
        lambda z, p, a: loss(PatchPrediction(z, p, a, out.contributions), target, 0.3), leaves)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(('multi_label', 'target'), [
    (False, INDICES), (False, soft_targets().float()), (True, MULTI_HOT)])
def test_half_precision_is_computed_in_float32(multi_label, target, dtype):
    """Half-precision logits, also under autocast: float32 losses that equal those of the logits cast first."""
    out = prediction(dtype=dtype)
    wide = PatchPrediction(*(t.float() for t in out))
    loss = LossAttentionLoss(multi_label=multi_label)
    expected = loss(wide, target, 0.1)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        under_autocast = loss(out, target, 0.1)
    for terms in (loss(out, target, 0.1), under_autocast):
        assert [t.dtype for t in terms] == [torch.float32] * 3
        assert [t.item() for t in terms] == [t.item() for t in expected]


@pytest.mark.parametrize(('multi_label', 'shape'), [
    (False, (B + 1,)), (False, (B, 1)), (False, (B, K + 1)), (False, (B + 1, K)), (False, (B, M, K)), (False, ()),
    (True, (B,)), (True, (B, K - 1)), (True, (K,)),
])
def test_wrong_target_shape(multi_label, shape):
    """Neither (B,) nor (B, K), or (B,) with multi_label: ValueError that gives both shapes."""
    target = torch.zeros(shape, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'target must be .*\(3, 5\).*got') as error:
        LossAttentionLoss(multi_label=multi_label)(prediction(), target, 0.1)
    assert str(tuple(shape)) in str(error.value)


def test_one_class():
    """Its softmax is 1 whatever the logit is: refused, but for classes that are independent."""
    one = PatchPrediction(*(tensor[..., :1] if tensor.dim() == 3 or name == 'logits' else tensor
                            for name, tensor in prediction()._asdict().items()))
    with pytest.raises(ValueError, match='multi_label must be True'):
        LossAttentionLoss()(one, torch.zeros(B, dtype=torch.int64), 0.1)
    assert LossAttentionLoss(multi_label=True)(one, torch.ones(B, 1), 0.1)[2] > 0


@pytest.mark.parametrize('ignored', [-100, 255])
def test_ignored_images(ignored):
    """Images without a label count in neither term."""
    p = prediction()
    loss = LossAttentionLoss(nn.CrossEntropyLoss(ignore_index=ignored, label_smoothing=0.1))
    some = loss(p, torch.tensor([4, ignored, 2]), 0.5)
    alone = loss(PatchPrediction(*(tensor[[0, 2]] for tensor in p)), torch.tensor([4, 2]), 0.5)
    torch.testing.assert_close(some, alone)


def test_smoothing_of_jsd():
    """timm's loss keeps it in the cross entropy that it has inside."""
    p, soft = prediction(), LossAttentionLoss(smoothing=0.1)
    jsd = LossAttentionLoss(timm.loss.JsdCrossEntropy(num_splits=3, smoothing=0.1))
    assert jsd.smoothing == 0.1
    torch.testing.assert_close(jsd.patch_loss(p, INDICES), soft.patch_loss(p, INDICES))


@pytest.mark.parametrize('smoothing', [-0.1, 1., 1.5, math.nan])
def test_smoothing_out_of_range(smoothing):
    """Smoothing outside [0, 1): ValueError that names it."""
    with pytest.raises(ValueError, match='smoothing'):
        LossAttentionLoss(smoothing=smoothing)


@pytest.mark.parametrize(('tau', 'expected'), [
    (0, 0.),
    (1, 0.1 * math.exp(-5 * (79 / 80) ** 2)),
    (40, 0.1 * math.exp(-5 / 4)),
    (79.5, 0.1 * math.exp(-5 * (0.5 / 80) ** 2)),
    (80, 0.1),
    (80.5, 0.1),
    (1000, 0.1),
])
def test_gamma_rampup_values(tau, expected):
    """γ(0) = 0, γ_max exp(−5 (1 − T)²) on the ramp, γ_max from its end on."""
    assert gamma_rampup(tau) == pytest.approx(expected, abs=1e-15)


@settings(deadline=None, max_examples=50)
@given(tau=st.floats(1e-3, 200), later=st.floats(0, 50), gamma_max=st.floats(0, 10), length=st.floats(1, 300))
def test_gamma_rampup_properties(tau, later, gamma_max, length):
    """The ramp never falls, stays in [0, γ_max], and depends on τ / length only."""
    gamma = gamma_rampup(tau, gamma_max, length)
    assert 0 <= gamma <= gamma_rampup(tau + later, gamma_max, length) <= gamma_max
    assert gamma == pytest.approx(gamma_rampup(tau / length * 80, gamma_max), rel=1e-9, abs=1e-12)


def test_gamma_rampup_without_ramp():
    """A ramp of no length: γ_max from the start."""
    assert gamma_rampup(0, 0.3, 0) == 0.3


@pytest.mark.parametrize('name', ['tau', 'gamma_max', 'rampup_epochs'])
@pytest.mark.parametrize('value', [-1, -1e-9, math.nan])
def test_gamma_rampup_negative(name, value):
    """Negative arguments (or NaN): ValueError that names the argument."""
    with pytest.raises(ValueError, match=f'^{name} must'):
        gamma_rampup(**{'tau': 1., name: value})


@pytest.mark.parametrize('soft', [False, True])
@pytest.mark.parametrize('args', [{}, dict(m_plus=0.7, m_minus=0.2, down_weight=0.25)])
def test_margin_loss_equals_loops(args, soft):
    """Sabour et al., Eq. 4, for class indices and class probabilities."""
    lengths = torch.rand(B, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    m_plus, m_minus, down = args.get('m_plus', 0.9), args.get('m_minus', 0.1), args.get('down_weight', 0.5)
    target = soft_targets() if soft else INDICES
    total = 0.
    for i in range(B):
        for k in range(K):
            y = target[i, k].item() if soft else float(INDICES[i] == k)
            v = lengths[i, k].item()
            total += y * max(0, m_plus - v) ** 2 + down * (1 - y) * max(0, v - m_minus) ** 2
    assert MarginLoss(**args)(lengths, target).item() == pytest.approx(total / B, abs=1e-12)


def test_margin_loss_half_precision():
    """Half-precision lengths: computed in float32."""
    lengths = torch.rand(B, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    loss = MarginLoss()(lengths, INDICES)
    assert loss.dtype == torch.float32
    assert loss.item() == MarginLoss()(lengths.float(), INDICES).item()


def test_margin_loss_as_image_term():
    """The margin loss is a criterion: image term from it, patch term cross entropy."""
    out = prediction()
    _, patch = naive_eq9(out, [one_hot(y, 0.) for y in INDICES.tolist()])
    terms = LossAttentionLoss(MarginLoss())(out, INDICES, 0.07)
    assert_terms(terms, MarginLoss()(out.logits, INDICES).item(), patch, 0.07)
