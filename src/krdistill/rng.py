"""Random numbers as a pure function of (seed, stream, epoch, index).

A counter-based generator: every image's augmentation depends on the seed, the purpose ("stream"), the epoch and the
image's own index, and on nothing else. So batch size, worker count and resumption do not change a run, and a stored
view can be replayed. The mixing function is SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number
generators", OOPSLA 2014), in wrapping int64 arithmetic so that it runs on any torch device.
"""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical (not arithmetic) right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift_right(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift_right(x, 31)


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed for one purpose, in [0, 2**63), from the run's seed and the purpose's name."""
    state = seed & _MASK
    for name in names:
        word = zlib.crc32(name.encode()) | (1 << 32) if isinstance(name, str) else name & _MASK
        state = _mix_int((state + _GOLDEN + word * 0xD1342543DE82EF95) & _MASK)
    return state >> 1


def _mix_int(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def uniform(seed: int, stream: str, epoch: int, index: Tensor, draws: int) -> Tensor:
    """Uniform numbers in [0, 1) for each image index.

    Args:
        seed: the run's seed.
        stream: what the numbers are for; two streams are independent.
        epoch: the epoch (or view) number.
        index: image indices, shape ``(B,)``, int64.
        draws: how many numbers per image.

    Returns:
        Shape ``(B, draws)``, float32, on the device of ``index``.
    """
    base = _signed(derive_seed(seed, stream, epoch) << 1)
    counter = index.to(torch.int64).unsqueeze(1) * draws + torch.arange(draws, device=index.device)
    bits = _mix(_mix(counter * _signed(_GOLDEN) + base))
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


@contextlib.contextmanager
def forked(seed: int, *names: str | int) -> Iterator[None]:
    """A block in which torch's global CPU generator is seeded for one purpose; afterwards it is as before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, *names))
        yield


@contextlib.contextmanager
def drawing(device: torch.device, seed: int, *names: str | int) -> Iterator[None]:
    """As :func:`forked`, with the generator of a CUDA device too: a block whose dropout is drawn for one purpose."""
    generators = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generators.append(torch.cuda.default_generators[index])
    states = [g.get_state() for g in generators]
    for g in generators:
        g.manual_seed(derive_seed(seed, *names))
    try:
        yield
    finally:
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose; the global generator is never touched."""
    gen = torch.Generator(device="cpu")
    gen.manual_seed(derive_seed(seed, *names))
    return gen
