"""What a run survives: killed writers, a second process, damaged checkpoints, full disks, bad numbers, signals."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from krdistill import files, runfolder, stages
from krdistill.config import RunConfig, TrainConfig, load_config
from krdistill.data import DataBundle
from krdistill.errors import RunFolderError
from krdistill.events import Events
from krdistill.files import DiskError, half_written, locked, remove_half_written, replacing, write_text
from krdistill.models.network import build_network
from krdistill.objective import Objective, Term, classification_term, on_labels_and_progress
from krdistill.pipeline import prepare, run
from krdistill.priors import ClassGroups
from krdistill.runfolder import CONFIG, LOCK, OWNER, RunFolder, owned
from krdistill.stages import StoppedError
from krdistill.training.loop import DivergedError, Trainer
from krdistill.training.optim import learning_rate
from krdistill.training.task import Task

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "groups": "thirds", "n_max": 60},
    "teacher": {"model": "resnet8w8"},
    "student": {"model": "resnet8w8"},
    "train": {"epochs": 2, "batch_size": 32, "augmentation": "crop-only", "evaluate_every": 2},
    "recipe": "kd",
    "baselines": [],
    "bank": {"views": 2},
    "export": {"onnx": False},
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
COMMAND = [
    "-m", "krdistill", "run", "digits-lt", "--teacher.model", "resnet8w8", "--student.model", "resnet8w8",
    "--data.n_max", "60", "--train.epochs", "2", "--baselines", "[]", "--export.onnx", "false",
]  # fmt: skip


@pytest.fixture
def config() -> RunConfig:
    return load_config(SMALL)


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps: list[tuple[str, int]] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, name: str, done: int, total: int) -> None:
        self.steps.append((name, done))


def _python(code: str, *args: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, **options)


# Killed while a file is written ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.yaml", "student.pt", "model.safetensors", "plain", "a.b.c.json"])
def test_what_a_killed_writer_leaves_is_known_by_its_name_and_removed(tmp_path: Path, name: str) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from krdistill.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as part:\n    part.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    write_text(tmp_path / "below" / name, "old")
    assert _python(code, tmp_path / "below" / name).returncode == -signal.SIGKILL
    (left,) = (p for p in (tmp_path / "below").iterdir() if p.name != name)
    assert half_written(left) == name
    remove_half_written(tmp_path)
    assert [p.name for p in (tmp_path / "below").iterdir()] == [name]
    assert (tmp_path / "below" / name).read_text() == "old"


@pytest.mark.parametrize("name", ["config.yaml", ".gitignore", ".nfs00ab12", ".a.json", ".config.yaml.swp"])
def test_other_files_are_nobodys_leftovers(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    assert half_written(tmp_path / name) is None
    remove_half_written(tmp_path)
    assert (tmp_path / name).is_file()


def test_a_run_killed_while_it_wrote_its_first_files_goes_on(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (f".{CONFIG}.abcd1234.yaml", f".{OWNER}.abcd1234.json", LOCK, OWNER):
        (folder / name).write_text("{")
    with owned(folder, config):
        RunFolder(folder, config)
    assert {p.name for p in folder.iterdir()} == {CONFIG, LOCK}
    (folder / CONFIG).unlink()
    (folder / ".thesis.txt.abcd1234.txt").write_text("half of somebody else's file")
    with pytest.raises(RunFolderError, match="no run folder"), owned(folder, config):
        pass


# One process at a time ------------------------------------------------------------------------------------------------


_HOLD = (
    "import sys; from pathlib import Path; from krdistill.config import load_config\n"
    "from krdistill.runfolder import owned\n"
    "import json\n"
    "with owned(Path(sys.argv[1]), load_config(json.loads(sys.argv[2]))):\n    print('holds', flush=True); input()"
)


def test_a_second_process_is_refused_until_the_first_is_dead(tmp_path: Path, config: RunConfig) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-c", _HOLD, str(folder), json.dumps(SMALL)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "holds\n"
        before = {p: p.read_bytes() for p in folder.iterdir()}
        with pytest.raises(RunFolderError, match=rf"Process {holder.pid} on .* has worked in .* since 20\d\d-"):
            run(prepare(config), folder)
        assert before == {p: p.read_bytes() for p in folder.iterdir()}
        (folder / OWNER).unlink()  # the moment before it says who it is
        with pytest.raises(RunFolderError, match="Another process works in"), owned(folder, config):
            pass
        holder.kill()
    with owned(folder, config):
        assert json.loads((folder / OWNER).read_text())["process"] == os.getpid()
    assert not (folder / OWNER).exists()


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be made"), owned(tmp_path / "file" / "run", config):
        pass


def test_a_disk_without_locks_gives_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with locked(tmp_path / "a.lock"), locked(tmp_path / "a.lock"):
        pass


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _state(value: float) -> dict[str, Any]:
    return {"a": torch.full((50, 40), value), "b": {"c": [1, 2.5, None]}}


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(torch.full((4,), 2.0).numpy().tobytes()) + 3] ^= 0x40  # a weight that torch would load
    path.write_bytes(bytes(data))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_cut, _flip, _empty])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, config: RunConfig, damage: Any) -> None:
    folder = RunFolder(tmp_path / "run", config)
    assert folder.load_checkpoint("student") is None
    for value in (0.0, 1.0, 2.0):
        folder.save_checkpoint("student", _state(value))
    newest, before = (tmp_path / "run" / "checkpoints" / f"student{n}.pt" for n in ("", "-previous"))
    assert sorted(p.name for p in newest.parent.iterdir()) == [before.name, newest.name]
    found = folder.load_checkpoint("student")
    assert found is not None and torch.equal(found["a"], _state(2.0)["a"]) and found["b"] == _state(2.0)["b"]
    damage(newest)
    notes: list[str] = []
    found = folder.load_checkpoint("student", notes.append)
    assert found is not None and torch.equal(found["a"], _state(1.0)["a"])
    assert len(notes) == 1 and "student.pt is damaged" in notes[0] and "the checkpoint before it" in notes[0]
    folder.save_checkpoint("student", _state(3.0))  # takes the place of the damaged one, not of the good one
    os.unlink(newest)  # as if killed between two renames
    found = RunFolder(tmp_path / "run", config).load_checkpoint("student")
    assert found is not None and torch.equal(found["a"], _state(1.0)["a"])
    damage(before) if damage is not _flip else _cut(before)
    with pytest.raises(RunFolderError, match=r"previous\.pt is damaged.*Delete .*-previous\.pt to train"):
        folder.load_checkpoint("student")


def test_a_checkpoint_holds_data_alone(tmp_path: Path, config: RunConfig) -> None:
    folder = RunFolder(tmp_path / "run", config)
    folder.save_checkpoint("student", {"a": torch.zeros(1), "code": os.system})
    with pytest.raises(RunFolderError, match="damaged"):
        folder.load_checkpoint("student")


def test_a_training_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    plan, whole, folder = prepare(config), tmp_path / "whole", tmp_path / "run"
    run(plan, whole, report=False)
    heard = Heard()
    with pytest.raises(StoppedError, match=r"Stopped after step 9 of \d+ of teacher, and saved"):
        run(plan, folder, report=False, stop=lambda: len(heard.steps) == 9, events=heard)
    assert heard.steps[-1] == ("teacher", 9)
    _cut(folder / "checkpoints" / "teacher.pt")
    heard = Heard()
    run(plan, folder, report=False, events=heard)
    assert any("going on after epoch 0 of 2, 8 steps into" in n for n in heard.notes), heard.notes
    assert heard.steps[0] == ("teacher", 9)
    for name in ("metrics.json", "student/model.safetensors", "teacher/model.safetensors"):
        assert (whole / name).read_bytes() == (folder / name).read_bytes()


# Stopping -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["bank", "student", "nothing"])
def test_a_run_that_is_asked_to_stop_saves_and_goes_on(tmp_path: Path, config: RunConfig, after: str) -> None:
    plan, heard = prepare(config), Heard()
    with pytest.raises(StoppedError, match="same command"):
        run(plan, tmp_path / "run", events=heard, stop=lambda: after == "nothing" or (after, 2) in heard.steps[-1:])
    last = heard.steps[-1]
    assert last == (("teacher", 1) if after == "nothing" else (after, 2))
    assert (tmp_path / "run" / "checkpoints" / f"{last[0]}.pt").is_file() == (after != "bank")
    again = Heard()
    run(plan, tmp_path / "run", events=again, report=False)
    assert after != "student" or again.steps[0] == ("student", 3)


def _started(folder: Path) -> subprocess.Popen[str]:
    """A run in the middle of its teacher's training."""
    log = folder / "log.jsonl"
    before = log.read_text().count("\n") if log.is_file() else 0
    process = subprocess.Popen(
        [sys.executable, *COMMAND, "--teacher.train.epochs", "500", "--out", str(folder)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT,
    )  # fmt: skip
    end = time.monotonic() + 60
    while not log.is_file() or log.read_text().count("\n") <= before:
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)
    return process


def test_a_signal_saves(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with _started(tmp_path / "run") as process:
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        assert process.returncode == 75, err
        assert "Stopped after step" in " ".join(out.split()) and "the same command goes on" in " ".join(out.split())
        assert "once more stops at once" in err and "Traceback" not in err
        saved = tmp_path / "run" / "checkpoints" / "teacher.pt"
        assert saved.is_file() and not (tmp_path / "run" / OWNER).exists()
    assert "going on after epoch" in " ".join(out.split())  # the second of the two went on from the first's


def test_a_second_signal_ends_at_once() -> None:
    code = """
import os, signal
from krdistill.commands.run import stop_by_signal
from krdistill.distributed import World
before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
with stop_by_signal(World(1, 2, 1)) as stop:
    assert not stop()
    for number in (signal.SIGINT, signal.SIGTERM):  # as torchrun sends them
        os.kill(os.getpid(), number)
    assert stop()
assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) and stop()
with stop_by_signal(World.alone()) as stop:
    os.kill(os.getpid(), signal.SIGINT)
    print("first", stop(), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("second", flush=True)
"""
    done = _python(code)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "first True\n"), done.stderr
    assert done.stderr.count("once more stops at once") == 1  # the first process speaks


def test_processes_of_one_run_stop_together_and_go_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, *COMMAND, "--teacher.train.epochs", "500", "--device", "cpu", "--out", str(folder)]
    both = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**ENVIRONMENT, **common, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    end = time.monotonic() + 120
    while not (folder / "log.jsonl").is_file() or not (folder / "log.jsonl").read_text():
        assert time.monotonic() < end and both[0].poll() is None, both[0].communicate()
        time.sleep(0.02)
    both[1].send_signal(signal.SIGTERM)  # alone, it waits for the first
    time.sleep(0.5)
    assert [process.poll() for process in both] == [None, None]
    both[0].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=90) for process in both]
    assert [process.returncode for process in both] == [75, 75], said
    assert "Stopped after step" in " ".join(said[0][0].split()) and "Stopped" not in said[1][0]
    assert not any("Traceback" in err or "error" in err for _, err in said), said
    folder_of_one = RunFolder(folder, load_config(yaml.safe_load((folder / CONFIG).read_text())))
    state = folder_of_one.load_checkpoint("teacher")
    assert state is not None
    steps = re.search(r"after step (\d+) of (\d+)", " ".join(said[0][0].split()))
    assert steps is not None
    per_epoch = int(steps[2]) // 500
    assert state["trainer"]["epoch"] * per_epoch + state["trainer"]["sums"]["steps"] == int(steps[1])


# Full disks -----------------------------------------------------------------------------------------------------------


def test_a_file_that_may_not_grow_keeps_what_was_there(tmp_path: Path) -> None:
    """Under a limit of the system's, as the writers meet it: each reports it in another way."""
    code = """
import io, resource, sys, os
from pathlib import Path
import numpy as np, torch
from safetensors.torch import save_file
from krdistill.config import load_config
from krdistill.files import DiskError, replacing, write_text
from krdistill.runfolder import RunFolder
root, big = Path(sys.argv[1]), torch.arange(2.0**18)
folder = RunFolder(root / "run", load_config({"name": "a", "data": {"source": "digits"}}))
folder.save_checkpoint("student", {"a": torch.ones(3)})
writers = {
    "text": lambda part: part.write_text("a" * 2**20),
    "torch": lambda part: torch.save(big, part),
    "numpy": lambda part: np.savez(part, a=big.numpy()),
    "safetensors": lambda part: save_file({"a": big}, part),
}
for name in writers:
    write_text(root / f"{name}.npz", "old")
resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
for name, write in writers.items():
    try:
        with replacing(root / f"{name}.npz") as part:
            write(part)
        print(name, "no error")
    except DiskError as error:
        assert (root / f"{name}.npz").read_text() == "old"
        print(name, error.errno is not None and "MiB are free" in str(error) and "Make room" in str(error))
try:
    folder.save_checkpoint("student", {"a": big})
except DiskError as error:
    print("checkpoint", torch.equal(folder.load_checkpoint("student")["a"], torch.ones(3)))
assert not list(root.rglob(".*"))
"""
    done = _python(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{n} True" for n in ("text", "torch", "numpy", "safetensors", "checkpoint")]


def test_a_full_disk_stops_the_run_with_what_is_safe(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    plan, folder, heard, sync = prepare(config), tmp_path / "run", Heard(), os.fsync

    def fsync(handle: int) -> None:
        if ("student", 3) in heard.steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError) as caught:
        run(plan, folder, events=heard, report=False)
    said = str(caught.value)
    assert "checkpoints/student.pt failed: No space left on device" in said and "Make room" in said
    assert f"Safe in {folder} (finished: teacher; with a checkpoint: student)" in said
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.setattr(os, "fsync", sync)
    again = Heard()
    run(plan, folder, events=again, report=False)
    assert again.steps[0] == ("student", 3)  # the second step's checkpoint was whole
    # The log too.
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(DiskError, match=r"log\.jsonl failed"):
        RunFolder(folder, config).log({"stage": "student"})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_log_on_a_full_disk(tmp_path: Path, config: RunConfig) -> None:
    folder = RunFolder(tmp_path / "run", config)
    (tmp_path / "run" / runfolder.LOG).symlink_to("/dev/full")
    with pytest.raises(DiskError, match="No space left on device"):
        folder.log({"stage": "student"})


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "no"), RuntimeError("shape"), ValueError("x")):
        with pytest.raises(type(error)) as caught, replacing(tmp_path / "a.txt"):
            raise error
        assert caught.value is error


def test_half_a_line_of_the_log_is_passed_over(tmp_path: Path, config: RunConfig) -> None:
    folder = RunFolder(tmp_path / "run", config)
    folder.log({"stage": "ä", "epoch": 1})
    whole = (tmp_path / "run" / "log.jsonl").read_bytes()
    (tmp_path / "run" / "log.jsonl").write_bytes(whole + whole[: whole.index("ä".encode()) + 1])
    assert folder.read_log() == [{"stage": "ä", "epoch": 1}]
    folder.rewind_log("ä", 1)
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == whole


# Numbers that are not finite ------------------------------------------------------------------------------------------


class _Poison(nn.Module):
    """A loss of 0, but for one class in one step: a value, or a gradient, that is no number."""

    def __init__(self, kind: str, label: int, step: int) -> None:
        super().__init__()
        self.kind, self.label, self.left = kind, label, step

    def forward(self, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        self.left -= self.training
        hit = (labels == self.label) if self.left < 0 else torch.zeros_like(labels, dtype=torch.bool)
        zero = logits[:, 0] * 0
        if self.kind == "value":
            return torch.where(hit, zero + math.inf, zero)
        rest = (~hit).float()
        return (zero + rest).sqrt() - rest


def _poisoned(kind: str, label: int, step: int) -> tuple[Task, DataBundle, ClassGroups]:
    data = prepare(load_config(SMALL)).data
    prior, groups = stages.measure(data)
    network = build_network("resnet8w8", class_names=data.train.class_names, images=data.train.images, seed=0)
    poison = Term("poison", _Poison(kind, label, step), on_labels_and_progress)
    return Task(network, Objective([classification_term("cross-entropy", prior), poison])), data, groups


TRAIN = TrainConfig(epochs=2, batch_size=40, augmentation="crop-only", evaluate_every=2)
CPU = torch.device("cpu")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["value", "gradient"])
def test_the_first_step_that_gave_no_number_is_named_and_can_be_run_again(
    tmp_path: Path, config: RunConfig, kind: str, optimizer: str
) -> None:
    train = TRAIN.model_copy(update={"optimizer": optimizer, "lr": 0.01})
    task, data, groups = _poisoned(kind, label=1, step=3)
    folder = RunFolder(tmp_path / "run", config)
    with pytest.raises(DivergedError) as caught:
        stages.fit(task, data, groups, train, seed=0, device=CPU, stage="baselines/x", store=folder)
    said, path = str(caught.value), tmp_path / "run" / "checkpoints" / "baselines-x-nonfinite.pt"
    rows = Trainer(_poisoned(kind, 1, 3)[0], data.train, train, seed=0, device=CPU).batches(0)[3]
    hit = rows[data.train.labels[rows] == 1]
    assert 1 < len(hit) < len(rows)
    if kind == "value":
        where = f"poison of {len(hit)} of {len(rows)} images, of class {data.train.class_names[1]}, rows {hit[0]}, "
        assert f"baselines/x: The loss is not finite (terms: {where}" in said and "classification" not in said
    else:
        assert "The norm of the gradient is not finite, though the loss is, in step 4 of epoch 1" in said
    assert "in step 4 of epoch 1. Nothing was updated" in said.replace("is, in", "in") and str(path) in said
    # Three steps were done, and nothing after: the parameters are those of a training that ends there.
    record = torch.load(path, weights_only=True)
    other = Trainer(_poisoned(kind, 1, 3)[0], data.train, train, seed=0, device=CPU)
    other.task.train()
    for step, batch in enumerate(other.feed.run(other.batches(0)[:3])):
        for group in other.optimizer.param_groups:
            group["lr"] = learning_rate(train, (step + 1) / (2 * other.steps_per_epoch + 1))
        other.step(0, step, *batch)
    assert all(torch.equal(p, record["trainer"]["task"][n]) for n, p in other.task.named_parameters())
    # The record is enough to see the same again.
    assert (record["epoch"], record["step"]) == (0, 3) and torch.equal(record["rows"], rows)
    again = Trainer(_poisoned(kind, 1, 0)[0], data.train, train, seed=0, device=CPU)
    again.restore(record["trainer"])
    again.task.train()
    out = again.step(record["epoch"], record["step"], *next(again.feed.run([record["rows"]])))
    for name, values in record["terms"].items():
        assert torch.equal(out.terms.terms[name].detach(), values) and torch.equal(record["labels"], out.labels)
    with pytest.raises(DivergedError, match="in step 4 of epoch 1"):
        again.state()


def test_a_state_that_is_no_number_is_never_saved(
    tmp_path: Path, config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "CHECKPOINT_SECONDS", 0.0)
    task, data, groups = _poisoned("value", label=0, step=4)
    folder, heard = RunFolder(tmp_path / "run", config), Heard()
    with pytest.raises(DivergedError, match="in step 5 of epoch 1"):
        stages.fit(task, data, groups, TRAIN, seed=0, device=CPU, store=folder, events=heard)
    assert heard.steps[-1] == ("student", 5)  # not at the epoch's end: the checkpoint asked for it
    found = folder.load_checkpoint("student")
    assert found is not None and found["trainer"]["sums"]["steps"] == 4
    folder.finish("student", {})
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_watching_changes_no_number() -> None:
    weights = []
    for watched in (True, False):
        task, data, _ = _poisoned("value", label=0, step=10**6)
        trainer = Trainer(task, data.train, TRAIN, seed=0, device=CPU)
        if not watched:
            del trainer.optimizer.found_inf  # type: ignore[attr-defined]
        list(trainer.epochs())
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(*weights)
