"""Which rows an epoch visits, and in which order: a pure function of (labels, seed, epoch).

Beside the plain shuffle there are three samplers that draw rare classes more often. They share one scheme, of N draws:

1. Class k gets N p_k draws, rounded up or down at random so that they sum to N and N p_k is their expectation.
2. Its draws go through its rows in a random order; when all are used, in a fresh random order. So a row is drawn again
   only when the rows of its class have all been drawn equally often.
3. The draws of each class are spread evenly over the epoch, at random places within even intervals. With equal draws
   that is: a random order of the classes, then another one, and so on.

Source: Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
arXiv 1910.09217; the cycles are those of its class-aware sampler (Shen et al., "Relay Backpropagation", ECCV 2016,
arXiv 1512.05830).
Deviation: there the class-balanced epoch has K n_max draws, here N as for every sampler, so that a change of sampler is
not a change of the run's length; there the other samplers draw every row independently, with repetition.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ._checks import check_choice, check_integer, check_number
from .priors import ClassPrior, CountsLike
from .rng import generator

Sampling = Literal["instance", "class-balanced", "square-root", "progressively-balanced"]

SAMPLINGS = ("instance", "class-balanced", "square-root", "progressively-balanced")


def epoch_order(sampling: Sampling, labels: Tensor, seed: int, epoch: int, *, progress: float = 0.0) -> Tensor:
    """The order of one epoch, by the sampler's name.

    Args:
        sampling: ``instance``, ``class-balanced``, ``square-root`` or ``progressively-balanced``.
        labels: one class index per row, shape ``(N,)``.
        seed: the run's seed.
        epoch: the epoch's number, from 0.
        progress: share of the run that is done, in [0, 1]; only ``progressively-balanced`` depends on it.

    Returns:
        Row numbers, shape ``(N,)``, int64, on the CPU.

    Raises:
        ArgumentError, DataError: arguments that do not fit, or fewer than two classes.
    """
    check_choice("sampling", sampling, SAMPLINGS)
    if sampling == "instance":
        return instance_order(len(labels), seed, epoch)
    if sampling == "progressively-balanced":
        return progressively_balanced_order(labels, seed, epoch, progress)
    return (class_balanced_order if sampling == "class-balanced" else square_root_order)(labels, seed, epoch)


def draw_shares(sampling: Sampling, counts: CountsLike, *, progress: float = 0.0) -> Tensor:
    r"""The class prior of what is drawn: p_k, the share of an epoch's draws that class k gets.

    n_k / N of the plain shuffle, and of the others what their functions say below.

    Args:
        sampling: the sampler's name.
        counts: n_k, training examples per class, ``(K,)``, every one at least 1.
        progress: t, the share of the run that is done, in [0, 1]; only ``progressively-balanced`` depends on it.

    Returns:
        Shape ``(K,)``, float64, on the CPU; positive, and they sum to 1.

    Raises:
        ArgumentError, DataError: arguments that do not fit.
    """
    check_choice("sampling", sampling, SAMPLINGS)
    t = check_number("progress", progress, at_least=0, at_most=1)
    share = ClassPrior.from_counts(counts).frequencies
    if sampling == "square-root":
        share = share.sqrt()
    elif sampling == "class-balanced":
        share = torch.ones_like(share)
    elif sampling == "progressively-balanced":
        share = (1 - t) * share + t / len(share)
    return share / share.sum()


def instance_order(n: int, seed: int, epoch: int) -> Tensor:
    """Every row once, in random order: instance-balanced sampling, the plain shuffle.

    Args:
        n: number of rows N >= 1.
        seed: the run's seed.
        epoch: the epoch's number, from 0.

    Returns:
        Row numbers, shape ``(N,)``, int64, on the CPU.

    Raises:
        ArgumentError: numbers out of range.
    """
    n, epoch = check_integer("n", n, at_least=1), check_integer("epoch", epoch, at_least=0)
    return torch.randperm(n, generator=generator(check_integer("seed", seed, at_least=0), "order", epoch))


def class_balanced_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    """Every class equally often, N / K times: p_k = 1 / K over the classes that have rows.

    Args:
        labels: one class index per row, shape ``(N,)``; indices without rows are no class.
        seed: the run's seed.
        epoch: the epoch's number, from 0.

    Returns:
        Row numbers, shape ``(N,)``, int64, on the CPU, with repetitions.

    Raises:
        ArgumentError: labels that are not whole numbers >= 0, or numbers out of range.
        DataError: fewer than two classes.
    """
    return _order(labels, seed, epoch, "class-balanced")


def square_root_order(labels: Tensor, seed: int, epoch: int) -> Tensor:
    r"""Half-way to balance: :math:`p_k \propto \sqrt{n_k}`.

    Arguments, result and errors as in :func:`class_balanced_order`.
    """
    return _order(labels, seed, epoch, "square-root")


def progressively_balanced_order(labels: Tensor, seed: int, epoch: int, progress: float) -> Tensor:
    r"""From the plain shuffle to class balance as the run goes on.

    .. math:: p_k = (1 - t) \, \frac{n_k}{N} + t \, \frac{1}{K}

    Args:
        labels, seed, epoch: as in :func:`class_balanced_order`.
        progress: t, the share of the run that is done, in [0, 1]. At 0 every row comes exactly once.

    Returns and errors as in :func:`class_balanced_order`.
    """
    return _order(labels, seed, epoch, "progressively-balanced", progress)


def _order(labels: Tensor, seed: int, epoch: int, name: Sampling, progress: float = 0.0) -> Tensor:
    """The scheme of this file."""
    seed, epoch = check_integer("seed", seed, at_least=0), check_integer("epoch", epoch, at_least=0)
    prior = ClassPrior.from_labels(labels, empty="drop")
    y = torch.searchsorted(prior.kept, torch.as_tensor(labels).detach().cpu().long())
    gen = generator(seed, "order", name, epoch)
    n = prior.counts
    draws = _rounded(draw_shares(name, n, progress=progress), len(y), gen)

    # One block per class and cycle through its rows; each block a random order of them.
    block_class = torch.repeat_interleave((draws + n - 1) // n)
    block = torch.repeat_interleave(n[block_class])
    entry_class = block_class[block]
    shuffled = (block + torch.rand(len(block), generator=gen, dtype=torch.float64)).argsort()
    member = shuffled - _starts(n[block_class])[block]
    rows = y.argsort(stable=True)[_starts(n)[entry_class] + member]

    # The first draws_k entries of each class, spread over the epoch.
    number = torch.arange(len(block)) - _starts(torch.bincount(entry_class, minlength=len(n)))[entry_class]
    kept = number < draws[entry_class]
    rows, number, size = rows[kept], number[kept], draws[entry_class[kept]]
    return rows[((number + torch.rand(len(rows), generator=gen, dtype=torch.float64)) / size).argsort()]


def _rounded(weights: Tensor, total: int, gen: torch.Generator) -> Tensor:
    """Whole numbers that sum to ``total``, each its exact share of it rounded up or down, and that share on average.

    Systematic sampling: a comb with a random offset over the cumulative shares, the classes in random order, so that
    neighbours in the label list do not compete for the same tooth.
    """
    order = torch.randperm(len(weights), generator=gen)
    ends = (weights[order].cumsum(0) / weights.sum() * total).round(decimals=9)
    ends[-1] = total
    teeth = (ends + torch.rand((), generator=gen, dtype=torch.float64)).floor().long()
    draws = torch.empty_like(teeth)
    draws[order] = teeth.diff(prepend=torch.zeros(1, dtype=torch.int64))
    return draws


def _starts(sizes: Tensor) -> Tensor:
    """Where each of consecutive blocks of these sizes begins."""
    return sizes.cumsum(0) - sizes
