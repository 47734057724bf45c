"""A trap that leaves a mark where anything runs it, and a small finished run to lay it in."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from traps import TINY, Trap

from krdistill.config import load_config
from krdistill.pipeline import prepare, run


@pytest.fixture
def trap(tmp_path: Path) -> Iterator[Trap]:
    """Afterwards no mark may be there; and one is left where it is unpickled, so the trap is a real one."""
    made = Trap(tmp_path / "sprung")
    pickle.loads(pickle.dumps(made))
    assert made.mark.exists()
    made.mark.unlink()
    yield made
    assert not made.mark.exists(), "a file of a stranger was run"


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "tiny"
    run(prepare(load_config(TINY)), folder)
    return folder


@pytest.fixture
def call() -> Callable[..., int]:
    """The command line, in this process; its exit code."""
    from krdistill.cli import main

    def called(*args: str) -> int:
        try:
            main(list(args))
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return called
