"""records/stats.py against scipy's own tests, published tables and simulation."""

import math
import sys

import numpy as np
import pytest
import scipy.stats

from helpers import ROOT

sys.path.append(str(ROOT / "records"))
import stats  # noqa: E402

LOSSES = [3.2785, 3.2791, 3.2779, 3.2788, 3.2802]
OTHERS = [3.2811, 3.2795, 3.2830]


def test_summary():
    n, mean, sd = stats.summary(LOSSES)
    assert n == 5 and math.isclose(mean, np.mean(LOSSES)) and math.isclose(sd, np.std(LOSSES, ddof=1))
    assert math.isnan(stats.summary([1.0])[2])


@pytest.mark.parametrize("values", ([], [1.0, math.nan], [math.inf]))
def test_no_statistics_of_nothing(values):
    with pytest.raises(ValueError, match="finite numbers"):
        stats.summary(values)


@pytest.mark.parametrize("target", (3.2775, 3.2789, 3.28, 3.29))
def test_the_one_sided_test_is_scipys(target):
    expected = scipy.stats.ttest_1samp(LOSSES, target, alternative="less").pvalue
    assert math.isclose(stats.below(LOSSES, target), expected, rel_tol=1e-9)


def test_the_one_sided_test_at_its_limits():
    assert math.isnan(stats.below([3.2], 3.28))
    assert stats.below([3.2, 3.2], 3.28) == 0 and stats.below([3.28, 3.28], 3.28) == 1


def test_the_fixed_sigma_rule():
    """A margin of 0.001 is enough from 16 runs on, one of 0.004 at once."""
    assert stats.fixed_sigma([3.279] * 16, 3.28)[1] and not stats.fixed_sigma([3.279] * 15, 3.28)[1]
    score, passes = stats.fixed_sigma([3.276], 3.28)
    assert math.isclose(score, 0.004, rel_tol=1e-6) and passes
    assert not stats.fixed_sigma([3.2761], 3.28)[1] and not stats.fixed_sigma([3.29] * 100, 3.28)[1]


@pytest.mark.parametrize("sd, needed", ((0.0013, (40, 13, 8, 6, 4)), (0.0018, (74, 21, 11, 8, 6))))
def test_runs_needed(sd, needed):
    """By trying every n with scipy's t-test quantile; the figures are those known from the speedrun's records."""
    margins = (0.0005, 0.001, 0.0015, 0.002, 0.003)
    slow = [next(n for n in range(2, 100) if scipy.stats.t.sf(m * math.sqrt(n) / sd, n - 1) < 0.01) for m in margins]
    assert [stats.runs_needed(margin, sd) for margin in margins] == slow
    assert all(abs(a - b) <= 1 for a, b in zip(slow, needed)), (slow, needed)


def test_more_runs():
    assert stats.more_runs(LOSSES, 3.28) == stats.runs_needed(3.28 - np.mean(LOSSES), np.std(LOSSES, ddof=1)) - 5 > 0
    assert stats.more_runs([3.2701, 3.2702, 3.27] * 2, 3.28) == 0
    assert stats.more_runs(OTHERS, 3.28) is None and stats.more_runs([3.27], 3.28) is None
    assert stats.more_runs([3.279], 3.28, sd=0.0013) == stats.runs_needed(0.001, 0.0013) - 1
    assert stats.runs_needed(1e-9, 1.0) is None and stats.runs_needed(0.1, 0.0) == 2


def test_welch_is_scipys():
    expected = scipy.stats.ttest_ind(LOSSES, OTHERS, equal_var=False)
    interval = expected.confidence_interval(0.99)
    difference, p, low, high = stats.welch(LOSSES, OTHERS)
    assert math.isclose(difference, np.mean(LOSSES) - np.mean(OTHERS))
    assert math.isclose(p, expected.pvalue, rel_tol=1e-9)
    assert math.isclose(low, interval.low, rel_tol=1e-9) and math.isclose(high, interval.high, rel_tol=1e-9)


def test_welch_at_its_limits():
    assert stats.welch([1.0, 1.0], [1.0, 1.0])[:2] == (0.0, 1.0)
    assert stats.welch([2.0, 2.0], [1.0, 1.0])[:2] == (1.0, 0.0)
    difference, p, low, high = stats.welch([2.0], [1.0, 1.1])
    assert math.isclose(difference, 0.95) and math.isnan(p) and (low, high) == (-math.inf, math.inf)


def test_holm():
    corrected = stats.holm(dict(a=0.01, b=0.04, c=0.03, d=0.005))
    assert {key: round(p, 6) for key, p in corrected.items()} == dict(a=0.03, b=0.06, c=0.06, d=0.02)
    with_nan = stats.holm(dict(a=0.4, b=math.nan))
    assert with_nan["a"] == 0.8 and math.isnan(with_nan["b"])


def test_the_band_holds_one_more_run_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(3000, 4))
    outside = sum(abs(x - np.mean(rest)) > stats.band(rest) for x, *rest in draws.tolist())
    assert 12 <= outside <= 52, outside  # 30 expected, sd 5.5: four sd either way
    assert math.isnan(stats.band([1.0]))


def test_words():
    assert stats.spread([1.0], 2) == "1.00" and stats.spread([1000.0, 1002.0], 1) == "1,001.0 ± 1.4"
    assert stats.p_text(0.0123) == "p = 0.012" and stats.p_text(1e-9) == "p < 0.0001"
    assert "one run" in stats.p_text(math.nan)


def test_without_scipy_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert stats.fixed_sigma([3.276], 3.28)[1]
    with pytest.raises(ValueError, match="pip install -r records/requirements.txt"):
        stats.below(LOSSES, 3.28)
