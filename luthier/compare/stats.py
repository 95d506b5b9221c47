"""Small-sample statistics over seeds: Student's t, because three seeds are few.

    mean ± t(0.975, n-1) · s / sqrt(n)                     Student (Gosset), The probable error of a mean, 1908
"""

import math


def t_cdf(t, df):
    """P(T <= t) for a whole number of degrees of freedom, in closed form.  Abramowitz & Stegun 26.7.3-26.7.4"""
    angle, cos2 = math.atan2(t, math.sqrt(df)), df / (df + t * t)
    term, total = (math.cos(angle), 0.0) if df % 2 else (1.0, 0.0)
    for k in range(2 if df % 2 else 1, df, 2):
        total += term
        term *= cos2 * k / (k + 1)
    inside = 2 / math.pi * (angle + math.sin(angle) * total) if df % 2 else math.sin(angle) * total
    return 0.5 + inside / 2


def t_quantile(q, df):
    """The t with P(T <= t) = q, by bisection; accurate to 1e-10."""
    low, high = -1.0, 1.0
    while t_cdf(low, df) > q:
        low *= 2
    while t_cdf(high, df) < q:
        high *= 2
    while high - low > 1e-11 * max(1.0, abs(high)):
        mid = (low + high) / 2
        low, high = (mid, high) if t_cdf(mid, df) < q else (low, mid)
    return (low + high) / 2


def interval(values, level=0.95):
    """(mean, low, high): the t-interval of the mean; a single value has no interval: (value, -inf, inf)."""
    values = [float(v) for v in values]
    n, mean = len(values), math.fsum(values) / len(values)
    if n == 1:
        return mean, -math.inf, math.inf
    s = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = t_quantile((1 + level) / 2, n - 1) * s / math.sqrt(n)
    return mean, mean - half, mean + half


def paired(a, b, level=0.95):
    """The same for a - b, seed by seed: seeds that are hard for both cancel."""
    if len(a) != len(b):
        raise ValueError(f"paired() compares runs seed by seed: {len(a)} against {len(b)} values")
    return interval([x - y for x, y in zip(a, b, strict=True)], level)
