"""Coverage and accuracy where a network answers only what it is sure of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krdistill.errors import ArgumentError
from krdistill.evaluation import coverage_table

CONFIDENCE = np.array([0.9, 0.8, 0.6, 0.4, 0.3])
CORRECT = np.array([True, False, True, True, False])
HEAD = np.array([True, True, True, False, False])


def test_by_hand() -> None:
    table = coverage_table(
        CONFIDENCE,
        CORRECT,
        groups={"head": HEAD, "tail": ~HEAD, "none": np.zeros(5, bool)},
        thresholds=(0, 0.6, 0.95),
    )
    assert [(r["threshold"], r["coverage"], r["accuracy"]) for r in table] == [
        (0.0, 1.0, pytest.approx(3 / 5)),
        (0.6, pytest.approx(3 / 5), pytest.approx(2 / 3)),  # what equals the threshold is answered
        (0.95, 0.0, None),
    ]
    assert table[1]["groups"] == {
        "head": {"coverage": 1.0, "accuracy": pytest.approx(2 / 3)},
        "tail": {"coverage": 0.0, "accuracy": None},
        "none": None,
    }


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_coverage_falls_and_is_that_of_its_parts(rows: list[tuple[float, bool, bool]]) -> None:
    c, right, head = (np.array(column) for column in zip(*rows, strict=True))
    table = coverage_table(c, right, groups={"head": head, "tail": ~head})
    shares = [r["coverage"] for r in table]
    assert shares == sorted(shares, reverse=True) and table[0]["accuracy"] == pytest.approx(right.mean())
    for row in table:
        parts = {"head": head, "tail": ~head}
        answered = sum(
            found["coverage"] * parts[name].sum() for name, found in row["groups"].items() if found is not None
        )
        assert answered == pytest.approx(row["coverage"] * len(c))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"confidence": np.array([])}, "N > 0"),
        ({"correct": CORRECT[:-1]}, "Expected confidence"),
        ({"correct": CORRECT.astype(int)}, "bool"),
        ({"confidence": np.array([0.1, np.nan, 0.2, 0.3, 0.4])}, "confidence: expected numbers in"),
        ({"thresholds": (0.5, 1.2)}, "thresholds: expected numbers in .* got 1.2"),
        ({"groups": {"head": HEAD[:2]}}, "for 'head'"),
    ],
)
def test_what_does_not_fit(change: dict[str, Any], said: str) -> None:
    given = {"confidence": CONFIDENCE, "correct": CORRECT, **change}
    with pytest.raises(ArgumentError, match=said):
        coverage_table(given.pop("confidence"), given.pop("correct"), **given)
