"""How many cases are tried, and what is told of them.

1,000 cases in all by default, always the same ones; KRDISTILL_FUZZ_CASES asks for more, which are others every time
(Hypothesis prints what reproduces a failure), and KRDISTILL_FUZZ_JSON names a file for the counts.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from fuzzing import CASES, SHARES, TRIED

_CASES: Counter[str] = Counter()
_FAILED: Counter[str] = Counter()
_BEGAN = time.monotonic()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Notes the cases of a test where it is run, which may be a process of pytest-xdist."""
    yield
    name = item.name.removeprefix("test_")
    if name in TRIED:
        item.user_properties.append(("fuzz", (name, TRIED[name])))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for key, value in report.user_properties if report.when == "call" else ():
        if key == "fuzz":
            name, count = value  # type: ignore[misc]
            _CASES[name] += count
            _FAILED[name] += report.failed


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Writes the counts, where that was asked for."""
    target = os.environ.get("KRDISTILL_FUZZ_JSON")
    if not target or hasattr(session.config, "workerinput"):
        return
    import torch

    from krdistill.files import write_json
    from krdistill.runfolder import environment

    write_json(
        Path(target),
        {
            "cases": sum(_CASES.values()),
            "cases_per_target": {name: _CASES[name] for name in SHARES},
            "failures": {name: _FAILED[name] for name in SHARES},
            "asked_for": CASES,
            "seconds": round(time.monotonic() - _BEGAN, 1),
            "hypothesis": hypothesis.__version__,
            "provenance": environment(torch.device("cpu")),
        },
    )
