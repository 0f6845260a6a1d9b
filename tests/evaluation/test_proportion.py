"""proportion.py against its definition."""
import statistics

import pytest

from timm_lossattn.evaluation.proportion import wilson_interval


@pytest.mark.parametrize(('hits', 'n', 'low', 'high'), [
    (8761, 10000, 0.8695, 0.8824), (0, 10, 0., 0.2775), (10, 10, 0.7225, 1.), (1, 2, 0.0945, 0.9055)])
def test_wilson_interval(hits, n, low, high):
    """The limits solve (p̂ − p)² = z² p (1 − p) / n."""
    found = wilson_interval(hits, n)
    assert found == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
    z = statistics.NormalDist().inv_cdf(0.975)
    for p in found:
        assert (hits / n - p) ** 2 == pytest.approx(z ** 2 * p * (1 - p) / n, abs=1e-9)
