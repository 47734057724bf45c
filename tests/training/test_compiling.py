from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from krdistill.config import TrainConfig
from krdistill.data.containers import ImageData
from krdistill.distributed import World
from krdistill.errors import ConfigError
from krdistill.models.network import Network, build_network
from krdistill.objective import Objective, classification_term
from krdistill.priors import ClassPrior
from krdistill.training import compiling
from krdistill.training.compiling import LONG, compile_mode, cxx_compiler
from krdistill.training.loop import Trainer
from krdistill.training.task import Task

CPU = torch.device("cpu")
needs_compiler = pytest.mark.skipif(cxx_compiler() is None, reason="no C++ compiler")


def _data(n: int = 58) -> ImageData:  # batches of 15 and of 14
    images = torch.randint(0, 255, (n, 8, 8, 1), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % 3, ("a", "b", "c"), tuple(map(str, range(n))), "noise")


def _network(model: str = "resnet8") -> Network:
    data = _data()
    return build_network(model, class_names=data.class_names, images=data.images, seed=0)


def _task() -> Task:
    network = _network()
    network.backbone.stages = network.backbone.stages[:1]  # one stage: compiling takes its time
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(16, 3)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 16, generator=generator) / 4)
        head.bias.zero_()
    network.backbone.head = head
    return Task(network, Objective([classification_term("cross-entropy", ClassPrior.from_labels(_data().labels))]))


CONFIG = TrainConfig(epochs=2, batch_size=15, augmentation="crop-only")


@needs_compiler
@pytest.mark.parametrize(
    ("asked", "model", "steps", "device", "size", "mode"),
    [
        ("auto", "resnet8", LONG, "cpu", 1, "default"),
        ("auto", "resnet8", LONG - 1, "cpu", 1, "none"),
        ("auto", "wrn_16_1", LONG, "cpu", 1, "none"),  # not measured
        ("auto", "resnet8", LONG, "cuda", 1, "none"),  # not measured
        ("auto", "resnet8", LONG, "cpu", 2, "none"),
        ("none", "resnet8", LONG, "cpu", 1, "none"),
        ("reduce-overhead", "wrn_16_1", 1, "cuda", 1, "reduce-overhead"),
    ],
)
def test_what_the_setting_comes_to(
    asked: str, model: str, steps: int, device: str, size: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    config = CONFIG.model_copy(update={"compile": asked})
    world = World(0, size, 0)
    assert compile_mode(config, _network(model), steps=steps, device=torch.device(device), world=world) == mode


def test_no_compiler_no_compiling(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("CXX", str(tmp_path / "g++"))
    assert cxx_compiler() is None
    assert compile_mode(CONFIG, _network(), steps=LONG, device=CPU, world=World.alone()) == "none"


def test_many_processes_refuse_it() -> None:
    with pytest.raises(ConfigError, match=r"train\.compile: .* by one process; set it to none"):
        compile_mode(
            CONFIG.model_copy(update={"compile": "default"}), _network(), steps=1, device=CPU, world=World(0, 2, 0)
        )


@needs_compiler
def test_a_compiled_training_goes_on_to_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a step that meets the smaller batches first, and its networks are plain ones outside of it."""
    monkeypatch.setattr(compiling, "LONG", 8)
    monkeypatch.setattr("sys.platform", "linux")
    states = []

    def keep(done: int, total: int) -> None:
        if done == 3:
            states.append(copy.deepcopy(whole.state()))

    whole = Trainer(_task(), _data(), CONFIG, seed=0, device=CPU, on_step=keep)
    assert whole.compiled == "default"
    before = {k: v.clone() for k, v in whole.task.state_dict().items()}
    assert all(torch.equal(v, before[k]) for k, v in _task().state_dict().items())  # the trial left no trace
    records = list(whole.epochs())
    whole.finish()
    again = Trainer(_task(), _data(), CONFIG, seed=0, device=CPU)
    again.restore(states[0])
    rest = list(again.epochs())
    assert [r.loss for r in rest] == [r.loss for r in records]
    a, b = whole.task.state_dict(), again.task.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a) and a.keys() == before.keys()
    plain = Trainer(_task(), _data(), CONFIG.model_copy(update={"compile": "none"}), seed=0, device=CPU)
    for record, other in zip(records, plain.epochs(), strict=True):
        assert record.loss["total"] == pytest.approx(other.loss["total"], rel=1e-3)


def test_what_cannot_be_compiled_is_trained_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With a C++ compiler that is there and does not work."""
    from torch._inductor import config as inductor

    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho out of order >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setattr(compiling, "LONG", 8)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (str(compiler),), "force_disable_caches": True}):
        trainer = Trainer(_task(), _data(), CONFIG, seed=0, device=CPU)
        assert trainer.compiled == "none" and trainer.compile_error
        with pytest.raises(ConfigError, match=r"torch\.compile could not translate .* Set it to none"):
            Trainer(_task(), _data(), CONFIG.model_copy(update={"compile": "default"}), seed=0, device=CPU)
        losses = [r.loss for r in trainer.epochs()]
    plain = Trainer(_task(), _data(), CONFIG.model_copy(update={"compile": "none"}), seed=0, device=CPU)
    assert losses == [r.loss for r in plain.epochs()]
