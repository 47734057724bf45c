"""The bank on disk: it answers as the teacher does, is found by its key alone, and survives kills and damage."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from krdistill.bank import BankKey, Coding, ViewBank, build_bank, fingerprint, open_bank
from krdistill.bank.store import BankError
from krdistill.config import TrainConfig
from krdistill.data import load_data
from krdistill.data.augment import Augmentation, build_augmentation
from krdistill.errors import ModelError
from krdistill.models.network import build_network
from krdistill.models.teacher import Teacher
from krdistill.recipes import list_recipes, recipe
from krdistill.stages import build_task, measure, profile_teacher
from krdistill.training.loop import Trainer

CPU = torch.device("cpu")
BUNDLE = load_data("digits", profile="exp", imbalance_factor=10)
DATA = BUNDLE.train


def _teacher(seed: int = 0) -> Teacher:
    network = build_network("resnet8w8", class_names=DATA.class_names, images=DATA.images, seed=seed)
    return Teacher(network, class_names=DATA.class_names)


def _augment(name: str = "trivial-augment") -> Augmentation:
    return build_augmentation(name, DATA.image_size[0])


def _build(root: Path, views: int = 2, **changes: Any) -> ViewBank:
    arguments: dict[str, Any] = {
        "teacher": _teacher(), "data": DATA, "augment": _augment(), "views": views, "root": root, "seed": 3,
        "coding": Coding(10, 32), "device": CPU,
    }  # fmt: skip
    arguments.update(changes)
    bank = build_bank(**arguments)
    assert bank is not None
    return bank


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> ViewBank:
    return _build(tmp_path_factory.mktemp("bank"), views=3, coding=Coding(10, 32, "float32"))


def test_it_says_what_the_teacher_says_to_every_view(bank: ViewBank) -> None:
    teacher, index = _teacher(), torch.tensor([5, 0, 500, 300, 5])
    for epoch in (0, 1, 2, 4):
        view = epoch % 3
        assert bank.replay(epoch) == (3, view)
        images = _augment()(DATA.images[index].permute(0, 3, 1, 2), index, seed=3, epoch=view)
        asked, read = teacher(images), bank.read(epoch, index, CPU)
        assert torch.allclose(asked.logits, read.logits, atol=1e-5)
        assert torch.allclose(asked.feature, read.feature, atol=1e-5)
    assert bank.bytes == 3 * len(DATA) * (4 + 4 * 42)


@pytest.mark.parametrize("name", [r.name for r in list_recipes() if "teacher" in r.needs and "maps" not in r.needs])
def test_training_from_a_bank_has_the_losses_of_asking(name: str, tmp_path: Path) -> None:
    """Every recipe, with as many views as epochs: the same losses to float16, step by step."""
    prior, groups = measure(BUNDLE, "thirds")
    teacher = _teacher()
    profile = profile_teacher(teacher, BUNDLE, device=CPU)
    entry = recipe(name)
    config = TrainConfig(epochs=2, batch_size=256, augmentation="trivial-augment", lr=0.01)
    bank = _build(tmp_path, seed=0)
    losses = []
    for answers in (None, bank):
        student = build_network("resnet8w8", class_names=DATA.class_names, images=DATA.images, seed=1)
        task = build_task(entry, entry.resolve({}), student, BUNDLE, prior, groups, teacher=teacher, profile=profile)
        trainer = Trainer(task, DATA, config, seed=0, device=CPU, answers=answers)
        losses.append([record.loss for record in trainer.epochs()])
    for asked, read in zip(*losses, strict=True):
        assert asked.keys() == read.keys()
        for term, value in asked.items():
            assert read[term] == pytest.approx(value, rel=5e-3, abs=5e-3), term


def test_a_second_build_only_opens(tmp_path: Path) -> None:
    first = _build(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}

    class NobodyAsks(Teacher):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("asked again")

    teacher = _teacher()
    teacher.__class__ = NobodyAsks
    teacher.__class__.__name__ = "Teacher"
    again = _build(tmp_path, teacher=teacher)
    assert again.folder == first.folder
    assert before == {p: p.stat().st_mtime_ns for p in first.folder.iterdir()}


def test_more_views_are_added_and_the_first_stay(tmp_path: Path) -> None:
    small = _build(tmp_path, views=1)
    row = torch.arange(10)
    before = small.read(0, row, CPU).logits
    asked: list[int] = []
    large = _build(tmp_path, views=3, on_step=lambda done, total: asked.append(total))
    assert large.folder == small.folder and large.views == 3
    assert set(asked) == {2 * large.chunks}  # the first view is not asked for again
    assert torch.equal(before, large.read(0, row, CPU).logits)
    assert _build(tmp_path, views=2).replay(2) == (3, 0)  # fewer views of the same bank


@pytest.mark.parametrize(
    "change",
    [
        lambda: {"teacher": _teacher(seed=1)},
        lambda: {"data": DATA.subset(torch.arange(len(DATA)).flip(0))},
        lambda: {"data": replace(DATA, inputs=DATA.images // 2)},
        lambda: {"augment": _augment("crop-only")},
        lambda: {"seed": 4},
        lambda: {"coding": Coding(10, 32, top_k=3)},
        lambda: {"coding": Coding(10, 0)},
    ],
)
def test_anything_else_is_another_bank(change: Any, tmp_path: Path) -> None:
    first = _build(tmp_path, views=1)
    other = _build(tmp_path, views=1, **change())
    assert other.folder != first.folder
    assert len({p.name for p in tmp_path.iterdir() if p.is_dir()}) == 2


def test_new_code_for_the_same_words_is_another_bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = BankKey.of(_teacher(), DATA, _augment("crop-only"), 0, Coding(10, 32))
    from krdistill.data.augmentation.spatial import RandomCrop

    plain = RandomCrop.apply
    monkeypatch.setattr(
        RandomCrop, "apply", lambda self, x, i, *, seed, epoch: plain(self, x, i, seed=seed + 1, epoch=epoch)
    )
    assert BankKey.of(_teacher(), DATA, _augment("crop-only"), 0, Coding(10, 32)).name != key.name


def test_fingerprints_see_every_number() -> None:
    network = build_network("resnet8w8", class_names=DATA.class_names, images=DATA.images, seed=0)
    before = fingerprint(network)
    assert before == fingerprint(build_network("resnet8w8", class_names=DATA.class_names, images=DATA.images, seed=0))
    with torch.no_grad():
        network.backbone.head.bias[3] += 1e-7 + network.backbone.head.bias[3].abs() * 1e-6
    assert fingerprint(network) != before


_BUILDER = """
import sys, time, torch
sys.path.insert(0, {tests!r})
from bank.test_view_bank import _build
from pathlib import Path
def slow(done, total):
    print(done, flush=True)
    time.sleep(0.05)
_build(Path({root!r}), views=40, on_step=slow)
"""


@pytest.mark.parametrize("after", [1, 30])
def test_a_killed_build_goes_on(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = _BUILDER.format(tests=str(Path(__file__).parents[1]), root=str(tmp_path / "bank"))
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) >= after:
            break
    if after > 1:
        time.sleep(2.5)  # long enough for a sync
    child.send_signal(signal.SIGKILL)
    child.wait()
    folder = next(p for p in (tmp_path / "bank").iterdir() if p.is_dir())
    with pytest.raises(BankError, match="not finished"):
        ViewBank(folder)
    totals: list[int] = []
    bank = _build(tmp_path / "bank", views=40, on_step=lambda done, total: totals.append(total))
    assert bank.folder == folder
    assert totals[0] == 40 * bank.chunks if after == 1 else totals[0] < 40 * bank.chunks
    whole = _build(tmp_path / "whole", views=40)
    for path in whole.folder.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_damage_is_seen(tmp_path: Path) -> None:
    folder = _build(tmp_path).folder
    data = bytearray((folder / "logits.bin").read_bytes())
    data[-5] ^= 0x40
    (folder / "logits.bin").write_bytes(data)
    bank = ViewBank(folder)
    bank.read(0, torch.tensor([0]), CPU)
    with pytest.raises(BankError, match=r"view 1, rows \d+ to \d+ are not what was written"):
        bank.read(1, torch.tensor([0]), CPU)
    (folder / "features.bin").write_bytes(b"short")
    with pytest.raises(BankError, match=r"features\.bin: expected [\d,]+ bytes, got 5"):
        ViewBank(folder)
    (folder / "bank.json").write_text("{")
    with pytest.raises(BankError, match="can be read"):
        ViewBank(folder)
    key = BankKey.of(_teacher(), DATA, _augment(), 3, Coding(10, 32))
    assert open_bank(tmp_path, key, 2) is None
    with pytest.raises(BankError, match="no bank"):
        ViewBank(tmp_path / "nowhere")


def test_a_full_disk_is_seen_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("krdistill.bank.build.free_bytes", lambda _: 300 * 2**20)
    with pytest.raises(BankError, match=r"100000 views of 519 images takes [\d,]+ MiB.*44 MiB are free.*bank\.top_k"):
        _build(tmp_path, views=100_000)
    assert not [p for p in tmp_path.iterdir() if p.is_dir()]


def test_more_views_than_there_are(bank: ViewBank) -> None:
    with pytest.raises(BankError, match="holds 3 views, 4 were asked for"):
        ViewBank(bank.folder, views=4)


@pytest.mark.parametrize(
    ("name", "changes", "dim", "message"),
    [
        ("reviewkd", {}, 32, "maps of the teacher's stages"),
        ("krdistill", {}, 0, "features, which are not among"),
        ("kd", {"mixup": 0.5}, 32, "mixes images"),
    ],
)
def test_what_a_bank_cannot_do_is_refused(
    name: str, changes: dict[str, Any], dim: int, message: str, tmp_path: Path
) -> None:
    prior, groups = measure(BUNDLE, "thirds")
    teacher = _teacher()
    profile = profile_teacher(teacher, BUNDLE, device=CPU)
    student = build_network("resnet8w8", class_names=DATA.class_names, images=DATA.images, seed=1)
    entry = recipe(name)
    task = build_task(entry, entry.resolve({}), student, BUNDLE, prior, groups, teacher=teacher, profile=profile)
    bank = _build(tmp_path, views=1, coding=Coding(10, dim))
    with pytest.raises(ModelError, match=message):
        Trainer(task, DATA, TrainConfig(epochs=1, **changes), seed=0, device=CPU, answers=bank)
