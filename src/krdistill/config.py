"""The configuration of a run: typed, strict, layered (preset, file, command line), and written down resolved.

Layers are merged in order and a later one wins. In every layer a section ``train`` stands for both
``teacher.train`` and ``student.train``; a value given for one of them in the same layer wins over it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .errors import ConfigError, unknown_name

GroupRule = Literal["shot", "thirds"] | tuple[int, int] | dict[str, tuple[str, ...]]

_LONGEST_YAML, _MOST_VALUES = 2**20, 100_000
_PLAIN_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "map", "seq", "merge")
)


Classification = Literal[
    "cross-entropy",
    "balanced-softmax",
    "logit-adjusted",
    "focal",
    "class-balanced",
    "class-balanced-focal",
    "label-aware-smoothing",
    "ldam",
    "ldam-drw",
    "dot-regression",
]
Head = Literal["linear", "cosine", "etf"]
SecondStage = Literal["none", "balanced-softmax", "crt", "tau-norm", "lws", "ncm"]
HEAD_OF: dict[str, Head] = {"ldam": "cosine", "ldam-drw": "cosine", "dot-regression": "etf"}
SMOOTHABLE = ("cross-entropy", "balanced-softmax", "logit-adjusted", "class-balanced")


class Section(BaseModel):
    """Base of every section: unknown keys are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which images, sentences or rows of numbers, and how they are cut.

    Attributes:
        source: ``digits``, ``cifar10``, ``cifar100``, ``tiny-imagenet``, or a path: a folder ``class/image``, a
            manifest (``.csv``, ``.tsv``, ``.parquet``), lists ``path label``, a NumPy archive (``.npz``), or a data
            set that the Hugging Face library saved (``docs/howto-data.md``). Sentences: ``banking77``, ``trec``,
            ``hwu64``, ``clinc150``, ``clinc150-imbalanced``, or a table with the columns ``text`` and ``label``; rows
            of numbers: ``digits-features``, a table, or an archive (``docs/howto-text.md``).
        root: folder that holds data sets; by default ``$KRDISTILL_DATA``, else ``~/.cache/krdistill/data``. For a
            manifest or lists: what their relative paths start from, by default their own folder.
        profile: shape of the long-tailed cut; ``none`` keeps the data as they are.
        imbalance_factor: largest over smallest class of the cut, at least 1 (0.01 in some papers is 100 here).
        n_max: images of the largest class of the cut; by default all there are.
        cut_seed: seed of the cut and of the validation part, so that runs of every seed see the same images.
        val_fraction: share of the training images put aside for validation, stratified.
        split_by: what the test and validation parts that are put aside do not separate: ``none``, the images of one
            ``group`` (a manifest's column: the patient, the camera), or near-``duplicates``.
        image_size: side in pixels that images are resized to.
        on_unreadable: ``skip`` leaves unreadable images out; by default they are an error.
        empty: ``drop`` leaves classes without a training image out; by default they are an error.
        cache: whether a folder's images are decoded once into a memory-mapped file under ``$KRDISTILL_CACHE`` (by
            default ``~/.cache/krdistill/images``): ``always``, ``never``, or ``auto``, above 1 GiB of pixels.
        groups: ``shot`` (many > 100, medium 20-100, few < 20 training images), ``thirds``, ``[high, low]``, or the
            groups by name, each with its classes' names.
    """

    source: str = "digits"
    root: str | None = None
    profile: Literal["none", "exp", "step", "pareto"] = "none"
    imbalance_factor: float = 1.0
    n_max: int | None = Field(default=None, ge=1)
    cut_seed: int = Field(default=0, ge=0)
    val_fraction: float = Field(default=0.0, ge=0.0, lt=1.0)
    split_by: Literal["none", "group", "duplicates"] = "none"
    image_size: int | None = Field(default=None, ge=8)
    on_unreadable: Literal["error", "skip"] = "error"
    empty: Literal["error", "drop"] = "error"
    cache: Literal["auto", "always", "never"] = "auto"
    groups: GroupRule = "shot"

    @field_validator("imbalance_factor")
    @classmethod
    def _convention(cls, value: float) -> float:
        if value < 1:
            raise ValueError(
                f"expected at least 1, got {value:g}. The imbalance factor is the largest class over the smallest; "
                f"where a paper writes {value:g}, write {1 / value:g}"
                if value > 0
                else f"expected at least 1, got {value:g}. It is the largest class over the smallest"
            )
        return value

    @model_validator(mode="after")
    def _cut(self) -> DataConfig:
        if self.profile == "none" and self.imbalance_factor != 1:
            raise ValueError(
                f"imbalance_factor is {self.imbalance_factor:g} but profile is 'none', so nothing would be cut; "
                "set profile to exp, step or pareto, or leave imbalance_factor out"
            )
        return self


class TrainConfig(Section):
    """How a network is trained.

    Attributes:
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        optimizer: ``sgd`` (with momentum) or ``adamw``.
        lr: learning rate after warm-up.
        momentum: SGD's momentum, AdamW's first beta.
        nesterov: Nesterov momentum (SGD).
        weight_decay: L2 penalty (SGD) or decoupled decay (AdamW).
        schedule: ``cosine`` to zero, or ``steps``.
        warmup: linear warm-up, as a fraction of the run.
        milestones: where ``steps`` decays, as fractions of the run.
        decay: factor at each milestone.
        label_smoothing: of the classification loss.
        augmentation: name of the augmentation (``krdistill list augmentations``).
        sampler: how an epoch's images are drawn: every image once (``instance``), every class alike
            (``class-balanced``), by the ``square-root`` of the class sizes, from the first to the second in the course
            of the run (``progressively-balanced``), or as the ``recipe`` says. Losses that hold the class prior
            (balanced softmax, logit adjustment) hold that of the draws.
        mixup: alpha of mixup's Beta distribution; 0 is off.
        ema: decay of the weights' exponential moving average, which is then what is evaluated and kept; 0 is off.
        evaluate_every: epochs between evaluations during training; the last epoch is always evaluated.
        precision: of the networks' arithmetic in training: ``float32``, ``bfloat16`` (autocast; losses, weights and
            statistics stay float32), or ``auto``: bfloat16 on CUDA cards that have it, else float32.
        compile: ``default`` or ``reduce-overhead`` (CUDA graphs) has torch.compile translate the networks; ``none``
            runs them as they are; ``auto`` is ``default`` where it was measured faster and pays for its time: ResNets
            of ours in trainings of at least 20,000 steps, on one Linux process's CPU, with a C++ compiler; else
            ``none``.
        on_nonfinite: what a step does whose loss or gradient is not finite: ``stop`` ends the training and says why;
            ``skip`` leaves the step out, counts it, and stops beyond a hundredth of all steps (or three).
    """

    epochs: int = Field(default=30, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(default=0.05, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(default=5e-4, ge=0)
    schedule: Literal["cosine", "steps"] = "cosine"
    warmup: float = Field(default=0.02, ge=0, lt=1)
    milestones: tuple[float, ...] = (0.625, 0.75, 0.875)
    decay: float = Field(default=0.1, gt=0, le=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    augmentation: str = "crop-flip"
    sampler: Literal["recipe", "instance", "class-balanced", "square-root", "progressively-balanced"] = "recipe"
    mixup: float = Field(default=0.0, ge=0)
    ema: float = Field(default=0.0, ge=0, lt=1)
    evaluate_every: int = Field(default=5, ge=1)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    compile: Literal["auto", "none", "default", "reduce-overhead"] = "auto"
    on_nonfinite: Literal["stop", "skip"] = "stop"

    @field_validator("milestones")
    @classmethod
    def _fractions(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(not 0 < m < 1 for m in value) or list(value) != sorted(set(value)):
            raise ValueError(f"expected rising fractions of the run between 0 and 1, got {list(value)}")
        return value


def _fits(classification: str, head: str, train: TrainConfig) -> None:
    """A classification loss may ask for a head of its own, and may not know label smoothing."""
    wanted = HEAD_OF.get(classification, head)
    if wanted != head:
        raise ValueError(f"classification {classification!r} needs head {wanted!r}, got {head!r}; set head: {wanted}")
    if head == "etf" and classification != "dot-regression":
        raise ValueError(f"head 'etf' is trained by classification 'dot-regression', got {classification!r}")
    if train.label_smoothing > 0 and classification not in SMOOTHABLE:
        raise ValueError(f"label_smoothing is {train.label_smoothing:g}, but {classification!r} has none; set it to 0")


class TeacherConfig(Section):
    """The teacher.

    Attributes:
        model: name of a network: krdistill's own (``krdistill list models``), ``timm:NAME``, ``torchvision:NAME``,
            ``hf:NAME-or-folder`` (of sentences too), ``module:package.path:factory`` (of every kind), or
            ``embedding:NAME-or-folder`` (of sentences, frozen).
        weights: what its training starts from: ``none`` (fresh ones), ``pretrained`` (its library's), or a file.
        tap: name of its classifier layer (in a ``file``: of the tensor that is the feature), where not found by itself.
        run: an earlier run folder to take the teacher from, instead of training one; of several, an ensemble is made.
        file: a trained network to take, as ``.onnx`` or ``.pt2`` (``torch.export.save``), instead of training one.
        answers: a file of stored answers (``.npz`` or ``.safetensors``) to take the place of a teacher that cannot be
            asked; see :func:`krdistill.bank.load_answers`.
        classification: the loss a new teacher is trained with.
        head: its last layer: ``linear``, ``cosine`` (for ldam) or ``etf`` (for dot-regression).
        second_stage: how its last layer is balanced after training, on its own frozen features: fitted anew with
            ``balanced-softmax`` or class-balanced draws (``crt``), scaled (``lws``, ``tau-norm``), or ``ncm``.
        train: how a new teacher is trained.
    """

    model: str = "resnet20"
    weights: str = "none"
    tap: str | None = Field(default=None, coerce_numbers_to_str=True)
    run: str | tuple[str, ...] | None = None
    file: str | None = None
    answers: str | None = None
    classification: Classification = "cross-entropy"
    head: Head = "linear"
    second_stage: SecondStage = "none"
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _head(self) -> TeacherConfig:
        given = [name for name in ("run", "file", "answers") if getattr(self, name)]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} both say where the teacher comes from; give one of them")
        idle = ["weights"] if self.weights != "none" else []
        idle += ["tap"] if self.tap is not None and not self.file else []
        if given and idle:
            raise ValueError(f"{' and '.join(idle)} would have no effect, as {given[0]} says where the teacher is")
        _fits(self.classification, self.head, self.train)
        return self


class StudentConfig(Section):
    """The student.

    Attributes:
        model: name of a network, as for the teacher.
        weights: what its training starts from, as for the teacher.
        tap: name of its classifier layer, where it is not found by itself.
        head: its last layer, as for the teacher.
        second_stage: how its last layer is balanced after training.
        train: how it is trained, every baseline alike.
    """

    model: str = "resnet8"
    weights: str = "none"
    tap: str | None = Field(default=None, coerce_numbers_to_str=True)
    head: Head = "linear"
    second_stage: SecondStage = "none"
    train: TrainConfig = TrainConfig()


def check_student(student: StudentConfig, recipe: str, classification: str) -> None:
    """Refuses a recipe whose classification loss does not fit the student's head or label smoothing."""
    try:
        _fits(classification, student.head, student.train)
    except ValueError as error:
        raise ConfigError(f"recipe {recipe}: {error} (student.head, student.train).") from None


class RecipeConfig(BaseModel):
    """A recipe by name, with options of its own (``krdistill list recipes``).

    Attributes:
        name: the recipe.
        label: the name to show and to store it under; by default the recipe's.
    """

    model_config = ConfigDict(extra="allow", frozen=True, ser_json_inf_nan="constants")

    name: str = "krdistill"
    label: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")

    @property
    def key(self) -> str:
        return self.label or self.name

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class BankConfig(Section):
    """The view bank: the teacher's answers, stored (``docs/howto-bank.md``).

    Attributes:
        views: views of every image that the teacher answers once; epoch e of a student then shows view e modulo
            ``views``. 0 asks the teacher in every step. ``auto`` stores them where that saves work.
        folder: where banks are kept, to be shared by several runs (``auto`` then always stores them); by default in the
            run folder.
        dtype: of the stored numbers.
        top_k: logits kept of each answer; by default all.
        features: store the teacher's features beside its logits; recipes that match features need them.
    """

    views: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    folder: str | None = None
    dtype: Literal["float16", "float32"] = "float16"
    top_k: int | None = Field(default=None, ge=1)
    features: bool = True


class ExportConfig(Section):
    """What is written for the device: ``onnx`` false leaves it out."""

    onnx: bool = True


class RunConfig(Section):
    """One run: data, teacher, student, recipe, baselines.

    Attributes:
        name: name of the run; its folder is ``runs/<name>`` unless ``--out`` says otherwise.
        seed: the one seed of everything random but the long-tailed cut.
        device: ``auto`` (CUDA where there is one, else CPU), ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.
        data: which images.
        teacher: which teacher.
        student: which student.
        recipe: how the student is taught.
        baselines: recipes trained beside it, for comparison, with the same student and schedule.
        bank: whether the teacher's answers are stored.
        export: what is written for the device.
    """

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$")
    seed: int = Field(default=0, ge=0, lt=2**63)
    device: str = Field(default="auto", pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")
    data: DataConfig = DataConfig()
    teacher: TeacherConfig = TeacherConfig()
    student: StudentConfig = StudentConfig()
    recipe: RecipeConfig = RecipeConfig()
    baselines: tuple[RecipeConfig, ...] = ()
    bank: BankConfig = BankConfig()
    export: ExportConfig = ExportConfig()

    @field_validator("recipe", mode="before")
    @classmethod
    def _recipe_by_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("baselines", mode="before")
    @classmethod
    def _baselines_by_name(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, Sequence):
            return [{"name": v} if isinstance(v, str) else v for v in value]
        return value

    @model_validator(mode="after")
    def _distinct(self) -> RunConfig:
        keys = [r.key for r in self.baselines]
        twice = sorted({k for k in keys if keys.count(k) > 1})
        if twice:
            raise ValueError(f"baselines: {', '.join(twice)} stands twice; give each a label of its own")
        return self

    def as_dict(self) -> dict[str, Any]:
        """Plain data, every default written out."""
        return self.model_dump(mode="json")


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Reads a run's configuration.

    Args:
        source: a preset's name, the path of a YAML file (which may itself name a preset as ``preset: NAME``), or a
            mapping.
        overrides: pairs ``("section.key", "value")`` from the command line; values are read as YAML.

    Raises:
        ConfigError: an unknown preset, a file that is no YAML mapping, an unknown key (the message names the nearest
            one) or a value out of range.
    """
    if isinstance(source, Mapping):
        layers = [dict(source)]
    else:
        layers = [_read_source(str(source))]
    if "preset" in layers[0]:
        preset = layers[0].pop("preset")
        layers.insert(0, _read_preset(str(preset)))
    layers += [_override_layer(key, value) for key, value in overrides]
    merged: dict[str, Any] = {}
    for layer in layers:
        _merge(merged, _spread_train(_recipe_names(layer)))
    return validate(RunConfig, merged)


def validate(section: type[Any], values: Mapping[str, Any], *, where: str = "") -> Any:
    """Builds a section from plain data, and turns what pydantic says into one readable :class:`ConfigError`."""
    try:
        return section.model_validate(values)
    except ValidationError as error:
        lines = [_explain(section, item, where) for item in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from None


def list_presets() -> dict[str, str]:
    """Preset names, each with the first comment line of its file."""
    found = {}
    for entry in sorted(resources.files(__package__).joinpath("presets").iterdir(), key=lambda e: e.name):
        if entry.name.endswith(".yaml"):
            first = entry.read_text(encoding="utf-8").splitlines()[0]
            found[entry.name.removesuffix(".yaml")] = first.lstrip("# ").strip()
    return found


def dump_config(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True)


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Lines ``key: old -> new`` for every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        lines = []
        for key in [*old, *(k for k in new if k not in old)]:
            lines += difference(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return lines
    return [] if old == new else [f"{path}: {old!r} -> {new!r}"]


def _read_source(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.suffix in {".yaml", ".yml"} or "/" in source:
        if not path.is_file():
            raise ConfigError(f"No configuration file {source!r}. Presets, by name: {', '.join(list_presets())}.")
        return _parse(read_text(path), source)
    return _read_preset(source)


def _read_preset(name: str) -> dict[str, Any]:
    presets = list_presets()
    if name not in presets:
        raise ConfigError(
            unknown_name("preset", name, presets, hint="A configuration file is given by a path ending in .yaml.")
        )
    text = resources.files(__package__).joinpath("presets").joinpath(f"{name}.yaml").read_text(encoding="utf-8")
    return _parse(text, f"preset {name}")


def read_text(path: Path) -> str:
    """A text file's content.

    Raises:
        ConfigError: it cannot be read, or is no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from None


def parse_yaml(text: str, where: str, loader: Any = yaml.SafeLoader) -> Any:
    """Plain data (texts, numbers, lists, mappings) from YAML that a stranger may have written.

    A tag that asks for anything else is refused, before anything is made; so are more than 1 MiB, and aliases
    (``*name``) that stand for themselves or, in all, for more than 100,000 values: a few lines of these would fill any
    memory.

    Args:
        text: the YAML.
        where: what it is, for messages.
        loader: PyYAML's, safe.

    Raises:
        ConfigError: all of that, or no YAML.
    """
    if len(text) > _LONGEST_YAML:
        raise ConfigError(f"{where} has {len(text):,} characters; expected at most {_LONGEST_YAML:,}.")
    try:
        parser = loader(text)
        try:
            node = parser.get_single_node()
            if node is None:
                return None
            if _values(node, {}) > _MOST_VALUES:
                raise ConfigError(f"{where}: its aliases stand for more than {_MOST_VALUES:,} values. Write them out.")
            return parser.construct_document(node)
        finally:
            parser.dispose()
    except ConfigError:
        raise
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply.") from None
    except Exception as error:  # PyYAML's constructors raise nearly anything, as for the date 2001-99-99
        raise ConfigError(f"{where} is not valid YAML: {error}") from None


def _values(node: Any, known: dict[int, int]) -> int:
    """How many values a node stands for, with what its aliases stand for; refuses what is no plain data."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError(f"an alias stands for what it is in{node.start_mark}")
        return known[id(node)]
    if node.tag not in _PLAIN_TAGS:
        raise yaml.YAMLError(
            f"expected texts, numbers, lists and sections, got the tag {node.tag}{node.start_mark}; "
            "a date stands in quotation marks"
        )
    known[id(node)] = 0
    inner = node.value if isinstance(node.value, list) else []
    parts = [part for entry in inner for part in (entry if isinstance(entry, tuple) else (entry,))]
    known[id(node)] = 1 + sum(_values(part, known) for part in parts)
    return known[id(node)]


def _parse(text: str, where: str) -> dict[str, Any]:
    values = parse_yaml(text, where)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected sections such as 'data:' and 'teacher:', got {type(values).__name__}.")
    return values


def _override_layer(key: str, value: str) -> dict[str, Any]:
    parts = key.split(".")
    if not all(parts):
        raise ConfigError(f"--{key}: expected a key such as --student.train.epochs.")
    try:
        parsed = parse_yaml(value, f"--{key}")
    except ConfigError:
        parsed = value
    layer: Any = parsed
    for part in reversed(parts):
        layer = {part.replace("-", "_"): layer}
    return layer


def _recipe_names(layer: dict[str, Any]) -> dict[str, Any]:
    """``recipe: kd`` is short for ``recipe: {name: kd}``, so that layers merge."""
    if isinstance(layer.get("recipe"), str):
        layer = {**layer, "recipe": {"name": layer["recipe"]}}
    return layer


def _spread_train(layer: dict[str, Any]) -> dict[str, Any]:
    layer = copy.deepcopy(layer)
    shared = layer.pop("train", None)
    if shared is None:
        return layer
    if not isinstance(shared, dict):
        raise ConfigError(f"train: expected keys such as epochs and lr, got {shared!r}.")
    for who in ("teacher", "student"):
        section = layer.setdefault(who, {})
        if isinstance(section, dict):
            own = section.get("train")
            section["train"] = {**copy.deepcopy(shared), **(own if isinstance(own, dict) else {})}
    return layer


def _merge(base: dict[str, Any], layer: Mapping[str, Any]) -> None:
    for key, value in layer.items():
        new_recipe = key == "recipe" and isinstance(value, Mapping) and "name" in value
        held = base.get(key)
        if new_recipe and isinstance(held, dict) and held.get("name") not in (None, value["name"]):
            base[key] = dict(value)  # another recipe: the former one's options do not carry over
        elif isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = copy.deepcopy(value)


def _explain(section: type[BaseModel], item: Any, where: str) -> str:
    path = [str(p) for p in item["loc"] if not (isinstance(p, str) and ("[" in p or p in {"int", "float", "str"}))]
    if item["type"] == "extra_forbidden":  # the key itself may look like what pydantic puts in between
        path = [*path[: len(path) - (path[-1:] == [str(item["loc"][-1])])], str(item["loc"][-1])]
    name = ".".join([where, *path] if where else path)
    if item["type"] == "extra_forbidden":
        known = _keys(section, path[:-1])
        text = unknown_name("key", path[-1], known)
        return f"{name}: {text}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{name}: {message}." if name else f"{message}."
    got = item.get("input")
    shown = "" if isinstance(got, (dict, BaseModel)) else f", got {got!r}"
    return f"{name}: {message[0].lower()}{message[1:]}{shown}."


def _keys(section: type[BaseModel], path: Sequence[str]) -> list[str]:
    current: Any = section
    for part in path:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
    if isinstance(current, type) and issubclass(current, BaseModel):
        keys = list(current.model_fields)
        return [*keys, "train"] if current is RunConfig else keys
    return []
