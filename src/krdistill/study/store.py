"""A study is a folder; this is the only place that knows what its files are called."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..config import difference
from ..errors import RunFolderError
from ..files import locked, read_json, write_json, write_text
from .plan import Item, StudyPlan

BANKS = "banks"
INDEX, RESULT, RESULTS, PAGE, REPORT = "study.json", "result.json", "results.json", "results.md", "results.html"
DEVICES = "devices.json"


class StudyFolder:
    """The files of a study.

    | file | what it holds |
    |---|---|
    | ``study.json`` | the study file as it was last run; every cell the folder holds, with its configuration |
    | ``teachers/<name>/``, ``cells/<name>/`` | run folders, ``result.json`` in them once they are finished |
    | ``banks/`` | the teachers' stored answers, shared by their cells |
    | ``devices.json`` | what the students of the pairs cost where they run |
    | ``failures/``, ``logs/`` | by item: what went wrong, what its process printed |
    | ``results.json``, ``results.md``, ``results.html`` | every cell and what they come to |

    Args:
        path: the folder; it is made when a study is begun in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()

    @contextlib.contextmanager
    def opened(self, plan: StudyPlan) -> Iterator[None]:
        """Takes a study in, and keeps others from running it meanwhile: new cells join those that the folder holds.

        Raises:
            RunFolderError: the folder holds other files, or one of the cells with another configuration; or another
                process is running it.
        """
        known = self.path / INDEX
        if not known.is_file() and self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(f"{self.path} exists and holds no study. Choose another folder with --out.")
        self.path.mkdir(parents=True, exist_ok=True)

        def busy() -> None:
            raise RunFolderError(f"Another process is running the study in {self.path}. Wait for it, or stop it.")

        with locked(self.path / ".lock", busy=busy):
            self._take_in(plan)
            yield

    def _take_in(self, plan: StudyPlan) -> None:
        known = self.path / INDEX
        index = read_json(known) if known.is_file() else {"cells": {}, "identities": {}}
        for cell in plan.cells:
            old = index["cells"].get(cell.id)
            if old is None or old == cell.item or not (self.path / old).is_dir():
                continue
            lines = difference(index["identities"][old], dict(plan.items[cell.item].identity))
            shown = "\n  ".join(lines[:12]) + ("\n  ..." if len(lines) > 12 else "")
            raise RunFolderError(
                f"{self.path} already holds {cell.title!r} as another run. It differs in\n  {shown}\n"
                "Nothing was touched. Choose another folder with --out, give what changed another label, or take the "
                "change back. Methods, seeds and labels may be added."
            )
        used = {c.item for c in plan.cells}
        cells = {**index["cells"], **{c.id: c.item for c in plan.cells}}
        identities = {**index["identities"], **{k: dict(plan.items[k].identity) for k in used}}
        write_json(known, {"study": plan.study.model_dump(mode="json"), "cells": cells, "identities": identities})

    @contextlib.contextmanager
    def working(self, key: str) -> Iterator[None]:
        """One process at a time may work on an item; a second one waits."""
        with locked(self.log(key).with_suffix(".lock")):
            yield

    def result(self, key: str) -> dict[str, Any] | None:
        """What a finished item came to, or None."""
        path = self.path / key / RESULT
        if not path.is_file():
            return None
        try:
            found: dict[str, Any] = read_json(path)
        except ValueError as error:
            raise RunFolderError(f"{path} is damaged ({error}). Delete it and run the study again.") from None
        return found

    def finish(self, key: str, result: dict[str, Any]) -> None:
        write_json(self.path / key / RESULT, result)
        self.forget_failure(key)

    def failure(self, key: str) -> dict[str, Any] | None:
        """What went wrong with an item, or None."""
        path = self._failure(key)
        return read_json(path) if path.is_file() else None

    def fail(self, key: str, message: str, kind: str) -> None:
        write_json(self._failure(key), {"message": message, "kind": kind, "log": str(self.log(key))})

    def forget_failure(self, key: str) -> None:
        self._failure(key).unlink(missing_ok=True)

    def failed(self, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if self._failure(item.key).is_file()]

    def devices(self) -> dict[str, Any]:
        """What the students cost where they run, as far as it was measured."""
        path = self.path / DEVICES
        try:
            return dict(read_json(path)) if path.is_file() else {}
        except (ValueError, TypeError) as error:
            raise RunFolderError(f"{path} is damaged ({error}). Delete it and run the study again.") from None

    def write_devices(self, found: dict[str, Any]) -> None:
        write_json(self.path / DEVICES, found)

    def drop_banks(self) -> None:
        """Frees the disk of stored answers that nobody asked for and nobody needs any more."""
        shutil.rmtree(self.path / BANKS, ignore_errors=True)

    def write_results(self, results: dict[str, Any]) -> None:
        """Writes what a study came to: the numbers, and the pages made of them."""
        from ..reporting.study import study_html, study_markdown

        write_json(self.path / RESULTS, results)
        write_text(self.path / PAGE, study_markdown(results))
        write_text(self.path / REPORT, study_html(results))

    def log(self, key: str) -> Path:
        return self.path / "logs" / f"{key.replace('/', '-')}.log"

    def _failure(self, key: str) -> Path:
        return self.path / "failures" / f"{key.replace('/', '-')}.json"
