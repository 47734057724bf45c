"""Training on many processes: the global batch is the setting, and W processes give the losses that one gives.

Every process holds all data and draws the same order of an epoch. Of every global batch it takes a contiguous share
(:func:`share`), runs the networks on it, and gathers what they say (:func:`gather_outputs`), so that the loss is
computed on the whole batch by every process: relations within the batch, memories, statistics of a batch and the log
are then those of one process. Batch normalisation sees the whole batch too (:func:`synchronise_batch_norm`). Values of
single samples that come from large maps are computed on the share and gathered themselves.

Gradients. Every process computes the same loss L on the gathered batch, and averages its gradients with the others'
(:class:`torch.nn.parallel.DistributedDataParallel`). With x_r the rows of process r,

.. math:: \\frac{\\partial L}{\\partial \\theta}
    = \\sum_r \\frac{\\partial L}{\\partial x_r} \\frac{\\partial x_r}{\\partial \\theta}
    = \\frac{1}{W} \\sum_r \\Big( W \\frac{\\partial L}{\\partial x_r} \\Big) \\frac{\\partial x_r}{\\partial \\theta}

so the backward pass of :func:`gather_rows` hands a process W times the gradient of its own rows; it needs no
communication, because L is the same everywhere. A parameter that is used after the gather, such as a projector's, gets
its whole gradient on every process, and the average leaves it. Neither depends on the shares' sizes.

With :meth:`World.alone` nothing here calls torch.distributed.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from ._checks import at_least_float32, check_integer, check_number, describe
from .errors import ArgumentError, ConfigError, KrdistillError, ModelError
from .outputs import Outputs, Step

T = TypeVar("T")

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


class DistributedError(KrdistillError):
    """The processes of a training lost each other."""


@dataclass(frozen=True)
class World:
    """The processes that train together, and which of them this is.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes W.
        local_rank: number of this process on its machine, from 0.
    """

    rank: int
    size: int
    local_rank: int

    @staticmethod
    def alone() -> World:
        """One process."""
        return World(0, 1, 0)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes and speaks."""
        return self.rank == 0


# Coming together ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def join(device: str, *, timeout: float = 60.0) -> Iterator[World]:
    """A block in which the processes that torchrun started work together; without torchrun, one process alone.

    Args:
        device: ``cpu`` (they speak by gloo), ``cuda`` (by NCCL; every process takes the GPU of its local rank, which
            becomes the current one), or ``auto``: CUDA where there is one, else the CPU.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        ConfigError: half of torchrun's environment, a device that many processes cannot share, or a process group that
            somebody made already.
        DistributedError: in place of torch's errors, where a process was lost, on the way in or inside of the block.
            The process cannot join again then; it should end soon, best by ``os._exit``, which waits for no message.
    """
    world = _environment()
    timeout = check_number("timeout", timeout, above=0)
    if world.size == 1:
        yield world
        return
    backend = _backend(device, world)
    if dist.is_initialized():
        raise ConfigError("torch.distributed is initialised already; leave that to krdistill, under torchrun.")
    try:
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
        yield world
    except (RuntimeError, ValueError) as error:
        if isinstance(error, KrdistillError) or not _of_communication(error):
            raise
        raise DistributedError(
            f"Process {world.rank} of {world.size} lost another process: it has ended, or it did not answer within "
            f"{timeout:g} seconds. Its own message says why. Start all processes again; the training goes on from its "
            f"last checkpoint. ({str(error).splitlines()[0]:.200})"
        ) from error
    # Not after an error: messages may be under way, and ending the group then hangs or crashes.
    dist.destroy_process_group()


def _environment() -> World:
    values = {name: os.environ.get(name) for name in _VARIABLES}
    if all(value is None for value in values.values()):
        return World.alone()
    rank, size, local = (int(v) if v is not None and v.isdecimal() else -1 for v in values.values())
    if min(rank, local) < 0 or not rank < size:
        came = ", ".join(f"{name}={value}" for name, value in values.items())
        raise ConfigError(
            f"Expected torchrun's environment, got {came}. Start many processes with torchrun; for one process, unset "
            "these variables."
        )
    return World(rank, size, local)


def _backend(device: str, world: World) -> str:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda") or not dist.is_available():
        raise ConfigError(
            f"Expected device cpu, cuda or auto for {world.size} processes (each takes its own GPU), got {device!r}."
            if dist.is_available()
            else "This build of PyTorch cannot train on many processes; install one that has torch.distributed."
        )
    if device == "cpu":
        return "gloo"
    if world.local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"Process {world.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}. Start at "
            "most one process per GPU (torchrun --nproc-per-node), or choose device cpu."
        )
    torch.cuda.set_device(world.local_rank)
    return "cpu:gloo,cuda:nccl"


def _of_communication(error: BaseException) -> bool:
    """Whether torch.distributed raised it; gloo's errors are plain RuntimeErrors."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "monitoredbarrier", "connection closed by peer"))


def barrier(world: World) -> None:
    """Waits for every process."""
    if world.size == 1:
        return
    if dist.get_backend() == "gloo":
        dist.monitored_barrier()  # names the process that is missing
    else:
        _all_gather(torch.zeros(1, 1), [1] * world.size)


def first_then_all(do: Callable[[], T], world: World) -> T:
    """Has the first process do something, and then all others; where the first refuses, all refuse with its words."""
    result: list[T] = []
    refused: KrdistillError | None = None
    if world.first:
        try:
            result.append(do())
        except KrdistillError as error:
            refused = error
    said = broadcast(str(refused) if refused is not None else None, world)
    if refused is not None:
        raise refused
    if said is not None:
        raise KrdistillError(said)
    return result[0] if result else do()


def broadcast(value: T, world: World) -> T:
    """What the first process has, on every process.

    Args:
        value: anything that pickle takes; what the other processes give is not looked at.
    """
    if world.size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def same_everywhere(text: str, world: World, *, what: str = "configuration") -> None:
    """Refuses processes that were started with something else than the first.

    Args:
        text: for example a resolved configuration, or a checksum over the data.
        what: its name in the message.

    Raises:
        ConfigError: on every process, with the first line that differs.
    """
    if world.size == 1:
        return
    digest = torch.frombuffer(bytearray(hashlib.sha256(text.encode()).digest()), dtype=torch.uint8).unsqueeze(0)
    digests = _all_gather(digest, [1] * world.size)
    others = (digests != digests[0]).any(1).nonzero().flatten().tolist()
    if not others:
        return
    texts: list[str] = [""] * world.size
    dist.all_gather_object(texts, text)
    lines = zip_longest(texts[0].splitlines(), texts[others[0]].splitlines(), fillvalue="")
    first, other = next(((a, b) for a, b in lines if a != b), ("", ""))
    raise ConfigError(
        f"Expected the same {what} in all {world.size} processes, but got another in process "
        f"{', '.join(map(str, others))} than in process 0: {other.strip()!r:.200} instead of {first.strip()!r:.200}. "
        "Start every machine with the same command on the same data."
    )


# Shares of a batch ----------------------------------------------------------------------------------------------------


def share_sizes(n: int, world: World) -> list[int]:
    """How many of n rows each process takes: sizes that differ by one at most, the larger ones first.

    Raises:
        ArgumentError: fewer rows than processes.
    """
    n = check_integer("n", n, at_least=1)
    if n < world.size:
        raise ArgumentError(
            f"Expected at least one row per process, but got {n} rows for {world.size} processes. Use a larger global "
            "batch or fewer processes."
        )
    return [n // world.size + (rank < n % world.size) for rank in range(world.size)]


def share(index: Tensor, world: World) -> Tensor:
    """This process's rows of a batch that every process has, ``(B, ...)``: contiguous, in order, without overlap.

    Raises:
        ArgumentError: fewer rows than processes.
    """
    return index if world.size == 1 else index.split(share_sizes(len(index), world))[world.rank]


# Gathering ------------------------------------------------------------------------------------------------------------


def gather_rows(t: Tensor, sizes: Sequence[int], world: World) -> Tensor:
    """The rows of all processes, in the order of the processes.

    Args:
        t: this process's rows, ``(sizes[rank], ...)``, of any dtype.
        sizes: rows of every process, known to all.

    Returns:
        Shape ``(sum(sizes), ...)``. Backward hands this process W times the gradient of its own rows: right where
        every process computes the same loss from the result and gradients are averaged over the processes.

    Raises:
        ArgumentError: another number of rows than ``sizes`` says.
    """
    if len(sizes) != world.size or t.ndim < 1 or len(t) != sizes[world.rank]:
        raise ArgumentError(
            f"Expected one size per process ({world.size}) and as many rows as it says, but got sizes {list(sizes)} "
            f"and {describe(t)} in process {world.rank}."
        )
    if world.size == 1:
        return t
    if t.requires_grad and torch.is_grad_enabled():
        gathered: Tensor = _Gather.apply(t, list(sizes), world)
        return gathered
    return _all_gather(t, sizes)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor, sizes: list[int], world: World) -> Tensor:
        ctx.start, ctx.stop, ctx.size = sum(sizes[: world.rank]), sum(sizes[: world.rank + 1]), world.size
        return _all_gather(t, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad[ctx.start : ctx.stop] * ctx.size, None, None


def _all_gather(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """As bytes, so that every dtype goes through every backend; shorter shares are padded."""
    shape = (sum(sizes), *t.shape[1:])
    row = t[0].numel() if len(t) else t.new_empty(t.shape[1:]).numel()
    if not row or not shape[0]:
        return t.new_empty(shape)
    padded = t.new_zeros(max(sizes), row)
    padded[: len(t)] = t.detach().reshape(len(t), row)
    own = padded.view(torch.uint8)
    parts = [torch.empty_like(own) for _ in sizes]
    dist.all_gather(parts, own)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]).view(t.dtype).view(shape)


def gather_outputs(outputs: Outputs, sizes: Sequence[int], world: World) -> Outputs:
    """Logits and features of the whole batch ``(B, K)``, ``(B, D)``; maps are left out, they are large.

    Args:
        outputs: of this process's share.
        sizes: as in :func:`gather_rows`, and so is the gradient.
    """
    # Each by itself: joined in one message, logits that no loss uses would give their head gradients of 0, not none.
    return Outputs(gather_rows(outputs.logits, sizes, world), gather_rows(outputs.feature, sizes, world))


def gather_step(step: Step, sizes: Sequence[int], world: World) -> Step:
    """What the terms of an objective may look at, for the whole batch; without maps.

    Args:
        step: of this process's share.
        sizes: as in :func:`gather_rows`, and so is the gradient.
    """
    return Step(
        gather_outputs(step.student, sizes, world),
        gather_rows(step.labels, sizes, world),
        gather_outputs(step.teacher, sizes, world) if step.teacher is not None else None,
        gather_rows(step.rows, sizes, world) if step.rows is not None else None,
        step.progress,
    )


# Gradients ------------------------------------------------------------------------------------------------------------


def average_gradients(module: nn.Module, world: World, *, probe: Callable[[nn.Module], Tensor]) -> nn.Module:
    """The module in :class:`torch.nn.parallel.DistributedDataParallel`; alone, the module itself.

    All processes start with the first one's parameters and buffers. Parameters that the loss does not depend on, such
    as the head's where a recipe trains the feature alone, keep no gradient, as with one process.

    Args:
        module: what is trained, on its device; to be called through the result in training.
        probe: gives a loss of the module on a few images. It is called once with the module in evaluation mode, to see
            which parameters it depends on; every process must call this function.

    Raises:
        ModelError: the loss depends on no parameter.
    """
    if world.size == 1:
        return module
    modes = {part: part.training for part in module.modules()}
    module.eval()  # neither running statistics nor memories move
    used = _leaves(probe(module))
    for part, mode in modes.items():
        part.training = mode
    trained = [p for p in module.parameters() if p.requires_grad]
    if not any(p in used for p in trained):
        raise ModelError("Expected a loss that depends on parameters of the module, but got one that has none.")
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.numel():
                flat = buffer.reshape(-1).view(torch.uint8)
                dist.broadcast(flat, src=0)
                buffer.copy_(flat.view(buffer.dtype).view(buffer.shape))
    # From here on buffers stay the same, as every process computes them from the same batch. The name of the option
    # has changed in newer torch.
    known = inspect.signature(DistributedDataParallel).parameters
    keep: dict[str, Any] = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
    unused = not all(p in used for p in trained)
    return DistributedDataParallel(module, find_unused_parameters=unused, **keep)


def _leaves(loss: Tensor) -> set[Tensor]:
    """The leaves that a value's graph ends in."""
    todo, seen, leaves = [loss.grad_fn], set(), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
        todo += [parent for parent, _ in node.next_functions]
    return leaves


# Batch normalisation --------------------------------------------------------------------------------------------------


def synchronise_batch_norm(module: nn.Module, world: World) -> None:
    """Batch normalisation over the batches of all processes together, in place; with one process, as it was.

    In training mode, mean and variance are those of all processes' values, each counted once, so that shares of any
    sizes give what one process gives on the whole batch; so do the running statistics, which take the unbiased
    variance. Evaluation mode and ``state_dict`` do not change. Called with :meth:`World.alone`, the layers become the
    ordinary ones again.

    On CUDA the layers become :class:`torch.nn.SyncBatchNorm`, so the module must be on its device already.

    Args:
        module: its layers :class:`torch.nn.BatchNorm1d`, ``2d`` and ``3d``, at any depth.

    Raises:
        ModelError: another kind of batch normalisation, which this cannot synchronise.
    """
    for name, layer in module.named_modules():
        if not isinstance(layer, _BatchNorm):
            continue
        ordinary = getattr(layer, "ordinary", type(layer))
        if world.size == 1:
            layer.__class__ = ordinary
            continue
        if ordinary not in _SYNCHRONISED:
            if ordinary is nn.SyncBatchNorm:
                continue
            raise ModelError(
                f"Layer {name!r} is a {ordinary.__name__}, which cannot be synchronised over processes. Train this "
                "network with one process, or use BatchNorm1d, 2d or 3d."
            )
        tensor = next((t for t in (layer.weight, layer.running_mean) if t is not None), None)
        vars(layer).update(ordinary=ordinary, world=world, process_group=None)
        layer.__class__ = nn.SyncBatchNorm if tensor is not None and tensor.is_cuda else _SYNCHRONISED[ordinary]


class _Synchronised(_BatchNorm):
    """The training mode of a batch normalisation over all processes, on any device."""

    world: World

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self._check_input_dim(x)
        y, mean, var, count = _BatchNormOverProcesses.apply(x, self.weight, self.bias, self.eps, self.world)
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            momentum = self.momentum
            if self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                momentum = 1.0 / float(self.num_batches_tracked) if momentum is None else momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum or 0.0)
                unbiased = var * (count / (count - 1))
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum or 0.0)
        return y


class _BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    pass


class _BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    pass


class _BatchNorm3d(_Synchronised, nn.BatchNorm3d):
    pass


_SYNCHRONISED: dict[type, type[_BatchNorm]] = {
    nn.BatchNorm1d: _BatchNorm1d,
    nn.BatchNorm2d: _BatchNorm2d,
    nn.BatchNorm3d: _BatchNorm3d,
}


class _BatchNormOverProcesses(torch.autograd.Function):
    """Two small messages: every process's count, mean and variance forward, the sums of the gradient backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, world: World
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # Means and variances, not sums of squares, whose difference would lose digits.
        var, mean = torch.var_mean(at_least_float32(x), (0, *range(2, x.ndim)), correction=0)
        own = torch.stack([mean, var, torch.full_like(mean, x.numel() // x.shape[1])]).double()
        means, variances, counts = _all_gather(own.unsqueeze(0), [1] * world.size).unbind(1)
        total = counts.sum(0)
        if x.device.type == "cpu" and float(total[0]) < 2:
            raise ArgumentError(
                f"Expected more than one value per channel for batch normalisation in training mode, but got "
                f"{describe(x)}."
            )
        dtype = mean.dtype
        mean = (counts * means).sum(0) / total
        var = ((counts * (variances + (means - mean).square())).sum(0) / total).to(dtype)
        mean = mean.to(dtype)
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, var, total)
        return y, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, mean, var, total = ctx.saved_tensors
        gain = torch.ones_like(mean) if weight is None else weight
        # As in evaluation mode: the gradients of scale and shift, and the input's as if mean and variance were fixed.
        dx, d_gain, d_shift = torch.ops.aten.native_batch_norm_backward(
            grad, x, gain, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        if ctx.needs_input_grad[0]:
            sums = torch.stack([d_shift, d_gain]).double()
            dist.all_reduce(sums)
            by_mean, by_var = (sums / total).to(mean.dtype)
            shape = (1, -1, *(1 for _ in range(2, x.ndim)))
            scale = (var + ctx.eps).rsqrt()
            towards = (
                (at_least_float32(x) - mean.view(shape)).mul_((scale * by_var).view(shape)).add_(by_mean.view(shape))
            )
            dx = dx.sub_(towards.mul_((gain * scale).view(shape)))
        return (
            dx if ctx.needs_input_grad[0] else None,
            d_gain.to(weight.dtype) if ctx.needs_input_grad[1] else None,
            d_shift.to(gain.dtype) if ctx.needs_input_grad[2] else None,
            None,
            None,
        )
