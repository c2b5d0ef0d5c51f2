"""Student's t distribution, so that intervals over a few seeds or classes need no further library.

The tail is an incomplete beta function, computed by its continued fraction (NIST Digital Library of Mathematical Functions,
8.17.22, https://dlmf.nist.gov/8.17), and right to about twelve digits far out in the tail too.
"""

from __future__ import annotations

import math
from functools import lru_cache

_TINY = 1e-300
_MOST_TERMS = 10_000


def two_sided_p_value(t: float, degrees: float) -> float:
    """Chance that a value of Student's distribution lies further from 0 than `t`.

    Args:
        t: any number, infinity too.
        degrees: degrees of freedom, above 0; they need not be whole, and infinity gives the normal distribution.
    """
    if degrees <= 0:
        raise ValueError(f"{degrees} degrees of freedom; there must be more than 0")
    if math.isinf(t):
        return 0.0
    if math.isinf(degrees):
        return math.erfc(abs(t) / math.sqrt(2.0))
    return _incomplete_beta(degrees / 2.0, 0.5, degrees / (degrees + t * t))


@lru_cache(maxsize=1024)
def quantile95(degrees: float) -> float:
    """The number within which, on both sides of 0, Student's distribution has 95 % of its mass: 1.96 for many degrees."""
    low, high = 0.0, 2.0
    while two_sided_p_value(high, degrees) > 0.05:
        high *= 2.0
    while high - low > 1e-12 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if two_sided_p_value(middle, degrees) > 0.05 else (low, middle)
    return high


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b) of x in [0, 1]."""
    if x <= 0.0 or x >= 1.0:
        return max(0.0, min(1.0, x))
    if x > (a + 1.0) / (a + b + 2.0):  # there the fraction converges slowly
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    return math.exp(log_front) / (a * _continued_fraction(a, b, x))


def _continued_fraction(a: float, b: float, x: float) -> float:
    """1 + d1 / (1 + d2 / (1 + ...)), from the front (Lentz's way)."""
    value = numerator = 1.0
    denominator = 0.0
    for term in range(1, _MOST_TERMS):
        half = term // 2
        if term % 2:
            step = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1))
        else:
            step = half * (b - half) * x / ((a + 2 * half - 1) * (a + 2 * half))
        denominator = 1.0 / _not_zero(1.0 + step * denominator)
        numerator = _not_zero(1.0 + step / numerator)
        value *= numerator * denominator
        if abs(numerator * denominator - 1.0) < 1e-15:
            return value
    raise ArithmeticError(f"the incomplete beta function of {a}, {b}, {x} does not converge")


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
