"""The training loop, from top to bottom."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..bank.answers import Answers
from ..config import TrainConfig
from ..data.augment import augmentation_of, mixup
from ..data.containers import Examples
from ..data.feed import Feed
from ..distributed import World, average_gradients, gather_rows, share, share_sizes, synchronise_batch_norm
from ..errors import ConfigError, KrdistillError, ModelError
from ..kinds import NOUNS, as_batch
from ..models.network import Network
from ..objective import Objective
from ..outputs import Outputs
from ..rng import drawing
from ..sampling import Sampling, epoch_order
from .compiling import compile_mode
from .optim import build_optimizer, learning_rate
from .task import StepOutput, Task, place


class DivergedError(KrdistillError):
    """The loss or its gradient stopped being finite numbers.

    Args:
        message: which term and classes, in which step, and what to do.
        record: what the step needs to be run again, tensors on the CPU: ``epoch`` and ``step`` (from 0), ``rows`` and
            ``labels`` of its batch, ``terms`` (name to per-sample values), ``lr``, and ``trainer``, the state from
            before the step's update (:meth:`Trainer.restore`); where bad steps are left out, the state of now.
    """

    def __init__(self, message: str, record: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        self.record = record or {}


@dataclass(frozen=True)
class EpochRecord:
    """What an epoch measured.

    Attributes:
        epoch: from 1.
        epochs: of the whole training.
        lr: learning rate of the epoch's last step.
        seconds: wall time of its training steps.
        loss: mean of every term, and ``total``.
        train_accuracy: on the augmented training images, as they were seen.
        stats: name of a per-sample statistic to its mean by class, ``(K,)`` (NaN where the class was not seen).
        skipped: steps that were left out, as a loss or gradient was not finite; no mean is over them.
        skipped_words: which terms, images and classes the first of them was about, or empty.
        last: whether it was the last epoch.
    """

    epoch: int
    epochs: int
    lr: float
    seconds: float
    loss: dict[str, float]
    train_accuracy: float
    stats: dict[str, list[float]] = field(default_factory=dict)
    skipped: int = 0
    skipped_words: str = ""

    @property
    def last(self) -> bool:
        return self.epoch == self.epochs


class Trainer:
    """Trains a task epoch by epoch.

    Args:
        task: what is trained.
        data: the training images.
        config: how.
        seed: of order, augmentation and mixup.
        device: where.
        answers: the teacher's stored answers, where it is not to be asked. The images then show the views that the
            answers are about.
        world: the processes that train together, each on its share of every batch.
        on_step: called with (steps done, steps in all) after every step; it may ask for :meth:`state`.

    Raises:
        ModelError: stored answers that the objective cannot be trained with.
    """

    def __init__(
        self,
        task: Task,
        data: Examples,
        config: TrainConfig,
        *,
        seed: int,
        device: torch.device,
        answers: Answers | None = None,
        world: World | None = None,
        on_step: Callable[[int, int], None] | None = None,
    ) -> None:
        self.task, self.world = task, world or World.alone()
        task.world = self.world
        place(task, device)
        if task.teacher is not None:
            place(task.teacher, device)
        self.config, self.seed, self.device, self.on_step = config, seed, device, on_step
        self.answers = answers if task.objective.needs_teacher else None
        if self.answers is not None:
            check_answers(self.answers, task.objective, config)
        task.precision = training_precision(config.precision, device)
        self.feed = Feed(data, device)
        self.labels, self.noun = data.labels, NOUNS[data.kind]
        self.num_classes, self.class_names = data.num_classes, data.class_names
        self.augment = augmentation_of(config.augmentation, data)
        self.optimizer = build_optimizer(config, task.parameters())
        self.average = (
            AveragedModel(task.network, multi_avg_fn=get_ema_multi_avg_fn(config.ema), use_buffers=True)
            if config.ema > 0
            else None
        )
        self.sampler: Sampling = task.objective.sampler if config.sampler == "recipe" else config.sampler
        self.steps_per_epoch = math.ceil(len(data.labels) / config.batch_size)
        self.epoch = 0
        self.sums = self._nothing()
        self.skips, self.skipped = config.on_nonfinite == "skip", 0
        self.watch = Watch(self.optimizer, math.ceil(len(data.labels) / self.steps_per_epoch), device, skip=self.skips)
        self.model: torch.nn.Module = task
        self.draws = has_dropout(task)
        steps = config.epochs * self.steps_per_epoch
        self.compiled = compile_mode(config, task.network, steps=steps, device=device, world=self.world)
        self.compile_error: str | None = None
        if self.compiled != "none":
            self._compile()
        if self.world.size > 1:
            self._spread()

    @property
    def network(self) -> Network:
        """The network to evaluate and keep: the moving average where there is one."""
        return cast(Network, self.average.module) if self.average is not None else self.task.network

    def batches(self, epoch: int) -> tuple[Tensor, ...]:
        """Row numbers of an epoch's batches, in order.

        Their sizes differ by one at most, so that no batch of one or two images upsets batch normalisation.
        """
        order = epoch_order(
            self.sampler, self.labels, self.seed, epoch, progress=epoch / max(1, self.config.epochs - 1)
        )
        return torch.tensor_split(order, self.steps_per_epoch)

    def epochs(self) -> Iterator[EpochRecord]:
        """Runs the epochs that are left."""
        while self.epoch < self.config.epochs:
            yield self.run_epoch()

    def step(
        self, epoch: int, step: int, index: Tensor, images: Tensor, labels: Tensor, *, total: int | None = None
    ) -> StepOutput:
        """One step.

        Args:
            epoch: from 0.
            step: within the epoch, from 0.
            index: row numbers ``(B,)``, on the device, as are the following.
            images: as the data set has them; uint8 ``(B, H, W, C)``, or another kind (:mod:`krdistill.kinds`).
            labels: ``(B,)``.
            total: with many processes, images of the whole batch: these are this process's :func:`share` of it, or the
                whole batch where images are mixed.
        """
        sizes = share_sizes(total, self.world) if self.world.size > 1 and total is not None else None
        if self.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        before = self._changing() if self.skips else []
        progress = (epoch * self.steps_per_epoch + step) / (self.config.epochs * self.steps_per_epoch)
        replay = self.answers.replay(epoch) if self.answers is not None else None
        seed, view = replay if replay is not None else (self.seed, epoch)
        images = self.augment(as_batch(images), index, seed=seed, epoch=view)
        drawn: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
        if self.draws:  # what a network drops depends on the step alone, whether or not the training was stopped before
            drawn = drawing(self.device, self.seed, "dropout", epoch, step, self.world.rank)
        if self.config.mixup > 0:
            images, partner, weight = mixup(images, alpha=self.config.mixup, seed=self.seed, epoch=epoch, step=step)
            own = (share(t, self.world) for t in (images, labels, labels[partner], index))  # partners may be elsewhere
            images, labels, partners, index = own
            with drawn:
                out = self.model(
                    images, labels, index=index, progress=progress, partners=partners, share=weight, sizes=sizes
                )
        else:
            answer = self.answers.read(epoch, index, self.device) if self.answers is not None else None
            with drawn:
                out = self.model(images, labels, index=index, progress=progress, answer=answer, sizes=sizes)
        loss = out.terms.total().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.watch.look(epoch * self.steps_per_epoch + step, out.terms.terms)
        if self.watch.freezes or not self.skips or not bool(self.watch.flag):
            self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.task.network)
        with torch.no_grad():
            for now, old in before:
                now.copy_(torch.where(self.watch.flag > 0, old, now))
        step_output: StepOutput = out
        return step_output

    def _changing(self) -> list[tuple[Tensor, Tensor]]:
        """What a step changes besides parameters and the optimiser's state, with copies: a step may be left out."""
        average = [] if self.average is None else [*self.average.parameters(), *self.average.buffers()]
        return [(now, now.detach().clone()) for now in (*self.task.buffers(), *average)]

    def _compile(self) -> None:
        """Has the networks compiled, on a batch of every size there is; nothing of the training's state is moved.

        Where nobody asked for it by name, a network that cannot be compiled is trained as it is.
        """
        state = copy.deepcopy(self.task.state_dict())
        self.task.compile_networks(self.compiled, teacher=self.answers is None)
        try:
            self.task.train()
            for size in sorted({len(batch) for batch in self.batches(0)}, reverse=True):
                self._try(size)
        except Exception as error:  # whatever a compiler may meet
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            if self.config.compile != "auto":
                raise ConfigError(
                    f"train.compile: torch.compile could not translate the networks ({first}). Set it to none."
                ) from error
            self.task.compile_networks(None, teacher=False)
            self.compiled, self.compile_error = "none", first
        finally:
            self.optimizer.zero_grad(set_to_none=True)
            self.task.load_state_dict(state)

    def _try(self, size: int) -> None:
        """A step on that many images that changes no parameter."""
        index, images, labels = next(self.feed.run([torch.arange(size)]))
        images = self.augment(as_batch(images), index, seed=self.seed, epoch=0)
        if self.config.mixup > 0:
            images = mixup(images, alpha=self.config.mixup, seed=self.seed, epoch=0, step=0)[0]
        answer = self.answers.read(0, index, self.device) if self.answers is not None else None
        self.model(images, labels, index=index, answer=answer).terms.total().mean().backward()

    def _spread(self) -> None:
        """Makes this the training of one process among many."""
        smallest = len(self.labels) // self.steps_per_epoch
        share_sizes(smallest, self.world)  # refuses a batch with fewer images than processes
        synchronise_batch_norm(self.task, self.world)

        def probe(model: torch.nn.Module) -> Tensor:
            rows = share(torch.arange(smallest), self.world)
            index, images, labels = next(self.feed.run([rows]))
            answer = self.answers.read(0, index, self.device) if self.answers is not None else None
            sizes = share_sizes(smallest, self.world)
            out = model(as_batch(images), labels, index=index, progress=0.5, answer=answer, sizes=sizes)
            loss: Tensor = out.terms.total().mean()
            return loss

        self.model = average_gradients(self.task, self.world, probe=probe)

    def finish(self) -> None:
        """Leaves the network as that of one process, to be saved or exported."""
        self.task.compile_networks(None, teacher=False)
        synchronise_batch_norm(self.task, World.alone())
        if self.average is not None:
            synchronise_batch_norm(self.average, World.alone())
        self.task.world = World.alone()

    def run_epoch(self) -> EpochRecord:
        """Runs one epoch, or what is left of it, and measures it.

        Nothing is read back from the device before its end.

        Raises:
            DivergedError: a step's loss or gradient was not finite. No parameter was changed from that step on.
        """
        epoch, config = self.epoch, self.config
        self.task.train()
        total = config.epochs * self.steps_per_epoch
        started, before = time.perf_counter(), float(self.sums["seconds"])
        left = self.batches(epoch)[int(self.sums["steps"]) :]
        own = left if config.mixup > 0 else [share(batch, self.world) for batch in left]
        fed = zip(left, self.feed.run(own), strict=True)
        for step, (batch, (index, images, labels)) in enumerate(fed, start=int(self.sums["steps"])):
            done = epoch * self.steps_per_epoch + step
            lr = learning_rate(config, (done + 1) / (total + 1))
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self._add(self.step(epoch, step, index, images, labels, total=len(batch)))
            self.sums["steps"], self.sums["lr"] = step + 1, lr
            self.sums["seconds"] = before + time.perf_counter() - started
            if self.on_step is not None:
                self.on_step(done + 1, total)
        self.check()
        sums = self.sums
        count = max(1, len(self.labels) - int(sums["left_out"]))
        loss = {name: float(value) / count for name, value in sums["terms"].items()}
        loss["total"] = sum(loss.values())
        self.epoch += 1
        self.sums = self._nothing()
        return EpochRecord(
            epoch=self.epoch,
            epochs=config.epochs,
            lr=sums["lr"],
            seconds=before + time.perf_counter() - started,
            loss=loss,
            train_accuracy=float(sums["right"]) / count,
            stats={name: (value / sums["seen"]).tolist() for name, value in sums["stats"].items()},
            skipped=sums["skipped"],
            skipped_words=sums["skipped_words"],
        )

    def _nothing(self) -> dict[str, Any]:
        """What an epoch adds up, before its first step."""
        zero = torch.zeros((), device=self.device, dtype=torch.float64)
        seen = torch.zeros(self.num_classes, device=self.device, dtype=torch.float64)
        return {
            "steps": 0, "lr": self.config.lr, "seconds": 0.0, "terms": {}, "stats": {}, "right": zero, "seen": seen,
            "left_out": zero.clone(), "skipped": 0, "skipped_words": "",
        }  # fmt: skip

    def _add(self, out: StepOutput) -> None:
        """Adds a step's measurements to the epoch's, on the device."""
        sums, labels = self.sums, out.labels

        def counted(values: Tensor) -> Tensor:
            return values.masked_fill(self.watch.flag > 0, 0) if self.skips else values

        with torch.no_grad():
            for name, value in out.terms.terms.items():
                sums["terms"][name] = sums["terms"].get(name, 0) + counted(value.detach()).sum(dtype=torch.float64)
            ones = torch.ones_like(labels, dtype=torch.float64)
            sums["seen"].index_add_(0, labels, counted(ones))
            for name, value in out.terms.stats.items():
                per_class = sums["stats"].setdefault(name, torch.zeros_like(sums["seen"]))
                per_class.index_add_(0, labels, counted(value.to(torch.float64)))
            sums["right"] += counted(out.logits.argmax(1) == labels).sum()
            if self.skips:
                sums["left_out"] += self.watch.flag * len(labels)

    def check(self) -> None:
        """Looks whether every step so far gave finite numbers; this reads the device.

        Raises:
            DivergedError: one did not; where such steps are left out, too many.
        """
        found = self.watch.found()
        if found is None:
            return
        number, terms = found
        count, most = self.watch.clear(), max(3, self.config.epochs * self.steps_per_epoch // 100)
        epoch, step = divmod(number, self.steps_per_epoch)
        rows = self.batches(epoch)[step]
        labels = self.labels[rows]
        bad = {name: ~v[: len(rows)].isfinite() for name, v in terms.items()}
        words = [
            f"{name} of {int(b.sum())} of {len(rows)} {self.noun}, of class "
            + _some(self.class_names[c] for c in labels[b].unique().tolist())
            + ", rows "
            + _some(map(str, rows[b].tolist()))
            for name, b in bad.items()
            if b.any()
        ]
        what = "The norm of the gradient is not finite, though the loss is,"
        if words:
            what = f"The loss is not finite (terms: {'; '.join(words)})"
        config = self.config
        if self.skips:
            self.skipped += count
            self.sums["skipped"] += count
            self.sums["skipped_words"] = self.sums["skipped_words"] or f"{what} in step {step + 1}."
            if self.skipped <= most:
                return
        frozen = " Nothing was updated from there on." if self.watch.freezes else ""
        if self.skips:
            frozen = f" {self.skipped} steps were left out; at most {most} may be."
        raise DivergedError(
            f"{what} in step {step + 1} of epoch {epoch + 1}.{frozen} "
            f"Try a lower learning rate than {config.lr:g}, or more warm-up than {config.warmup:g} of the run.",
            {
                "epoch": epoch,
                "step": step,
                "rows": rows,
                "labels": labels,
                "terms": {name: v[: len(rows)] for name, v in terms.items()},
                "lr": learning_rate(config, (number + 1) / (config.epochs * self.steps_per_epoch + 1)),
                "trainer": _to(self._state(), torch.device("cpu")),
            },
        )

    def state(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; all randomness is a function of seed, epoch and row.

        Raises:
            DivergedError: a step gave a number that is not finite, so there is nothing to go on with.
        """
        self.check()
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "sums": self.sums,
            "task": self.task.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict() if self.average is not None else None,
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what :meth:`state` gave, in the middle of an epoch too."""
        self.epoch = int(state["epoch"])
        self.sums = {**self._nothing(), **_to(state["sums"], self.device)}
        self.skipped = int(state.get("skipped", 0))
        self.task.load_state_dict(state["task"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])


class Watch:
    """Looks at every step's terms and gradients on the device, and freezes the parameters from the first that is bad.

    A step is bad where a term's value or the norm of a parameter's gradient is not finite. Nothing is read back until
    :meth:`found` is asked: the fused optimisers take a flag on the device that leaves all parameters and their own
    state as they are.

    Args:
        optimizer: of the training.
        batch_size: of the largest batch.
        device: of the training.
        skip: whether every bad step is left out for itself, and the next one is taken.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, batch_size: int, device: torch.device, *, skip: bool = False
    ) -> None:
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.flag = torch.zeros((), device=device)
        self.first = torch.full((), -1, device=device)
        self.names: list[str] = []
        self.values = torch.zeros(0, batch_size, device=device)
        self.skip, self.count = skip, torch.zeros((), dtype=torch.int64, device=device)
        self.freezes = bool(optimizer.defaults["fused"])
        if self.freezes:
            optimizer.found_inf = self.flag  # type: ignore[attr-defined]
        if skip and isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"]:
            for parameter in self.parameters:  # a first step that is left out would leave them as the memory was
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def look(self, number: int, terms: dict[str, Tensor]) -> None:
        """After a backward pass.

        Args:
            number: of the step, from the training's first.
            terms: of its loss, each ``(B,)``.
        """
        names, rows = list(terms), self.values.shape[1]
        values = torch.stack([terms[name].float() for name in names])
        if names != self.names:
            self.names, self.values = names, self.values.new_zeros(len(names), rows)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))  # the largest values would take seven times as long
        bad = ~(values.isfinite().all() & norms.isfinite().all())
        new = bad & (self.first < 0)
        self.count += bad
        self.first.copy_(torch.where(new, number, self.first))
        padded = torch.nn.functional.pad(values, (0, rows - values.shape[1]))
        self.values.copy_(torch.where(new, padded, self.values))
        bad = bad.to(self.flag.dtype)
        self.flag.copy_(bad if self.skip else torch.maximum(self.flag, bad))

    def found(self) -> tuple[int, dict[str, Tensor]] | None:
        """The first bad step's number and its terms ``(B,)``, padded with zeros, on the CPU; None where all is well."""
        number = int(self.first)
        return None if number < 0 else (number, dict(zip(self.names, self.values.cpu(), strict=True)))

    def clear(self) -> int:
        """How many steps were bad since this was asked last; where each is left out, the next one is a first again."""
        count = int(self.count)
        if self.skip:
            self.count.zero_()
            self.first.fill_(-1)
        return count


def _some(words: Iterable[str], limit: int = 8) -> str:
    listed = list(words)
    return ", ".join(listed[:limit]) + (f" and {len(listed) - limit} more" if len(listed) > limit else "")


def check_answers(answers: Answers, objective: Objective, config: TrainConfig) -> None:
    """Refuses stored answers that an objective cannot be trained with.

    Raises:
        ModelError: it needs maps, or features that are not stored, or the images are mixed.
    """
    problem = (
        "needs the maps of the teacher's stages, which no bank holds"
        if objective.needs_maps
        else "needs the teacher's features, which are not among the stored answers"
        if objective.needs_features and not answers.feature_dim
        else "mixes images (mixup), which no stored answer is about"
        if config.mixup > 0
        else None
    )
    if problem:
        raise ModelError(f"The training {problem}. Ask the teacher in every step (bank.views 0), or change that.")


def has_dropout(module: torch.nn.Module) -> bool:
    """Whether any part of a module leaves numbers out at random: a layer for it, or a number of that name above 0."""
    for part in module.modules():
        given = {"drop": part.p} if isinstance(part, torch.nn.modules.dropout._DropoutNd) else vars(part)
        if any("drop" in name and isinstance(p, float) and p > 0 for name, p in given.items()):
            return True
    return False


def training_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the networks' arithmetic: ``auto`` is bfloat16 on CUDA cards that have it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {k: _to(v, device) for k, v in value.items()}
    return value.to(device) if isinstance(value, Tensor) else value


def collect(
    network: torch.nn.Module,
    data: Examples,
    wanted: Callable[[Outputs], tuple[Tensor, ...]],
    *,
    device: torch.device,
    batch_size: int = 256,
    world: World | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, ...]:
    """What is wanted of a network's answers to images as they are (no augmentation); many processes ask for a share
    each.

    Args:
        network: put on the device, and into evaluation mode.
        data: N images.
        wanted: from the answers to a batch, on the device, to one or more tensors with a row per image. What it leaves
            out is never held: the logits of 400,000 images of 8,000 classes are 13 GB.
        device: where the network works.
        batch_size: images at once.
        world: the processes that share the work.
        on_step: told the images done and their number.

    Returns:
        Each of the tensors for all images, ``(N, ...)``, on the CPU.
    """
    place(network.eval(), device)
    found: list[Tensor] = []
    world, rows = world or World.alone(), torch.arange(len(data))
    spread = 1 < world.size <= len(data)
    own = share(rows, world) if spread else rows
    with torch.no_grad():
        for done in range(0, len(own), batch_size):
            until = min(done + batch_size, len(own))
            parts = wanted(network(as_batch(data.inputs[int(own[done]) : int(own[until - 1]) + 1].to(device))))
            if not found:  # written into, rather than joined at the end: that would hold everything twice
                found = [torch.empty((len(own), *part.shape[1:]), dtype=part.dtype) for part in parts]
            for whole, part in zip(found, parts, strict=True):
                whole[done:until] = part
            if on_step is not None:
                on_step(until, len(own))
    if not spread:
        return tuple(found)
    sizes = share_sizes(len(data), world)
    return tuple(gather_rows(part, sizes, world) for part in found)


def collect_outputs(
    network: torch.nn.Module,
    data: Examples,
    *,
    device: torch.device,
    batch_size: int = 256,
    world: World | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """A network's logits and features, as :func:`collect` collects them.

    Returns:
        Logits ``(N, K)`` and features ``(N, D)``, float32 on the CPU.
    """
    logits, features = collect(
        network, data, lambda out: (out.logits.float(), out.feature.float()),
        device=device, batch_size=batch_size, world=world, on_step=on_step,
    )  # fmt: skip
    return logits, features


def collect_features(
    network: torch.nn.Module, data: Examples, *, device: torch.device, world: World | None = None
) -> Tensor:
    """A network's features alone, ``(N, D)``, float32 on the CPU."""
    (features,) = collect(network, data, lambda out: (out.feature.float(),), device=device, world=world)
    return features
