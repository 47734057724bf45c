"""How a teacher's answers are written: pure functions from outputs to small arrays and back."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import ArgumentError, ModelError
from ..outputs import Outputs

Precision = Literal["float16", "float32"]


@dataclass(frozen=True)
class Coding:
    r"""The stored form of the answers to a batch.

    A row of logits is stored as its maximum m (float32) and the differences :math:`z_k - m`, whose precision is best
    where the probability is: in float16 a difference is off by at most a part in 2048 of itself.

    With ``top_k`` only the k largest logits are kept, with their classes, and one number r (float32) for all others,

    .. math:: r = \log \frac{1}{K - k} \sum_{j \notin \text{top-}k} e^{z_j - m}

    so that the kept classes have the probabilities that the teacher gave them, and the rest share theirs evenly.

    Args:
        num_classes: K.
        feature_dim: D; 0 stores no features.
        dtype: of logits and features.
        top_k: how many logits to keep, below K; None keeps all.

    Source: Shen and Xing, "A Fast Knowledge Distillation Framework for Visual Recognition", ECCV 2022,
    arXiv 2112.01528, for stored soft labels of views, and for sharing out what top-k leaves ("marginal smoothing").
    Deviation: logits and features are stored, not probabilities, so that rectification and temperature are applied
    when they are read, and any recipe can use the same bank.
    """

    num_classes: int
    feature_dim: int
    dtype: Precision = "float16"
    top_k: int | None = None

    def __post_init__(self) -> None:
        if self.top_k is not None and not 1 <= self.top_k < self.num_classes:
            raise ArgumentError(
                f"top_k: expected a number from 1 to {self.num_classes - 1} for {self.num_classes} classes, "
                f"got {self.top_k}. Leave it out to keep every logit."
            )

    @property
    def fields(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Name of each array to its dtype and the shape of a row."""
        kind = torch.float16 if self.dtype == "float16" else torch.float32
        k = self.num_classes if self.top_k is None else self.top_k
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"peak": (torch.float32, ()), "logits": (kind, (k,))}
        if self.top_k is not None:
            found |= {"classes": (torch.int32, (k,)), "rest": (torch.float32, ())}
        if self.feature_dim:
            found["features"] = (kind, (self.feature_dim,))
        return found

    @property
    def row_bytes(self) -> int:
        """Bytes of the answer to one view of one image."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.fields.values())

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def encode(self, outputs: Outputs) -> dict[str, Tensor]:
        """The arrays of a batch, on the CPU, in the order of :attr:`fields`.

        Raises:
            ModelError: answers that are not finite, or too large for float16.
        """
        logits, feature = outputs.logits.float(), outputs.feature.float()
        peak = logits.amax(1)
        found = {"peak": peak}
        if self.top_k is None:
            found["logits"] = logits - peak[:, None]
        else:
            values, classes = logits.topk(self.top_k, dim=1)
            others = (logits - peak[:, None]).scatter(1, classes, -torch.inf)
            rest = others.logsumexp(1) - math.log(self.num_classes - self.top_k)
            found |= {"logits": values - peak[:, None], "classes": classes, "rest": rest}
        if self.feature_dim:
            found["features"] = feature
        result = {}
        for name, (dtype, _) in self.fields.items():
            stored = found[name].to(dtype)
            if stored.is_floating_point() and not bool(torch.isfinite(stored).all()):
                finite = bool(torch.isfinite(found[name]).all())
                raise ModelError(
                    f"The teacher's {name} reach {float(found[name].abs().max()):.3g}, too large for float16. "
                    "Set bank.dtype to float32."
                    if finite
                    else f"The teacher's {name} are not finite numbers for some images; look at its weights."
                )
            result[name] = stored.cpu().contiguous()
        return result

    def decode(self, arrays: dict[str, Tensor]) -> Outputs:
        """The answers of a batch, float32, from its arrays on any device."""
        peak = arrays["peak"][:, None]
        logits = arrays["logits"].float()
        if self.top_k is not None:
            full = arrays["rest"][:, None].repeat(1, self.num_classes)
            logits = full.scatter_(1, arrays["classes"].long(), logits)
        feature = arrays["features"].float() if self.feature_dim else peak.new_zeros(len(peak), 0)
        return Outputs(logits + peak, feature)
