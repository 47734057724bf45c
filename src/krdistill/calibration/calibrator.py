"""A fitted calibrator: plain data that is stored as JSON, and answers alike on arrays and tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, ModelError, unknown_name
from ..files import read_json, write_json
from .arrays import TINY, as_float64, log_softmax, namespace

# Name to what it is, in the order of every table; a dash in a name is an underscore in its file's.
METHODS = {
    "none": "the network's own softmax",
    "temperature": "temperature scaling: one number for all classes",
    "balanced-temperature": "temperature scaling, every class counting the same",
    "vector": "vector scaling: a factor and an offset per class",
    "head-to-tail": "temperature scaling, images weighted by what head classes know of the tail's spread",
    "ets": "ensemble temperature scaling: softened, plain and uniform predictions, mixed",
    "isotonic": "isotonic regression, one class against the rest",
    "histogram": "histogram binning, one class against the rest",
}


@dataclass(frozen=True)
class Calibrator:
    """What turns a network's logits into calibrated probabilities.

    Attributes:
        method: one of ``METHODS``.
        num_classes: K.
        parameters: what was fitted, as plain data (numbers, lists, mappings).

    Raises:
        ArgumentError: an unknown method, or parameters that are not this method's or not of K classes.
    """

    method: str
    num_classes: int
    parameters: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ArgumentError(unknown_name("calibration method", str(self.method), METHODS))
        if not isinstance(self.num_classes, int) or self.num_classes < 2:
            raise ArgumentError(f"num_classes: expected a whole number of at least 2, got {self.num_classes!r}.")
        problem = _problem(self.method, self.num_classes, self.parameters)
        if problem:
            raise ArgumentError(f"The parameters of the calibrator {self.method!r} are damaged: expected {problem}.")

    def __call__(self, logits: Any) -> Any:
        """Calibrated probabilities of logits.

        Args:
            logits: a NumPy array or a tensor, shape ``(N, K)``.

        Returns:
            The same kind of array, shape ``(N, K)``, float64 (float32 on a device without float64), rows that sum
            to 1. Rows with NaN stay NaN.

        Raises:
            ArgumentError: another shape.
        """
        if getattr(logits, "ndim", None) != 2 or logits.shape[1] != self.num_classes:
            raise ArgumentError(
                f"logits: expected shape (N, K) with K = {self.num_classes}, got {getattr(logits, 'shape', logits)!s}."
            )
        made = import_module(f".{self.method.replace('-', '_')}", __package__)
        return made.apply(log_softmax(as_float64(logits)), self.parameters)

    def from_probabilities(self, probabilities: Any) -> Any:
        """The same of a softmax's probabilities, as an exported file answers: their logarithms are logits.

        Args:
            probabilities: shape ``(N, K)``, at least 0; 0 is read as the smallest number of float32.
        """
        p = as_float64(probabilities)
        xp = namespace(p)
        return self(xp.log(xp.clip(p, TINY, None)))

    def log_probabilities(self, logits: Any) -> Any:
        """Their logarithms, finite, as another program's logits: the softmax of them is what the call answers.

        Args:
            logits: as for the call. A probability of 0 becomes the smallest number of float32.
        """
        p = self(logits)
        xp = namespace(p)
        return xp.log(xp.clip(p, TINY, None))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"method": self.method, "num_classes": self.num_classes, "parameters": dict(self.parameters)}

    @classmethod
    def from_dict(cls, data: Any) -> Calibrator:
        """The calibrator that :meth:`as_dict` wrote.

        Raises:
            ArgumentError: it is none.
        """
        if not isinstance(data, Mapping) or set(data) != {"method", "num_classes", "parameters"}:
            raise ArgumentError(f"A calibrator has method, num_classes and parameters; got {data!r:.80}.")
        return cls(data["method"], data["num_classes"], data["parameters"])

    def save(self, path: Path) -> None:
        """Writes it as a JSON file."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path) -> Calibrator:
        """Reads the file that :meth:`save` wrote.

        Raises:
            ModelError: no such file, or a damaged one.
        """
        try:
            return cls.from_dict(read_json(path))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is no calibrator ({error}).") from None

    def words(self) -> str:
        """Its name, with the temperature where it has one.

        >>> Calibrator("temperature", 3, {"temperature": 1.5}).words()
        'temperature (T 1.500)'
        """
        T = self.parameters.get("temperature")
        return self.method if T is None else f"{self.method} (T {T:.3f})"


def _problem(method: str, K: int, parameters: Any) -> str | None:
    """What was expected of parameters that do not fit, in words."""
    if not isinstance(parameters, Mapping):
        return "a mapping"
    if method in ("temperature", "balanced-temperature", "head-to-tail", "ets"):
        T: Any = parameters.get("temperature")
        if not _numbers([T]) or T <= 0:
            return "a temperature above 0"
    if method == "ets":
        w: Any = parameters.get("weights")
        if not _numbers(w, 3) or min(w) < 0 or not math.isclose(sum(w), 1.0, abs_tol=1e-6):
            return "three weights of at least 0 that sum to 1"
    if method == "vector" and not all(_numbers(parameters.get(key), K) for key in ("scale", "offset")):
        return f"scale and offset of {K} numbers"
    if method == "isotonic":
        knots = parameters.get("knots")
        if not isinstance(knots, list) or len(knots) != K or not all(map(_rising, knots)):
            return f"knots of {K} classes, ascending"
    if method == "histogram":
        values = parameters.get("values")
        if not isinstance(values, list) or len(values) != K or not all(_shares(row) for row in values):
            return f"values of {K} classes in [0, 1]"
    return None


def _numbers(values: Any, length: int | None = None) -> bool:
    return (
        isinstance(values, list)
        and (length is None or len(values) == length)
        and all(isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values)
    )


def _shares(values: Any) -> bool:
    return _numbers(values) and all(0 <= v <= 1 for v in values)


def _rising(knots: Any) -> bool:
    if not isinstance(knots, Mapping) or not _numbers(knots.get("at")) or not _shares(knots.get("value")):
        return False
    at, value = knots["at"], knots["value"]
    return len(at) == len(value) and all(
        a < b and v <= w for a, b, v, w in zip(at, at[1:], value, value[1:], strict=False)
    )
