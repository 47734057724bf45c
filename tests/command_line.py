"""Calls the command line as a person does."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from krdistill.cli import main


def told(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, standard output, and standard error in one line."""
    code = 0
    try:
        main(args)
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, " ".join(err.split())
