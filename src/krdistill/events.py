"""What a long job tells whoever started it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class Events:
    """What a caller hears while a run goes on; every method may be overridden, none has to be."""

    def stage(self, name: str, detail: str) -> None:
        """A stage starts."""

    def skipped(self, name: str, detail: str) -> None:
        """A stage's result was already there."""

    def progress(self, name: str, done: int, total: int) -> None:
        """Part of a stage is done."""

    def epoch(self, name: str, line: Mapping[str, Any]) -> None:
        """An epoch ended; ``line`` is what went to the log."""

    def note(self, text: str) -> None:
        """Something a person should know."""
