from __future__ import annotations

import math

import pytest
import torch

from krdistill.config import TrainConfig
from krdistill.data.containers import ImageData
from krdistill.models.network import Network, build_network
from krdistill.models.teacher import Teacher
from krdistill.objective import Objective, ObjectiveContext, TeacherProfile, classification_term
from krdistill.priors import ClassPrior
from krdistill.recipes import recipe
from krdistill.training.loop import DivergedError, Trainer, collect_outputs
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
    objective = entry.build(entry.resolve({}), context)
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
    mixed = task.mixed(images, labels, partners, 0.3).terms.total()
    own, other = task(images, labels).terms.total(), task(images, partners).terms.total()
    assert torch.allclose(mixed, 0.3 * own + 0.7 * other, atol=1e-5)
    assert torch.allclose(task.mixed(images, labels, partners, 1.0).terms.total(), own, atol=1e-6)


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
