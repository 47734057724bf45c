"""Trained classifiers that come as a file of operations (``.onnx``, ``.pt2``), to be asked as a teacher.

Nothing is unpickled, and no code that a file brings along is run: an ONNX file is run by ONNX Runtime, and of a
``torch.export`` archive the graph (JSON) and the raw weights are read here and its operators called one by one, where
torch's own reader would fall back to unpickling.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import MissingDependencyError, ModelError
from ..files import check_unpacked, replacing
from ..kinds import NOUNS, Kind

SUFFIXES = (".onnx", ".pt2")
_SHORTEST = 4  # bytes of a sentence that krdistill's own files take
CARD = "network.json"  # name of the extra file of a .pt2 that says what class names, mean, std, image_size are


@dataclass(frozen=True)
class Facts:
    """What a file says of its network; None where it does not.

    Attributes:
        card: class names, mean, std, image size: the keys of ``network.json``.
        batch: how many images it takes at once, None for any number.
        channels: of the images.
        image_size: (H, W) of the images.
        dtype: of the images; uint8 ones are raw, 0 to 255.
        feature: name of the tensor that is the feature.
        kind: what it takes: images ``(B, C, H, W)``; rows of numbers, floating point ``(B, D)``; or sentences, bytes
            uint8 ``(B, L)`` with zeros behind them.
        width: D of the rows, or L where the file takes one length alone.
    """

    card: Mapping[str, Any] = field(default_factory=dict)
    batch: int | None = None
    channels: int | None = None
    image_size: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    feature: str | None = None
    kind: Kind = "image"
    width: int | None = None

    @property
    def words(self) -> str:
        """What it takes, in words."""
        dims = (self.channels, *(self.image_size or (None, None))) if self.kind == "image" else (self.width,)
        names = {"image": "B C H W", "features": "B D", "text": "B L"}[self.kind].split()
        shown = ", ".join(str(v or n) for n, v in zip(names, (self.batch, *dims), strict=True))
        return f"{NOUNS[self.kind]}, {str(self.dtype).removeprefix('torch.')} ({shown})"


def _facts(path: Path, name: str, dims: Sequence[int | None], dtype: torch.dtype | None, **more: Any) -> Facts:
    """What the shape of a graph's only input says: the kind, and which sizes are fixed (None, 0: any)."""
    sizes = [d or None for d in dims]
    if dtype is not None and len(sizes) == 4:
        size = (sizes[2], sizes[3]) if sizes[2] and sizes[3] else None
        return Facts(batch=sizes[0], channels=sizes[1], image_size=size, dtype=dtype, **more)
    if dtype is not None and len(sizes) == 2:
        kind: Kind = "features" if dtype.is_floating_point else "text"
        if kind == "features" or dtype == torch.uint8:
            return Facts(batch=sizes[0], dtype=dtype, kind=kind, width=sizes[1], **more)
    was = "another type" if dtype is None else str(dtype).removeprefix("torch.")
    raise ModelError(
        f"{path}: expected images (B, C, H, W), rows of numbers float (B, D) or the bytes of sentences uint8 (B, L) as "
        f"input {name!r}, got {was} {sizes}. A network that takes token numbers is given as hf:FOLDER."
    )


class Graph(nn.Module):
    """A file of operations as a frozen backbone: images in, logits and feature out.

    Args:
        path: the file.
        facts: what it says of itself.
        run: images of its dtype, on any device, to logits and feature (None where there is none).
        parameter_count: numbers in it.
        tap: name of the tensor that was asked for as the feature.
        fallback: (C, H, W) of the images, or (D,) of the rows, where the file does not say.

    Raises:
        ModelError: it does not give logits ``(B, K)``.
    """

    def __init__(
        self,
        path: Path,
        facts: Facts,
        run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
        *,
        parameter_count: int,
        tap: str | None,
        fallback: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(facts.card, dict):
            raise ModelError(f"{path}: expected keys such as class_names in {CARD}, got {type(facts.card).__name__}.")
        self.path, self.facts, self.run, self.parameter_count, self.tap = path, facts, run, parameter_count, tap
        self.has_feature = facts.feature is not None
        # What tells this network from others, for those who look at a module's state to know it again.
        digest = hashlib.sha256(path.read_bytes() + str(facts.feature).encode()).digest()
        self.register_buffer("digest", torch.frombuffer(bytearray(digest), dtype=torch.uint8))
        blank, seen = self._blank(fallback or ())
        try:
            logits, feature = self.answer(blank)
        except ModelError:
            raise
        except Exception as error:  # whatever the runtime raises
            raise ModelError(
                f"{path} takes {facts.words}, and cannot answer {seen}: "
                f"{str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
            ) from None
        if logits.ndim != 2 or len(logits) != len(blank) or feature.ndim != 2:
            raise ModelError(
                f"{path}: expected logits (B, K) and a feature (B, D), got {tuple(logits.shape)} and "
                f"{tuple(feature.shape)} of {len(blank)} {NOUNS[facts.kind]}. Give a classifier of "
                f"{NOUNS[facts.kind]}."
            )
        self.num_classes, self.feature_dim = logits.shape[1], feature.shape[1]

    def _blank(self, fallback: Sequence[int]) -> tuple[Tensor, str]:
        """A batch to try it with, and what that is in words."""
        facts, B = self.facts, self.facts.batch or 2
        if facts.kind == "text":
            self.channels = 1
            return torch.full((B, facts.width or 8), 97, dtype=torch.uint8), "sentences as bytes"
        if facts.kind == "features":
            self.channels = facts.width or (fallback[0] if len(fallback) == 1 else 1)
            if len(fallback) == 1 and self.channels != fallback[0]:
                raise ModelError(
                    f"{self.path} takes {facts.words}; the data are rows of {fallback[0]} numbers, (B, {fallback[0]}). "
                    "Give a network for these columns, or the data with the columns it was trained on, in its order."
                )
            return torch.zeros(B, self.channels), f"rows of {self.channels} numbers, ({B}, {self.channels})"
        C, H, W = fallback if len(fallback) == 3 else (3, 32, 32)
        size = facts.image_size or (H, W)
        self.channels = facts.channels or C
        return (
            torch.zeros(B, self.channels, *size), f"images of {size[0]}x{size[1]} with {self.channels} channel(s)"
        )  # fmt: skip

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        return self  # it never changes, and a runtime's session cannot be copied

    @torch.compiler.disable
    def answer(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` and feature ``(B, D)`` of images ``(B, C, H, W)``; raw ones are given in [0, 1]. Or of rows
        of numbers, or of the bytes of sentences, which are filled up with zeros, or cut, to the file's own length."""
        if self.facts.kind == "text":
            length = self.facts.width or max(_SHORTEST, x.shape[1])
            x = nn.functional.pad(x[:, :length], (0, max(0, length - x.shape[1])))
        elif self.facts.dtype == torch.uint8:
            x = (x * 255).round().clamp(0, 255).to(torch.uint8)
        else:
            x = x.to(self.facts.dtype)
        size = self.facts.batch or len(x)
        parts = []
        for part in x.contiguous().split(size):
            short = size - len(part)
            padded = torch.cat((part, part.new_zeros(short, *part.shape[1:]))) if short else part
            logits, feature = self.run(padded)
            logits = logits.float()
            if feature is None:
                feature = logits
            elif feature.ndim > 2:  # a map (B, D, H, W): its mean over positions
                feature = feature.flatten(2).mean(2)
            parts.append((logits[: len(part)], feature.float()[: len(part)]))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    @property
    def architecture(self) -> dict[str, Any]:
        """Where it is found again beside a ``network.json``."""
        return {"name": self.path.name, "file": f"model{self.path.suffix}", "tap": self.tap}

    def copy_to(self, folder: Path) -> None:
        """Copies the file into a network's folder."""
        target = folder / f"model{self.path.suffix}"
        if not target.exists() or not target.samefile(self.path):
            data = self.path.read_bytes()
            with replacing(target) as part:
                part.write_bytes(data)


def load_graph(path: Path, *, tap: str | None = None, fallback: Sequence[int] | None = None) -> Graph:
    """Reads a trained classifier from an ``.onnx`` file or a ``.pt2`` file of ``torch.export.save``.

    Its output is the logits; where the graph ends in a softmax, what goes into it. The feature is the input of the
    linear operation that gives the logits (``Gemm`` or ``MatMul``, ``linear`` or ``addmm``).

    Args:
        path: the file. Class names, mean, std and image size are taken from an ONNX file's metadata (JSON values under
            ``class_names``, ...), and from the extra file ``network.json`` of a ``.pt2``.
        tap: name of the tensor that is the feature, where it is not found or not the one.
        fallback: (C, H, W) of the images, or (D,) of the rows, where the file does not say.

    Raises:
        ModelError: no such file, a damaged one, one that is not a classifier of images, rows or sentences, or an
            unknown ``tap``.
        MissingDependencyError: an ONNX file, and the ``onnx`` extra is not installed.
    """
    path = Path(path).expanduser()
    if path.suffix not in SUFFIXES:
        raise ModelError(
            f"{str(path)!r}: expected a trained network as {' or '.join(SUFFIXES)}. A file of weights is given beside "
            "the network's name, as weights."
        )
    if not path.is_file():
        raise ModelError(f"No file {str(path)!r}. Expected a trained network as {' or '.join(SUFFIXES)}.")
    return (_load_onnx if path.suffix == ".onnx" else _load_pt2)(path, tap, fallback)


# ONNX -----------------------------------------------------------------------------------------------------------------

_ONNX_DTYPES = {1: torch.float32, 2: torch.uint8, 10: torch.float16, 11: torch.float64}
_ONNX_THROUGH = {"Identity", "Cast", "Flatten", "Reshape", "Squeeze", "Dropout"}


def _load_onnx(path: Path, tap: str | None, fallback: Sequence[int] | None) -> Graph:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"An ONNX file as teacher needs the package {error.name}: pip install 'krdistill[onnx]'."
        ) from None
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf, checker and file errors have no common base
        raise ModelError(f"{path} is damaged, or no ONNX file: {str(error).strip()[:200]}") from None
    graph = model.graph
    weights = {w.name for w in graph.initializer}
    inputs = [i for i in graph.input if i.name not in weights]
    if len(inputs) != 1:
        raise ModelError(
            f"{path}: expected one input, of images, rows or the bytes of sentences, got {[i.name for i in inputs]}."
        )
    dims = [d.dim_value if d.HasField("dim_value") else None for d in inputs[0].type.tensor_type.shape.dim]
    facts = _facts(path, inputs[0].name, dims, _ONNX_DTYPES.get(inputs[0].type.tensor_type.elem_type))
    makers = {name: node for node in graph.node for name in node.output}
    names = [o.name for o in graph.output]
    logits = "logits" if "logits" in names else names[0]
    while logits in makers and makers[logits].op_type in {"Softmax", "LogSoftmax"}:
        logits = makers[logits].input[0]
    if tap is not None and tap not in makers:
        raise ModelError(f"{path}: no tensor {tap!r} to take the feature from. {_near(tap, makers)}")
    feature = tap or _onnx_feature(logits, makers, weights)
    for name in (logits, feature):
        if name is not None and name not in names:
            graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
            names.append(name)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no public base
        raise ModelError(f"{path}: ONNX Runtime cannot run it: {str(error).strip()[:200]}") from None
    wanted = [logits] if feature is None else [logits, feature]

    def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
        given = [torch.from_numpy(a).to(x.device) for a in session.run(wanted, {inputs[0].name: x.cpu().numpy()})]
        return given[0], given[1] if len(given) > 1 else None

    card = {}
    for entry in model.metadata_props:
        try:
            card[entry.key] = json.loads(entry.value)
        except ValueError:
            card[entry.key] = entry.value
    return Graph(
        path,
        replace(facts, card=card, feature=feature),
        run,
        parameter_count=sum(int(np.prod(w.dims)) for w in graph.initializer if len(w.dims)),
        tap=tap,
        fallback=fallback,
    )  # fmt: skip


def _onnx_feature(name: str, makers: Mapping[str, Any], weights: set[str]) -> str | None:
    """The input of the Gemm or MatMul that gives a tensor, through a bias and changes of shape."""
    while name in makers:
        node = makers[name]
        if node.op_type in {"Gemm", "MatMul"}:
            return node.input[0] if node.input[0] in makers else None
        inner = [i for i in node.input if i in makers and makers[i].op_type in {"Gemm", "MatMul", *_ONNX_THROUGH}]
        if node.op_type in _ONNX_THROUGH:
            name = node.input[0]
        elif node.op_type == "Add" and len(inner) == 1:
            name = inner[0]
        else:
            return None
    return None


# torch.export ---------------------------------------------------------------------------------------------------------

# The numbers by which the archive writes dtypes and memory formats (torch/_export/serde/schema.py).
_DTYPES = {
    1: torch.uint8, 2: torch.int8, 3: torch.int16, 4: torch.int32, 5: torch.int64, 6: torch.float16, 7: torch.float32,
    8: torch.float64, 9: torch.complex32, 10: torch.complex64, 11: torch.complex128, 12: torch.bool,
    13: torch.bfloat16,
}  # fmt: skip
_FORMATS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.channels_last_3d, 4: torch.preserve_format}
_OPERATOR = re.compile(r"torch\.ops\.aten\.([a-z_0-9A-Z]+)\.([a-z_0-9A-Z]+)")
_SCALARS: dict[str, Callable[..., Any]] = {
    **{
        f"_operator.{name}": getattr(operator, name)
        for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "getitem", "eq", "ne", "lt",
                     "le", "gt", "ge", "and_", "or_", "not_")
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    "torch.sym_float": float, "torch.sym_max": max, "torch.sym_min": min, "torch.sym_not": operator.not_,
    "torch.sym_int": int,
}  # fmt: skip
_SKIPPED = {"_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range", "sym_constrain_range_for_size"}
_SOFT = {"softmax", "_softmax", "log_softmax", "_log_softmax"}
_THROUGH = {"view", "reshape", "flatten", "squeeze", "alias", "clone", "contiguous", "detach", "to", "_to_copy",
            "dropout", "_unsafe_view"}  # fmt: skip
_LINEAR = {"linear": 0, "addmm": 1, "mm": 0, "matmul": 0}


@dataclass(frozen=True)
class _Node:
    """One operator call of an archive's graph."""

    call: Callable[..., Any]
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Any, ...]


@dataclass(frozen=True)
class _Name:
    """The value of an earlier node."""

    name: str


class _Here:
    """The device that the images are on, whatever the archive was made on."""


def _load_pt2(path: Path, tap: str | None, fallback: Sequence[int] | None) -> Graph:
    try:
        check_unpacked(path, stored=True)
        with zipfile.ZipFile(path) as archive:
            files = {name.split("/", 1)[1]: name for name in archive.namelist() if "/" in name}
            if "models/model.json" not in files:
                raise ModelError(
                    f"{path} is no archive of torch.export.save that this can read (models/model.json missing). "
                    "Export it again with a current torch, or as ONNX."
                )
            program = json.loads(archive.read(files["models/model.json"]))
            values = _archive_tensors(path, archive, files)
            card = json.loads(archive.read(files[f"extra/{CARD}"])) if f"extra/{CARD}" in files else {}
        graph, signature = program["graph_module"]["graph"], program["graph_module"]["signature"]
        constants, given = _signature(path, signature, values)
        nodes = [_node(path, node) for node in graph["nodes"]]
        _check_order(nodes)
        _refuse_training(path, nodes, constants, signature["output_specs"])
        meta = graph["tensor_values"][given]
    except ModelError:
        raise
    except Exception as error:  # whatever a file that a stranger made may lead to
        raise ModelError(f"{path} is damaged, or no archive of torch.export.save: {error!r}"[:300]) from None
    dims = [d.get("as_int") for d in meta["sizes"]]
    facts = _facts(path, given, dims, _DTYPES.get(meta["dtype"]), card=card)
    returned = [spec["user_output"]["arg"].get("as_tensor", {}).get("name") for spec in signature["output_specs"]]
    makers = {o: node for node in nodes for o in node.outputs if isinstance(o, str)}
    logits = returned[0]
    while logits in makers and makers[logits].op in _SOFT:
        logits = makers[logits].args[0].name
    if tap is not None and tap not in makers:
        raise ModelError(f"{path}: no tensor {tap!r} to take the feature from. {_near(tap, makers)}")
    feature = tap or _pt2_feature(logits, makers)
    held: dict[torch.device, dict[str, Tensor]] = {torch.device("cpu"): constants}

    def run(x: Tensor) -> tuple[Tensor, Tensor | None]:
        if x.device not in held:
            held[x.device] = {k: v.to(x.device) for k, v in constants.items()}
        found = _interpret(nodes, {**held[x.device], given: x}, {logits} | ({feature} if feature else set()), x.device)
        return found[logits], found[feature] if feature else None

    # One graph serves any number of images only where that number was left open when it was made.
    return Graph(
        path,
        replace(facts, feature=feature),
        run,
        parameter_count=sum(v.numel() for v in constants.values()),
        tap=tap,
        fallback=fallback,
    )


def _archive_tensors(path: Path, archive: zipfile.ZipFile, files: Mapping[str, str]) -> dict[str, Tensor]:
    """Weights and constants of an archive: raw bytes, or torch files that hold nothing but tensors."""
    import io
    import pickle

    found: dict[str, Tensor] = {}
    try:
        for kind in ("weights", "constants"):
            whole = files.get(f"data/{kind}/model.pt")
            if whole is not None:
                found |= torch.load(io.BytesIO(archive.read(whole)), map_location="cpu", weights_only=True)
            index = files.get(f"data/{kind}/model_{kind}_config.json")
            for name, entry in json.loads(archive.read(index))["config"].items() if index else ():
                data = archive.read(files[f"data/{kind}/{entry['path_name']}"])
                if not str(entry["path_name"]).startswith(("weight_", "tensor_")):
                    raise pickle.UnpicklingError
                if entry["use_pickle"]:
                    found[name] = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
                else:
                    found[name] = _raw_tensor(data, entry["tensor_meta"])
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds pickled objects beside its weights; reading them could run code, and was not done. "
            "Export the network without custom objects, or as ONNX."
        ) from None
    return found


def _raw_tensor(data: bytes, meta: Mapping[str, Any]) -> Tensor:
    size, stride = ([int(d["as_int"]) for d in meta[key]] for key in ("sizes", "strides"))
    dtype = _DTYPES[meta["dtype"]]
    if not data:
        return torch.empty(size, dtype=dtype)
    storage = torch.frombuffer(bytearray(data), dtype=dtype)
    return storage.as_strided(size, stride, int(meta["storage_offset"]["as_int"])).clone()


def _signature(path: Path, signature: Mapping[str, Any], values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Constants by the name the graph calls them, and the name of the images."""
    constants, given = {}, []
    for spec in signature["input_specs"]:
        kind, entry = next(iter(spec.items()))
        if kind == "user_input":
            given.append(entry["arg"]["as_tensor"]["name"] if "as_tensor" in entry["arg"] else str(entry["arg"]))
            continue
        key = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}[kind]
        constants[entry["arg"]["name"]] = values[entry[key]]
    if len(given) != 1:
        raise ModelError(f"{path}: expected one input, of images, rows or the bytes of sentences, got {given}.")
    return constants, given[0]


def _refuse_training(path: Path, nodes: Sequence[_Node], constants: Mapping[str, Tensor], outputs: Any) -> None:
    """A graph of training mode would change its own buffers, or drop numbers at random."""
    changes = any(kind != "user_output" for spec in outputs for kind in spec)
    for node in nodes:
        held = [a.name for a in node.args if isinstance(a, _Name) and a.name in constants]
        schema = getattr(node.call, "_schema", None)
        changes = changes or (bool(held) and schema is not None and schema.is_mutable)
        changes = changes or (node.op.endswith("dropout") and len(node.args) > 2 and node.args[2] is True)
    if changes:
        raise ModelError(
            f"{path} was exported in training mode: it would change with every batch. "
            "Call model.eval() before torch.export.export."
        )


def _node(path: Path, node: Mapping[str, Any]) -> _Node:
    target = str(node["target"])
    found = _OPERATOR.fullmatch(target)
    if found is not None:
        call = getattr(getattr(torch.ops.aten, found[1]), found[2])
        names = {a.name for a in call._schema.arguments}
        if any("file" in name for name in names):
            raise ModelError(f"{path}: the operator {target!r} reaches for files, which is not allowed.")
    elif target in _SCALARS:
        call = _SCALARS[target]
    else:
        raise ModelError(
            f"{path}: the operator {target!r} is none of those that may be run here (torch.ops.aten). "
            "Export the network without custom or higher-order operators, or as ONNX."
        )
    given = [(a["name"], a.get("kind", 1), _argument(path, a["arg"])) for a in node["inputs"]]
    return _Node(
        call,
        found[1] if found is not None else target,
        tuple(value for _, kind, value in given if kind != 2),
        {name: value for name, kind, value in given if kind == 2},
        tuple(_result(o) for o in node["outputs"]),
    )


def _check_order(nodes: Sequence[_Node]) -> None:
    """A graph that runs in a circle would be followed for ever."""
    made = [{o for o in node.outputs if isinstance(o, str)} for node in nodes]
    later = set().union(*made)
    for node, names in zip(nodes, made, strict=True):
        if any(isinstance(a, _Name) and a.name in later for a in (*node.args, *node.kwargs.values())):
            raise ValueError("a node asks for what a later one gives")
        later -= names


def _argument(path: Path, arg: Mapping[str, Any]) -> Any:
    kind, value = next(iter(arg.items()))
    if kind == "as_none":
        return None
    if kind in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float", "as_optional_tensor"):
        if "name" in value:
            return _Name(value["name"])
        inner, content = next(iter(value.items()))
        if inner == "as_tensor":
            return _Name(content["name"])
        return _Name(content) if inner == "as_name" else None if inner == "as_none" else content
    if kind in ("as_tensors", "as_sym_ints", "as_sym_bools", "as_sym_floats", "as_optional_tensors"):
        one = "as_optional_tensor" if kind == "as_optional_tensors" else kind.removesuffix("s")
        return [_argument(path, {one: v}) for v in value]
    if kind in ("as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_string"):
        return float(value) if kind == "as_float" else value  # infinities are written as texts
    if kind == "as_scalar_type":
        return _DTYPES[value]
    if kind == "as_memory_format":
        return _FORMATS[value]
    if kind == "as_layout":
        return torch.strided
    if kind == "as_device":
        return _Here()
    raise ModelError(f"{path}: an argument of kind {kind!r} cannot be read here. Export the network as ONNX.")


def _result(output: Mapping[str, Any]) -> Any:
    kind, value = next(iter(output.items()))
    if kind in ("as_tensor", "as_sym_int", "as_sym_bool", "as_sym_float"):
        return value.get("name") or value.get("as_name")
    return [v["name"] for v in value] if kind == "as_tensors" else None


def _pt2_feature(name: str, makers: Mapping[str, _Node]) -> str | None:
    while name in makers:
        node = makers[name]
        if node.op in _LINEAR:
            given = node.args[_LINEAR[node.op]]
            return given.name if isinstance(given, _Name) and given.name in makers else None
        if node.op == "add" and isinstance(node.args[0], _Name) and not isinstance(node.call, type(operator.add)):
            inner = [
                a.name
                for a in node.args
                if isinstance(a, _Name) and a.name in makers and makers[a.name].op in (*_LINEAR, *_THROUGH)
            ]
            if len(inner) != 1:
                return None
            name = inner[0]
        elif node.op in _THROUGH:
            name = node.args[0].name
        else:
            return None
    return None


def _interpret(
    nodes: Sequence[_Node], values: dict[str, Any], wanted: set[str], device: torch.device
) -> dict[str, Tensor]:
    def fill(value: Any) -> Any:
        if isinstance(value, _Name):
            return values[value.name]
        if isinstance(value, _Here):
            return device
        return [fill(v) for v in value] if isinstance(value, list) else value

    for node in nodes:
        if node.op in _SKIPPED:
            continue
        given = node.call(*(fill(a) for a in node.args), **{k: fill(v) for k, v in node.kwargs.items()})
        outputs = node.outputs
        if len(outputs) == 1:
            given = (given,)
        for name, value in zip(outputs, given, strict=False):
            if isinstance(name, list):
                values.update(zip(name, value, strict=True))
            elif name is not None:
                values[name] = value
        if wanted <= values.keys():
            break
    return {name: values[name] for name in wanted}


def _near(name: str, known: Mapping[str, Any]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(known)[-5:]
    return f"Near: {', '.join(near)}."
