from __future__ import annotations

import copy
import io
import math
import shutil
import sys
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from krdistill.config import TrainConfig
from krdistill.data.containers import ImageData
from krdistill.models.network import Network, build_network
from krdistill.models.teacher import Teacher
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from krdistill.outputs import Outputs
from krdistill.priors import ClassPrior
from krdistill.recipes import recipe
from krdistill.training.loop import (
    DivergedError,
    Trainer,
    collect,
    collect_features,
    collect_outputs,
    training_precision,
)
from krdistill.training.optim import build_optimizer, learning_rate
from krdistill.training.task import Task

CPU = torch.device("cpu")


def _data(n: int = 60, seed: int = 0) -> ImageData:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randint(0, 100, (n, 8, 8, 1), generator=generator, dtype=torch.uint8)
    for c in range(3):  # each class has a bright column of its own
        images[labels == c, :, 2 * c + 1] += 150
    return ImageData(images, labels, ("a", "b", "c"), tuple(map(str, range(n))), "columns")


def _supervised(seed: int = 0) -> Task:
    data = _data()
    network = build_network("resnet8", class_names=data.class_names, images=data.images, seed=seed)
    return Task(network, Objective([classification_term("cross-entropy", ClassPrior.from_labels(data.labels))]))


def _distilled(name: str = "krdistill", seed: int = 0) -> Task:
    data = _data()
    prior = ClassPrior.from_counts([40, 15, 5])
    networks: list[Network] = [
        build_network(model, class_names=data.class_names, images=data.images, seed=seed)
        for model in ("resnet14", "resnet8")
    ]
    generator = torch.Generator().manual_seed(0)
    means = torch.nn.functional.normalize(torch.randn(3, networks[0].feature_dim, generator=generator), dim=1)
    profile = TeacherProfile(
        means,
        torch.randn(30, 3, generator=generator),
        torch.arange(30) % 3,
        "random",
        torch.randn(30, means.shape[1], generator=generator),
        torch.arange(30) % 3,
    )
    entry = recipe(name)
    context = ObjectiveContext(prior, prior.groups("thirds"), networks[1].feature_dim, profile)
    full = {"prior": "label", "correction": "lift", "rectify": "blend"} if name == "krdistill" else {}
    objective = entry.build(entry.resolve(full), context)
    return Task(networks[1], objective, Teacher(networks[0], class_names=data.class_names))


def _train(task: Task, **changes: object) -> Trainer:
    config = TrainConfig.model_validate(
        {"epochs": 3, "batch_size": 16, "lr": 0.05, "augmentation": "crop-only", **changes}
    )
    trainer = Trainer(task, _data(), config, seed=0, device=CPU)
    for _ in trainer.epochs():
        pass
    return trainer


def test_it_learns() -> None:
    task = _supervised()
    _train(task, epochs=12, augmentation="none")
    logits, features = collect_outputs(task.network, _data(), device=CPU)
    assert (logits.argmax(1) == _data().labels).float().mean() == 1.0
    assert features.shape == (60, task.network.feature_dim)


def test_what_is_wanted_is_collected_and_nothing_else() -> None:
    network, data = _supervised().network, _data()
    logits, features = collect_outputs(network, data, device=CPU)
    held: list[torch.Tensor] = []

    def wanted(out: Outputs) -> tuple[torch.Tensor, ...]:
        assert not network.training and not torch.is_grad_enabled()
        held.append(out.logits)
        return out.logits.argmax(1), out.logits[:, :2, None]

    done: list[tuple[int, int]] = []
    found = collect(network, data, wanted, device=CPU, batch_size=25, on_step=lambda i, n: done.append((i, n)))
    assert [len(z) for z in held] == [25, 25, 10] and done == [(25, 60), (50, 60), (60, 60)]
    assert found[0].dtype == torch.int64 and torch.equal(found[0], logits.argmax(1))
    torch.testing.assert_close(found[1], logits[:, :2, None])  # batches of another size round otherwise
    assert torch.equal(collect_features(network, data, device=CPU), features)


@pytest.mark.parametrize("name", ["krdistill", "kd"])
def test_same_seed_same_weights_and_other_seed_other_weights(name: str) -> None:
    weights = []
    for data_seed in (0, 0, 1):
        task = _distilled(name)
        trainer = Trainer(task, _data(), TrainConfig(epochs=1, batch_size=16), seed=data_seed, device=CPU)
        trainer.run_epoch()
        weights.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_the_teacher_stays_as_it_was_and_out_of_the_checkpoint() -> None:
    task = _distilled()
    assert task.teacher is not None
    before = {k: v.clone() for k, v in task.teacher.state_dict().items()}
    trainer = _train(task, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in task.teacher.state_dict().items())
    own = sum(p.numel() for p in task.network.parameters()) + sum(p.numel() for p in task.objective.parameters())
    trained = sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"])
    assert trained == own
    assert not any("teacher" in key for key in trainer.state()["task"])


def test_projector_is_trained() -> None:
    task = _distilled()
    before = {k: v.clone() for k, v in task.objective.named_parameters()}
    assert before
    _train(task, epochs=1)
    assert all(not torch.equal(v, before[k]) for k, v in task.objective.named_parameters())


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"mixup": 0.4}, {"optimizer": "adamw", "lr": 1e-3}])
def test_going_on_from_a_state_equals_going_through(changes: dict[str, object]) -> None:
    whole = _train(_distilled(), **changes)
    config = whole.config
    first = Trainer(_distilled(), _data(), config, seed=0, device=CPU)
    first.run_epoch()
    state = first.state()
    second = Trainer(_distilled(seed=5), _data(), config, seed=0, device=CPU)
    second.task._teacher[:] = first.task._teacher
    second.restore(state)
    for _ in second.epochs():
        pass
    a, b = whole.network.state_dict(), second.network.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_batches_cover_every_image_once_in_near_equal_parts() -> None:
    trainer = Trainer(_supervised(), _data(), TrainConfig(batch_size=16), seed=0, device=CPU)
    batches = trainer.batches(0)
    assert sorted(torch.cat(batches).tolist()) == list(range(60))
    assert {len(b) for b in batches} == {15}
    assert not torch.equal(torch.cat(batches), torch.cat(trainer.batches(1)))


def test_records_hold_the_loss_and_how_often_errors_were_corrected() -> None:
    task = _distilled()
    trainer = Trainer(task, _data(), TrainConfig(epochs=2, batch_size=16), seed=0, device=CPU)
    record = trainer.run_epoch()
    assert set(record.loss) == {"classification", "lrd", "rrd", "total"}
    assert record.loss["total"] == pytest.approx(sum(v for k, v in record.loss.items() if k != "total"))
    assert len(record.stats["corrected"]) == 3 and all(0 <= v <= 1 for v in record.stats["corrected"])
    assert not record.last and trainer.run_epoch().last


def test_ema_is_the_average_of_the_steps() -> None:
    task = _supervised()
    config = TrainConfig(epochs=1, batch_size=60, ema=0.75, augmentation="none", warmup=0)
    trainer = Trainer(task, _data(), config, seed=0, device=CPU)
    start = task.network.backbone.head.weight.detach().clone()
    trainer.run_epoch()  # one step: the average starts at the first weights it is given
    assert torch.equal(trainer.network.backbone.head.weight, task.network.backbone.head.weight)
    first = task.network.backbone.head.weight.detach().clone()
    assert not torch.equal(first, start)
    trainer.run_epoch()
    expected = 0.75 * first + 0.25 * task.network.backbone.head.weight.detach()
    assert torch.allclose(trainer.network.backbone.head.weight, expected, atol=1e-6)


def test_mixed_labels_mix_the_loss() -> None:
    task = _distilled().eval()
    data = _data()
    images = data.images[:8].permute(0, 3, 1, 2).float() / 255
    labels, partners = data.labels[:8], data.labels[1:9]
    mixed = task(images, labels, partners=partners, share=0.3).terms.total()
    own, other = task(images, labels).terms.total(), task(images, partners).terms.total()
    assert torch.allclose(mixed, 0.3 * own + 0.7 * other, atol=1e-5)
    assert torch.allclose(task(images, labels, partners=partners, share=1.0).terms.total(), own, atol=1e-6)


def test_a_loss_that_is_no_number_stops_with_what_to_do() -> None:
    with pytest.raises(DivergedError, match=r"terms: .*lower learning rate than 1e\+30"):
        _train(_supervised(), lr=1e30, warmup=0)


def test_learning_rate_schedules() -> None:
    cosine = TrainConfig(lr=0.2, warmup=0.1)
    assert learning_rate(cosine, 0.05) == pytest.approx(0.1)
    assert learning_rate(cosine, 0.1) == pytest.approx(0.2)
    assert learning_rate(cosine, 0.55) == pytest.approx(0.1)
    assert learning_rate(cosine, 1.0) == pytest.approx(0.0, abs=1e-12)
    steps = TrainConfig(lr=0.05, schedule="steps", warmup=0, milestones=(0.625, 0.75, 0.875))
    assert [learning_rate(steps, p) for p in (0, 0.62, 0.63, 0.8, 0.9)] == pytest.approx([0.05, 0.05, 5e-3, 5e-4, 5e-5])
    assert math.isclose(learning_rate(TrainConfig(warmup=0), 0.0), 0.05)


def test_optimizers_are_as_configured() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2))]
    sgd = build_optimizer(TrainConfig(lr=0.1, momentum=0.8, nesterov=True, weight_decay=1e-3), parameters)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"] and sgd.defaults["weight_decay"] == 1e-3
    adam = build_optimizer(TrainConfig(optimizer="adamw", lr=1e-3), parameters)
    assert isinstance(adam, torch.optim.AdamW) and adam.defaults["betas"] == (0.9, 0.999)


class _StoppedError(Exception):
    pass


@pytest.mark.parametrize("after", [1, 6, 8, 11])
def test_going_on_within_an_epoch_equals_going_through(after: int) -> None:
    """Steps 1 to 12 of three epochs of four: the state of any of them is enough, and the log is the same too."""
    whole = _distilled()
    records = list(Trainer(whole, _data(), TRAIN, seed=0, device=CPU).epochs())
    states = []

    def stop(done: int, total: int) -> None:
        if done == after:
            states.append(copy.deepcopy(first.state()))
            raise _StoppedError

    first = Trainer(_distilled(), _data(), TRAIN, seed=0, device=CPU, on_step=stop)
    with pytest.raises(_StoppedError):
        list(first.epochs())
    buffer = io.BytesIO()
    torch.save(states[0], buffer)
    buffer.seek(0)
    second = Trainer(_distilled(seed=5), _data(), TRAIN, seed=0, device=CPU)
    second.task._teacher[:] = first.task._teacher
    second.restore(torch.load(buffer, weights_only=True))
    rest = list(second.epochs())
    assert len(rest) == 3 - (after - (after % 4 == 0)) // 4
    for old, new in zip(records[-len(rest) :], rest, strict=True):
        assert (old.loss, old.train_accuracy, old.stats, old.lr) == (new.loss, new.train_accuracy, new.stats, new.lr)
    a, b = whole.state_dict(), second.task.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


TRAIN = TrainConfig(epochs=3, batch_size=15, augmentation="crop-only")


class _ReadBacks(TorchDispatchMode):
    """Counts what makes a device wait for the program: numbers and sizes that are read back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(word in name for word in ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal.def")):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["krdistill", "kd", "kd-balanced", "dkd", "ltkd", "bkd"])
@pytest.mark.parametrize("augmentation", ["crop-flip", "trivial-augment"])
def test_nothing_is_read_back_within_a_step(name: str, augmentation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # The argument checks look at values where that is free: on the CPU. As on a GPU, they must not here.
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("krdistill") and hasattr(module, "readable"):
            monkeypatch.setattr(module, "readable", lambda x: False)
    config = TRAIN.model_copy(update={"augmentation": augmentation})
    trainer = Trainer(_distilled(name), _data(), config, seed=0, device=CPU)
    trainer.task.train()
    batches = list(trainer.feed.run(trainer.batches(0)))
    trainer._add(trainer.step(0, 0, *batches[0]))
    with _ReadBacks() as mode:
        for i in (1, 2):
            trainer._add(trainer.step(0, i, *batches[i]))
    assert mode.seen == []
    with _ReadBacks() as mode:
        float(torch.ones(()))
    assert mode.seen  # the counter counts


def test_the_fused_optimisers_are_the_plain_ones() -> None:
    for name, plain in (("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)):
        config = TrainConfig(optimizer=name, lr=0.01, momentum=0.9, nesterov=name == "sgd", weight_decay=0.01)
        mine = [torch.nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4).clone())]
        theirs = [torch.nn.Parameter(mine[0].detach().clone())]
        fused = build_optimizer(config, mine)
        assert fused.defaults["fused"]
        settings = {k: v for k, v in fused.defaults.items() if k not in ("fused", "foreach", "decoupled_weight_decay")}
        reference = plain(theirs, **settings, foreach=False)
        for step in range(5):
            for parameters, optimizer in ((mine, fused), (theirs, reference)):
                parameters[0].grad = torch.sin(torch.arange(12.0).view(3, 4) + step)
                optimizer.step()
        assert torch.allclose(mine[0], theirs[0], atol=1e-6)


def test_low_precision_is_near_and_its_losses_are_float32() -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        task = _distilled()
        trainer = Trainer(task, _data(), TRAIN.model_copy(update={"precision": precision}), seed=0, device=CPU)
        trainer.task.train()
        index, images, labels = next(iter(trainer.feed.run(trainer.batches(0))))
        out = trainer.step(0, 0, index, images, labels)
        assert all(v.dtype == torch.float32 for v in out.terms.terms.values()) and out.logits.dtype == torch.float32
        assert all(p.dtype == torch.float32 for p in task.parameters())
        losses[precision] = {k: float(v.detach().mean()) for k, v in out.terms.terms.items()}
    assert losses["float32"] != losses["bfloat16"]
    for name, value in losses["float32"].items():
        assert losses["bfloat16"][name] == pytest.approx(value, rel=0.05, abs=0.02)


def test_auto_precision_is_float32_without_a_fast_card() -> None:
    assert training_precision("auto", CPU) == torch.float32
    assert training_precision("bfloat16", CPU) == torch.bfloat16


def test_channels_last_changes_nothing() -> None:
    out = []
    for layout in (torch.channels_last, torch.contiguous_format):
        task = _distilled()
        trainer = Trainer(task, _data(), TRAIN, seed=0, device=CPU)
        task.to(memory_format=layout)
        trainer.run_epoch()
        out.append(torch.cat([p.detach().flatten() for p in task.parameters()]))
    assert torch.allclose(*out, atol=1e-4)


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
def test_compiled_networks_train_alike() -> None:
    losses = []
    for mode in ("none", "default"):
        config = TrainConfig(epochs=1, batch_size=30, augmentation="none", compile=mode)
        task = _supervised()
        task.network.backbone.stages = task.network.backbone.stages[:1]  # one stage: compiling takes its time
        task.network.backbone.head = torch.nn.Linear(16, 3)
        torch.nn.init.constant_(task.network.backbone.head.weight, 0.1)
        torch.nn.init.zeros_(task.network.backbone.head.bias)
        losses.append(Trainer(task, _data(), config, seed=0, device=CPU).run_epoch().loss)
    for name, value in losses[0].items():
        assert losses[1][name] == pytest.approx(value, rel=1e-3), name
