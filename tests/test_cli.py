from __future__ import annotations

from pathlib import Path

import pytest

from krdistill.cli import main
from krdistill.config import list_presets
from krdistill.recipes import list_recipes


def _call(*args: str) -> int:
    try:
        main(list(args))
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_list_shows_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert _call("list") == 0
    shown = capsys.readouterr().out
    for name in (*list_presets(), *(r.name for r in list_recipes()), "resnet32x4", "crop-flip", "2409.07694"):
        assert name in shown


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("rum",), "Did you mean 'run'"),
        (("run",), "Missing argument"),
        (("run", "cifar100lt"), "Did you mean 'cifar100-lt'"),
        (("run", "digits-lt", "--student.train.epoch", "3"), "Did you mean 'epochs'"),
        (("run", "digits-lt", "--student.train.epochs"), "needs a value"),
        (("run", "digits-lt", "stray"), "--section.key VALUE"),
        (("run", "digits-lt", "--recipe", "krdistil"), "Did you mean 'krdistill'"),
        (("run", "digits-lt", "--student.model", "resnet80"), "network"),
        (("run", "cifar100-lt", "--data.root", "nowhere"), "krdistill data download cifar100"),
        (("list", "recipe"), "Did you mean 'recipes'"),
        (("report", "nowhere"), "nowhere"),
        (("show", "nowhere"), "nowhere"),
        (("data", "download", "cifar1000", "--root", "x"), "cifar100"),
    ],
)
def test_a_users_mistake_is_one_message_without_a_traceback(
    args: tuple[str, ...],
    said: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call(*args) == 2
    err = capsys.readouterr().err
    assert said in err.replace("\n", " ").replace("  ", " ")
    assert "Traceback" not in err
    assert not list(tmp_path.iterdir()), "a refused command left something behind"


def test_dry_run_prints_the_plan_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert _call("run", "digits-lt", "--dry-run", "--seed", "3") == 0
    shown = capsys.readouterr().out
    for words in ("training images 8x8x1", "imbalance factor", "resnet8w32", "krdistill", "runs/digits-lt", "seed 3"):
        assert words in shown
    assert not list(tmp_path.iterdir())


def test_run_show_and_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = (
        "--train.epochs", "1", "--teacher.model", "resnet8", "--baselines", "kd", "--export.onnx", "false",
        "--out", "r",
    )  # fmt: skip
    assert _call("run", "digits-lt", *small) == 0
    shown = capsys.readouterr().out
    assert "of training" in shown and "report   r/report.html" in shown
    table = [
        line for line in shown.splitlines() if "balanced" in line or line.startswith(("kd", "krdistill", "teacher"))
    ]
    assert len(table) >= 4
    assert _call("show", "r") == 0
    assert "krdistill" in capsys.readouterr().out
    (tmp_path / "r" / "report.html").unlink()
    assert _call("report", "r") == 0
    assert (tmp_path / "r" / "report.html").is_file()
    # The same command again has nothing to do; another one is refused, and nothing is lost.
    assert _call("run", "digits-lt", *small) == 0
    assert "already" in capsys.readouterr().out
    assert _call("run", "digits-lt", *small, "--seed", "1") == 2
    assert "seed: 0 -> 1" in capsys.readouterr().err
