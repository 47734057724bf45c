"""The study file, and the cells it stands for: data x pairs x teachers x methods x seeds, each a run of its own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, StrictInt, field_validator, model_validator

from ..config import RecipeConfig, RunConfig, Section, load_config, parse_yaml, read_text, validate
from ..errors import ConfigError, KrdistillError, unknown_name
from ..pipeline import check_names
from ..recipes import resolve_recipe

LABEL = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
AXES = ("data", "pairs", "teachers")
SETTABLE = ("data", "teacher", "student", "train", "bank", "device")
_OWN_TEACHERS = "a study trains its teachers itself, one for each seed"
_ELSEWHERE = {
    "recipe": "methods",
    "baselines": "methods",
    "seed": "seeds",
    "name": "name",
    "export": "no key: cells export nothing",
}

Overrides = dict[str, Any]


class MethodConfig(RecipeConfig):
    """A recipe with its options and its label, as among a run's baselines.

    Attributes:
        set: overrides for this method's cells alone; no ``data`` among them.
    """

    set: Overrides = Field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class StudyConfig(Section):
    """A study file.

    Attributes:
        name: of the study; its folder is ``studies/<name>`` unless ``--out`` says otherwise.
        base: a preset, or a configuration file (seen from the study file).
        set: overrides for every cell, dotted keys.
        seeds: each method is run once with each.
        baseline: label of the method that the paired differences are taken against; the first one by default.
        methods: recipes by name, or with options.
        data: label to overrides.
        pairs: label to overrides of teacher and student.
        teachers: label to overrides of the teacher.
        jobs: processes at once.
        threads: per process; by default the machine's processors over ``jobs``.
    """

    name: str = Field(pattern=LABEL)
    base: str
    set: Overrides = Field(default_factory=dict)
    seeds: tuple[StrictInt, ...]
    baseline: str | None = None
    methods: tuple[MethodConfig, ...]
    data: dict[str, Overrides] = Field(default_factory=dict)
    pairs: dict[str, Overrides] = Field(default_factory=dict)
    teachers: dict[str, Overrides] = Field(default_factory=dict)
    jobs: StrictInt = Field(default=1, ge=1)
    threads: StrictInt | None = Field(default=None, ge=1)

    @field_validator("methods", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [{"name": v} if isinstance(v, str) else v for v in value]
        return value

    @field_validator("data", "pairs", "teachers", mode="before")
    @classmethod
    def _axis(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        for label in value:
            if not isinstance(label, str) or not re.match(LABEL, label):
                raise ValueError(f"expected labels of letters, digits and _.+- such as if100, got {label!r}")
        return {label: {} if overrides is None else overrides for label, overrides in value.items()}

    @model_validator(mode="after")
    def _whole(self) -> StudyConfig:
        if not self.seeds:
            raise ValueError("seeds: expected at least one, as [0, 1, 2], got none")
        if any(s < 0 for s in self.seeds):
            raise ValueError(f"seeds: expected numbers of at least 0, got {min(self.seeds)}")
        labels = [m.key for m in self.methods]
        if not labels:
            raise ValueError("methods: expected at least one recipe, got none")
        for what, values in (("seeds", [str(s) for s in self.seeds]), ("methods", labels)):
            twice = list(dict.fromkeys(v for v in values if values.count(v) > 1))
            if twice:
                hint = "; give each a label of its own" if what == "methods" else ""
                raise ValueError(f"{what}: {', '.join(twice)} stands twice{hint}")
        if self.baseline is not None and self.baseline not in labels:
            raise ValueError(f"baseline: {unknown_name('method', self.baseline, labels)}")
        return self

    @property
    def reference(self) -> str:
        """Label of the method that differences are taken against."""
        return self.baseline or self.methods[0].key

    @property
    def threads_each(self) -> int:
        return self.threads or max(1, (os.cpu_count() or 1) // self.jobs)


@dataclass(frozen=True)
class Item:
    """A piece of work: a run folder.

    Attributes:
        key: its folder, seen from the study's: ``teachers/...`` or ``cells/...``, ending in a hash of ``identity``.
        kind: what it trains.
        config: the run. A cell's ``teacher.run`` is set where it is run, as it depends on where the study stands.
        identity: what its numbers depend on, as plain data.
        waits_for: key of the teacher a cell needs.
    """

    key: str
    kind: Literal["teacher", "cell"]
    config: RunConfig
    identity: Mapping[str, Any]
    waits_for: str | None = None


@dataclass(frozen=True)
class Cell:
    """A method with a seed in a place of the axes; an axis that the study does not have is the empty label.

    Attributes:
        item: key of its work. Two cells share one where the numbers must be the same: a method that asks no teacher
            is run once for all teachers.
        teacher_item: key of the teacher of this place and seed.
    """

    data: str
    pair: str
    teacher: str
    method: str
    seed: int
    item: str
    teacher_item: str

    @property
    def place(self) -> tuple[str, str, str]:
        return (self.data, self.pair, self.teacher)

    @property
    def title(self) -> str:
        """What a person calls it."""
        return f"{', '.join(v for v in (*self.place, self.method) if v)}, seed {self.seed}"

    @property
    def id(self) -> str:
        """What it is called in files."""
        return "/".join(v or "-" for v in (*self.place, self.method, str(self.seed)))


@dataclass(frozen=True)
class StudyPlan:
    """A study's cells and their work, every configuration resolved and checked; a teacher stands before its cells."""

    study: StudyConfig
    items: Mapping[str, Item]
    cells: tuple[Cell, ...]

    @property
    def places(self) -> list[tuple[str, str, str]]:
        return list(dict.fromkeys(c.place for c in self.cells))


def read_study(path: Path, *, jobs: int | None = None, threads: int | None = None) -> StudyConfig:
    """Reads a study file.

    Args:
        path: a YAML file.
        jobs: instead of the file's.
        threads: instead of the file's.

    Raises:
        ConfigError: no such file, no YAML mapping, a key twice, unknown or missing, or a value out of range.
    """
    if not path.is_file():
        raise ConfigError(f"No study file {str(path)!r}.")
    values = parse_yaml(read_text(path), str(path), _Loader)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected keys such as 'base:' and 'methods:', got {type(values).__name__}.")
    given = {k: v for k, v in (("jobs", jobs), ("threads", threads)) if v is not None}
    study: StudyConfig = validate(StudyConfig, {**values, **given})
    if _is_path(study.base) and not Path(study.base).is_absolute():
        study = study.model_copy(update={"base": str(path.parent / study.base)})
    return study


def plan_study(study: StudyConfig) -> StudyPlan:
    """Resolves every cell of a study and checks it; loads no data and trains nothing.

    Raises:
        ConfigError: a name, a key or a value is wrong; the message says where it stands.
        ModelError: no such network.
    """
    _check_overrides("set", study.set)
    for axis in AXES:
        for label, overrides in getattr(study, axis).items():
            _check_overrides(f"{axis}.{label}", overrides)
    for method in study.methods:
        _check_overrides(f"methods.{method.key}.set", method.set)
        cut = [k for k, _ in _flat(method.set) if k.split(".")[0] == "data"]
        if cut:
            raise ConfigError(
                f"methods.{method.key}.set: {cut[0]}: every method sees the same data; set it under data."
            )
        resolve_recipe(method)
    items: dict[str, Item] = {}
    cells = []
    axes = [list(getattr(study, axis).items()) or [("", {})] for axis in AXES]
    for places in itertools.product(*axes):
        labels = [label for label, _ in places]
        for method in study.methods:
            layers = [study.set, *(overrides for _, overrides in places), method.set]
            where = ", ".join([*(label for label in labels if label), method.key])
            base = _resolve(study.base, layers, where)
            for seed in study.seeds:
                teacher, cell = _items(base, method, seed)
                try:
                    if cell.key not in items:
                        check_names(cell.config)
                    if teacher.key not in items:
                        check_names(teacher.config)
                except KrdistillError as error:
                    raise type(error)(f"{where}: {error}") from None
                items.setdefault(teacher.key, teacher)
                items.setdefault(cell.key, cell)
                cells.append(Cell(labels[0], labels[1], labels[2], method.key, seed, cell.key, teacher.key))
    _check_places(cells)
    return StudyPlan(study, items, tuple(cells))


# Resolving ------------------------------------------------------------------------------------------------------------


def _resolve(base: str, layers: Sequence[Overrides], where: str) -> RunConfig:
    """The run that a base and layers of overrides stand for."""
    flat = []
    for layer in layers:  # within one layer, what is said of one network wins over what is said of both
        flat += sorted(_flat(layer), key=lambda pair: not pair[0].startswith("train"))
    try:
        config = load_config(base, [(key, yaml.safe_dump(value)) for key, value in flat])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    for key, given in (("teacher.run", config.teacher.run), ("teacher.answers", config.teacher.answers)):
        if given:
            raise ConfigError(f"{base}: {key} is set, but {_OWN_TEACHERS}; leave it out.")
    return config


def _items(base: RunConfig, method: MethodConfig, seed: int) -> tuple[Item, Item]:
    """A cell's work and its teacher's. Labels, the study's name and where it stands are no part of an identity."""
    values = base.as_dict()
    # The seed, the data and the teacher make a teacher; as a run it needs some student too, which nobody trains.
    shared = {"seed": seed, "device": base.device, "data": values["data"], "teacher": values["teacher"]}
    slug = re.sub(r"[^A-Za-z0-9_.+-]", "-", base.teacher.model)
    teacher_config: RunConfig = validate(
        RunConfig,
        {
            **shared, "name": f"teacher-{slug}"[:80], "export": {"onnx": False}, "recipe": {"name": "none"},
            "student": {
                "model": base.teacher.model,
                "tap": None if base.teacher.file else base.teacher.tap,
                "train": {"augmentation": base.teacher.train.augmentation},  # the default is for images alone
            },
        },
    )  # fmt: skip
    teacher = Item(f"teachers/{slug}-seed{seed}-{_hash(shared)}", "teacher", teacher_config, shared)

    recipe, options = resolve_recipe(method)
    asks = bool(recipe.needs & {"teacher", "experts"})
    identity = {
        **{k: v for k, v in shared.items() if asks or k != "teacher"},
        **({"bank": {k: v for k, v in values["bank"].items() if k != "folder"}} if asks else {}),
        "student": values["student"],
        "recipe": {"name": recipe.name, **options.model_dump(mode="json")},
        **({"sampler": recipe.sampler} if recipe.sampler != "instance" else {}),  # a recipe's own draws
    }
    config: RunConfig = validate(
        RunConfig,
        {
            **values, "seed": seed, "name": method.key, "baselines": [], "export": {"onnx": False},
            "recipe": {"name": method.name, "label": method.label, **method.options},
        },
    )  # fmt: skip
    return teacher, Item(f"cells/{recipe.name}-seed{seed}-{_hash(identity)}", "cell", config, identity, teacher.key)


def _hash(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]


def _check_places(cells: Sequence[Cell]) -> None:
    """Two labels of an axis that stand for the same runs are a slip of the pen."""
    held: dict[tuple[str, ...], tuple[str, str, str]] = {}
    by_place: dict[tuple[str, str, str], list[str]] = {}
    for cell in cells:
        by_place.setdefault(cell.place, []).extend((cell.item, cell.teacher_item))
    for place, keys in by_place.items():
        other = held.setdefault(tuple(keys), place)
        if other != place:
            names = [", ".join(v for v in p if v) for p in (other, place)]
            raise ConfigError(f"{names[0]!r} and {names[1]!r} stand for the same runs; take one of them out.")


def _flat(overrides: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """``{a: {b: 1}}`` and ``{a.b: 1}`` are both ``("a.b", 1)``."""
    for key, value in overrides.items():
        name = f"{path}.{key}" if path else str(key)
        if isinstance(value, Mapping):
            yield from _flat(value, name)
        else:
            yield name, value


def _check_overrides(where: str, overrides: Mapping[str, Any]) -> None:
    for key, _ in _flat(overrides):
        parts = key.split(".")
        if parts[0] in _ELSEWHERE:
            raise ConfigError(f"{where}: {key} is not set here; the study file says it under {_ELSEWHERE[parts[0]]}.")
        if key in ("teacher.run", "teacher.answers"):
            raise ConfigError(f"{where}: {key} is not set here: {_OWN_TEACHERS}.")
        section: Any = RunConfig
        for i, part in enumerate(parts):
            if i == 0 and part == "train":
                section = RunConfig.model_fields["student"].annotation
            known = list(SETTABLE) if i == 0 else list(section.model_fields)
            if part not in known:
                raise ConfigError(f"{where}: {key}: {unknown_name('key', part, known)}")
            section = section.model_fields[part].annotation
            is_section = isinstance(section, type) and issubclass(section, BaseModel)
            if is_section == (i == len(parts) - 1):
                wanted = (
                    f"a key below it, as {key}.{next(iter(section.model_fields))}" if is_section else "no key below"
                )
                raise ConfigError(f"{where}: {key}: expected {wanted if is_section else f'{wanted} {part!r}'}.")


def _is_path(base: str) -> bool:
    return Path(base).suffix in {".yaml", ".yml"} or "/" in base


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML would let the last one win."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the label or key {key!r} stands twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)
