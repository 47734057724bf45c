"""Steps that gave no number and are left out: as if they had never been, counted, and not too many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from krdistill import stages
from krdistill.config import TrainConfig, load_config
from krdistill.data import DataBundle
from krdistill.events import Events
from krdistill.models.network import build_network
from krdistill.objective import Objective, Term, classification_term, on_labels_and_progress
from krdistill.pipeline import prepare
from krdistill.priors import ClassGroups
from krdistill.training.loop import DivergedError, Trainer
from krdistill.training.optim import learning_rate
from krdistill.training.task import Task

CPU = torch.device("cpu")
SMALL = {"data": {"source": "digits", "profile": "exp", "imbalance_factor": 10, "n_max": 40, "groups": "thirds"}}


class Poison(nn.Module):
    """A loss of 0, but in some steps, known by their share of the training: infinite, or with such a gradient."""

    def __init__(self, kind: str, steps: set[int], total: int) -> None:
        super().__init__()
        self.kind, self.steps, self.total = kind, steps, total

    def forward(self, logits: Tensor, labels: Tensor, progress: float) -> Tensor:
        bad = round(progress * self.total) in self.steps
        zero = logits[:, 0] * 0
        if self.kind == "value":
            return zero + (math.inf if bad else 0.0)
        return (zero + (0.0 if bad else 1.0)).sqrt() - (0.0 if bad else 1.0)


class Heard(Events):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.lines: list[Any] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def epoch(self, name: str, line: Any) -> None:
        self.lines.append(line)


def _data() -> tuple[DataBundle, ClassGroups]:
    data = prepare(load_config(SMALL)).data
    return data, stages.measure(data, "thirds")[1]


def _train(**changes: Any) -> TrainConfig:
    given = {"epochs": 2, "batch_size": 30, "augmentation": "crop-only", "on_nonfinite": "skip", "lr": 0.01, **changes}
    return TrainConfig.model_validate(given)


def _trainer(data: DataBundle, train: TrainConfig, kind: str, steps: set[int]) -> Trainer:
    network = build_network("resnet8w8", class_names=data.train.class_names, images=data.train.images, seed=0)
    total = train.epochs * math.ceil(len(data.train.labels) / train.batch_size)
    poison = Term("poison", Poison(kind, steps, total), on_labels_and_progress)
    term = classification_term("cross-entropy", stages.measure(data)[0])
    return Trainer(Task(network, Objective([term, poison])), data.train, train, seed=0, device=CPU)


def _bits(trainer: Trainer) -> dict[str, Any]:
    state = trainer.state()
    flat: dict[str, Any] = {f"task.{k}": v for k, v in state["task"].items()}
    for i, values in state["optimizer"]["state"].items():
        flat |= {f"optimizer.{i}.{k}": v for k, v in values.items()}
    return flat | {f"average.{k}": v for k, v in (state["average"] or {}).items()}


@pytest.mark.parametrize("changes", [{}, {"ema": 0.9}, {"optimizer": "adamw"}], ids=["sgd", "ema", "adamw"])
@pytest.mark.parametrize(("kind", "bad"), [("value", 0), ("value", 3), ("gradient", 4)])
def test_a_step_that_is_left_out_was_never_there(kind: str, bad: int, changes: dict[str, Any]) -> None:
    data, _ = _data()
    train = _train(**changes)
    one = _trainer(data, train, kind, {bad})
    record = one.run_epoch()
    assert record.skipped == 1 and one.skipped == 1
    what = "poison of " if kind == "value" else "The norm of the gradient"
    assert what in record.skipped_words and f"in step {bad + 1}" in record.skipped_words
    assert all(math.isfinite(v) for v in record.loss.values())
    # The same steps by hand, but for that one.
    other = _trainer(data, train, kind, set())
    other.task.train()
    loss = []
    for step, batch in enumerate(other.feed.run(other.batches(0))):
        if step == bad:
            continue
        for group in other.optimizer.param_groups:
            group["lr"] = learning_rate(train, (step + 1) / (2 * other.steps_per_epoch + 1))
        loss.append(other.step(0, step, *batch).terms.total().detach().double())
    assert record.loss["total"] == pytest.approx(float(torch.cat(loss).mean()), rel=1e-6)
    mine, theirs = _bits(one), _bits(other)
    assert mine.keys() == theirs.keys()
    assert [k for k, v in mine.items() if not torch.equal(v, theirs[k])] == []


def test_nothing_changes_where_every_step_is_good() -> None:
    data, _ = _data()
    found = []
    for mode in ("stop", "skip"):
        trainer = _trainer(data, _train(on_nonfinite=mode, ema=0.5), "value", set())
        record = trainer.run_epoch()
        found.append((record.loss, record.stats, record.skipped, _bits(trainer)))
    (a, b, c, first), (d, e, f, second) = found
    assert (a, b, c) == (d, e, f) and c == 0
    assert first.keys() == second.keys() and all(torch.equal(v, second[k]) for k, v in first.items())


def test_optimisers_without_a_flag_leave_it_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on devices that have no fused ones."""
    data, _ = _data()
    fused = _trainer(data, _train(), "value", {2})
    fused.run_epoch()
    plain = _trainer(data, _train(), "value", {2})
    plain.optimizer = torch.optim.SGD(
        plain.watch.parameters, lr=0.01, momentum=0.9, weight_decay=plain.config.weight_decay, fused=False
    )
    plain.watch = type(plain.watch)(plain.optimizer, plain.watch.values.shape[1], CPU, skip=True)
    assert not plain.watch.freezes
    assert plain.run_epoch().skipped == 1
    for (name, p), q in zip(fused.task.named_parameters(), plain.task.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_more_than_a_few_stop_the_training() -> None:
    data, _ = _data()
    trainer = _trainer(data, _train(epochs=2), "value", {0, 2, 3, 5})
    with pytest.raises(DivergedError, match=r"in step 1 of epoch 1\. 4 steps were left out; at most 3 may be"):
        trainer.run_epoch()
    whole = _trainer(data, _train(epochs=2), "value", {0, 2, 3})
    assert [whole.run_epoch().skipped, whole.run_epoch().skipped] == [3, 0]


def test_they_are_logged_told_and_counted_on_after_a_resume() -> None:
    data, groups = _data()
    train, heard = _train(epochs=2), Heard()
    trainer = _trainer(data, train, "value", {1})
    stages.fit(trainer.task, data, groups, train, seed=0, device=CPU, stage="student", events=heard)
    assert [line.get("skipped") for line in heard.lines] == [1, None]
    told = [note for note in heard.notes if "left out" in note]
    assert len(told) == 1 and told[0].startswith(
        "student, epoch 1: 1 steps left out. The loss is not finite (terms: poi"
    )
    # In the middle of an epoch, after the bad step.
    whole, first = (_trainer(data, train, "value", {1, 4}) for _ in range(2))
    end = whole.run_epoch()
    saved: list[Any] = []

    def on_step(done: int, total: int) -> None:
        if done == 3:
            saved.append(first.state())
            raise KeyboardInterrupt

    first.on_step = on_step
    with pytest.raises(KeyboardInterrupt):
        first.run_epoch()
    second = _trainer(data, train, "value", {1, 4})
    second.restore(saved[0])
    assert second.skipped == 1
    record = second.run_epoch()
    assert (record.skipped, record.skipped_words, record.loss) == (end.skipped, end.skipped_words, end.loss)
    assert second.skipped == 2 and all(torch.equal(v, _bits(whole)[k]) for k, v in _bits(second).items())
