"""A run is a folder; this is the only place that knows what its files are called."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import torch

from . import __version__
from .config import RunConfig, difference, dump_config, parse_yaml, read_text, validate
from .deploy.measuring import processor_name
from .distributed import World
from .errors import ConfigError, RunFolderError
from .files import disk_errors, half_written, locked, read_json, remove_half_written, replacing, write_json, write_text

CONFIG, PROVENANCE, SPLIT, LOG = "config.yaml", "provenance.json", "split.json", "log.jsonl"
METRICS, PREDICTIONS, DIAGNOSIS, PROFILE = "metrics.json", "predictions.npz", "diagnosis.json", "profile.pt"
DONE, ONNX, EXPORT, REPORT, BANK = "done.json", "student.onnx", "export.json", "report.html", "bank"
LOCK, OWNER, CHECKPOINTS = "run.lock", "owner.json", "checkpoints"

_PACKAGES = ("numpy", "scipy", "scikit-learn", "pillow", "torchvision", "timm", "transformers", "onnxruntime")
_SEAL = b"sha256 "
_SEAL_BYTES = len(_SEAL) + 64 + 1


@contextmanager
def owned(path: Path, config: RunConfig, *, world: World | None = None) -> Iterator[None]:
    """A block in which this process alone works in a run folder; what a killed one left half written is removed.

    The lock frees itself when its owner ends, however it ends. Reading needs none.

    Args:
        path: the folder; it is made where it is missing.
        config: the run's configuration.
        world: the processes that share the run; the first holds the lock for all.

    Raises:
        RunFolderError: another process works in it (the message says which), or it holds something else.
    """
    if world is not None and not world.first:
        yield
        return
    _refuse_others(path, config)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be made: {error.strerror}. Choose another folder with --out.") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise RunFolderError(f"{path} cannot be written to. Choose another folder with --out.")

    def busy() -> None:
        raise RunFolderError(_owner_words(path))

    with locked(path / LOCK, busy=busy):
        remove_half_written(path)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_json(path / OWNER, {"process": os.getpid(), "host": platform.node(), "since": now})
        try:
            yield
        finally:
            (path / OWNER).unlink(missing_ok=True)


def _owner_words(path: Path) -> str:
    try:
        owner = read_json(path / OWNER)
        who = f"Process {owner['process']} on {owner['host']} has worked in {path} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has only just begun
        who = f"Another process works in {path}"
    return f"{who}. Wait for it, or stop it; or choose another folder with --out. Nothing was touched."


def _refuse_others(path: Path, config: RunConfig) -> None:
    """Refuses a folder that holds another run or other files; writes nothing."""
    known = path / CONFIG
    if known.is_file():
        try:
            old = parse_yaml(read_text(known), str(known))
        except ConfigError as error:
            raise RunFolderError(f"{known} is damaged ({error}); choose another folder with --out.") from None
        lines = difference(_completed(old), config.as_dict())
        if lines:
            shown = "\n  ".join(lines[:12]) + ("\n  ..." if len(lines) > 12 else "")
            raise RunFolderError(
                f"{path} already holds another run. It differs in\n  {shown}\n"
                "Nothing was touched. Choose another folder with --out, or go on with the run's own configuration."
            )
    elif path.exists() and (not path.is_dir() or not all(map(_first_traces, path.iterdir()))):
        raise RunFolderError(f"{path} exists and is no run folder. Choose another one with --out.")


def _completed(stored: Any) -> Any:
    """A stored configuration with the defaults of keys that are newer than it; what is no configuration stays."""
    try:
        return validate(RunConfig, stored).as_dict()
    except ConfigError:
        return stored


def _first_traces(path: Path) -> bool:
    """Whether a run that was killed while it wrote its first file leaves such a file."""
    return path.name in (LOCK, OWNER) or half_written(path) in (CONFIG, OWNER)


class RunFolder:
    """Opens a run folder, or makes one.

    Args:
        path: the folder.
        config: the resolved configuration. A folder that holds a run with another one is refused.
        world: the processes that share the run; only the first writes, all others must see its disk.

    Attributes:
        stopping: asked after every step whether the run should save what it has and stop; by default it never should.

    Raises:
        RunFolderError: the folder holds another run (the message shows what differs) or other files.
    """

    def __init__(self, path: Path, config: RunConfig, *, world: World | None = None) -> None:
        self.path, self.world = path, world or World.alone()
        self.writes = self.world.first
        self.stopping: Callable[[], bool] = lambda: False
        self._damaged: set[Path] = set()
        known = path / CONFIG
        if not self.writes and not known.is_file():
            raise RunFolderError(f"Process {self.world.rank} does not see {path}; put it on a disk that all share.")
        _refuse_others(path, config)
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
        return _record(marker) if marker.is_file() else None

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Marks a training as finished; its checkpoints are not needed any more."""
        if not self.writes:
            return
        write_json(self.part(stage) / DONE, record)
        for path in (*self._checkpoints(stage), self._nonfinite(stage)):
            path.unlink(missing_ok=True)

    def safe(self) -> str:
        """What of the run is on the disk, in words."""
        done = sorted(str(p.parent.relative_to(self.path)) for p in self.path.rglob(DONE))
        saved = sorted({p.stem.removesuffix("-previous") for p in (self.path / CHECKPOINTS).glob("*.pt")})
        saved = [name for name in saved if not name.endswith("-nonfinite")]
        parts = [f"finished: {', '.join(done)}"] if done else []
        parts += [f"with a checkpoint: {', '.join(saved)}"] if saved else []
        return f"Safe in {self.path} ({'; '.join(parts) or 'nothing yet'}); the run goes on from there."

    # Checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoints(self, stage: str) -> tuple[Path, Path]:
        """The newest, and the one before it."""
        name = stage.replace("/", "-")
        return self.path / CHECKPOINTS / f"{name}.pt", self.path / CHECKPOINTS / f"{name}-previous.pt"

    def _nonfinite(self, stage: str) -> Path:
        return self.path / CHECKPOINTS / f"{stage.replace('/', '-')}-nonfinite.pt"

    def save_checkpoint(self, stage: str, state: dict[str, Any]) -> None:
        """Keeps a training's state, and the one before it."""
        if not self.writes:
            return
        newest, before = self._checkpoints(stage)
        with replacing(newest) as part:
            with part.open("wb") as file:
                _save_sealed(state, file)
            if newest.is_file() and newest not in self._damaged:
                os.replace(newest, before)
        self._damaged.discard(newest)

    def load_checkpoint(self, stage: str, note: Callable[[str], None] | None = None) -> dict[str, Any] | None:
        """A training's newest state that is whole, or None where it has none.

        Args:
            stage: whose.
            note: hears of a damaged one that is passed over.

        Raises:
            RunFolderError: there are some, and every one is damaged.
        """
        problems: list[str] = []
        there = [path for path in self._checkpoints(stage) if path.is_file()]
        for path in there:
            try:
                state = _load_sealed(path)
            except Exception as error:  # torch's unpickler raises nearly anything on a damaged file
                problems.append(f"{path} is damaged ({error})")
                self._damaged.add(path)
                continue
            if problems and note is not None:
                note(f"{problems[0]}; {stage} goes on from the checkpoint before it.")
            return state
        if problems:
            names = " and ".join(map(str, there))
            raise RunFolderError(f"{'; '.join(problems)}. Delete {names} to train {stage} from the start.")
        return None

    def save_nonfinite(self, stage: str, record: dict[str, Any]) -> Path:
        """Keeps what a step needs to be run again that gave a number which is not finite."""
        path = self._nonfinite(stage)
        if self.writes:
            with replacing(path) as part, part.open("wb") as file:
                torch.save(record, file)
        return path

    # The log ----------------------------------------------------------------------------------------------------

    def log(self, line: dict[str, Any]) -> None:
        if not self.writes:
            return
        path = self.path / LOG
        with disk_errors(path), path.open("a", encoding="utf-8") as log:
            log.write(json.dumps(line, ensure_ascii=False) + "\n")
            log.flush()
            os.fsync(log.fileno())  # a checkpoint that outlasts a loss of power has its epochs' lines

    def read_log(self) -> list[dict[str, Any]]:
        path = self.path / LOG
        if not path.is_file():
            return []
        lines = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
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
        return _record(path) if path.is_file() else {}

    def note_provenance(self, **facts: Any) -> None:
        self.write_json(PROVENANCE, {**self.provenance(), **facts})

    def note_environment(self, now: dict[str, Any], inputs: Mapping[str, str]) -> None:
        """Notes what a run's numbers depend on (:func:`environment`), and the checksums of the files it names.

        What was otherwise when earlier parts were made stays, as ``earlier``. Of a run that has its numbers, all stays.
        """
        old = self.provenance()
        if (self.path / METRICS).is_file():
            self.note_provenance(**{k: v for k, v in now.items() if k not in old})
            return
        now = {**now, "inputs": dict(inputs)}
        moved = {k: old[k] for k, v in now.items() if k != "started" and old.get(k, v) != v}
        if moved:
            now["earlier"] = [*old.get("earlier", []), moved]
        self.note_provenance(**{**now, "started": old.get("started", now["started"])})

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


def _record(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it; what it speaks of is done again.") from None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} is damaged. Delete it; what it speaks of is done again.")
    return found


class _Hashing:
    """A file that is written and hashed at once."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _save_sealed(state: dict[str, Any], file: BinaryIO) -> None:
    """Saves a state with the SHA-256 of what was meant to be written behind it; it is on the disk then."""
    hashing = _Hashing(file)
    torch.save(state, hashing)  # type: ignore[arg-type]
    file.write(_SEAL + hashing.digest.hexdigest().encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _load_sealed(path: Path) -> dict[str, Any]:
    left = path.stat().st_size - _SEAL_BYTES
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (piece := file.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
        seal = file.read()
    if not seal.startswith(_SEAL):
        raise ValueError("it is cut off")
    if seal != _SEAL + digest.hexdigest().encode() + b"\n":
        raise ValueError("its checksum is another than when it was written")
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


def environment(device: torch.device, processes: int = 1) -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration, its data and the files that it names."""
    return {
        "krdistill": __version__,
        "git": _git_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": {name: found for name in _PACKAGES if (found := _installed(name)) is not None},
        "platform": platform.platform(),
        "processor": _processor(device),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "device": str(device),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


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
    return processor_name()
