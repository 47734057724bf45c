"""Who does the work: processes on this machine, or a Ray cluster that shares the study's folder."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Protocol

from ..errors import ArgumentError, MissingDependencyError
from .plan import Item
from .store import StudyFolder


class Executor(Protocol):
    """Does items, several at a time.

    Attributes:
        slots: how many at once.
    """

    slots: int

    def start(self, folder: StudyFolder, item: Item) -> None:
        """Begins an item."""

    def ended(self, timeout: float) -> list[tuple[str, str | None]]:
        """Keys that ended within ``timeout`` seconds, each with how its process broke off, or None."""

    def close(self) -> None:
        """Stops what is still going on; it goes on from its checkpoints another time."""


class LocalExecutor:
    """Processes of this machine; each does one item after another.

    Args:
        jobs: how many at once.
        threads: of each.
    """

    def __init__(self, jobs: int = 1, threads: int = 1) -> None:
        self.slots, self.threads = jobs, threads
        self._workers: list[_Worker] = []

    def start(self, folder: StudyFolder, item: Item) -> None:
        idle = next((w for w in self._workers if w.key is None and w.alive), None)
        if idle is None:
            idle = _Worker(folder.log(item.key), self.threads)
            self._workers.append(idle)
        idle.send(job_of(folder, item))

    def ended(self, timeout: float) -> list[tuple[str, str | None]]:
        busy = {w: w.key for w in self._workers if w.key is not None}
        ready, _, _ = select.select(list(busy), [], [], timeout)
        result = [(busy[worker], worker.answer()) for worker in ready]
        self._workers = [w for w in self._workers if w.alive]
        return result

    def close(self) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.close()
        self._workers.clear()


class RayExecutor:
    """Processes of a Ray cluster; every machine sees the study's folder, the data and this package alike.

    Args:
        address: of the cluster; by default one is started here, for as long as the study runs.
        jobs: how many items at once, of a cluster that is started here.
        threads: of each.
    """

    def __init__(self, address: str | None = None, jobs: int = 1, threads: int = 1) -> None:
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise MissingDependencyError(
                "The executor 'ray' needs the package ray: pip install 'krdistill[train,ray]'."
            ) from None
        self._ray = ray
        quiet: dict[str, Any] = {"log_to_driver": False, "include_dashboard": False} if address is None else {}
        try:
            ray.init(
                address or "local", logging_level="error", **quiet,
                **({"num_cpus": jobs * threads} if address is None else {}),
            )  # fmt: skip
        except (ConnectionError, ValueError) as error:
            raise ArgumentError(f"--address: no Ray cluster at {address!r} ({error}).") from None
        self.threads = threads
        self.slots = int(ray.cluster_resources().get("CPU", 0)) // threads
        if self.slots < 1:
            self.close()
            raise ArgumentError(f"No machine of the Ray cluster has {threads} processors; give fewer --threads.")
        self._actor = ray.remote(num_cpus=threads, max_restarts=0)(_Actor)
        self._idle: list[Any] = []
        self._running: dict[Any, tuple[Any, str]] = {}

    def start(self, folder: StudyFolder, item: Item) -> None:
        actor = self._idle.pop() if self._idle else self._actor.remote(self.threads, os.getcwd())
        self._running[actor.do.remote(job_of(folder, item))] = (actor, item.key)

    def ended(self, timeout: float) -> list[tuple[str, str | None]]:
        done, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout)
        result = []
        for handle in done:
            actor, key = self._running.pop(handle)
            try:
                result.append((key, self._ray.get(handle)))
                self._idle.append(actor)
            except self._ray.exceptions.RayError as error:
                result.append((key, f"its Ray worker was lost: {str(error).splitlines()[0]}"))
        return result

    def close(self) -> None:
        self._ray.shutdown()


def job_of(folder: StudyFolder, item: Item) -> dict[str, Any]:
    """An item as plain data, for :mod:`krdistill.study.worker`."""
    return {
        "folder": str(folder.path), "key": item.key, "kind": item.kind, "config": item.config.as_dict(),
        "teacher": item.waits_for,
    }  # fmt: skip


class _Worker:
    """A process that does jobs, with the pipes to and from it.

    Args:
        log: where it prints until its first job says otherwise.
        threads: how many it may use.
        cwd: where it runs.
    """

    def __init__(self, log: Path, threads: int, cwd: str | None = None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as errors:  # a session of its own: Ctrl-C is for the process that gives the jobs
            self.process = subprocess.Popen(
                [sys.executable, "-m", "krdistill.study.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=errors, env=environment, cwd=cwd, start_new_session=True, bufsize=0,
            )  # fmt: skip
        self.key: str | None = None

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def fileno(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    def send(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.key = job["key"]
        with contextlib.suppress(BrokenPipeError):  # it died at once: its answer will be its end
            line = memoryview(json.dumps(job).encode() + b"\n")
            while line:
                line = line[self.process.stdin.write(line) :]

    def answer(self) -> str | None:
        """Waits for the end of the job: None, or how the process broke off."""
        self.key = None
        if os.read(self.fileno(), 4096):
            return None
        return _broke_off(self.process.wait())

    def close(self) -> None:
        process = self.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


class _Actor:
    """What stands on a Ray worker: it holds the pipes of a process as on one machine, so both end together."""

    def __init__(self, threads: int, cwd: str) -> None:
        self.threads, self.cwd = threads, cwd if Path(cwd).is_dir() else None
        self.worker: _Worker | None = None

    def do(self, job: dict[str, Any]) -> str | None:
        if self.worker is None or not self.worker.alive:
            self.worker = _Worker(StudyFolder(Path(job["folder"])).log(job["key"]), self.threads, self.cwd)
        self.worker.send(job)
        return self.worker.answer()


def _broke_off(status: int) -> str:
    """How a process ended that did not answer; a job that failed in words has written them down itself."""
    if status >= 0:
        return f"its process ended with status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = ", often for want of memory" if name == "SIGKILL" else ""
    return f"its process was ended by {name}{hint}; with --retry it goes on from its last checkpoint"
