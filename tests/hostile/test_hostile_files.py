"""Files that a stranger made: none runs, leaves its folder, or takes memory without bound."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import resource
import shutil
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from traps import TINY, Trap

from krdistill.bank.external import load_answers
from krdistill.bank.store import BankError, ViewBank
from krdistill.config import load_config
from krdistill.data import load_data
from krdistill.data.arrays import load_npz
from krdistill.data.cifar import load_cifar
from krdistill.data.decoding import decode, read_headers
from krdistill.data.lists import list_lists
from krdistill.errors import DataError, KrdistillError, ModelError, RunFolderError
from krdistill.files import read_arrays, read_json
from krdistill.models.graphs import load_graph
from krdistill.models.network import load_network
from krdistill.models.weights import read_weights
from krdistill.pipeline import prepare, run
from krdistill.runfolder import RunFolder


def _torch_file(value: Any, *, old: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=not old)
    return stream.getvalue()


def _peak() -> int:
    """The most memory this process has had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# Pickles --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["plain.pt", "new.pt", "old.pth", "inside.bin", "key.pt", "plain.safetensors"])
def test_weights(name: str, trap: Trap, tmp_path: Path) -> None:
    weights = {"w": torch.zeros(2)}
    content = {
        "plain.pt": pickle.dumps(trap),
        "new.pt": _torch_file(trap),
        "old.pth": _torch_file(trap, old=True),
        "inside.bin": _torch_file({"state_dict": {**weights, "more": trap}}),
        "key.pt": _torch_file({**weights, ("a", 1): [trap]}),
        "plain.safetensors": pickle.dumps(trap),
    }[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError):
        read_weights(tmp_path / name)


def test_checkpoints(trap: Trap, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run", load_config(TINY))
    content = _torch_file({"trainer": trap})
    path = folder.path / "checkpoints" / "teacher.pt"
    path.parent.mkdir()
    path.write_bytes(content + b"sha256 " + hashlib.sha256(content).hexdigest().encode() + b"\n")  # a good checksum
    with pytest.raises(RunFolderError, match="is damaged"):
        folder.load_checkpoint("teacher")


@pytest.mark.parametrize("content", ["trap", "list", "other", "cut"])
def test_profiles_of_teachers(content: str, trap: Trap, tiny_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "metrics.json").unlink()
    profile = folder / "teacher" / "profile.pt"
    written = {
        "trap": _torch_file({"class_means": trap}),
        "list": _torch_file([1]),
        "other": _torch_file({"x": torch.zeros(1)}),
        "cut": profile.read_bytes()[:-100],
    }
    profile.write_bytes(written[content])
    with pytest.raises(RunFolderError, match=r"profile\.pt is damaged"):
        run(prepare(load_config(TINY)), folder)


def test_numpy_archives(trap: Trap, tmp_path: Path, tiny_run: Path, call: Callable[..., int]) -> None:
    objects = np.array([trap, trap], dtype=object)
    images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 0, 1, 1])
    data = load_data("digits")
    for name, arrays in (
        ("data.npz", {"images": images, "labels": labels, "class_names": objects}),
        ("answers.npz", {"ids": objects, "logits": np.zeros((2, 10), np.float32)}),
    ):
        np.savez(tmp_path / name, **arrays)  # type: ignore[arg-type]
        for load in (load_npz, lambda path: load_answers(path, data), read_arrays):
            with pytest.raises((DataError, ValueError)):
                load(tmp_path / name)
    np.save(tmp_path / "one.npy", objects)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    (tmp_path / "raw.npz").write_bytes(pickle.dumps(trap))
    for name in ("one.npz", "raw.npz"):
        with pytest.raises(DataError):
            load_npz(tmp_path / name)
        with pytest.raises(DataError):
            load_answers(tmp_path / name, data)
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    np.savez(folder / "predictions.npz", labels=objects)
    assert call("report", str(folder)) == 2


def test_cifar_files(trap: Trap, tmp_path: Path) -> None:
    """Even where their checksum is the one expected, they make nothing but arrays and plain data."""
    files = {}
    for name in ("train", "test", "meta"):
        (tmp_path / name).write_bytes(pickle.dumps(trap))
        files[name] = hashlib.md5((tmp_path / name).read_bytes(), usedforsecurity=False).hexdigest()
    with pytest.raises(DataError, match=r"it wants builtins\.exec"):
        load_cifar(tmp_path, files, name="cifar100")


def test_exported_programs(trap: Trap, tmp_path: Path) -> None:
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "good.pt2")
    with zipfile.ZipFile(tmp_path / "good.pt2") as good:
        entries = {name: good.read(name) for name in good.namelist()}
    for i, kind in enumerate(("weights", "constants")):
        with zipfile.ZipFile(tmp_path / f"{i}.pt2", "w") as bad:
            for name, content in entries.items():
                bad.writestr(name, content)
            bad.writestr(f"good/data/{kind}/model.pt", pickle.dumps(trap))
        with pytest.raises(ModelError):
            load_graph(tmp_path / f"{i}.pt2", fallback=(1, 8, 8))


def test_an_exported_program_that_runs_in_a_circle_is_refused(tmp_path: Path) -> None:
    class Soft(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flatten(1).softmax(1).softmax(1)

    torch.export.save(torch.export.export(Soft(), (torch.zeros(1, 1, 8, 8),)), tmp_path / "good.pt2")
    assert load_graph(tmp_path / "good.pt2", fallback=(1, 8, 8)) is not None
    with zipfile.ZipFile(tmp_path / "good.pt2") as good, zipfile.ZipFile(tmp_path / "bad.pt2", "w") as bad:
        for name in good.namelist():
            content = good.read(name)
            if name.endswith("models/model.json"):
                program = json.loads(content)
                nodes = [n for n in program["graph_module"]["graph"]["nodes"] if "softmax" in n["target"]]
                nodes[0]["inputs"][0]["arg"] = {"as_tensor": {"name": nodes[1]["outputs"][0]["as_tensor"]["name"]}}
                content = json.dumps(program).encode()
            bad.writestr(name, content)
    with pytest.raises(ModelError, match="what a later one gives"):
        load_graph(tmp_path / "bad.pt2", fallback=(1, 8, 8))


def test_a_card_imports_no_module(tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stranger.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\nmake = None\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = shutil.copytree(tiny_run / "student", tmp_path / "student")
    card = json.loads((folder / "network.json").read_text())
    card["architecture"] = {"name": "module:stranger:make", "num_classes": 10, "in_channels": 1, "image_size": [8, 8]}
    (folder / "network.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="import and run that module"):
        load_network(folder)
    run_of_it = tmp_path / "run"
    shutil.copytree(folder, run_of_it / "teacher")
    with pytest.raises(ModelError, match="import and run that module"):
        prepare(load_config({**TINY, "teacher": {"run": str(run_of_it)}}))
    assert not (tmp_path / "sprung").exists()


# What says more of itself than it is ----------------------------------------------------------------------------------


def _safetensors(header: Any, body: bytes = bytes(16), length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


_ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "content",
    [
        _safetensors({"w": _ENTRY}, length=2**63),
        _safetensors({"w": _ENTRY}, length=10**9),
        _safetensors({"w": {**_ENTRY, "shape": [2**40]}}),
        _safetensors({"w": {**_ENTRY, "shape": [2**62, 4]}}),
        _safetensors({"w": {**_ENTRY, "shape": [-4]}}),
        _safetensors({"w": {**_ENTRY, "data_offsets": [0, 2**60]}}),
        _safetensors({"w": {**_ENTRY, "data_offsets": [16, 0]}}),
        _safetensors({"w": {**_ENTRY, "dtype": "PICKLE"}}),
        _safetensors({"w": _ENTRY, "v": {**_ENTRY, "data_offsets": [8, 24]}}, bytes(24)),
        _safetensors({"w": _ENTRY}, b""),
        _safetensors(b"[" * 100_000),
        _safetensors(b'{"w":' * 100_000),
        _safetensors(b"\xff\xfe"),
        b"",
        b"\x08",
    ],
)
def test_headers_of_safetensors_that_lie(content: bytes, tmp_path: Path, tiny_run: Path) -> None:
    before = _peak()
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError):
        read_weights(path)
    with pytest.raises(DataError):
        load_answers(path, load_data("digits"))
    folder = shutil.copytree(tiny_run / "student", tmp_path / "student")
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError):
        load_network(folder)
    assert _peak() - before < 2**28


def _memory(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """A machine of little memory, so that a small bomb is one."""
    import krdistill.files

    real = krdistill.files.os.sysconf
    monkeypatch.setattr(
        krdistill.files.os, "sysconf", lambda name: size // real("SC_PAGE_SIZE") if "PHYS" in str(name) else real(name)
    )


def test_archives_that_would_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 2**26
    np.savez_compressed(tmp_path / "bomb.npz", images=np.zeros((size // 64, 8, 8), np.uint8), labels=np.zeros(1))
    assert (tmp_path / "bomb.npz").stat().st_size < size / 500
    _memory(monkeypatch, size // 2)
    with pytest.raises(DataError, match="would unpack to"):
        load_npz(tmp_path / "bomb.npz")
    with pytest.raises(DataError, match="would unpack to"):
        load_answers(tmp_path / "bomb.npz", load_data("digits"))
    weights = {"w": torch.zeros(size // 4)}
    with (
        zipfile.ZipFile(io.BytesIO(_torch_file(weights))) as plain,
        zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    (tmp_path / "bomb.pt2").write_bytes((tmp_path / "bomb.pt").read_bytes())
    with pytest.raises(ModelError, match="would unpack to"):
        read_weights(tmp_path / "bomb.pt")
    with pytest.raises(ModelError, match="would unpack to"):
        load_graph(tmp_path / "bomb.pt2", fallback=(1, 8, 8))
    torch.save(weights, tmp_path / "good.pt")  # as large, and what it seems to be
    assert read_weights(tmp_path / "good.pt")["w"].numel() == size // 4


@pytest.mark.parametrize("shape", ["(1000000000000000,)", "(-5,)", f"({10**40},)", "(" * 50 + ")" * 50, "'x'"])
def test_headers_of_arrays_that_lie(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(118) + b"\n"
    with zipfile.ZipFile(tmp_path / "liar.npz", "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64))
    with pytest.raises(DataError):
        load_npz(tmp_path / "liar.npz")
    with pytest.raises(DataError):
        load_answers(tmp_path / "liar.npz", load_data("digits"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "",
        "null",
        "[]",
        "1e999",
        "\ud800",
        '{"architecture": 5, "image_size": [1e999]}',
    ],
)
def test_cards(text: str, tmp_path: Path, tiny_run: Path, call: Callable[..., int]) -> None:
    raw = text.encode("utf-8", "surrogatepass")
    folder = shutil.copytree(tiny_run, tmp_path / "run")
    (folder / "student" / "network.json").write_bytes(raw)
    with pytest.raises(ModelError):
        load_network(folder / "student")
    (folder / "metrics.json").write_bytes(raw)
    assert call("show", str(folder)) == (2 if "architecture" not in text else 0)  # a table of no network
    assert call("report", str(folder)) == 2
    (folder / "provenance.json").write_bytes(raw)
    assert call("rerun", str(folder)) == (2 if "architecture" not in text else 4)
    (folder / "bank.json").write_bytes(raw)
    with pytest.raises(BankError):
        ViewBank(folder)
    if len(text) > 1000:
        with pytest.raises(ValueError, match="nested too deeply"):
            read_json(folder / "metrics.json")


@pytest.mark.parametrize("size", ["[1e999, 1]", "[-1, 8]", "[0, 0]", "[8]", '"8x"', "[1000000000, 1000000000]", "null"])
def test_image_sizes_of_cards(size: str, tmp_path: Path, tiny_run: Path) -> None:
    folder = shutil.copytree(tiny_run / "student", tmp_path / "student")
    card = json.loads((folder / "network.json").read_text())
    text = json.dumps({**card, "image_size": "SIZE"}).replace('"SIZE"', size)
    (folder / "network.json").write_text(text)
    with pytest.raises(ModelError):
        load_network(folder)


# Archives and lists ---------------------------------------------------------------------------------------------------


def test_a_list_that_unpacks_to_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gzip

    monkeypatch.setattr("krdistill.data.lists._LONGEST", 2**22)
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a.png 0\n" + b"x" * 2**26 + b" 1\n"))
    with pytest.raises(DataError, match="expected a list of images"):
        list_lists(tmp_path / "train.txt.gz")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"x" * 2**26))  # one endless line
    with pytest.raises(DataError):
        list_lists(tmp_path / "train.txt.gz")
    (tmp_path / "train.txt.gz").write_bytes(gzip.compress(b"a.png 0\nb.png 1\n")[:-12] + b"\xff" * 12)
    with pytest.raises(DataError):
        list_lists(tmp_path / "train.txt.gz")


# Images ---------------------------------------------------------------------------------------------------------------


def _png(width: int, height: int) -> bytes:
    """A PNG that says of itself to be of a size, and holds nothing of it."""
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def _jpeg(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, "JPEG")
    content = bytearray(stream.getvalue())
    at = content.index(b"\xff\xc0") + 5
    content[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("content", [_png(60_000, 60_000), _jpeg(65_000, 65_000), _png(2**31 - 1, 1), _png(0, 0)])
def test_images_that_say_of_themselves_to_be_huge(content: bytes) -> None:
    before = _peak()
    headers, failures = read_headers([content])
    assert headers == [None] and 0 in failures
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        _, failed = decode([content], size=(8, 8), channels=3, resize=True)
    assert 0 in failed and _peak() - before < 2**28


def test_no_other_program_is_started_for_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has Ghostscript run a PostScript file, whatever the file is called."""
    import subprocess

    def started(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a program was started")

    for name in ("Popen", "check_call", "check_output", "run", "call"):
        monkeypatch.setattr(subprocess, name, started)
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    headers, failures = read_headers([path])
    assert headers == [None] and failures[0] == "no image format that Pillow knows"
    assert decode([path], size=(8, 8), channels=3)[1] == {0: "no image format that Pillow knows"}


# ONNX -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["../secret.bin", "/etc/hostname", "a/../../secret.bin", "link.bin"])
def test_an_onnx_file_reads_no_file_outside_of_its_folder(place: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from krdistill.deploy.runtime import DeviceModel

    (tmp_path / "secret.bin").write_bytes(np.arange(32, dtype=np.float32).tobytes())
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link.bin").symlink_to(tmp_path / "secret.bin")
    make, kinds = onnx.helper, onnx.TensorProto
    weight = onnx.TensorProto(name="w", data_type=kinds.FLOAT, dims=[16, 2], data_location=kinds.EXTERNAL)
    weight.external_data.add(key="location", value=place)
    shape = onnx.numpy_helper.from_array(np.array([-1, 16]), "shape")
    graph = make.make_graph(
        [
            make.make_node("Cast", ["images"], ["x"], to=kinds.FLOAT),
            make.make_node("Reshape", ["x", "shape"], ["flat"]),
            make.make_node("MatMul", ["flat", "w"], ["probabilities"]),
        ],
        "g",
        [make.make_tensor_value_info("images", kinds.UINT8, ["b", 1, 4, 4])],
        [make.make_tensor_value_info("probabilities", kinds.FLOAT, ["b", 2])],
        [weight, shape],
    )  # fmt: skip
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 17)], ir_version=8)
    for key, value in (("class_names", ["a", "b"]), ("channels", 1), ("image_size", [4, 4])):
        model.metadata_props.add(key=key, value=json.dumps(value))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError):
        load_graph(folder / "model.onnx", fallback=(1, 4, 4))
    with pytest.raises(ModelError):
        DeviceModel(folder / "model.onnx")


def test_a_network_takes_its_file_from_its_own_folder(tmp_path: Path, tiny_run: Path) -> None:
    folder = shutil.copytree(tiny_run / "student", tmp_path / "student")
    save_file({"w": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    card = json.loads((folder / "network.json").read_text())
    for name in ("../elsewhere.onnx", "/etc/passwd", "..", ""):
        card["architecture"] = {"name": "file", "file": name, "tap": None}
        (folder / "network.json").write_text(json.dumps(card))
        with pytest.raises(KrdistillError) as caught:
            load_network(folder)
        assert "elsewhere" not in str(caught.value) or str(folder) in str(caught.value)
