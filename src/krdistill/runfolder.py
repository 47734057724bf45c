"""A run is a folder; this is the only place that knows what its files are called."""

from __future__ import annotations

import json
import pickle
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import yaml

from . import __version__
from .config import RunConfig, difference, dump_config
from .distributed import World
from .errors import RunFolderError
from .files import read_json, replacing, write_json, write_text

CONFIG, PROVENANCE, SPLIT, LOG = "config.yaml", "provenance.json", "split.json", "log.jsonl"
METRICS, PREDICTIONS, DIAGNOSIS, PROFILE = "metrics.json", "predictions.npz", "diagnosis.json", "profile.pt"
DONE, ONNX, EXPORT, REPORT, BANK = "done.json", "student.onnx", "export.json", "report.html", "bank"


class RunFolder:
    """Opens a run folder, or makes one.

    Args:
        path: the folder.
        config: the resolved configuration. A folder that holds a run with another one is refused.
        world: the processes that share the run; only the first writes, all others must see its disk.

    Raises:
        RunFolderError: the folder holds another run (the message shows what differs) or other files.
    """

    def __init__(self, path: Path, config: RunConfig, *, world: World | None = None) -> None:
        self.path, self.world = path, world or World.alone()
        self.writes = self.world.first
        known = path / CONFIG
        if not self.writes and not known.is_file():
            raise RunFolderError(f"Process {self.world.rank} does not see {path}; put it on a disk that all share.")
        if known.is_file():
            try:
                old = yaml.safe_load(known.read_text(encoding="utf-8"))
            except yaml.YAMLError as error:
                raise RunFolderError(f"{known} is damaged ({error}); choose another folder with --out.") from None
            lines = difference(old, config.as_dict())
            if lines:
                shown = "\n  ".join(lines[:12]) + ("\n  ..." if len(lines) > 12 else "")
                raise RunFolderError(
                    f"{path} already holds another run. It differs in\n  {shown}\n"
                    "Nothing was touched. Choose another folder with --out, or go on with the run's own configuration."
                )
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(f"{path} exists and is no run folder. Choose another one with --out.")
        if self.writes:
            path.mkdir(parents=True, exist_ok=True)
        if not known.is_file():
            write_text(known, dump_config(config))

    # One network's part of the folder ---------------------------------------------------------------------------

    def part(self, stage: str) -> Path:
        """The folder of a trained network: ``teacher``, ``student`` or ``baselines/<key>``."""
        return self.path / stage

    def done(self, stage: str) -> dict[str, Any] | None:
        """What a finished training left behind, or None."""
        marker = self.part(stage) / DONE
        return read_json(marker) if marker.is_file() else None

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Marks a training as finished; its checkpoint is not needed any more."""
        if not self.writes:
            return
        write_json(self.part(stage) / DONE, record)
        self._checkpoint(stage).unlink(missing_ok=True)

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoint(self, stage: str) -> Path:
        return self.path / "checkpoints" / f"{stage.replace('/', '-')}.pt"

    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None:
        if not self.writes:
            return
        with replacing(self._checkpoint(stage)) as part:
            torch.save(state, part)

    def load_checkpoint(self, stage: str) -> dict[str, Any] | None:
        path = self._checkpoint(stage)
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, ValueError) as error:
            raise RunFolderError(f"{path} is damaged ({error}). Delete it to train {stage} from the start.") from None
        return state

    # The log ----------------------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        with (self.path / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, ensure_ascii=False) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        path = self.path / LOG
        if not path.is_file():
            return []
        lines = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue  # the line a killed run was writing; its epoch is done again
        return lines

    def rewind_log(self, stage: str, epoch: int) -> None:
        """Drops a stage's lines after an epoch: they are about to be written again."""
        if not self.writes:
            return
        kept = [line for line in self.read_log() if line.get("stage") != stage or line.get("epoch", 0) <= epoch]
        write_text(self.path / LOG, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept))

    # Provenance -------------------------------------------------------------------------------------------------

    def provenance(self) -> dict[str, Any]:
        path = self.path / PROVENANCE
        return read_json(path) if path.is_file() else {}

    def note_provenance(self, **facts: Any) -> None:
        self.write_json(PROVENANCE, {**self.provenance(), **facts})

    def write_json(self, name: str, value: Any) -> None:
        """Writes plain data into the folder, whole."""
        if self.writes:
            write_json(self.path / name, value)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds a stage's wall time to the provenance."""
        started = time.perf_counter()
        yield
        seconds = dict(self.provenance().get("seconds", {}))
        seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - started, 2)
        self.note_provenance(seconds=seconds)


def environment(device: torch.device) -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration."""
    return {
        "krdistill": __version__,
        "git": _git_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "processor": _processor(device),
        "device": str(device),
        "threads": torch.get_num_threads(),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _git_hash() -> str | None:
    """The commit of the source tree this runs from, with ``-dirty`` for local changes; None for an installed copy."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True, text=True, timeout=10, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
