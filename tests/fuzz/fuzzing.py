"""What the fuzz tests share: how many cases each has, and what may come out of one."""

from __future__ import annotations

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import hypothesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from krdistill.errors import KrdistillError

CASES = int(os.environ.get("KRDISTILL_FUZZ_CASES", "1000"))
# Parts of a hundred: those that are cheap, or face strangers' files, have more.
SHARES = {
    "configurations": 14, "configuration_texts": 8, "command_lines": 4, "study_files": 4, "counts": 10, "functions": 16,
    "objectives": 10, "evaluation": 6, "tables": 8, "archives": 6, "weights_and_cards": 6, "images": 8,
}  # fmt: skip
TRIED: Counter[str] = Counter()

ODD_FLOATS = (
    0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 5e-324, 1e-8, 1e4, 3.4e38, -3.4e38, 1e300, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip
floats = st.sampled_from(ODD_FLOATS) | st.floats(-10, 10)


def fuzz(**strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """A test that tries its share of the cases: each gives a result, or an error of krdistill that says something."""

    def made(test: Callable[..., Any]) -> Callable[..., None]:
        name = test.__name__.removeprefix("test_")
        always_the_same = "KRDISTILL_FUZZ_CASES" not in os.environ

        @settings(
            max_examples=max(1, CASES * SHARES[name] // 100), deadline=None, derandomize=always_the_same, database=None,
            suppress_health_check=list(HealthCheck), print_blob=True,
        )  # fmt: skip
        @hypothesis.given(**strategies)
        @functools.wraps(test)
        def tried(*args: Any, **drawn: Any) -> None:
            TRIED[name] += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    test(*args, **drawn)
            except KrdistillError as error:
                assert str(error).strip()

        return tried

    return made


@st.composite
def mutated(draw: st.DrawFn, originals: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few of them changed, cut, doubled or put in between."""
    content = bytearray(draw(originals))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "set", "cut", "insert", "drop", "double"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "set" and content:
            content[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))
        elif how == "cut":
            del content[at:]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=8))
        elif how == "drop":
            del content[at : at + draw(st.integers(1, 40))]
        else:
            content[at:at] = content[at : at + 40]
    return bytes(content)
