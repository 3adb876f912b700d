"""The statistics of the records: is a mean below the target, does A differ from B, how many more runs does it take?

    summary([3.2785, 3.2791, 3.2780])     n, mean and sd
    below(losses, 3.28)                   one-sided t-test: p of so low a mean if the true one were at the target
    fixed_sigma(losses, 3.28)             the rule of the optimisation track: (target - mean) sqrt(n) >= 0.004
    more_runs(losses, 3.28)               runs still missing, if mean and sd stay
    welch(a, b)                           difference of two means with its p and its confidence interval
    holm({"A B": 0.004, "A C": 0.03})     p values of several tests, corrected for their number

A rule asks for p < ALPHA, with seeds that were fixed beforehand. Needs scipy (records/requirements.txt).
"""
import math
import statistics

ALPHA = 0.01        # a claim needs a p below this
CONFIDENCE = 0.99   # of the intervals that are printed
NEED = 0.004        # fixed-sigma rule, in nats: 3.1 sd of one run where the sd is 0.0013
MOST = 10_000       # runs; needing more is the same as never


def distributions():
    """scipy.stats, imported where it is used: a table without tests does without it."""
    try:
        from scipy import stats
    except ImportError:
        raise ValueError("scipy is missing: pip install -r records/requirements.txt") from None
    return stats


def finite(values):
    values = [float(value) for value in values]
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"statistics need finite numbers, at least one; these are {values}")
    return values


def summary(values):
    """(n, mean, sd with n - 1); the sd of a single value is nan."""
    values = finite(values)
    return len(values), statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def below(values, target):
    """p of the one-sided t-test that the true mean is below the target; nan for a single run."""
    n, mean, sd = summary(values)
    if n < 2:
        return math.nan
    if sd == 0:  # the test's limit; scipy would divide by it
        return 0.0 if mean < target else 1.0
    return float(distributions().t.sf((target - mean) * math.sqrt(n) / sd, n - 1))


def fixed_sigma(values, target, need=NEED):
    """((target - mean) sqrt(n), whether that is enough). Needs no sd, so one run can do."""
    n, mean, _ = summary(values)
    score = (target - mean) * math.sqrt(n)
    return score, score >= need - 1e-12  # a margin of exactly 0.004 passes in floating point, too


def runs_needed(margin, sd, alpha=ALPHA):
    """Runs whose mean, `margin` below the target with this sd, gives p < alpha; None when no number does."""
    if not (margin > 0 and math.isfinite(margin) and math.isfinite(sd)):
        return None
    t = distributions().t
    enough = lambda n: margin * math.sqrt(n) > sd * t.isf(alpha, n - 1)
    if not enough(MOST):
        return None
    low, high = 1, MOST  # low is not enough, high is
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def more_runs(values, target, sd=None, alpha=ALPHA):
    """Runs to add for p < alpha, if mean and sd stay as they are; None when the mean is not below the target."""
    n, mean, own = summary(values)
    need = runs_needed(target - mean, own if sd is None else sd, alpha)
    return None if need is None else max(0, need - n)


def welch(a, b, confidence=CONFIDENCE):
    """(mean(a) - mean(b), p of so large a difference if there were none, low, high), variances not taken as equal."""
    (m, mean_a, sd_a), (n, mean_b, sd_b) = summary(a), summary(b)
    difference = mean_a - mean_b
    if min(m, n) < 2:
        return difference, math.nan, -math.inf, math.inf
    va, vb = sd_a ** 2 / m, sd_b ** 2 / n
    if va + vb == 0:  # no noise at all: two contestants that are one and the same, or whose results are fixed
        return difference, 1.0 if difference == 0 else 0.0, difference, difference
    t, df = distributions().t, (va + vb) ** 2 / (va ** 2 / (m - 1) + vb ** 2 / (n - 1))
    half = t.isf((1 - confidence) / 2, df) * math.sqrt(va + vb)
    return difference, float(2 * t.sf(abs(difference) / math.sqrt(va + vb), df)), difference - half, difference + half


def holm(ps):
    """{key: p corrected for the number of tests} by Holm's method; a nan stays and counts as a test."""
    corrected, floor = dict(ps), 0.0
    for i, key in enumerate(sorted((key for key in ps if not math.isnan(ps[key])), key=ps.get)):
        floor = max(floor, min(1.0, ps[key] * (len(ps) - i)))
        corrected[key] = floor
    return corrected


def band(values, confidence=CONFIDENCE):
    """Half-width around the mean where one more run of the same kind falls; nan for a single run."""
    n, _, sd = summary(values)
    return distributions().t.isf((1 - confidence) / 2, n - 1) * sd * math.sqrt(1 + 1 / n) if n > 1 else math.nan


def spread(values, digits, unit=""):
    """"mean ± sd", the sd only where there are several values."""
    n, mean, sd = summary(values)
    return f"{mean:,.{digits}f}" + (f" ± {sd:,.{digits}f}" if n > 1 else "") + unit


def p_text(p):
    return "p unknown (one run)" if math.isnan(p) else f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"
