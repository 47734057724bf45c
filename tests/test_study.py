"""A study on real digits, small: what it runs and does not run again, what it survives, what its numbers are."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from rich.console import Console
from scipy import stats

from krdistill import recipes
from krdistill.commands.compare import _live, compare
from krdistill.errors import ArgumentError, ConfigError, KrdistillError, RunFolderError
from krdistill.files import read_json
from krdistill.pipeline import prepare, run
from krdistill.reporting.study import (
    differences_table,
    means_table,
    pareto_points,
    pareto_table,
    rare_metric,
    study_html,
    study_markdown,
)
from krdistill.study import (
    LocalExecutor,
    RayExecutor,
    StudyFolder,
    collect,
    measure_students,
    plan_study,
    read_study,
    run_study,
)
from krdistill.study.execution import job_of
from krdistill.study.plan import Item, StudyPlan
from krdistill.study.results import flatten, summary_rows
from krdistill.study.running import Status, StudyEvents, seconds_left, survey
from krdistill.study.statistics import mean_interval, paired_difference, summarise
from krdistill.study.worker import attempt

TINY: dict[str, Any] = {
    "name": "tiny",
    "base": "digits-lt",
    "set": {
        "train.epochs": 2, "train.evaluate_every": 1, "teacher.model": "resnet8w8", "student.model": "resnet8w8",
        "data.n_max": 40, "data.imbalance_factor": 8, "data.groups": "shot",
    },
    "seeds": [0, 1],
    "baseline": "kd",
    "methods": ["none", "kd"],
    "threads": 1,
}  # fmt: skip


class Here:
    """Does the work in this process, one item at a time, as a worker does it."""

    slots = 1

    def __init__(self) -> None:
        self.did: list[str] = []

    def start(self, folder: StudyFolder, item: Item) -> None:
        attempt(folder, job_of(folder, item))
        self.did.append(item.key)
        self._over = item.key

    def ended(self, timeout: float) -> list[tuple[str, str | None]]:
        return [(self._over, None)]

    def close(self) -> None:
        pass


def _plan(tmp_path: Path, **changes: Any) -> StudyPlan:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**TINY, **changes}, sort_keys=False), encoding="utf-8")
    return plan_study(read_study(path))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyPlan, StudyFolder]:
    tmp_path = tmp_path_factory.mktemp("study")
    plan, folder = _plan(tmp_path), StudyFolder(tmp_path / "out")
    status = run_study(plan, folder, Here())
    assert set(status.states.values()) == {"done"}, status.failures
    return plan, folder


# Statistics -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10])
def test_paired_difference_is_students(n: int) -> None:
    a, b = np.random.default_rng(n).normal(size=(2, n))
    found = paired_difference(a.tolist(), b.tolist())
    low, high = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert found.n == n and found.half_width is not None
    assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
    low, high = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    assert mean_interval(a.tolist()) == pytest.approx((high - low) / 2)
    assert summarise(a.tolist()) == pytest.approx((a.mean(), a.std(ddof=1), n))


def test_statistics_by_hand() -> None:
    # d = 1, 2, 3: mean 2, s = 1, t(2; 0.975) = 4.302653, so 4.302653 / sqrt(3) = 2.484138.
    assert paired_difference([2, 4, 6], [1, 2, 3]) == pytest.approx((2.0, 2.484138, 3))
    assert paired_difference([0.5], [0.25]) == (0.25, None, 1)
    assert summarise([]) == (None, None, 0) and summarise([0.5]) == (0.5, None, 1)
    for wrong in (([], []), ([1.0], [1.0, 2.0])):
        with pytest.raises(ArgumentError, match="as many"):
            paired_difference(*wrong)
    with pytest.raises(ArgumentError, match="confidence"):
        paired_difference([1.0, 2.0], [0.0, 0.0], confidence=1.0)


# The study file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["none", "kdd"], "baseline": None}, "Unknown recipe 'kdd'.*'kd'"),
        ({"methods": ["kd", "none", "kd"]}, "methods: kd stands twice; give each a label"),
        ({"methods": []}, "methods: expected at least one"),
        ({"methods": [{"name": "kd", "temprature": 2}]}, "'temprature'.*'temperature'"),
        ({"methods": ["kd", {"name": "none", "label": "a/b"}]}, "label"),
        ({"baseline": "kt"}, "baseline: Unknown method 'kt'.*'kd'"),
        ({"seeds": []}, "seeds: expected at least one"),
        ({"seeds": [0, 0]}, "seeds: 0 stands twice"),
        ({"seeds": [0, -1]}, "seeds: expected numbers of at least 0, got -1"),
        ({"seeds": [0.5]}, "seeds"),
        ({"seeds": 3}, "seeds"),
        ({"jobs": 0}, "jobs"),
        ({"metods": ["kd"]}, "metods.*'methods'"),
        ({"base": "cifar100-tl"}, "Unknown preset 'cifar100-tl'.*'cifar100-lt'"),
        ({"base": "nowhere.yaml"}, "No configuration file"),
        ({"set": {"student.modle": "resnet8"}}, "set: student.modle: Unknown key 'modle'.*'model'"),
        ({"set": {"student": "resnet8"}}, "set: student: expected a key below it"),
        ({"set": {"student.model.name": "resnet8"}}, "set: student.model.name"),
        ({"set": {"teacher.run": "runs/x"}}, "set: teacher.run is not set here.*trains its teachers itself"),
        ({"set": {"teacher.answers": "a.npz"}}, "set: teacher.answers is not set here"),
        ({"set": {"recipe.tau": 1}}, "set: recipe.tau is not set here.*methods"),
        ({"set": {"seed": 1}}, "set: seed is not set here.*seeds"),
        ({"set": {"train.epochs": 0}}, "none: .*epochs"),
        ({"set": {"student.model": "resnet9x"}}, "none: .*resnet9x"),
        ({"set": {"teacher.second_stage": "tau-norm"}}, "none: teacher.second_stage.*val_fraction"),
        ({"data": {"a": {"data.imbalence_factor": 10}}}, "data.a: data.imbalence_factor: Unknown key"),
        ({"data": {"a b": {}}}, "data: expected labels.*'a b'"),
        ({"data": {10: {}}}, "data: expected labels.*10"),
        ({"data": {"a": {}, "b": {}}}, "'a' and 'b' stand for the same runs"),
        ({"data": {"a": {"data.imbalance_factor": 0.01}}}, "a, none: data.imbalance_factor.*at least 1"),
        ({"teachers": {"b": {"teacher.classification": "softmax"}}}, "b, none: teacher.classification"),
        ({"methods": ["kd", {"name": "none", "set": {"data.n_max": 9}}]}, "methods.none.set: data.n_max: every method"),
        ({"methods": ["kd", {"name": "none", "set": {"student.heed": "linear"}}]}, "methods.none.set: student.heed"),
    ],
)  # fmt: skip
def test_a_wrong_study_file_is_refused_as_a_whole(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(KrdistillError, match=f"(?s){message}"):
        _plan(tmp_path, **changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\nbase: digits-lt\nseeds: [0]\nmethods: [kd]\ndata: {a: {}, a: {}}", "'a' stands twice"),
        ("name: [", "not valid YAML"),
        ("- a", "expected keys such as"),
        ("name: a\nseeds: [0]\nmethods: [kd]", "base: field required"),
    ],
)
def test_a_file_that_is_no_study(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_study(path)
    with pytest.raises(ConfigError, match="No study file"):
        read_study(tmp_path / "none.yaml")


def test_a_base_beside_the_study_file(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("preset: digits-lt\nstudent: {model: resnet14}\n", encoding="utf-8")
    plan = _plan(tmp_path, base="base.yaml", set={})
    assert {i.config.student.model for i in plan.items.values() if i.kind == "cell"} == {"resnet14"}
    (tmp_path / "base.yaml").write_text("preset: digits-lt\nteacher: {run: runs/x}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"teacher\.run is set"):
        _plan(tmp_path, base="base.yaml")


def test_cells_are_the_product_and_share_their_teachers(tmp_path: Path) -> None:
    axes: dict[str, Any] = {
        "data": {"if8": {}, "if4": {"data.imbalance_factor": 4}},
        "pairs": {"a": {"student.model": "resnet8w8"}, "b": {"student": {"model": "resnet14w8"}}},
        "teachers": {"ce": {}, "balanced": {"teacher.classification": "balanced-softmax"}},
        "methods": ["none", "kd", {"name": "krdistill-lrd", "label": "auto", "tau": "auto", "set": {"train.lr": 0.1}}],
    }
    plan = _plan(tmp_path, **axes)
    assert len(plan.cells) == 2 * 2 * 2 * 3 * 2
    assert len({c.id for c in plan.cells}) == len(plan.cells) and len(plan.places) == 8
    by = {(*c.place, c.method, c.seed): c for c in plan.cells}
    # A teacher goes with data, kind and seed: every student and method of a place and seed has the same.
    assert by["if8", "a", "ce", "kd", 0].teacher_item == by["if8", "b", "ce", "none", 0].teacher_item
    others = [by["if4", "a", "ce", "kd", 0], by["if8", "a", "balanced", "kd", 0], by["if8", "a", "ce", "kd", 1]]
    assert by["if8", "a", "ce", "kd", 0].teacher_item not in {c.teacher_item for c in others}
    # What asks no teacher is run once for all teachers; what asks one is not.
    assert by["if8", "a", "ce", "none", 0].item == by["if8", "a", "balanced", "none", 0].item
    assert by["if8", "a", "ce", "kd", 0].item != by["if8", "a", "balanced", "kd", 0].item
    cell = plan.items[by["if8", "b", "ce", "auto", 1].item]
    assert cell.config.student.model == "resnet14w8" and cell.config.student.train.lr == 0.1
    assert cell.config.seed == 1 and cell.config.recipe.options == {"tau": "auto"}
    assert cell.config.baselines == () and not cell.config.export.onnx
    # That method's own learning rate holds for its teacher too, so it has teachers of its own.
    assert by["if8", "a", "ce", "auto", 0].teacher_item != by["if8", "a", "ce", "kd", 0].teacher_item
    # Labels, order and defaults that are written out change no key.
    again = _plan(tmp_path, methods=[{"name": "kd", "label": "plain", "temperature": 4.0}], baseline=None)
    assert {c.item for c in again.cells} == {c.item for c in _plan(tmp_path).cells if c.method == "kd"}


# Running --------------------------------------------------------------------------------------------------------------


def test_a_cell_is_an_ordinary_run_with_the_shared_teacher(finished: tuple[StudyPlan, StudyFolder]) -> None:
    plan, folder = finished
    assert sum(i.kind == "teacher" for i in plan.items.values()) == 2
    for cell in plan.cells:
        out, teacher = folder.path / cell.item, folder.path / cell.teacher_item
        for name in ("teacher/model.safetensors", "teacher/profile.pt", "teacher/diagnosis.json"):
            assert (out / name).read_bytes() == (teacher / name).read_bytes(), name
        assert not (out / "report.html").exists() and not (out / "student.onnx").exists()
        config = yaml.safe_load((out / "config.yaml").read_text())
        assert config["teacher"]["run"] == str(teacher) and config["seed"] == cell.seed
        assert config["bank"]["folder"] == str(folder.path / "banks")
        result, metrics = folder.result(cell.item), read_json(out / "metrics.json")
        assert result is not None
        student = result["networks"]["student"]
        assert student["last"]["top1"] == metrics["student"]["top1"] and student["last"]["epoch"] == 2
        assert student["best"]["top1"] >= student["last"]["top1"] and student["best"]["chosen_on"] == "test"
        assert result["config_hash"] == cell.item.rsplit("-", 1)[1] and result["provenance"]["seed"] == cell.seed
        split = read_json(out / "split.json")
        assert result["provenance"]["split_checksum"] == split["checksum"] and result["provenance"]["threads"] == 1
        # Thirds by hand: the classes of this cut are sorted by their counts already; 3, 4 and 3 of them.
        per_class = metrics["student"]["per_class"]
        assert split["counts"] == sorted(split["counts"], reverse=True)
        thirds = [np.mean(per_class[a:b]) for a, b in ((0, 3), (3, 7), (7, 10))]
        assert list(student["last"]["groups"]["thirds"].values()) == pytest.approx(thirds)
        few = [a for a, n in zip(per_class, split["counts"], strict=True) if n < 20]
        assert student["last"]["groups"]["shot"]["few"] == pytest.approx(np.mean(few))
        assert student["last"]["groups"]["shot"]["many"] is None
        best = next(
            json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()
            if json.loads(line)["epoch"] == student["best"]["epoch"]
        )  # fmt: skip
        assert student["best"]["groups"]["shot"] == best["test"]["groups"]
    teachers = [folder.result(k) for k, i in plan.items.items() if i.kind == "teacher"]
    assert all(t is not None and list(t["networks"]) == ["teacher", "teacher_rectified"] for t in teachers)


def test_a_teacher_of_another_seed_is_measured_anew(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan, folder = finished
    teacher = folder.path / plan.cells[0].teacher_item
    config = plan.items[plan.cells[0].item].config
    for seed, same in ((0, True), (7, False)):
        given = config.teacher.model_copy(update={"run": str(teacher)})
        out = tmp_path / str(seed)
        run(prepare(config.model_copy(update={"seed": seed, "teacher": given})), out, report=False)
        mine, theirs = (torch.load(p / "teacher" / "profile.pt", weights_only=True) for p in (out, teacher))
        assert torch.equal(mine["view_logits"], theirs["view_logits"]) == same


def test_nothing_is_done_twice_and_a_method_may_join(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan, folder = finished
    again = Here()
    run_study(plan, folder, again)
    assert again.did == []
    more = _plan(
        tmp_path, methods=["none", "kd", {"name": "krdistill-lrd", "label": "auto", "tau": "auto"}], seeds=[0, 1]
    )
    before = {c.item: (folder.path / c.item / "result.json").stat().st_mtime_ns for c in plan.cells}
    with pytest.raises(RunFolderError, match="already holds 'none, seed 0' as another run") as error:
        run_study(_plan(tmp_path, set={**TINY["set"], "student.train.lr": 0.3}), folder, Here())
    assert "student.train.lr: 0.05 -> 0.3\n" in str(error.value)
    status = run_study(more, folder, again)
    assert [k.split("-")[0] for k in again.did] == ["cells/krdistill"] * 2
    assert set(status.states.values()) == {"done"}
    assert before == {k: (folder.path / k / "result.json").stat().st_mtime_ns for k in before}


def test_cells_share_their_teachers_stored_answers(tmp_path: Path) -> None:
    methods = ["none", "kd", {"name": "kd", "label": "hot", "temperature": 8}]
    plan = _plan(tmp_path, methods=methods, seeds=[0], set={**TINY["set"], "bank.views": 2})
    folder, did = StudyFolder(tmp_path / "out"), Here()
    assert set(run_study(plan, folder, did).states.values()) == {"done"}
    assert len(list((folder.path / "banks").glob("*/bank.json"))) == 1
    assert not list((folder.path / "cells").glob("*/bank"))
    # What was asked for is kept; what was not is dropped when everything is done.
    drawn = _plan(tmp_path, methods=methods[:2], seeds=[0], set={**TINY["set"], "student.train.epochs": 39})
    other = StudyFolder(tmp_path / "other")
    assert set(run_study(drawn, other, did).states.values()) == {"done"}
    assert "bank" in read_json(other.path / drawn.cells[1].item / "provenance.json")["seconds"]
    assert not (other.path / "banks").exists()
    # Stored answers are others than fresh ones, so they make another cell; of what asks no teacher they do not.
    plain = _plan(tmp_path, methods=methods, seeds=[0])
    assert [a.item == b.item for a, b in zip(plan.cells, plain.cells, strict=True)] == [True, False, False]


def test_what_is_in_the_way_is_refused(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan, folder = finished
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="holds no study"):
        run_study(plan, StudyFolder(tmp_path / "full"), Here())
    with folder.opened(plan), pytest.raises(RunFolderError, match="Another process is running"):
        run_study(plan, folder, Here())


def test_a_failure_stops_nobody_else(tmp_path: Path) -> None:
    broken = {"name": "kd", "label": "broken", "set": {"student.head": "cosine", "student.second_stage": "crt"}}
    data = {"here": {}, "gone": {"data.source": str(tmp_path / "no-such-folder")}}
    plan = _plan(tmp_path, methods=["kd", broken], data=data, seeds=[0])
    folder, did = StudyFolder(tmp_path / "out"), Here()
    status = run_study(plan, folder, did)
    assert status.failed_cells == ["here/-/-/broken/0", "gone/-/-/kd/0", "gone/-/-/broken/0"]
    messages = {c.id: status.failures.get(c.item, "") for c in plan.cells}
    assert "plain linear head" in messages["here/-/-/broken/0"]
    assert messages["gone/-/-/kd/0"].startswith("its teacher failed (teachers/")
    gone = next(c.teacher_item for c in plan.cells if c.data == "gone")
    assert "no-such-folder" in status.failures[gone]
    results = collect(plan, folder)
    assert [c["state"] for c in results["cells"]] == ["done", "failed", "failed", "failed"]
    assert any("plain linear head" in note for note in results["places"][0]["notes"])
    assert results["places"][0]["rows"][1]["missing"] == [0] == results["places"][0]["rows"][1]["failed"]
    study_html(results), study_markdown(results)
    # A failure is left alone, until it is asked for again.
    later = Here()
    assert run_study(plan, folder, later).failed_cells == status.failed_cells and later.did == []
    run_study(plan, folder, later, retry=True)
    assert len(later.did) == 2 and {k.split("-")[0] for k in later.did} == {"teachers/resnet8w8", "cells/kd"}


def _until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)


def _children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-A", "-o", "pid=,ppid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [int(p) for p, parent, stat in rows if int(parent) == pid and not stat.startswith("Z")]


def _alive(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True).stdout.strip()
    return bool(shown) and not shown.startswith("Z")


def test_a_killed_study_goes_on(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan, whole = finished
    _plan(tmp_path)  # writes the file
    folder = StudyFolder(tmp_path / "out")
    code = "import sys; from krdistill.commands.compare import compare; compare.main(sys.argv[1:])"
    arguments = [str(tmp_path / "study.yaml"), "--out", str(folder.path)]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.DEVNULL)
    cells = [c.item for c in plan.cells]
    _until(lambda: sum(folder.result(k) is not None for k in cells) >= 1)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _until(lambda: not any(map(_alive, workers)))
    assert workers
    done = {k: (folder.path / k / "result.json").stat().st_mtime_ns for k in plan.items if folder.result(k)}
    assert 0 < sum(k in done for k in cells) < len(cells)
    rest = Here()
    status = run_study(plan, folder, rest)
    assert set(status.states.values()) == {"done"}, status.failures
    assert set(rest.did) == set(plan.items) - set(done)
    assert done == {k: (folder.path / k / "result.json").stat().st_mtime_ns for k in done}
    for key in plan.items:  # the same numbers as a study that nobody stopped
        a, b = folder.result(key), whole.result(key)
        assert a is not None and b is not None and a["networks"] == b["networks"]


def test_a_killed_worker_is_noticed_and_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**TINY["set"], "student.train.epochs": 60, "student.train.evaluate_every": 60}
    plan = _plan(tmp_path, set=settings, seeds=[0], methods=["kd"])
    folder, executor = StudyFolder(tmp_path / "out"), LocalExecutor(1, 1)
    eager = "import krdistill.stages as s; s.CHECKPOINT_SECONDS = 0.0; from krdistill.study.worker import main; main()"
    plain = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[1:] == ["-m", "krdistill.study.worker"]
        assert (options["env"]["OMP_NUM_THREADS"], options["env"]["OMP_WAIT_POLICY"]) == ("1", "PASSIVE")
        return plain([command[0], "-c", eager], **options)

    key = plan.cells[0].item
    statuses: list[Status] = []
    with monkeypatch.context() as patched:
        patched.setattr(subprocess, "Popen", popen)
        thread = threading.Thread(target=lambda: statuses.append(run_study(plan, folder, executor)))
        thread.start()
        log = folder.path / key / "log.jsonl"
        _until(lambda: log.is_file() and len(log.read_text().splitlines()) >= 2)
        os.kill(executor._workers[0].process.pid, signal.SIGKILL)
        thread.join(30)
    assert statuses[0].states[key] == "failed" and "SIGKILL" in statuses[0].failures[key]
    assert statuses[0].states[plan.cells[0].teacher_item] == "done"
    rest = Here()
    assert run_study(plan, folder, rest, retry=True).states[key] == "done" and rest.did == [key]
    assert re.search(r"student: going on after epoch [1-9]\d* of 60", capsys.readouterr().out)
    epochs = [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
    assert epochs == list(range(1, 61)) and folder.failure(key) is None


def test_a_study_may_be_moved_and_its_methods_renamed(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan, _ = finished
    old, key = StudyFolder(tmp_path / "old"), plan.cells[0].item
    run_study(plan, old, Here())
    (old.path / key / "result.json").unlink()
    (old.path / key / "metrics.json").unlink()  # as if it had been stopped before its evaluation
    other = plan.cells[1].item  # as if it had been killed while it wrote its first file
    shutil.rmtree(old.path / other)
    (old.path / other).mkdir()
    (old.path / other / ".config.yaml.x1.yaml").write_text("name: no")
    old.path.rename(tmp_path / "new")
    renamed = _plan(tmp_path, methods=[{"name": "none", "label": "alone"}, "kd"])
    did = Here()
    status = run_study(renamed, StudyFolder(tmp_path / "new"), did)
    assert did.did == [key, other] and set(status.states.values()) == {"done"}, status.failures


def test_ray_does_the_same(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    pytest.importorskip("ray.exceptions", reason="ray is not installed: pip install 'krdistill[ray]'")
    plan, whole = finished
    folder, executor = StudyFolder(tmp_path / "out"), RayExecutor(None, jobs=2, threads=1)
    assert executor.slots == 2
    status = run_study(plan, folder, executor)
    assert set(status.states.values()) == {"done"}, status.failures
    for key in plan.items:
        a, b = folder.result(key), whole.result(key)
        assert a is not None and b is not None and a["networks"] == b["networks"]


def test_without_ray_the_error_names_the_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(KrdistillError, match=r"pip install 'krdistill\[train,ray\]'"):
        RayExecutor()


def test_time_left_is_judged_by_what_is_done(finished: tuple[StudyPlan, StudyFolder]) -> None:
    plan, folder = finished
    status = survey(plan, folder)
    kinds = {c.item: c.method for c in plan.cells}
    assert seconds_left(status, kinds) == 0.0
    kd = [c.item for c in plan.cells if c.method == "kd"]
    status.results[kd[0]] = {**status.results[kd[0]], "seconds": 10.0}
    status.states[kd[1]] = "waiting"
    del status.results[kd[1]]
    assert seconds_left(status, kinds) == pytest.approx(10.0)
    status.slots = 4
    assert seconds_left(status, kinds) == pytest.approx(2.5)
    assert seconds_left(Status(plan, dict.fromkeys(plan.items, "waiting")), kinds) is None


# Results --------------------------------------------------------------------------------------------------------------


def _cell(method: str, seed: int, top1: float | None, checksum: str = "s", **network: Any) -> dict[str, Any]:
    result = None
    if top1 is not None:
        student = {
            "model": "net", "parameters": 1000, "macs": None, **network,
            "last": {"epoch": 2, "top1": top1, "groups": {"shot": {"many": top1, "few": None}}},
            "best": {"epoch": 1, "top1": top1 + 0.1, "chosen_on": "test"},
        }  # fmt: skip
        result = {"networks": {"student": student}, "provenance": {"split_checksum": checksum}}
    return {"method": method, "seed": seed, "state": "done" if result else "missing", "result": result}


def test_rows_by_hand() -> None:
    cells = [_cell("kd", s, v) for s, v in ((0, 0.2), (1, 0.3), (2, 0.4))]
    cells += [_cell("ours", 0, 0.4), _cell("ours", 1, 0.6), _cell("ours", 2, None)]
    kd, ours = summary_rows(cells, ["kd", "ours"], "kd", [0, 1, 2])
    assert kd["metrics"]["last.top1"]["mean"] == pytest.approx(0.3)
    assert kd["metrics"]["last.top1"]["std"] == pytest.approx(0.1)
    assert kd["metrics"]["last.top1"]["difference"] is None and kd["missing"] == []
    mine = ours["metrics"]["last.top1"]
    assert (mine["mean"], mine["n"], mine["values"]) == (pytest.approx(0.5), 2, {"0": 0.4, "1": 0.6})
    # d = 0.2 and 0.3: s = 0.0707107, over sqrt(2) is 0.05, t(1; 0.975) = 12.7062.
    assert mine["difference"] == {
        "mean": pytest.approx(0.25), "half_width": pytest.approx(0.63531, rel=1e-5), "n": 2, "seeds": [0, 1],
    }  # fmt: skip
    assert ours["missing"] == [2]
    few = ours["metrics"]["last.groups.shot.few"]
    assert few["mean"] is None and few["n"] == 0 and few["difference"] is None
    assert ours["metrics"]["best.top1"]["mean"] == pytest.approx(0.6)


def test_cells_on_other_images_are_not_paired() -> None:
    cells = [_cell("kd", 0, 0.2), _cell("kd", 1, 0.2), _cell("ours", 0, 0.5, "other"), _cell("ours", 1, 0.3)]
    _, ours = summary_rows(cells, ["kd", "ours"], "kd", [0, 1])
    assert ours["metrics"]["last.top1"]["difference"] == {
        "mean": pytest.approx(0.1), "half_width": None, "n": 1, "seeds": [1],
    }  # fmt: skip


def test_results_agree_with_the_run_folders(finished: tuple[StudyPlan, StudyFolder]) -> None:
    plan, folder = finished
    results = collect(plan, folder)
    place = results["places"][0]
    top1 = {
        m: [read_json(folder.path / c.item / "metrics.json")["student"]["top1"] for c in plan.cells if c.method == m]
        for m in ("none", "kd")
    }
    for row in place["rows"]:
        entry = row["metrics"]["last.top1"]
        assert entry["mean"] == pytest.approx(np.mean(top1[row["method"]]))
        assert entry["std"] == pytest.approx(np.std(top1[row["method"]], ddof=1))
    gaps = np.subtract(top1["none"], top1["kd"])
    gap = place["rows"][0]["metrics"]["last.top1"]["difference"]
    assert gap["mean"] == pytest.approx(gaps.mean()) and gap["seeds"] == [0, 1]
    assert gap["half_width"] == pytest.approx(stats.t.ppf(0.975, 1) * gaps.std(ddof=1) / np.sqrt(2))
    teachers = [
        read_json(folder.path / k / "metrics.json")["teacher_rectified"]["top1"]
        for k, i in plan.items.items() if i.kind == "teacher"
    ]  # fmt: skip
    assert [t["label"] for t in place["teachers"]] == ["teacher, as is", "teacher, prior removed"]
    assert place["teachers"][1]["metrics"]["last.top1"]["mean"] == pytest.approx(np.mean(teachers))
    json.dumps(results, allow_nan=False)


def test_pages_say_what_they_show(finished: tuple[StudyPlan, StudyFolder]) -> None:
    plan, folder = finished
    results = collect(plan, folder)
    page, text = study_html(results), study_markdown(results)
    place = results["places"][0]
    headers, rows = means_table(place)
    assert headers[:6] == ["", "all", "balanced", "many", "medium", "few"] and "all, best epoch (test)" in headers
    assert [r[0] for r in rows] == ["teacher, as is", "teacher, prior removed", "none", "kd"]
    assert all(r[headers.index("many")] == "n/a" for r in rows) and all("(n=2)" in r[1] for r in rows)
    assert page.count("<svg") == 2 and "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    for row in rows:
        assert row[1] in page and row[1] in text
    # One seed has no interval, and says so; a missing one is named.
    one = _plan(folder.path.parent, seeds=[0, 5])
    results = collect(one, folder)
    assert differences_table(results["places"][0], "kd")[1][0][1].endswith("(one seed, no interval)")
    assert means_table(results["places"][0])[1][-1][-1] == "5"
    assert "2 of 4 cells are done, 2 not run yet" in study_markdown(results)
    study_html(results)


def test_pages_escape(finished: tuple[StudyPlan, StudyFolder]) -> None:
    results = json.loads(json.dumps(collect(*finished)))
    nasty = "<img src=x onerror=alert(1)>|`\u202e"
    results["name"] = results["cells"][0]["message"] = nasty
    results["places"][0]["notes"] = [nasty]
    results["places"][0]["rows"][0]["method"] = nasty
    page, text = study_html(results), study_markdown(results)
    assert "<img" not in page and "<img" not in text and "\u202e" not in page + text
    assert "&lt;img" in page and "\\|" in text


def _place(pair: str, teacher_size: int, rows: Mapping[str, tuple[int, float, float]]) -> dict[str, Any]:
    def metrics(**values: float) -> dict[str, Any]:
        return {
            k.replace("_", "."): {"mean": v, "std": None, "half_width": None, "n": 1, "values": {"0": v}}
            for k, v in values.items()
        }

    return {
        "data": "d", "pair": pair, "teacher": "", "notes": [], "split": None,
        "teachers": [{"label": "teacher", "model": "t", "parameters": teacher_size, "macs": None, "metrics": {}}],
        "rows": [
            {
                "method": m, "model": pair, "parameters": size, "macs": None, "missing": [], "failed": [],
                "chosen_on": "test", "metrics": metrics(last_top1=top1, last_groups_shot_few=few),
            }
            for m, (size, top1, few) in rows.items()
        ],
    }  # fmt: skip


def test_pareto_front_by_hand() -> None:
    small = _place("small", 1000, {"kd": (100, 0.5, 0.1), "ours": (100, 0.6, 0.2)})
    large = _place("large", 1000, {"kd": (400, 0.7, 0.1), "ours": (400, 0.65, 0.4)})
    [entry] = pareto_points({"places": [small, large]})
    front = {
        (p["pair"], p["method"]): (p["front"]["all parameters"], p["front"]["few parameters"]) for p in entry["points"]
    }
    assert front == {
        ("small", "kd"): (False, False), ("small", "ours"): (True, True), ("large", "kd"): (True, False),
        ("large", "ours"): (False, True),
    }  # fmt: skip
    assert [p["ratio"] for p in entry["points"]] == [10.0, 10.0, 2.5, 2.5]
    headers, rows = pareto_table(entry)
    assert rows[1][headers.index("compression")] == "10.0x" and rows[1][-1] == "all, few"
    assert pareto_points({"places": [small]}) == []


def test_what_the_students_of_the_pairs_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pairs = {"wide": {"student.model": "resnet8w16"}, "narrow": {"student.model": "resnet8w8"}}
    plan, folder = _plan(tmp_path, pairs=pairs, seeds=[0], methods=["kd"]), StudyFolder(tmp_path / "out")
    status = run_study(plan, folder, Here())
    assert set(status.states.values()) == {"done"}, status.failures
    assert collect(plan, folder)["places"][0]["device"] is None
    said: list[str] = []
    found = measure_students(plan, folder, seconds=0.01, on_step=said.append)
    assert list(found) == ["-/wide/-", "-/narrow/-"] and len(said) == 4
    assert found["-/wide/-"]["macs"] > found["-/narrow/-"]["macs"] > 0
    measure_students(plan, folder, on_step=said.append)
    assert len(said) == 4  # known
    results = collect(plan, folder)
    [entry] = pareto_points(results)
    by_pair = {p["pair"]: p for p in entry["points"]}
    for pair, point in by_pair.items():
        assert (point["macs"], point["milliseconds"]) == tuple(found[f"-/{pair}/-"][k] for k in ("macs", "median_ms"))
    headers, rows = pareto_table(entry)
    assert rows[0][headers.index("ms")] == f"{found['-/narrow/-']['median_ms']:.3f}"
    page = study_html(results)
    assert "milliseconds of the student for one example" in page and "multiply-accumulates of the student" in page
    (folder.path / "devices.json").write_text("[", encoding="utf-8")
    with pytest.raises(RunFolderError, match="damaged"):
        collect(plan, folder)
    (folder.path / "devices.json").unlink()
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "krdistill[onnx]" in measure_students(plan, folder)["-/wide/-"]["left_out"]


def test_the_rarest_classes_are_those_that_there_are() -> None:
    row = {
        "metrics": {f"last.groups.{k}": {"n": n} for k, n in (("shot.medium", 2), ("shot.few", 0), ("thirds.tail", 2))}
    }
    assert rare_metric({"rows": [row]}) == "last.groups.thirds.tail"
    row["metrics"]["last.groups.shot.few"]["n"] = 1
    assert rare_metric({"rows": [row]}) == "last.groups.shot.few"
    assert rare_metric({"rows": []}) is None


def test_flat_names() -> None:
    network = {"last": {"top1": 0.5, "groups": {"shot": {"few": None}}}, "best": None}
    assert flatten(network) == {"last.top1": 0.5, "last.groups.shot.few": None}


# The command ----------------------------------------------------------------------------------------------------------


def test_a_study_of_rows_and_one_of_sentences(tmp_path: Path) -> None:
    rows = _plan(tmp_path, base="features-lt", seeds=[0], methods=["kd"], set={"train.epochs": 2})
    status = run_study(rows, StudyFolder(tmp_path / "out"), Here())
    assert set(status.states.values()) == {"done"}, status.failures
    sentences = _plan(tmp_path, base="banking77-lt", seeds=[0], methods=["kd"], set={})
    teacher = next(item for item in sentences.items.values() if item.kind == "teacher")
    # What stands in for the student of a teacher's own run is checked against the data like any other.
    assert teacher.config.student.train.augmentation == "none" == teacher.config.teacher.train.augmentation


def test_the_command_prints_and_tells_by_its_status(tmp_path: Path) -> None:
    broken = {"name": "kd", "label": "broken", "set": {"student.head": "cosine", "student.second_stage": "crt"}}
    plan = _plan(tmp_path, methods=["kd", broken], seeds=[3])
    out = tmp_path / "out"
    arguments = [str(tmp_path / "study.yaml"), "--out", str(out), "--jobs", "1"]
    dry = CliRunner().invoke(compare, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and "2 in 2 runs, 1 shared teachers" in dry.output and not out.exists()
    run_study(plan, StudyFolder(out), Here())
    done = CliRunner().invoke(compare, arguments)
    assert done.exit_code == 1 and "plain linear head" in done.output.replace("\n", " ")
    assert "1 of 2 cells failed; --retry tries them again" in done.output
    assert all((out / name).stat().st_size for name in ("results.json", "results.md", "results.html"))
    wrong = CliRunner().invoke(compare, [*arguments, "--address", "auto"])
    assert isinstance(wrong.exception, ConfigError)


def test_the_table_shows_where_a_study_stands(finished: tuple[StudyPlan, StudyFolder]) -> None:
    plan, folder = finished
    status = survey(plan, folder)
    kd = [c.item for c in plan.cells if c.method == "kd"]
    top1 = status.results[kd[0]]["networks"]["student"]["last"]["top1"]
    status.results = {k: {**r, "seconds": 90.0} for k, r in status.results.items() if k != kd[1]}
    status.states[kd[1]] = "waiting"
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)
    with _live(console) as events:
        events.tick(status)
        status.states[kd[1]] = "failed"
        events.tick(status)
    shown = re.sub(r"\x1b\[[0-9?]*[a-zA-Z]", "", text.getvalue())
    assert re.search(rf"kd +1/2  {100 * top1:.1f}%  1 min 30 s left", shown)
    assert re.search(rf"kd +1/2 1 failed  {100 * top1:.1f}%", shown) and re.search(r"none +2/2  \d", shown)


def test_events_are_heard(finished: tuple[StudyPlan, StudyFolder], tmp_path: Path) -> None:
    plan = _plan(tmp_path, seeds=[0], methods=["none"], baseline=None)
    heard: list[str] = []

    class Heard(StudyEvents):
        def started(self, key: str, status: Status) -> None:
            heard.append(f"started {key.split('-')[0]}")

        def finished(self, key: str, status: Status) -> None:
            heard.append(f"finished {key.split('-')[0]} {status.states[key]}")

    run_study(plan, StudyFolder(tmp_path / "out"), Here(), events=Heard())
    both = ("teachers/resnet8w8", "cells/none")
    assert heard == [words for key in both for words in (f"started {key}", f"finished {key} done")]


def test_how_a_recipe_draws_is_part_of_what_a_cell_stands_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def identity() -> dict[str, Any]:
        plan = _plan(tmp_path, methods=["krdistill"], baseline="krdistill", seeds=[0])
        return dict(plan.items[plan.cells[0].item].identity)

    now = identity()
    assert now["sampler"] == "square-root"
    monkeypatch.setitem(recipes._RECIPES, "krdistill", replace(recipes.recipe("krdistill"), sampler="instance"))
    assert identity() == {k: v for k, v in now.items() if k != "sampler"}


def test_a_study_that_has_grown_reuses_committed_cells(
    finished: tuple[StudyPlan, StudyFolder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reuse = runpy.run_path(str(Path(__file__).parents[1] / "benchmarks" / "reuse.py"))
    before = json.loads(json.dumps(collect(*finished)))
    folder = StudyFolder(tmp_path / "grown")
    grown = _plan(tmp_path, methods=["none", {"name": "kd", "label": "plain"}, "kd-balanced"], baseline="plain")
    assert reuse["lay"](grown.study, folder, [before], {"none": "none", "plain": "kd"}) == 4
    did = Here()
    assert set(run_study(grown, folder, did).states.values()) == {"done"}
    assert sorted(key.split("/")[1].split("-seed")[0] for key in did.did) == ["kd-balanced"] * 2 + ["resnet8w8"] * 2
    results = collect(grown, folder)
    folder.write_results(results)
    old, new = (r["places"][0]["rows"][0]["metrics"] for r in (before, results))
    assert {n: e["values"] for n, e in old.items()} == {n: e["values"] for n, e in new.items()}
    (tmp_path / "kept").mkdir()
    path = reuse["take"](folder, [before], tmp_path / "kept")
    assert "2 teachers as before" in capsys.readouterr().out
    assert len(json.loads(path.read_text(encoding="utf-8"))["cells"]) == 6

    found = [r["networks"]["teacher"]["last"] for r in before["teachers"].values()]
    for factor, same in ((1 + 1e-14, True), (1 + 1e-9, False)):  # the order of a sum; another teacher
        for last in found:
            last["nll"] *= factor
        if same:
            reuse["take"](folder, [before], tmp_path / "kept")
        else:
            with pytest.raises(SystemExit, match="come to other figures"):
                reuse["take"](folder, [before], tmp_path / "kept")
    with pytest.raises(SystemExit, match="no method bkd"):
        reuse["lay"](grown.study, folder, [before], {"bkd": "bkd"})
    other = _plan(tmp_path, methods=[{"name": "kd", "temperature": 2}], baseline="kd")
    with pytest.raises(SystemExit, match="options of kd differ"):
        reuse["lay"](other.study, StudyFolder(tmp_path / "other"), [before], {"kd": "kd"})
    longer = _plan(tmp_path, set={**TINY["set"], "train.epochs": 3})
    with pytest.raises(SystemExit, match="set differs"):
        reuse["lay"](longer.study, StudyFolder(tmp_path / "longer"), [before], {"kd": "kd"})


def test_the_study_of_the_howto_is_what_the_page_says(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "howto-compare.md").read_text(encoding="utf-8")
    path = tmp_path / "study.yaml"
    path.write_text(page.split("```yaml\n")[1].split("```")[0], encoding="utf-8")
    plan = plan_study(read_study(path))
    kinds = [item.kind for item in plan.items.values()]
    assert (len(plan.cells), kinds.count("cell"), kinds.count("teacher")) == (72, 60, 12)
