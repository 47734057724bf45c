"""Tables, lists, archives, weights, cards and images, changed at random."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import fuzz, mutated
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from krdistill.bank.external import load_answers
from krdistill.data import DataBundle, load_data
from krdistill.data.arrays import load_npz
from krdistill.data.decoding import decode, read_headers
from krdistill.data.lists import list_lists
from krdistill.data.manifest import list_manifest
from krdistill.data.tables import kind_of_table, load_features, load_table
from krdistill.deploy.inputs import entries
from krdistill.deploy.runtime import _read_weights
from krdistill.errors import KrdistillError
from krdistill.models.network import build_network, load_network, save_network
from krdistill.models.weights import read_weights


def _each(*loads: Callable[[], Any]) -> None:
    for load in loads:
        try:
            load()
        except KrdistillError as error:
            assert str(error)


TABLES = [
    b"path,label\na.png,cat\nb.png,dog\nc.png,cat\n", b"path;label;split;group\na;x;train;1\nb;y;test;2\n",
    b"label\tpath\n\"a\"\"b\"\tc\n0\td\n", "\ufeffpath,label\n\u00e4.png,\u00fc\n".encode(),
    b"path,label\n\"a\nb\",c\n",
    b"text,label\nhello there,a\nwell,b\nbye,a\n", b"label,x1,x2\na,1,2.5\nb,3,-4e3\na,0,0\n",
    b"a/1.png 0\na/2.png 1\nb/3.png 1\n", b"class,weight\na,1\nb,2.5\n", b"",
]  # fmt: skip


NAMES = ["t.csv", "t.tsv", "train.txt", "train.txt.gz", "train.txt.xz", "t.parquet"]


@fuzz(content=mutated(st.sampled_from(TABLES) | st.binary(max_size=60)), name=st.sampled_from(NAMES))
def test_tables(content: bytes, name: str) -> None:
    import gzip
    import lzma

    with tempfile.TemporaryDirectory() as place:
        path = Path(place, name)
        packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix)
        path.write_bytes(packed(content) if packed and len(content) % 3 else content)
        _each(
            lambda: kind_of_table(path), lambda: load_table(path, "text"), lambda: load_table(path, "features"),
            lambda: list_manifest(path), lambda: list_lists(path), lambda: list_lists(place),
            lambda: _read_weights(path, ("a", "b")), lambda: list(entries([str(path)])),
        )  # fmt: skip


@functools.cache
def _bundle() -> DataBundle:
    return load_data("digits", profile="exp", imbalance_factor=1, n_max=5)


@functools.cache
def _archives() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    found = []
    images, labels = rng.integers(0, 255, (6, 8, 8), dtype=np.uint8), np.arange(6) % 2
    for write in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        write(stream, images=images, labels=labels, class_names=np.array(["a", "b"]))  # type: ignore[operator]
        found.append(stream.getvalue())
    stream = io.BytesIO()
    np.savez(stream, x_train=np.ones((6, 3)), y_train=labels, x_test=np.ones((2, 3)), y_test=np.array([0, 1]))
    found.append(stream.getvalue())
    ids = [*_bundle().train.ids, *_bundle().test.ids][:40]
    stream = io.BytesIO()
    np.savez(stream, ids=np.array(ids), logits=np.zeros((len(ids), 10), np.float32))
    found.append(stream.getvalue())
    found.append(save({"logits": torch.zeros(len(ids), 10)}, {"ids": json.dumps(ids)}))
    return tuple(found)


@fuzz(
    content=mutated(st.deferred(lambda: st.sampled_from(_archives()))),
    suffix=st.sampled_from([".npz", ".safetensors"]),
)
def test_archives(content: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, f"a{suffix}")
        path.write_bytes(content)
        _each(
            lambda: kind_of_table(path), lambda: load_npz(path), lambda: load_features(path),
            lambda: load_answers(path, _bundle()),
        )  # fmt: skip


@functools.cache
def _network() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as place:
        images = torch.zeros(2, 8, 8, 1, dtype=torch.uint8)
        save_network(build_network("resnet8w8", class_names=["a", "b"], images=images), Path(place))
        return {path.name: path.read_bytes() for path in Path(place).iterdir()}


@functools.cache
def _torch_files() -> tuple[bytes, ...]:
    found = []
    for new in (True, False):
        stream = io.BytesIO()
        state = {"state_dict": {"w": torch.zeros(3, 2), "b": torch.ones(2)}, "n": [1, 2.0, "x"]}
        torch.save(state, stream, _use_new_zipfile_serialization=new)
        found.append(stream.getvalue())
    return (*found, save({"w": torch.zeros(3)}))


@st.composite
def _cards(draw: st.DrawFn) -> bytes:
    """A network's card with some values replaced."""
    card = json.loads(_network()["network.json"])
    odd = st.sampled_from([None, 0, -1, 1e999, "x", [], {}, [8, 8], 10**30, [1e308], "module:os:getcwd", True, [[]]])
    for key in draw(st.lists(st.sampled_from(sorted(card)), max_size=2)):
        card[key] = draw(odd)
    if isinstance(card["architecture"], dict) and draw(st.booleans()):
        key = draw(st.sampled_from([*card["architecture"], "file", "members", "tap"]))
        card["architecture"][key] = draw(odd)
    return json.dumps(card).encode()


def _or_mutated(content: bytes) -> st.SearchStrategy[bytes]:
    return st.just(content) | mutated(st.just(content))


@fuzz(
    card=st.deferred(lambda: mutated(st.just(_network()["network.json"])) | _cards()),
    weights=st.deferred(lambda: _or_mutated(_network()["model.safetensors"])),
    other=st.deferred(lambda: mutated(st.sampled_from(_torch_files()))),
    name=st.sampled_from(["w.pt", "w.bin", "w.safetensors"]),
)  # fmt: skip
def test_weights_and_cards(card: bytes, weights: bytes, other: bytes, name: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place, "network.json").write_bytes(card)
        Path(place, "model.safetensors").write_bytes(weights)
        Path(place, name).write_bytes(other)
        _each(lambda: load_network(Path(place)), lambda: read_weights(Path(place, name)))


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    rng = np.random.default_rng(0)
    found = []
    for form, mode in (
        ("PNG", "RGB"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("JPEG", "L"),
        ("JPEG", "CMYK"), ("GIF", "P"), ("TIFF", "RGB"), ("TIFF", "F"), ("WEBP", "RGB"), ("BMP", "RGB"),
        ("PPM", "RGB"), ("PNG", "1"),
    ):  # fmt: skip
        pixels = rng.integers(0, 255, (12, 9, 3), dtype=np.uint8)
        if mode == "I;16":
            image = Image.fromarray(rng.integers(0, 65535, (12, 9)).astype(np.uint16))
        else:
            image = Image.fromarray(pixels).convert(mode)
        stream = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(stream, form, **({"exif": exif} if form in ("JPEG", "PNG", "WEBP", "TIFF") else {}))
        found.append(stream.getvalue())
    return tuple(found)


@fuzz(
    contents=st.deferred(lambda: st.lists(mutated(st.sampled_from(_pictures())), min_size=1, max_size=3)),
    channels=st.sampled_from([1, 3]),
    resize=st.booleans(),
)
def test_images(contents: list[bytes], channels: int, resize: bool) -> None:
    headers, failures = read_headers(contents)
    assert all((header is None) == (i in failures) for i, header in enumerate(headers))
    pixels, failed = decode(contents, size=(12, 9), channels=channels, resize=resize)
    assert pixels.shape == (len(contents), 12, 9, channels) and all(failed.values())
    assert all(not pixels[i].any() for i in failed)
