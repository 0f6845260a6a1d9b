"""Directions and evidence against naive loops in float64."""
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timm_lossattn import PatchPrediction
from timm_lossattn.explanation import Explanation
from timm_lossattn.explanation.evidence import direction, direction_over_rivals, evidence_along
from timm_lossattn.explanation.geometry import spread_over_neighbours


def naive_weights(z, t, against):
    """w_k of the other classes, one image, as the definition says."""
    others = [k for k in range(len(z)) if k != t]
    if against == 'mean':
        return {k: 1 / len(others) for k in others}
    total = sum(math.exp(z[k] - max(z)) for k in others)
    return {k: math.exp(z[k] - max(z)) / total for k in others}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 4), st.integers(1, 7), st.integers(2, 6),
       st.sampled_from(['rest', 'mean']))
def test_evidence_is_exact_and_as_defined(seed, B, M, K, against):
    generator = torch.Generator().manual_seed(seed)
    contributions = 3 * torch.randn(B, M, K, generator=generator)
    logits = contributions.sum(dim=1)
    target = torch.randint(K, (B,), generator=generator)
    v = direction(logits, target, against)
    evidence = evidence_along(contributions, v)
    for i in range(B):
        z, c, t = logits[i].tolist(), contributions[i].tolist(), int(target[i])
        w = naive_weights(z, t, against)
        for m in range(M):
            assert float(evidence[i, m]) == pytest.approx(c[m][t] - sum(w[k] * c[m][k] for k in w), abs=2e-5)
        assert float(evidence[i].sum()) == pytest.approx(z[t] - sum(w[k] * z[k] for k in w), abs=5e-5)
    torch.testing.assert_close(v.sum(dim=1), torch.zeros(B), rtol=0., atol=1e-6)


def test_evidence_under_autocast():
    """Contributions are float32; a matrix product would be rounded there."""
    contributions, v = torch.randn(2, 9, 5), torch.randn(2, 5)
    with torch.autocast('cpu', torch.bfloat16):
        found = evidence_along(contributions, v)
    assert torch.equal(found, evidence_along(contributions, v))
    torch.testing.assert_close(found.sum(dim=1), (contributions.sum(dim=1) * v).sum(dim=1))


def test_rivals_that_matter():
    """A class that is far behind counts for nothing, however many there are of them; the mean counts them all."""
    logits = torch.tensor([[5., 4., *[-20.] * 98]])
    v = direction_over_rivals(logits, torch.tensor([0]))
    assert v[0, :2].tolist() == pytest.approx([1., -1.], abs=1e-6)
    assert v[0, 2:].abs().max() < 1e-9
    assert direction(logits, torch.tensor([0]), 'mean')[0, 1:].tolist() == pytest.approx([-1 / 99] * 99)


@pytest.mark.parametrize('against', ['rest', 'mean', None])
def test_single_class(against):
    """It has no others: its evidence are its contributions, whatever it should be compared with."""
    assert direction(torch.tensor([[2.]]), torch.tensor([0]), against).tolist() == [[1.]]


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_extreme_logits(dtype):
    """Neither overflow nor NaN."""
    logits = torch.tensor([[6e4, -6e4, 6e4], [0., 0., 0.]], dtype=dtype)
    v = direction_over_rivals(logits, torch.tensor([0, 2]))
    assert v.dtype == torch.float32
    assert v.tolist() == [[1., 0., -1.], [-0.5, -0.5, 1.]]


def test_no_gradient_through_the_weights():
    """They are constants of the question; d(v·z)/dz is v."""
    z = torch.randn(2, 5, requires_grad=True)
    v = direction(z, torch.tensor([1, 2]))
    gradient, = torch.autograd.grad((v * z).sum(), z)
    assert torch.equal(gradient, v)


def test_direction_of_an_explanation():
    """The number that another tool has to be asked about is the one that the evidence sums to; JSON has the rivals."""
    contributions = torch.randn(2, 4, 3)
    alpha = torch.full((2, 4), 0.25)
    logits = contributions.sum(dim=1)
    boxes = torch.tensor([[0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8], [4, 4, 8, 8]])
    explanation = Explanation(
        PatchPrediction(logits, contributions / 0.25, alpha, contributions), logits.softmax(1), torch.tensor([0, 1]),
        (2, 2), (8, 8), boxes, alpha > 0, torch.zeros(2, 3, 8, 8), ([0.] * 3, [1.] * 3), ['cat', 'dog', 'bird'], 'rest')
    for against in ('rest', 'mean', 2, None):
        one = explanation.versus(against)
        torch.testing.assert_close(one.evidence.sum(1), (one.direction * logits).sum(1))
    rivals = {r['label']: r['weight'] for r in explanation.to_dict(0)['rivals']}
    dog, bird = logits[0, 1:].softmax(0).tolist()
    assert rivals == pytest.approx({'dog': dog, 'bird': bird})
    assert explanation.versus(2).to_dict(1)['rivals'] == [{'class': 2, 'label': 'bird', 'weight': 1.}]
    assert explanation.versus(None).to_dict(1)['rivals'] == []


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10 ** 6), st.integers(1, 5), st.integers(1, 5), st.floats(0.2, 3.))
def test_spread_keeps_the_sum(seed, rows, columns, sigma):
    """Against a loop: every patch gives all of its value away, most to near patches that say what it says."""
    g = torch.Generator().manual_seed(seed)
    M = rows * columns
    values, logits = torch.randn(2, M, generator=g), 3 * torch.randn(2, M, 4, generator=g)
    found = spread_over_neighbours(values, logits, (rows, columns), sigma)
    p = logits.double().softmax(2)
    expected = torch.zeros(2, M, dtype=torch.float64)
    for b in range(2):
        for m in range(M):
            parts = []
            for n in range(M):
                d2 = (m // columns - n // columns) ** 2 + (m % columns - n % columns) ** 2
                alike = sum(math.sqrt(float(p[b, m, k] * p[b, n, k])) for k in range(4))
                parts.append(math.exp(-d2 / (2 * sigma ** 2)) * alike ** 2)
            expected[b] += values[b, m].double() * torch.tensor(parts, dtype=torch.float64) / sum(parts)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.sum(1), values.sum(1), rtol=1e-4, atol=1e-4)
    one = spread_over_neighbours(values, logits[:1], (rows, columns), sigma)  # the same image asked twice
    torch.testing.assert_close(one[0], found[0])


def test_spread_stops_at_a_border():
    """Between patches that say another class nothing is shared, between patches that say the same it is."""
    logits = torch.tensor([[[50., 0.], [50., 0.], [0., 50.], [0., 50.]]])
    found = spread_over_neighbours(torch.tensor([[4., 0., 0., -2.]]), logits, (1, 4), 100.)
    torch.testing.assert_close(found, torch.tensor([[2., 2., -1., -1.]]), atol=1e-3, rtol=0.)


def test_spread_of_independent_classes():
    """Against a loop over classes: a class that is there with one patch and not with the other parts them."""
    g = torch.Generator().manual_seed(0)
    values, logits = torch.randn(1, 4, generator=g), 4 * torch.randn(1, 4, 3, generator=g)
    p = logits[0].double().sigmoid()
    parts = torch.zeros(4, 4, dtype=torch.float64)
    for m in range(4):
        for n in range(4):
            alike = math.prod(math.sqrt(p[m, k] * p[n, k]) + math.sqrt((1 - p[m, k]) * (1 - p[n, k])) for k in range(3))
            parts[m, n] = math.exp(-(m - n) ** 2 / 8) * alike ** 2
    found = spread_over_neighbours(values, logits, (1, 4), 2., independent=True)
    torch.testing.assert_close(found.double(), values.double() @ (parts / parts.sum(1, keepdim=True)))
    single = torch.tensor([[[9.], [-9.]]])  # one class: there, and not there
    found = spread_over_neighbours(torch.tensor([[1., -1.]]), single, (1, 2), 2., independent=True)
    torch.testing.assert_close(found, torch.tensor([[1., -1.]]), atol=1e-3, rtol=0.)


def test_spread_refuses():
    values, logits = torch.randn(1, 4), torch.randn(1, 4, 3)
    assert torch.equal(spread_over_neighbours(values, logits, (2, 2), 0.), values)
    with pytest.raises(ValueError, match='sigma must not be negative, got -1'):
        spread_over_neighbours(values, logits, (2, 2), -1.)
