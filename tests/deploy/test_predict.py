from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krdistill.cli import main
from krdistill.data.folder import IMAGE_SUFFIXES
from krdistill.deploy import DeviceModel, entries, predict
from krdistill.deploy import inputs as inputs_module
from krdistill.deploy.inputs import Entry
from krdistill.deploy.runtime import with_prior
from krdistill.errors import ModelError
from krdistill.models.network import load_network
from krdistill.stages import load_configured_data

Bright = Callable[..., Path]
BLOCKED = (
    "torch",
    "torchvision",
    "scipy",
    "sklearn",
    "matplotlib",
    "onnx",
    "onnxscript",
    "torchmetrics",
    "safetensors",
    "rich",
    "pydantic",
    "yaml",
)


def _call(*args: str | Path) -> int:
    try:
        main([str(a) for a in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def _rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text, newline="")))


def _save(path: Path, value: int = 0, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)
    return path


def _light(value: float) -> float:
    """Probability of 'light' for an image of one grey value: the sigmoid of its brightness."""
    return 1 / (1 + math.exp(-value / 255))


# Without torch -------------------------------------------------------------------------------------------------------


def test_student_of_a_real_run_answers_without_torch_as_pytorch_does(finished_run: Path, tmp_path: Path) -> None:
    from krdistill.config import load_config

    test = load_configured_data(load_config(str(finished_run / "config.yaml")).data).test
    network = load_network(finished_run / "student").eval()
    folder = tmp_path / "digits"
    folder.mkdir()
    images = test.images[:150]
    for i, image in enumerate(images.numpy()):
        Image.fromarray(image.squeeze(2)).save(folder / f"{i:03d}.png")
    code = (
        "import sys\n"
        f"class Refuse:\n    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] in {BLOCKED!r}:\n            raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from krdistill.cli import main\n"
        f"main(['predict', {str(finished_run / 'student.onnx')!r}, {str(folder)!r}, '--top', '10', '--batch', '64'])\n"
        f"assert not set({BLOCKED!r}) & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    rows = _rows(done.stdout)
    with torch.no_grad():
        want = network(images.permute(0, 3, 1, 2)).logits.softmax(1).numpy()
    assert [Path(r["path"]).name for r in rows] == [f"{i:03d}.png" for i in range(150)]
    names = test.class_names
    got = np.zeros_like(want)
    for i, row in enumerate(rows):
        for k in range(10):
            suffix = "" if k == 0 else f"_{k + 1}"
            got[i, names.index(row[f"class{suffix}"])] = float(row[f"probability{suffix}"])
        assert row["class"] == names[want[i].argmax()] and row["error"] == ""
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_natural_prior_of_a_real_run_is_its_training_frequencies(finished_run: Path, tmp_path: Path) -> None:
    model = DeviceModel(finished_run / "student.onnx")
    split = json.loads((finished_run / "split.json").read_text(encoding="utf-8"))
    assert list(model.class_counts or ()) == split["counts"]


# Inputs ---------------------------------------------------------------------------------------------------------------


def test_suffixes_are_those_of_training_folders() -> None:
    assert inputs_module.IMAGE_SUFFIXES == IMAGE_SUFFIXES


def test_every_kind_of_input_in_order(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "photos"
    for name in ("b.png", "a.PNG", "deep/er/c.bmp", ".hidden.png", ".git/x.png"):
        _save(root / name)
    (root / "notes.md").write_text("no image")
    (tmp_path / "list.txt").write_text("photos/b.png\r\nphotos/ä é.png\n\n", encoding="utf-8")
    _save(root / "ä é.png", 255)
    (root / "table.csv").write_text('id,path\n1,b.png\n2,"deep/er/c.bmp"\n3,\n', encoding="utf-8-sig")
    (root / "tabs.tsv").write_text("path\tid\nb.png\t1\n", encoding="utf-8")
    odd = _save(root / "new\nline.png", 255)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(os.fsencode(f"{odd}\0{root / 'b.png'}\0"))))
    given = [
        str(root / "b.png"),
        str(root),
        str(tmp_path / "list.txt"),
        str(root / "table.csv"),
        str(root / "tabs.tsv"),
    ]
    assert _call("predict", brightness_file(), *given, "-", "--batch", "2") == 3
    out, err = capsys.readouterr()
    rows = _rows(out)
    inside = ["a.PNG", "b.png", "new\nline.png", "ä é.png", "deep/er/c.bmp"]
    want = [str(root / "b.png"), *(str(root / name) for name in inside), "photos/b.png", "photos/ä é.png"]
    want += ["b.png", "deep/er/c.bmp", f"{root / 'table.csv'}:4", "b.png", str(odd), str(root / "b.png")]
    assert [r["path"] for r in rows] == want
    assert [r["error"] for r in rows if r["error"]] == ["no path in this line"]
    light = [r["path"] for r in rows if r["probability"] and abs(float(r["probability"]) - _light(255)) < 1e-5]
    assert light == [str(odd), str(root / "ä é.png"), "photos/ä é.png", str(odd)]
    assert "1 of 14 could not be read" in err


def test_lines_on_standard_input(brightness_file: Bright, tmp_path: Path) -> None:
    names = [str(_save(tmp_path / f"{i}.png", i)) for i in range(3)]
    stream = io.BytesIO("\r\n".join(names).encode() + b"\n\n" + names[0].encode())
    assert [e.shown for e in entries(["-"], stream)] == [*names, names[0]]


def test_links_in_a_circle_and_lists_that_cannot_be_read(tmp_path: Path) -> None:
    _save(tmp_path / "in" / "a.png")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "no_column.csv").write_text("file\na.png\n")
    (tmp_path / "empty").mkdir()
    given = ["in", "no_column.csv", "gone.csv", "empty", "gone.png"]
    found = list(entries([str(tmp_path / g) for g in given], io.BytesIO()))
    errors = [e.error or "" for e in found]
    assert len(found) == 5 and errors[0] == errors[4] == ""  # a missing image is found out when it is opened
    for error, said in zip(errors[1:4], ("a column 'path', got file", "no such file", "without images"), strict=True):
        assert said in error


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS keeps file names in UTF-8")
def test_names_that_are_no_utf8_come_out_as_they_are(
    brightness_file: Bright, tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    folder = os.fsencode(tmp_path / "in")
    os.mkdir(folder)
    shutil.copy(os.fsencode(_save(tmp_path / "a.png")), folder + b"/\xff.png")
    file = brightness_file()
    code = "from krdistill.cli import main; import sys; main(sys.argv[1:])"
    for form in ("csv", "jsonl"):
        command = [sys.executable, "-c", code, "predict", str(file), str(tmp_path / "in"), "--format", form]
        done = subprocess.run(command, capture_output=True, timeout=60)
        assert done.returncode == 0, done.stderr
        if form == "csv":
            assert folder + b"/\xff.png,dark,0.500000," in done.stdout
        else:
            assert os.fsencode(json.loads(done.stdout)["path"]) == folder + b"/\xff.png"


# Images ---------------------------------------------------------------------------------------------------------------


def test_bad_images_are_rows_and_the_others_are_looked_at(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in"
    _save(folder / "a_good.png", 255)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    (folder / "b_cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    (folder / "c_zero.png").touch()
    (folder / "d_text.png").write_text("no image at all")
    (folder / "e_folder.png").mkdir()
    _save(folder / "f_cmyk.jpg", 0, mode="CMYK")  # no ink at all is white
    Image.fromarray(np.full((4, 4), 65535, np.uint16)).save(folder / "g_16bit.png")
    frames = [Image.new("L", (4, 4), v) for v in (255, 0)]
    frames[0].save(folder / "h_animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(folder / "i_glass.png")
    _save(folder / "j_bomb.png", 255, size=(100, 100))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    assert _call("predict", brightness_file(), folder, folder / "gone.png", "--batch", "3") == 3
    out, err = capsys.readouterr()
    rows = {Path(r["path"]).name: r for r in _rows(out)}
    bad = {"b_cut.jpg": "truncated", "c_zero.png": "empty file", "d_text.png": "no image format",
           "j_bomb.png": "more than 5,000 pixels", "gone.png": "no such file"}  # fmt: skip
    for name, said in bad.items():
        assert said in rows[name]["error"] and rows[name]["class"] == rows[name]["probability"] == "", rows[name]
    good = {name: float(r["probability"]) for name, r in rows.items() if not r["error"]}
    assert set(good) == {"a_good.png", "f_cmyk.jpg", "g_16bit.png", "h_animated.gif", "i_glass.png"}
    assert all(abs(p - _light(255)) < 1e-5 for p in good.values())
    assert "5 of 10 could not be read" in err and "Traceback" not in err


def test_photographs_are_turned_upright_scaled_and_grey_where_the_model_is(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Upright the picture is 8 wide and 16 high and fits as a whole; lying, its white middle alone would be cropped."""
    stored = np.zeros((8, 16, 3), np.uint8)
    stored[:, 6:10] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(tmp_path / "lying.png", exif=exif)
    grey = brightness_file(shape=("batch", 1, 8, 4))
    assert _call("predict", grey, tmp_path / "lying.png", "--top", "2") == 0
    (row,) = _rows(capsys.readouterr().out)
    # Red is 76 of 255 in grey (ITU-R 601), on a quarter of the picture.
    assert row["class"] == "light" and abs(float(row["probability"]) - _light(76 / 4)) < 1e-3
    assert abs(float(row["probability_2"]) - (1 - _light(76 / 4))) < 1e-3


def test_order_and_answers_do_not_depend_on_the_batch(brightness_file: Bright, tmp_path: Path) -> None:
    model = DeviceModel(brightness_file())
    found = [Entry(str(i), _save(tmp_path / f"{i}.png", (37 * i) % 256)) for i in range(50)]
    found.insert(20, Entry("gone", tmp_path / "gone.png"))
    one, some, all_ = (list(predict(model, found, top=2, batch=b)) for b in (1, 7, 100))
    assert one == some == all_
    assert [p.path for p in one] == [e.shown for e in found]
    light = [dict(zip(p.classes, p.probabilities, strict=True)).get("light") for p in one]
    want = [_light((37 * i) % 256) for i in range(50)]
    np.testing.assert_allclose([v for v in light if v is not None], want, atol=1e-6)


def test_images_are_read_only_as_far_as_they_are_needed(brightness_file: Bright, tmp_path: Path) -> None:
    image, taken = _save(tmp_path / "a.png"), []

    def endless() -> Iterator[Entry]:
        while True:
            taken.append(1)
            yield Entry("a", image)

    stream = predict(DeviceModel(brightness_file()), endless(), batch=4)
    for _ in range(40):
        next(stream)
    assert 40 <= len(taken) <= 40 + 4 * (min(8, os.cpu_count() or 1) + 2)
    stream.close()  # type: ignore[attr-defined]


def test_answers_that_are_no_numbers_are_errors(brightness_file: Bright, tmp_path: Path) -> None:
    model = DeviceModel(brightness_file(slope=(0.0, math.nan)))
    (p,) = predict(model, [Entry("a", _save(tmp_path / "a.png", 255))])
    assert "not finite" in (p.error or "") and not p.classes


# Priors, doubt, formats -----------------------------------------------------------------------------------------------


def test_prior_worked_out_by_hand() -> None:
    p = np.array([[0.2, 0.8], [1.0, 0.0]], np.float32)
    # 0.2*9 : 0.8*1 = 1.8 : 0.8
    np.testing.assert_allclose(with_prior(p, np.array([0.9, 0.1]))[0], [1.8 / 2.6, 0.8 / 2.6], atol=1e-7)
    z = np.log([0.2, 0.8]) + np.log([0.9, 0.1])  # the same as adding the log prior to the logits
    np.testing.assert_allclose(with_prior(p, np.array([0.9, 0.1]))[0], np.exp(z) / np.exp(z).sum(), atol=1e-7)
    np.testing.assert_array_equal(with_prior(p, None), p.astype(np.float64))
    np.testing.assert_allclose(with_prior(p, np.array([0.5, 0.5])), p, atol=1e-7)
    np.testing.assert_allclose(with_prior(p, np.array([0.0, 1.0])), [[0, 1], [0, 1]])  # not NaN


@pytest.mark.parametrize(("prior", "light"), [("uniform", 0.5), ("natural", 0.25), ("FILE", 0.8)])
def test_priors_of_the_command(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str], prior: str, light: float
) -> None:
    file = brightness_file(metadata={"class_names": ["dark", "light"], "class_counts": [30, 10]})
    (tmp_path / "prior.csv").write_text("class,weight\nlight,8\ndark,2\n", encoding="utf-8")
    given = str(tmp_path / "prior.csv") if prior == "FILE" else prior
    assert _call("predict", file, _save(tmp_path / "a.png"), "--prior", given, "--format", "jsonl", "--top", "9") == 0
    row = json.loads(capsys.readouterr().out)
    assert {t["class"]: t["probability"] for t in row["top"]} == {"light": light, "dark": round(1 - light, 6)}
    assert row["class"] == row["top"][0]["class"] and "error" not in row


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "does not say how many training images"),
        ("name,weight\n", "columns class and weight"),
        ("class,weight\nlihgt,1\n", "Did you mean 'light'"),
        ("class,weight\nlight,1\nlight,1\n", "twice"),
        ("class,weight\nlight,1\n", "'dark'"),
        ("class,weight\nlight,-1\ndark,1\n", "at least 0"),
        ("class,weight\nlight,much\ndark,1\n", "'much'"),
        ("class,weight\nlight,nan\ndark,1\n", "'nan'"),
        ("class,weight\nlight\ndark,1\n", "None"),
        ("class,weight\nlight,0\ndark,0\n", "all weights"),
    ],
)
def test_priors_that_cannot_be_used_are_refused(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | None, said: str
) -> None:
    if text is not None:
        (tmp_path / "prior.csv").write_text(text, encoding="utf-8")
    given = "natural" if text is None else str(tmp_path / "prior.csv")
    assert _call("predict", brightness_file(), _save(tmp_path / "a.png"), "--prior", given) == 2
    out, err = capsys.readouterr()
    assert said in err and not out and "Traceback" not in err


def test_doubt_leaves_the_class_empty_and_the_probability_there(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [_save(tmp_path / "a.png", 0), _save(tmp_path / "b.png", 255)]
    assert _call("predict", brightness_file(), *images, "--abstain-below", "0.6", "--top", "2") == 0
    out, err = capsys.readouterr()
    assert err.strip() == "1 of 2 are less sure than 0.6, and left open."
    rows = _rows(out)
    assert [r["class"] for r in rows] == ["", "light"]
    assert [float(r["probability"]) for r in rows] == [0.5, round(_light(255), 6)]
    assert rows[0]["class_2"] == "light"
    assert _call("predict", brightness_file(), *images, "--abstain-below", "0.6", "--format", "jsonl") == 0
    assert [json.loads(line)["class"] for line in capsys.readouterr().out.splitlines()] == [None, "light"]


def test_cells_that_a_spreadsheet_would_run_are_made_harmless(
    brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["=1+1.png", "+a.png", "@a.png", "-a.png", "\tq.png", 'plain, with = and "quotes"\r.png']
    for name in names:
        _save(Path(name), 255)
    file = brightness_file(metadata={"class_names": ["dark", "=HYPERLINK()"]})
    assert _call("predict", file, "--", *names) == 0
    rows = _rows(capsys.readouterr().out)
    assert [r["path"] for r in rows] == [*(f"'{name}" for name in names[:5]), names[5]]
    assert {r["class"] for r in rows} == {"'=HYPERLINK()"}
    assert _call("predict", file, "--format", "jsonl", "--", names[0]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == names[0]  # JSON is not run


def test_out_takes_its_place_whole(brightness_file: Bright, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image, out = _save(tmp_path / "a.png"), tmp_path / "made" / "out.csv"
    assert _call("predict", brightness_file(), image, "--out", out) == 0
    assert capsys.readouterr().out == ""
    assert [p.name for p in out.parent.iterdir()] == ["out.csv"]
    assert _rows(out.read_text(encoding="utf-8"))[0]["probability"] == "0.500000"
    assert _call("predict", brightness_file(), image, "--out", out.parent) == 2
    assert "is a folder" in capsys.readouterr().err


def test_a_reader_that_has_seen_enough_is_no_error(brightness_file: Bright, tmp_path: Path) -> None:
    image = _save(tmp_path / "a.png")
    (tmp_path / "many.txt").write_text("a.png\n" * 20_000)
    assert image.is_file()
    code = "from krdistill.cli import main; import sys; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, "predict", str(brightness_file()), str(tmp_path / "many.txt")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == b"path,class,probability,error\n"
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(60) == 0 and said == b"", said


# Files that are no student --------------------------------------------------------------------------------------------


def test_files_that_are_no_student_are_refused(brightness_file: Bright, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    whole = brightness_file("whole.onnx")
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("not a model")
    (tmp_path / "cut.onnx").write_bytes(whole.read_bytes()[:200])
    float32 = onnx.TensorProto.FLOAT
    names = {"class_names": ["dark", "light"]}
    cases = {
        tmp_path / "gone.onnx": "not there",
        tmp_path: "a folder",
        tmp_path / "empty.onnx": "cannot be opened",
        tmp_path / "text.onnx": "cannot be opened",
        tmp_path / "cut.onnx": "cannot be opened",
        brightness_file("1.onnx", metadata={}): "what its classes are called",
        brightness_file("2.onnx", metadata={"class_names": "dark"}): "what its classes are called",
        brightness_file("3.onnx", metadata={"class_names": ["a", "b", "c"]}): "answers 2 classes and names 3",
        brightness_file("4.onnx", shape=("batch", 4)): "expected one input of raw images",
        brightness_file("5.onnx", dtype=float32): "expected one input of raw images",
        brightness_file("6.onnx", more_inputs=1): "expected one input of raw images",
        brightness_file("7.onnx", shape=(1, 3, 4, 4)): "expected one input of raw images",
        brightness_file("8.onnx", shape=("batch", 2, 4, 4)): "1 or 3",
        brightness_file("9.onnx", shape=("batch", 3, "h", "w")): "expected one input of raw images",
        brightness_file("10.onnx", metadata={**names, "class_counts": [1]}): "2 whole numbers",
    }
    for path, said in cases.items():
        with pytest.raises(ModelError) as caught:
            DeviceModel(path)
        assert said in str(caught.value) and "krdistill export" in str(caught.value), (path, str(caught.value))


def test_a_missing_runtime_names_its_extra(brightness_file: Bright, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        f"from krdistill.cli import main\nmain(['predict', {str(brightness_file())!r}, 'x.png'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "krdistill[runtime]" in done.stderr and "Traceback" not in done.stderr
