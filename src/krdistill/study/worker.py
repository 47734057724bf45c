"""A process that does items of a study: ``python -m krdistill.study.worker``, told what to do by its input.

The input stays open as long as the process that gives the jobs lives: when that one dies, however it dies, the worker
stops too, so that nobody writes to a run which another process has taken up.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import torch

from .. import pipeline, runfolder
from ..config import RunConfig, difference, dump_config, parse_yaml, read_text, validate
from ..errors import KrdistillError
from ..events import Events
from ..files import write_text
from .results import item_result
from .store import BANKS, StudyFolder

ORPHANED = 3


def attempt(folder: StudyFolder, job: dict[str, Any]) -> None:
    """Does an item as :func:`work`; what goes wrong is written down, and nothing is raised."""
    try:
        work(folder, job)
    except (KrdistillError, OSError) as error:
        folder.fail(job["key"], str(error), type(error).__name__)
    except Exception as error:
        traceback.print_exc()
        folder.fail(job["key"], f"{type(error).__name__}: {error}", type(error).__name__)


def work(folder: StudyFolder, job: dict[str, Any]) -> None:
    """Does one item, or goes on with it, and leaves its ``result.json``.

    Args:
        folder: of the study.
        job: ``key``, ``kind``, ``config``, and for a cell ``teacher``, the key of its teacher.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    key, values = job["key"], job["config"]
    with folder.working(key):
        if folder.result(key) is not None:
            return
        out = folder.path / key
        if job["kind"] == "cell":
            taken = {"run": str(folder.path / job["teacher"]), "file": None, "weights": "none", "tap": None}
            bank = {**values["bank"], "folder": values["bank"]["folder"] or str(folder.path / BANKS)}
            values = {**values, "teacher": {**values["teacher"], **taken}, "bank": bank}
        config: RunConfig = validate(RunConfig, values)
        _make_ready(out, config)
        plan = pipeline.prepare(config)
        if job["kind"] == "teacher":
            pipeline.run_teacher(plan, out, events=_Lines())
        else:
            pipeline.run(plan, out, events=_Lines(), report=False)
        folder.finish(key, item_result(out, key, job["kind"]))


def _make_ready(out: Path, config: RunConfig) -> None:
    """Lets a run folder be gone on with where a study was moved or its methods were relabelled."""
    known = out / runfolder.CONFIG
    if not known.is_file():
        return
    # The name of a cell and the place of its teacher and of stored answers are no part of what it is.
    old = parse_yaml(read_text(known), str(known))
    lines = difference(old, config.as_dict())
    if lines and all(line.startswith(("teacher.run:", "bank.folder:", "name:", "recipe.label:")) for line in lines):
        write_text(known, dump_config(config))


class _Lines(Events):
    """What is worth a line in the item's log."""

    def stage(self, name: str, detail: str) -> None:
        print(f"{name}: {detail}", flush=True)

    def skipped(self, name: str, detail: str) -> None:
        print(f"{name}: {detail}", flush=True)

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)


def main() -> None:
    """Does the jobs that come as lines of JSON, one after the other, and answers each with its key when it is over."""
    answers = os.dup(1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(jobs,), daemon=True).start()
    while True:
        job = jobs.get()
        folder = StudyFolder(Path(job["folder"]))
        _print_to(folder.log(job["key"]))
        attempt(folder, job)
        os.write(answers, f"{job['key']}\n".encode())


def _print_to(log: Path) -> None:
    """What is printed from here on, by whatever part of the process, goes to an item's log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with log.open("ab") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)


def _listen(jobs: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Ends the process where the input ends: whoever gave the jobs is gone."""
    rest = b""
    while chunk := os.read(0, 1 << 16):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            jobs.put(json.loads(line))
    os._exit(ORPHANED)


if __name__ == "__main__":
    main()
