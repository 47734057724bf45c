"""What a recipe is: a frozen record of a named method, its typed options, and what builds its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..config import Classification, Section, validate

if TYPE_CHECKING:
    from ..objective import Objective, ObjectiveContext
    from ..sampling import Sampling


class Options(Section):
    """Options that every recipe has.

    Attributes:
        classification: the student's own loss on the labels. ``balanced-softmax`` adds the log prior to the logits
            while training, so that the plain logits are a balanced classifier at test time. ``ldam``, ``ldam-drw`` and
            ``dot-regression`` need another head (``--student.head``).
        classification_weight: its weight.
    """

    classification: Classification = "cross-entropy"
    classification_weight: float = Field(default=1.0, ge=0)

    @property
    def uses_features(self) -> bool | None:
        """Whether networks must show their features; None: as the recipe says."""
        return None


@dataclass(frozen=True)
class Source:
    """Where a method comes from."""

    title: str
    year: int
    arxiv: str = ""


@dataclass(frozen=True)
class Recipe:
    """A named method.

    Attributes:
        name: as given to ``--recipe``.
        summary: one line.
        source: the paper.
        needs: what it takes besides images and labels: ``teacher``, ``counts``, ``features``, ``maps``, ``memory``.
        options: the class of its options.
        defaults: where its defaults differ from the class's.
        sampler: how its training images are drawn (:mod:`krdistill.sampling`) unless ``train.sampler`` says otherwise.
        defaults_from: where the defaults come from.
        build: options and context to an objective.
        reuses_classifier: whether a projector and the teacher's frozen classifier take the place of the student's head
            (its options then hold the projector's ``factor``).
    """

    name: str
    summary: str
    source: Source
    needs: frozenset[str]
    options: type[Options]
    defaults_from: str
    build: Callable[[Any, ObjectiveContext], Objective]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sampler: Sampling = "instance"
    reuses_classifier: bool = False

    def needs_with(self, options: Options) -> frozenset[str]:
        """:attr:`needs` with these options: of some recipes it is they that say whether features are used."""
        uses = options.uses_features
        return self.needs if uses is None else self.needs - {"features"} | ({"features"} if uses else set())

    def drawn(self, sampler: Sampling | Literal["recipe"]) -> Sampling:
        """How images are drawn where the configuration says ``sampler``."""
        return self.sampler if sampler == "recipe" else sampler

    def resolve(self, options: Mapping[str, Any]) -> Options:
        """The recipe's options with the user's values over its defaults; unknown ones are refused."""
        resolved: Options = validate(self.options, {**self.defaults, **options}, where=f"recipe {self.name}")
        return resolved


TEACHER = frozenset({"teacher"})
COUNTS = frozenset({"teacher", "counts"})
FEATURES = frozenset({"teacher", "counts", "features"})
