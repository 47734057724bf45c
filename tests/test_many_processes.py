"""`krdistill run` under torchrun, on two real processes: the same run as one, and what happens when one dies."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ARGUMENTS = [
    "digits-lt", "--teacher.model", "resnet8w8", "--student.model", "resnet8w8", "--train.epochs", "2",
    "--train.batch_size", "49", "--train.evaluate_every", "1", "--baselines", "kd", "--bank.views", "2",
    "--export.onnx", "false", "--device", "cpu",
    "--train.lr", "0.005",  # small steps: larger ones make a thousandth of a last bit within two epochs
    "--recipe.prior", "label",  # re-fitting a classifier makes more of the last bits, in which W processes differ
]  # fmt: skip
TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.xdist_group("many processes")  # they share two runs
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def _one(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "krdistill", "run", *ARGUMENTS, *more, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def _two(out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*TWO, "-m", "krdistill", "run", *ARGUMENTS, *more, "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    done = _one(folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together") / "run"
    done = _two(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1  # one of them speaks
    return folder


def test_two_processes_run_the_run_of_one(alone: Path, together: Path) -> None:
    for one, two in zip(_log(alone), _log(together), strict=True):
        assert (one["stage"], one["epoch"], one["lr"]) == (two["stage"], two["epoch"], two["lr"])
        for term, value in one["loss"].items():
            assert two["loss"][term] == pytest.approx(value, rel=2e-3), (one["stage"], term)
        assert two["train_accuracy"] == pytest.approx(one["train_accuracy"], abs=0.005)
    first, second = (json.loads((f / "metrics.json").read_text()) for f in (alone, together))
    for one, two in ((first["student"], second["student"]), (first["teacher"], second["teacher"])):
        assert two["images"] == one["images"]  # every test image once
        assert two["nll"] == pytest.approx(one["nll"], rel=5e-3)
        assert two["top1"] == pytest.approx(one["top1"], abs=0.01)
    bank = {p.name: p.stat().st_size for p in (together / "bank").rglob("*.bin")}
    assert bank == {p.name: p.stat().st_size for p in (alone / "bank").rglob("*.bin")}
    assert (together / "report.html").is_file()


def test_a_finished_run_is_not_done_again_by_two(together: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in together.rglob("model.safetensors")}
    done = _two(together)
    assert done.returncode == 0, done.stderr
    assert before == {p: p.stat().st_mtime_ns for p in together.rglob("model.safetensors")}


def test_two_processes_do_a_run_of_two_again(together: Path, tmp_path: Path) -> None:
    again = [sys.executable, "-m", "krdistill", "rerun", str(together), "--out", str(tmp_path / "again")]
    refused = subprocess.run(again, capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert refused.returncode == 2 and "torchrun --nproc-per-node 2" in " ".join(refused.stderr.split())
    done = subprocess.run([*TWO, *again[1:]], capture_output=True, text=True, timeout=240, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("metrics, predictions and weights, bit for bit") == 1


def test_what_the_first_refuses_is_said_once(together: Path, tmp_path: Path) -> None:
    done = _two(together, "--student.train.epochs", "3")
    assert done.returncode != 0
    assert (
        done.stderr.count("already holds another run") == 1
        and "Traceback (most recent call last)" not in (done.stderr.split("torch/distributed/")[0])
    )
    done = _two(tmp_path / "small", "--train.batch_size", "1")
    assert done.returncode != 0
    assert done.stderr.count("at least one row per process") == 1


def test_one_process_dies_the_other_says_so_and_the_run_goes_on(together: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**ENVIRONMENT, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "krdistill", "run", *ARGUMENTS, "--out", str(folder)]
    children = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    waited = time.monotonic()
    while not (folder / "log.jsonl").is_file() or len(_log(folder)) < 3:  # the teacher is done, a student is not
        assert time.monotonic() - waited < 120 and children[0].poll() is None
        time.sleep(0.02)
    children[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, said = children[0].communicate(timeout=70)
    children[1].communicate()
    assert time.monotonic() - killed < 60
    assert children[0].returncode == 1
    assert "lost another process" in said and "goes on from its last checkpoint" in said
    assert "Traceback" not in said
    done = _two(folder)
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((f / "metrics.json").read_text()) for f in (together, folder))
    assert first["student"]["per_class"] == second["student"]["per_class"]
    assert first["student"]["nll"] == pytest.approx(second["student"]["nll"], rel=1e-6)
