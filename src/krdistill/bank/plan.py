"""When a bank pays."""

from __future__ import annotations

DEFAULT_VIEWS = 32  # measured: docs/performance.md
WORTH = 1.2  # a bank must save at least a sixth of the teacher's work
AUTO_BYTES = 4 * 2**30  # a larger bank is built only when it is asked for


def views_that_pay(epochs: int, students: int) -> int:
    """How many views to store for ``students`` trainings of ``epochs`` epochs; 0 where asking the teacher is as cheap.

    Never more than the epochs: with as many views as epochs every epoch has views of its own, and nothing is lost.
    """
    views = min(epochs, DEFAULT_VIEWS)
    return views if students * epochs >= WORTH * views else 0
