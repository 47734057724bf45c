"""What several seeds say: means with their spread, and paired differences with an interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy import stats

from ..errors import ArgumentError

CONFIDENCE = 0.95


class Summary(NamedTuple):
    """Of n values: ``mean`` (None of none) and sample standard deviation ``std`` (None of fewer than two)."""

    mean: float | None
    std: float | None
    n: int


class Difference(NamedTuple):
    """Mean of n paired differences, and the half-width of its interval; None of a single pair."""

    mean: float
    half_width: float | None
    n: int


def summarise(values: Sequence[float]) -> Summary:
    r"""Mean and sample standard deviation, :math:`s^2 = \frac{1}{n-1} \sum_i (x_i - \bar x)^2`.

    Args:
        values: n finite numbers.

    >>> summarise([1.0, 2.0, 3.0])
    Summary(mean=2.0, std=1.0, n=3)
    """
    n = len(values)
    if n == 0:
        return Summary(None, None, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(mean, None, 1)
    return Summary(mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)), n)


def mean_interval(values: Sequence[float], *, confidence: float = CONFIDENCE) -> float | None:
    r"""Half-width of Student's t interval of a mean, :math:`t_{n-1,\,(1 + \text{confidence}) / 2} \; s / \sqrt n`.

    Args:
        values: n numbers.
        confidence: how often such an interval holds the true mean, in (0, 1).

    Returns:
        None of fewer than two values: they have no interval.
    """
    if not 0 < confidence < 1:
        raise ArgumentError(f"confidence: expected a number in (0, 1), got {confidence!r}.")
    _, std, n = summarise(values)
    return None if std is None else float(stats.t.ppf((1 + confidence) / 2, n - 1)) * std / math.sqrt(n)


def paired_difference(a: Sequence[float], b: Sequence[float], *, confidence: float = CONFIDENCE) -> Difference:
    r"""Mean of the differences of pairs, with Student's t interval.

    With :math:`d_i = a_i - b_i` over n pairs, :math:`\bar d` their mean and s their sample standard deviation:

    .. math:: \bar d \pm t_{n-1,\,(1 + \text{confidence}) / 2} \; s / \sqrt n

    Args:
        a: n numbers.
        b: n numbers, the i-th of the same seed as ``a``'s.
        confidence: how often such an interval holds the true mean, in (0, 1).

    Returns:
        Mean, half-width (None for one pair: it has no interval) and n.

    Raises:
        ArgumentError: no pairs, or lengths that differ.

    Source: Student, "The Probable Error of a Mean", 1908.

    >>> paired_difference([0.5, 0.7], [0.4, 0.4]).n
    2
    """
    if len(a) != len(b) or not a:
        raise ArgumentError(f"Expected as many numbers a as b, at least one, got {len(a)} and {len(b)}.")
    gaps = [x - y for x, y in zip(a, b, strict=True)]
    return Difference(math.fsum(gaps) / len(gaps), mean_interval(gaps, confidence=confidence), len(gaps))
