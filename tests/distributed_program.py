"""What the tests of krdistill.distributed run in every process: small trainings, and each piece by itself.

    torchrun --nproc-per-node 2 tests/distributed_program.py pieces FOLDER [DEVICE]
    python tests/distributed_program.py lost FOLDER {silent,killed}      (per rank, with torchrun's variables)

Every process writes what it found into FOLDER.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from krdistill.data import DataBundle, load_data
from krdistill.data.augment import build_augmentation, mixup
from krdistill.distributed import (
    DistributedError,
    World,
    average_gradients,
    barrier,
    broadcast,
    gather_rows,
    gather_step,
    join,
    same_everywhere,
    share,
    share_sizes,
    synchronise_batch_norm,
)
from krdistill.errors import KrdistillError
from krdistill.models.network import build_network
from krdistill.models.teacher import Teacher
from krdistill.objective import on_last_maps, on_maps
from krdistill.outputs import LossTerms, Step
from krdistill.recipes import recipe
from krdistill.sampling import epoch_order
from krdistill.stages import build_task, measure, profile_teacher
from krdistill.training.task import Task, place

BATCH, EPOCHS, SEED = 33, 2, 3


# Trainings ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    mixup: float = 0.0
    student: str = "resnet8w8"


CASES = (
    Case("krdistill", "krdistill"),
    Case("krdistill in float32", "krdistill", dtype=torch.float32),
    Case("kd with mixup", "kd", mixup=0.4),
    Case("rkd", "rkd"),
    Case("sp", "sp"),
    Case("crd", "crd", {"negatives": 50, "embed_dim": 16}),
    Case("ltkd", "ltkd"),
    Case("reviewkd", "reviewkd", student="resnet8"),
    Case("simkd", "simkd"),
    Case("simkd with labels", "simkd", {"classification_weight": 0.5}),
    Case("rkd without labels", "rkd", {"classification_weight": 0.0}),  # nothing depends on the head
)


def digits() -> DataBundle:
    return load_data("digits", profile="exp", imbalance_factor=10, n_max=30)


def make_task(case: Case, data: DataBundle) -> Task:
    prior, groups = measure(data, "thirds")
    about: dict[str, Any] = {"class_names": data.train.class_names, "images": data.train.images}
    teacher = Teacher(build_network("resnet8w8", **about, seed=7), class_names=data.train.class_names)
    profile = profile_teacher(teacher, data, device=torch.device("cpu"))
    entry = recipe(case.recipe)
    student = build_network(case.student, **about, seed=1)
    return build_task(
        entry, entry.resolve(case.options), student, data, prior, groups, teacher=teacher, profile=profile, seed=SEED
    )


class WholeBatch(nn.Module):
    """A task on this process's share, its loss terms on the whole batch."""

    def __init__(self, task: Task, world: World) -> None:
        super().__init__()
        self.task, self.world = task, world

    def forward(
        self, images: Tensor, labels: Tensor, partners: Tensor, lam: float, index: Tensor, progress: float,
        sizes: list[int],
    ) -> tuple[LossTerms, Tensor]:  # fmt: skip
        task, maps = self.task, self.task.objective.needs_maps
        assert task.teacher is not None
        step = Step(task.network(images, maps=maps), labels, task.teacher(images, maps=maps), index, progress)
        whole = gather_step(step, sizes, self.world)
        terms = self.terms(step, whole, sizes)
        if lam < 1:
            other = gather_rows(partners, sizes, self.world)
            terms = terms.mixed(self.terms(step._replace(labels=partners), whole._replace(labels=other), sizes), lam)
        return terms, whole.student.logits.detach()

    def terms(self, step: Step, whole: Step, sizes: list[int]) -> LossTerms:
        """Terms on maps are computed on the share and gathered, the others on the gathered batch."""
        found: dict[str, Tensor] = {}
        for term in self.task.objective.terms:
            own = term.call in (on_maps, on_last_maps)
            found[term.name] = gather_rows(term(step), sizes, self.world) if own else term(whole)
        return LossTerms(found)


def train(case: Case, data: DataBundle, world: World, device: torch.device) -> dict[str, Any]:
    """Two epochs; what they measured, and the weights."""
    task = make_task(case, data)
    assert task.teacher is not None
    for module in (task, task.teacher):
        place(module.to(case.dtype), device)
    synchronise_batch_norm(task, world)
    labels, images = data.train.labels.to(device), data.train.images.to(device)
    augment = build_augmentation("crop-only", data.train.image_size[0])
    n, steps = len(labels), -(-len(labels) // BATCH)
    optimizer = torch.optim.SGD(
        [p for p in task.parameters() if p.requires_grad], lr=0.02, momentum=0.9, weight_decay=0.01
    )

    def some(module: nn.Module) -> Tensor:
        rows = torch.arange(2 * world.size, device=device)
        own, alike = share(rows, world), share_sizes(len(rows), world)
        batch = images[own].permute(0, 3, 1, 2)
        terms, _ = module(batch, labels[own], labels[own], 1.0, own, 0.5, alike)
        return terms.total().mean()

    model = average_gradients(WholeBatch(task, world), world, probe=some)
    model.train()
    curve, terms_seen, right = [], [], 0
    for epoch in range(EPOCHS):
        order = epoch_order("instance", data.train.labels, SEED, epoch)
        for number, rows in enumerate(torch.tensor_split(order, steps)):
            rows = rows.to(device)
            sizes = share_sizes(len(rows), world)
            own = share(rows, world)
            if case.mixup:  # a partner may be in another process's share, so the whole batch is mixed
                batch = augment(images[rows].permute(0, 3, 1, 2), rows, seed=SEED, epoch=epoch)
                batch, partner, lam = mixup(batch, alpha=case.mixup, seed=SEED, epoch=epoch, step=number)
                batch, partners = share(batch, world), labels[share(rows[partner], world)]
            else:
                batch = augment(images[own].permute(0, 3, 1, 2), own, seed=SEED, epoch=epoch)
                partners, lam = labels[own], 1.0
            progress = (epoch * steps + number) / (EPOCHS * steps)
            terms, said = model(batch, labels[own], partners, lam, own, progress, sizes)
            loss = terms.total().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            curve.append(float(loss.detach()))
            terms_seen.append({k: v.detach().cpu() for k, v in terms.terms.items()})
            right += int((said.argmax(1) == labels[rows]).sum())
    synchronise_batch_norm(task, World.alone())
    return {
        "curve": curve,
        "terms": terms_seen,
        "accuracy": right / (EPOCHS * n),
        "weights": {k: v.cpu() for k, v in task.state_dict().items()},
        "test": evaluate(task, data, world, device),
    }


def evaluate(task: Task, data: DataBundle, world: World, device: torch.device) -> Tensor:
    """The logits of all test images, each process asked for its share."""
    task.eval()
    n = len(data.test.labels)
    own = share(torch.arange(n), world)
    with torch.no_grad():
        logits = [task.network(data.test.images[i].to(device).permute(0, 3, 1, 2)).logits for i in own.split(100)]
    return gather_rows(torch.cat(logits).cpu(), share_sizes(n, world), world)


# Pieces ---------------------------------------------------------------------------------------------------------------


def rows_of(n: int, dtype: torch.dtype) -> Tensor:
    """Rows that differ, of any dtype."""
    noise = torch.randn(n, 3, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 50
    return (noise > 0) if dtype == torch.bool else noise.to(dtype)


DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.int16, torch.uint8, torch.bool)
SIZES = ([3, 2], [1, 4], [4, 0])


def gathers(world: World) -> dict[str, Tensor]:
    found = {}
    for sizes in SIZES:
        for dtype in DTYPES:
            own = rows_of(sum(sizes), dtype).split(sizes)[world.rank]
            found[f"{sizes} {dtype}"] = gather_rows(own.transpose(1, 2), sizes, world)  # not contiguous
    own = torch.arange(5).split([3, 2])[world.rank]
    found["vector"] = gather_rows(own, [3, 2], world)
    found["no columns"] = gather_rows(torch.zeros(len(own), 0), [3, 2], world)
    return found


def relational(world: World, sizes: list[int]) -> dict[str, Tensor]:
    """A loss that no share could compute alone, with a weight before the gather and one after it."""
    g = torch.Generator().manual_seed(5)
    x, before, after = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((sum(sizes), 4), (4, 3), (3, 2)))
    before.requires_grad_()
    after.requires_grad_()
    own = x.split(sizes)[world.rank]
    h = gather_rows((own @ before).tanh(), sizes, world) @ after
    loss = torch.cdist(h, h).square().mean() + h[0].sum() * h[-1].sum()
    loss.backward()
    grads = {"loss": loss.detach()}
    for name, leaf in (("before", before), ("after", after)):
        assert leaf.grad is not None
        grads[name] = gather_rows(leaf.grad.unsqueeze(0), [1] * world.size, world).mean(0)
    return grads


NORMS: dict[str, tuple[Any, tuple[int, ...], torch.dtype]] = {
    "1d": (partial(nn.BatchNorm1d, 3), (3,), torch.float64),
    "1d of sequences": (partial(nn.BatchNorm1d, 3), (3, 4), torch.float64),
    "2d": (partial(nn.BatchNorm2d, 3), (3, 5, 4), torch.float64),
    "2d, cumulative": (partial(nn.BatchNorm2d, 3, momentum=None), (3, 2, 2), torch.float64),
    "2d, not affine": (partial(nn.BatchNorm2d, 3, affine=False), (3, 2, 2), torch.float64),
    "2d, not tracked": (partial(nn.BatchNorm2d, 3, track_running_stats=False), (3, 2, 2), torch.float64),
    "3d": (partial(nn.BatchNorm3d, 3), (3, 2, 2, 2), torch.float64),
    "far from 0": (partial(nn.BatchNorm2d, 3), (3, 4, 4), torch.float32),
    "half": (partial(nn.BatchNorm2d, 3), (3, 4, 4), torch.bfloat16),
}


def norm(name: str, world: World, sizes: list[int], device: torch.device) -> dict[str, Tensor]:
    """Two steps of training, then evaluation."""
    kind, shape, dtype = NORMS[name]
    layer = nn.Sequential(kind()).to(device)
    if dtype == torch.float64:
        layer.double()
    g = torch.Generator().manual_seed(6)
    for p in layer.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    synchronise_batch_norm(layer, world)
    found: dict[str, Tensor] = {}
    for step in range(2):
        x, slope = (torch.randn(sum(sizes), *shape, generator=g, dtype=torch.float64) for _ in range(2))
        x = (2 + x + (1000 if name == "far from 0" else 0)).to(dtype)
        own = x.split(sizes)[world.rank].to(device)
        if own.ndim == 4:
            own = own.contiguous(memory_format=torch.channels_last)
        own.requires_grad_()
        y = layer(own)
        grads = torch.autograd.grad(y, [own, *layer.parameters()], slope.split(sizes)[world.rank].to(y))
        found[f"y{step}"], found[f"dx{step}"] = (
            gather_rows(t.detach().cpu().float() if dtype == torch.bfloat16 else t.detach().cpu(), sizes, world)
            for t in (y, grads[0])
        )
        for i, grad in enumerate(grads[1:]):
            found[f"d{step}.{i}"] = gather_rows(grad.cpu().unsqueeze(0), [1] * world.size, world).sum(0)
    layer.eval()
    if "not tracked" not in name:
        found["evaluated"] = (
            layer(rows_of(4, torch.float64)[:, :, :1].expand(4, 3, 2).to(next(layer.buffers())))
            if len(shape) == 2
            else torch.zeros(0)
        )
    synchronise_batch_norm(layer, World.alone())
    assert type(layer[0]) is kind.func
    return {**found, **{k: v.cpu() for k, v in layer.state_dict().items()}}


def said(job: Any) -> str:
    """The message of the error that a job ends in."""
    try:
        job()
    except KrdistillError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def pieces(folder: Path, device_name: str) -> None:
    with join(device_name) as world:
        device = torch.device(device_name)
        config = f"seed: 1\nlr: {0.1 * (1 + world.rank)}\nepochs: 3"
        found: dict[str, Any] = {
            "world": world,
            "gathers": gathers(world),
            "relational": {str(sizes): relational(world, sizes) for sizes in ([3, 2], [1, 5])},
            "norms": {name: norm(name, world, [5, 2], device) for name in NORMS},
            "broadcast": broadcast({"from": world.rank, "rows": [1, 2]}, world),
            "same": said(lambda: same_everywhere("seed: 1", world)),
            "differs": said(lambda: same_everywhere(config, world)),
            "too small": said(lambda: share_sizes(1, world)),
            "wrong rows": said(lambda: gather_rows(torch.zeros(3), [2, 2], world)),
            "twice": said(lambda: join(device_name).__enter__()),
        }
        barrier(world)
        data = digits()
        found["trained"] = {case.name: train(case, data, world, device) for case in CASES}
    torch.save(found, folder / f"{world.rank}.pt")


# Losing a process -----------------------------------------------------------------------------------------------------


def lost(folder: Path, how: str) -> None:
    """Process 1 falls silent, or is killed in its fourth step; the other says what it met, and after how long."""
    rank, data, steps = int(os.environ["RANK"]), digits(), iter(range(100))

    def before(module: nn.Module, _: Any) -> None:
        if isinstance(module, WholeBatch) and next(steps) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1 and how == "killed":
        nn.modules.module.register_module_forward_pre_hook(before)
    began = time.perf_counter()
    try:
        with join("cpu", timeout=4 if how == "silent" else 30) as world:
            barrier(world)
            began = time.perf_counter()
            if how == "killed":
                train(CASES[0], data, world, torch.device("cpu"))
            if rank == 1:
                time.sleep(7)  # it neither ends nor answers
            gather_rows(torch.zeros(1), [1, 1], world)
    except DistributedError as error:
        torch.save((time.perf_counter() - began, str(error)), folder / f"{how}{rank}.pt")
        os._exit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "pieces":
        pieces(Path(sys.argv[2]), sys.argv[3])
    else:
        lost(Path(sys.argv[2]), sys.argv[3])
