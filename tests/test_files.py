from __future__ import annotations

from pathlib import Path

import pytest

from krdistill.files import read_json, replacing, write_json, write_text


def test_written_whole_and_nothing_left_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    write_json(path, {"a": [1, None, "ß"]})
    assert read_json(path) == {"a": [1, None, "ß"]}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failure_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), replacing(path) as part:
        part.write_text("half", encoding="utf-8")
        raise RuntimeError("killed")
    assert path.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_no_silent_nan_in_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())
