from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import distributed_program as program
from krdistill.distributed import (
    World,
    average_gradients,
    gather_rows,
    join,
    share,
    share_sizes,
    synchronise_batch_norm,
)
from krdistill.errors import ArgumentError, ConfigError, ModelError

pytestmark = pytest.mark.xdist_group("distributed")  # the processes are started once

HERE = Path(__file__).parent
ALONE = World.alone()
CPU = torch.device("cpu")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def _environment(**more: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent / "src"), **more}


def _torchrun(folder: Path, device: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(HERE / "distributed_program.py"), "pieces", str(folder), device],
        env=_environment(), capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, started by torchrun."""
    return _torchrun(tmp_path_factory.mktemp("two"), "cpu")


@pytest.fixture(scope="module")
def data() -> Any:
    return program.digits()


def _same(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


# Shares and gathering -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "size"), [(33, 2), (7, 7), (100, 7), (8, 3), (5, 1)])
def test_shares_cover_the_batch_in_order_without_overlap(n: int, size: int) -> None:
    index = torch.randperm(n, generator=torch.Generator().manual_seed(0))
    worlds = [World(rank, size, rank) for rank in range(size)]
    parts = [share(index, world) for world in worlds]
    assert torch.equal(torch.cat(parts), index)
    assert [len(p) for p in parts] == share_sizes(n, worlds[0])
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_batch_smaller_than_the_world_is_refused(two: list[dict[str, Any]]) -> None:
    with pytest.raises(ArgumentError, match=r"3 rows for 4 processes.*larger global batch"):
        share(torch.arange(3), World(0, 4, 0))
    assert all("1 rows for 2 processes" in found["too small"] for found in two)


def test_gathering_gives_every_process_all_rows(two: list[dict[str, Any]]) -> None:
    for found in two:
        gathered = found["gathers"]
        for sizes in program.SIZES:
            for dtype in program.DTYPES:
                value = gathered[f"{sizes} {dtype}"]
                assert value.dtype == dtype
                assert torch.equal(value, program.rows_of(sum(sizes), dtype).transpose(1, 2))
        assert gathered["vector"].tolist() == [0, 1, 2, 3, 4]
        assert gathered["no columns"].shape == (5, 0)
        assert "expected" in found["wrong rows"].lower() and "(3,)" in found["wrong rows"]


@pytest.mark.parametrize("sizes", [[3, 2], [1, 5]])
def test_averaged_gradients_through_a_gather_are_those_of_one_process(
    two: list[dict[str, Any]], sizes: list[int]
) -> None:
    for found in two:
        _same(found["relational"][str(sizes)], program.relational(ALONE, [sum(sizes)]), 1e-12)


# Batch normalisation --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", program.NORMS)
def test_batch_normalisation_sees_the_whole_batch(two: list[dict[str, Any]], name: str) -> None:
    dtype = program.NORMS[name][2]
    tolerance = {torch.float64: 1e-11, torch.float32: 2e-3, torch.bfloat16: 3e-2}[dtype]
    expected = program.norm(name, ALONE, [7], CPU)
    for found in two:
        _same(found["norms"][name], expected, tolerance)


def test_batch_normalisation_far_from_zero_keeps_its_digits(two: list[dict[str, Any]]) -> None:
    """In float32, values of 1000 +- 1 have a variance that a sum of squares would lose."""
    found = two[0]["norms"]["far from 0"]["y0"].double()
    g = torch.Generator().manual_seed(6)
    weight, bias, x = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((3,), (3,), (7, 3, 4, 4)))
    x = (1002 + x).float().double()
    exact = torch.nn.functional.batch_norm(x, None, None, weight, bias, True)
    assert (found - exact).abs().max() < 5e-4


def test_synchronising_keeps_state_and_can_be_undone() -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.BatchNorm1d(4))
    before, layer = {k: v.clone() for k, v in network.state_dict().items()}, network[1]
    synchronise_batch_norm(network, World(0, 2, 0))
    assert network[1] is layer and type(layer) is not torch.nn.BatchNorm2d
    assert isinstance(layer, torch.nn.BatchNorm2d)
    _same(dict(network.state_dict()), before, 0)
    synchronise_batch_norm(network, ALONE)
    assert type(network[1]) is torch.nn.BatchNorm2d and type(network[2]) is torch.nn.BatchNorm1d


def test_an_unknown_batch_normalisation_is_refused() -> None:
    class Fused(torch.nn.BatchNorm2d):
        pass

    with pytest.raises(ModelError, match="'0' is a Fused"):
        synchronise_batch_norm(torch.nn.Sequential(Fused(3)), World(0, 2, 0))


# Trainings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", program.CASES, ids=lambda c: c.name)
def test_two_processes_train_as_one(two: list[dict[str, Any]], data: Any, case: program.Case) -> None:
    expected = program.train(case, data, ALONE, CPU)
    tolerance = 1e-9 if case.dtype == torch.float64 else 2e-5
    assert len(expected["curve"]) == 2 * -(-len(data.train.labels) // program.BATCH)
    for found in (found["trained"][case.name] for found in two):
        assert found["curve"] == pytest.approx(expected["curve"], rel=tolerance, abs=tolerance)
        assert found["accuracy"] == expected["accuracy"]
        for ours, theirs in zip(found["terms"], expected["terms"], strict=True):
            _same(ours, theirs, 10 * tolerance)
        _same(found["weights"], expected["weights"], 10 * tolerance)
        torch.testing.assert_close(found["test"], expected["test"], rtol=10 * tolerance, atol=100 * tolerance)
    start = program.make_task(case, data).to(case.dtype).state_dict()
    moved = {k for k, v in expected["weights"].items() if v.dtype.is_floating_point and not torch.equal(v, start[k])}
    head = "network.backbone.head.weight"
    assert len(moved) > 10 and (head in moved) == ("without labels" not in case.name and "simkd" not in case.name)


def test_both_processes_end_with_the_same_weights(two: list[dict[str, Any]]) -> None:
    for case in program.CASES:
        ours, theirs = (found["trained"][case.name]["weights"] for found in two)
        for name, value in ours.items():
            assert torch.equal(value, theirs[name]), (case.name, name)


def test_a_loss_without_parameters_is_refused() -> None:
    layer = torch.nn.Linear(2, 2)
    with pytest.raises(ModelError, match="none"):
        average_gradients(layer, World(0, 2, 0), probe=lambda _: torch.zeros((), requires_grad=True) * 2)


# Coming together ------------------------------------------------------------------------------------------------------


def test_each_process_knows_its_place(two: list[dict[str, Any]]) -> None:
    assert [found["world"] for found in two] == [World(0, 2, 0), World(1, 2, 1)]
    assert [found["world"].first for found in two] == [True, False]
    assert all(found["broadcast"] == {"from": 0, "rows": [1, 2]} for found in two)


def test_processes_that_were_started_differently_are_refused(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["same"] == "no error"
        assert found["differs"].startswith("ConfigError") and "in process 1 than" in found["differs"]
        assert "'lr: 0.2' instead of 'lr: 0.1'" in found["differs"]
        assert "initialised already" in found["twice"]


def test_alone_nothing_speaks_to_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with join("cpu") as world:
        assert world == ALONE and world.first
        assert not torch.distributed.is_initialized()
        x = torch.ones(3, requires_grad=True)
        assert gather_rows(x, [3], world) is x and share(x, world) is x
        layer = torch.nn.BatchNorm1d(2)
        synchronise_batch_norm(layer, world)
        assert type(layer) is torch.nn.BatchNorm1d
        assert average_gradients(layer, world, probe=lambda _: pytest.fail("asked")) is layer
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with join("cpu") as world:
        assert world == ALONE and not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("variables", "device", "said"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "cpu", "LOCAL_RANK=None"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "RANK=2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cpu", "RANK=x"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "mps", "got 'mps'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "cuda:1", "its own GPU"),
        ({"RANK": "98", "WORLD_SIZE": "99", "LOCAL_RANK": "98"}, "cuda", "has no GPU"),
    ],
)
def test_a_wrong_start_is_said(
    variables: dict[str, str], device: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said), join(device):
        pytest.fail("joined")


def _free_ports(n: int) -> list[str]:
    sockets = [socket.socket() for _ in range(n)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_a_process_that_is_silent_or_killed_ends_the_others_clearly(tmp_path: Path) -> None:
    ways, command = ("silent", "killed"), [sys.executable, str(HERE / "distributed_program.py"), "lost", str(tmp_path)]
    running: dict[tuple[str, int], subprocess.Popen[str]] = {}
    try:
        for how, port in zip(ways, _free_ports(2), strict=True):
            for rank in range(2):
                place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
                env = _environment(**place, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
                running[how, rank] = subprocess.Popen([*command, how], env=env, stderr=subprocess.PIPE, text=True)
        said = {key: process.communicate(timeout=60)[1] for key, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
    ended = {key: process.returncode for key, process in running.items()}
    assert ended == {("silent", 0): 3, ("silent", 1): 3, ("killed", 0): 3, ("killed", 1): -9}, said
    seconds, message = torch.load(tmp_path / "silent0.pt")
    assert 3.5 < seconds < 7 and "did not answer within 4 seconds" in message
    seconds, message = torch.load(tmp_path / "killed0.pt")
    assert seconds < 30 and message.startswith("Process 0 of 2 lost another process: it has ended")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_as_one(tmp_path: Path, data: Any) -> None:
    for found in _torchrun(tmp_path, "cuda"):
        for case in program.CASES:
            expected = program.train(case, data, ALONE, torch.device("cuda"))
            tolerance = 1e-8 if case.dtype == torch.float64 else 1e-4
            assert found["trained"][case.name]["curve"] == pytest.approx(expected["curve"], rel=tolerance)
