"""Class counts, class priors and class groups of long-tailed data.

n_k is the number of training images of class k, N their sum, pi_k = n_k / N the class prior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .errors import ArgumentError, DataError

CountsLike = Sequence[int] | np.ndarray | Tensor

SHOT_HIGH, SHOT_LOW = 100, 20
MOST_CLASSES = 2**20  # a single label of a damaged file would otherwise ask for any memory


def _whole_numbers(name: str, values: Any) -> Tensor:
    """``values`` as a 1-D int64 tensor on the CPU (a copy); anything but whole numbers is an error."""
    if isinstance(values, Tensor):
        tensor = values.detach().cpu()
        values = (tensor.double() if tensor.is_floating_point() else tensor).numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise ArgumentError(f"{name}: expected a flat list of whole numbers, but got one of uneven depth.") from error
    if array.ndim != 1:
        raise ArgumentError(f"{name}: expected one dimension, but got an array of shape {array.shape}.")
    if array.size == 0:
        raise ArgumentError(f"{name}: expected at least one number, but got none.")
    if array.dtype.kind == "f":
        bad = ~(np.isfinite(array) & (array == np.floor(array)) & (np.abs(array) < 2.0**53))
    elif array.dtype.kind == "u":
        bad = array > np.iinfo(np.int64).max
    elif array.dtype.kind == "i":
        bad = np.zeros(array.shape, dtype=bool)
    else:
        raise ArgumentError(f"{name}: expected whole numbers, but got values of type {array.dtype}.")
    if bad.any():
        index = int(bad.argmax())
        raise ArgumentError(f"{name}: expected whole numbers, but got {array[index]} at position {index}.")
    return torch.from_numpy(array.astype(np.int64))


def _whole_number(name: str, value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 1:
        raise ArgumentError(f"{name}: expected a whole number >= 1, but got {value!r}.")
    if value >= 2**63:
        raise ArgumentError(f"{name}: expected a whole number below 2**63, but got {value!r}.")
    return int(value)


def _listed(names: Sequence[str], limit: int = 5) -> str:
    shown = ", ".join(repr(n) for n in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """A division of the classes into named groups, such as many / medium / few.

    Attributes:
        names: the groups' names, from the head to the tail.
        index: group number of each class, shape ``(K,)``, int64, on the CPU.
        rule: how the groups were made, for people.
    """

    names: tuple[str, ...]
    index: Tensor
    rule: str

    def __post_init__(self) -> None:
        if not self.names or len(set(self.names)) != len(self.names):
            raise ArgumentError(f"names: expected different group names, at least one, but got {self.names!r}.")
        index = _whole_numbers("index", self.index)
        if int(index.min()) < 0 or int(index.max()) >= len(self.names):
            raise ArgumentError(
                f"index: expected group numbers in 0..{len(self.names) - 1}, "
                f"but got {int(index.min())}..{int(index.max())}."
            )
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "index", index)

    def members(self, name: str) -> Tensor:
        """Class indices of one group, ascending, shape ``(number of members,)``, int64."""
        if name not in self.names:
            raise ArgumentError(f"name: expected one of the groups {', '.join(self.names)}, but got {name!r}.")
        return (self.index == self.names.index(name)).nonzero().flatten()

    def sizes(self) -> dict[str, int]:
        """Number of classes of each group; 0 for an empty group."""
        counts = torch.bincount(self.index, minlength=len(self.names)).tolist()
        return dict(zip(self.names, counts, strict=True))

    def mean_over(self, values: Sequence[float] | np.ndarray | Tensor) -> dict[str, float | None]:
        """Mean of per-class values over each group's classes.

        Args:
            values: one value per class, shape ``(K,)``. NaN stands for a class without a value (such as one that is
                absent from the test set) and is left out.

        Returns:
            Group name to mean (in float64), or to None where a group has no value: not available, never 0.
        """
        tensor = torch.as_tensor(values).detach().to("cpu").double()
        if tensor.shape != self.index.shape:
            raise ArgumentError(
                f"values: expected one value per class, shape {tuple(self.index.shape)}, "
                f"but got shape {tuple(tensor.shape)}."
            )
        known = ~tensor.isnan()
        size = len(self.names)
        number = torch.bincount(self.index[known], minlength=size)
        total = torch.zeros(size, dtype=torch.float64).index_add_(0, self.index[known], tensor[known])
        return {name: float(total[g] / number[g]) if int(number[g]) else None for g, name in enumerate(self.names)}

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"names": list(self.names), "index": self.index.tolist(), "rule": self.rule}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassGroups:
        """The groups that :meth:`as_dict` wrote."""
        try:
            return cls(tuple(data["names"]), data["index"], data["rule"])
        except KeyError as error:
            raise DataError(f"Class groups: expected the key {error} beside {sorted(data)}.") from error


@dataclass(frozen=True, eq=False)
class ClassPrior:
    r"""How many training images each class has, and what follows from that.

    .. math:: \pi_k = n_k / N, \qquad N = \sum_k n_k

    Make one with :meth:`from_counts` or :meth:`from_labels`. Every class has at least one image: the prior of an empty
    class is 0 and its logarithm infinite, so an empty class is an error, or is dropped on request.

    Attributes:
        counts: n_k, shape ``(K,)``, int64, on the CPU, every one at least 1.
        class_names: K names.
        kept: original index of each class, shape ``(K,)``, int64; ``arange(K)`` when no class was dropped.
    """

    counts: Tensor
    class_names: tuple[str, ...]
    kept: Tensor

    def __post_init__(self) -> None:
        counts = _whole_numbers("counts", self.counts)
        kept = _whole_numbers("kept", self.kept)
        names = tuple(str(n) for n in self.class_names)
        if len(counts) < 2:
            raise DataError(f"counts: expected at least 2 classes with images, but got {len(counts)}.")
        if len(names) != len(counts):
            raise ArgumentError(f"class_names: expected {len(counts)} names, one per class, but got {len(names)}.")
        if int(counts.min()) < 1:
            raise DataError(f"counts: expected at least 1 image per class, but got {int(counts.min())}.")
        if (total := float(counts.double().sum())) >= 2.0**53:
            raise DataError(f"counts: expected fewer than 2**53 images in all, but got {total:g}.")
        if kept.shape != counts.shape or int(kept[0]) < 0 or bool((kept.diff() <= 0).any()):
            raise ArgumentError(f"kept: expected {len(counts)} ascending class indices >= 0, one per class.")
        object.__setattr__(self, "counts", counts)
        object.__setattr__(self, "class_names", names)
        object.__setattr__(self, "kept", kept)

    @classmethod
    def from_counts(
        cls,
        counts: CountsLike,
        *,
        class_names: Sequence[str] | None = None,
        empty: Literal["error", "drop"] = "error",
    ) -> ClassPrior:
        """The prior of given class counts.

        Args:
            counts: images per class, ``(K,)``, whole numbers >= 0.
            class_names: K names; by default the class indices.
            empty: what a class without an image is: ``"error"``, or ``"drop"`` to leave it out (``kept`` then says
                which classes remain; the labels must be renumbered accordingly).

        Raises:
            ArgumentError: counts that are negative, fractional or not numbers; names of the wrong number.
            DataError: a class without an image (``empty="error"``), or fewer than 2 classes with images.
        """
        if empty not in ("error", "drop"):
            raise ArgumentError(f"empty: expected 'error' or 'drop', but got {empty!r}.")
        tensor = _whole_numbers("counts", counts)
        if class_names is not None and (isinstance(class_names, str) or len(class_names) != len(tensor)):
            raise ArgumentError(
                f"class_names: expected {len(tensor)} names, one per class, but got "
                f"{f'the string {class_names!r}' if isinstance(class_names, str) else len(class_names)}."
            )
        names = [str(n) for n in class_names] if class_names is not None else [str(k) for k in range(len(tensor))]
        if int(tensor.min()) < 0:
            index = int((tensor < 0).nonzero()[0])
            raise ArgumentError(
                f"counts: expected numbers >= 0, but got {int(tensor[index])} for class {names[index]!r}."
            )
        kept = tensor.nonzero().flatten()
        if len(kept) < len(tensor):
            if empty == "error":
                missing = [names[k] for k in (tensor == 0).nonzero().flatten().tolist()]
                raise DataError(
                    f"{len(missing)} of {len(tensor)} classes have no training image: {_listed(missing)}. Add images, "
                    f'or leave the {"class" if len(missing) == 1 else "classes"} out with empty="drop".'
                )
            tensor, names = tensor[kept], [names[k] for k in kept.tolist()]
        return cls(tensor, tuple(names), kept)

    @classmethod
    def from_labels(
        cls,
        labels: CountsLike,
        *,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        empty: Literal["error", "drop"] = "error",
    ) -> ClassPrior:
        """The prior of a training set's labels.

        Args:
            labels: one class index per image, ``(N,)``.
            num_classes: K; by default the number of ``class_names``, else the largest label plus one.
            class_names, empty: as in :meth:`from_counts`.

        Raises:
            ArgumentError: labels outside ``[0, K)`` or not whole numbers; otherwise as :meth:`from_counts`.
        """
        tensor = _whole_numbers("labels", labels)
        low, high = int(tensor.min()), int(tensor.max())
        if num_classes is None:
            num_classes = len(class_names) if class_names is not None else min(high + 1, MOST_CLASSES)
        num_classes = _whole_number("num_classes", num_classes)
        if low < 0 or high >= num_classes:
            position = int(((tensor < 0) | (tensor >= num_classes)).nonzero()[0])
            raise ArgumentError(
                f"labels: expected class indices in 0..{num_classes - 1}, but got {int(tensor[position])} "
                f"at position {position}."
            )
        counts = torch.bincount(tensor, minlength=num_classes)
        return cls.from_counts(counts, class_names=class_names, empty=empty)

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.counts)

    @property
    def total(self) -> int:
        """N, the number of training images."""
        return int(self.counts.sum())

    @property
    def frequencies(self) -> Tensor:
        """pi_k = n_k / N, shape ``(K,)``, float64."""
        return self.counts.double() / self.total

    @property
    def log_prior(self) -> Tensor:
        """log pi_k, shape ``(K,)``, float64."""
        return self.frequencies.log()

    @property
    def imbalance_factor(self) -> float:
        """n_max / n_min."""
        return int(self.counts.max()) / int(self.counts.min())

    def effective_number_weights(self, beta: float = 0.9999) -> Tensor:
        """:func:`effective_number_weights` of these counts."""
        return effective_number_weights(self.counts, beta)

    def groups(
        self, rule: str | tuple[int, int] | list[int] | Mapping[str, Sequence[str]] = "shot", *, noun: str = "images"
    ) -> ClassGroups:
        """Divide the classes into head, middle and tail.

        Args:
            rule: how.

                - ``"shot"``: many (more than 100 images), medium (20 to 100), few (fewer than 20): the field's
                  usual groups.
                - ``(high, low)``: the same with thresholds of your own: many > high, medium low..high, few < low.
                - ``"thirds"``: head, medium, tail: classes sorted by count, ties by class index; the first 33 %, the
                  next 34 %, the last 33 % of them. Head and tail each hold 0.33 K classes rounded to the nearest
                  whole number (a half goes up); medium holds the rest: 33/34/33 of 100, 3/4/3 of 10, 1/0/1 of 2.
                - a mapping of group names to class names, every class in one group: the groups of another set, say.
            noun: what is counted, in a word, for the rule in words.

        Returns:
            The groups; a group may be empty.
        """
        if isinstance(rule, tuple | list):
            return self._threshold_groups(rule, noun)
        if isinstance(rule, Mapping):
            return self._named_groups(rule)
        if rule == "shot":
            return self._threshold_groups((SHOT_HIGH, SHOT_LOW), noun)
        if rule != "thirds":
            raise ArgumentError(f"rule: expected 'shot', 'thirds', (high, low) or groups by name, but got {rule!r}.")
        K = self.num_classes
        outer = (33 * K + 50) // 100
        order = torch.sort(self.counts, descending=True, stable=True).indices
        index = torch.empty(K, dtype=torch.int64)
        for group, members in enumerate(order.split([outer, K - 2 * outer, outer])):
            index[members] = group
        sizes = f"{outer}/{K - 2 * outer}/{outer}"
        rule_text = f"classes sorted by training {noun}: first 33 %, next 34 %, last 33 % ({sizes} classes)"
        return ClassGroups(("head", "medium", "tail"), index, rule_text)

    def _threshold_groups(self, thresholds: Sequence[int], noun: str) -> ClassGroups:
        if len(thresholds) != 2:
            raise ArgumentError(f"rule: expected two thresholds (high, low), but got {thresholds!r}.")
        high = _whole_number("rule: threshold high", thresholds[0])
        low = _whole_number("rule: threshold low", thresholds[1])
        if low > high:
            raise ArgumentError(f"rule: expected (high, low) with low <= high, but got ({high}, {low}).")
        index = (self.counts <= high).long() + (self.counts < low).long()
        rule_text = f"many > {high}, medium {low}-{high}, few < {low} training {noun}"
        return ClassGroups(("many", "medium", "few"), index, rule_text)

    def _named_groups(self, rule: Mapping[str, Sequence[str]]) -> ClassGroups:
        place = {name: k for k, name in enumerate(self.class_names)}
        index = torch.full((self.num_classes,), -1)
        for group, names in enumerate(rule.values()):
            for name in names:
                if name not in place or index[place[name]] >= 0:
                    what = "is in two groups" if name in place else "is no class of the data"
                    raise ArgumentError(f"rule: expected every class in one group, but {name!r} {what}.")
                index[place[name]] = group
        if bool((index < 0).any()):
            lost = self.class_names[int((index < 0).nonzero()[0])]
            raise ArgumentError(f"rule: expected every class in one group, but {lost!r} is in none.")
        return ClassGroups(tuple(rule), index, "groups given by class names")

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"counts": self.counts.tolist(), "class_names": list(self.class_names), "kept": self.kept.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ClassPrior:
        """The prior that :meth:`as_dict` wrote."""
        try:
            return cls(data["counts"], tuple(data["class_names"]), data["kept"])
        except KeyError as error:
            raise DataError(f"Class prior: expected the key {error} beside {sorted(data)}.") from error


def effective_number_weights(counts: CountsLike, beta: float = 0.9999) -> Tensor:
    r"""Class weights by the effective number of samples.

    .. math:: w_k \propto \frac{1 - \beta}{1 - \beta^{n_k}}, \qquad \sum_k w_k = K

    Args:
        counts: images per class, ``(K,)``, whole numbers >= 1.
        beta: in [0, 1). 0 gives equal weights; towards 1, weights go to :math:`1 / n_k`.

    Returns:
        Weights, shape ``(K,)``, float64, on the CPU.

    Raises:
        ArgumentError: a count below 1, or ``beta`` outside [0, 1).

    Source: Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    Deviation: :math:`1 - \beta^n` is computed as ``-expm1(n log1p(beta - 1))`` in float64, exact for any n.
    """
    tensor = _whole_numbers("counts", counts)
    if int(tensor.min()) < 1:
        index = int((tensor < 1).nonzero()[0])
        raise ArgumentError(f"counts: expected numbers >= 1, but got {int(tensor[index])} for class {index}.")
    if isinstance(beta, bool) or not isinstance(beta, int | float | np.floating) or not 0 <= beta < 1:
        raise ArgumentError(f"beta: expected a number in [0, 1), but got {beta!r}.")
    log_beta = torch.tensor(float(beta) - 1, dtype=torch.float64).log1p()
    weights = -1 / torch.expm1(tensor.double() * log_beta)
    return weights * (len(tensor) / weights.sum())
