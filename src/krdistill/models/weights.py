"""Weights from a file, fitted to a network; nothing is ever unpickled."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import ModelError
from ..files import check_unpacked

_WRAPPED = ("state_dict", "model", "model_state_dict", "net")
_PREFIXES = ("module.", "_orig_mod.")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, by name.

    Args:
        path: safetensors, or what :func:`torch.save` wrote of a state dict (also under ``state_dict`` or ``model``).
            Prefixes that parallel training and compiling leave are taken off.

    Raises:
        ModelError: no such file, a damaged one, or one that holds more than tensors (a pickled module).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ModelError(f"No file of weights {str(path)!r}. Expected safetensors, or a torch state dict.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if file.read(2) not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"):  # a zip archive, or a pickle
                raise ValueError("it does not begin as what torch.save writes")
        check_unpacked(path, stored=True)
        values: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ModelError(
            f"{path} holds more than tensors; reading it could run code, and was not done. Save the weights alone, in "
            "the program that made it: torch.save(model.state_dict(), path), or as safetensors."
        ) from None
    except Exception as error:  # torch's unpickler raises nearly anything on a damaged file
        raise ModelError(f"{path} is damaged, or no file of weights: {error}") from None
    for key in _WRAPPED:
        if isinstance(values, Mapping) and isinstance(values.get(key), Mapping):
            values = values[key]
    if not isinstance(values, Mapping) or not values or not all(isinstance(v, Tensor) for v in values.values()):
        raise ModelError(f"{path}: expected the names and tensors of a state dict, got {type(values).__name__}.")
    state = {str(k): v for k, v in values.items()}
    for prefix in _PREFIXES:
        if all(k.startswith(prefix) for k in state):
            state = {k.removeprefix(prefix): v for k, v in state.items()}
    return state


def load_weights(
    backbone: nn.Module,
    given: str | Path | Mapping[str, Tensor],
    *,
    head: str,
    class_names: Sequence[str],
    their_names: Sequence[str] | None = None,
    unused: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Puts weights into a network in place; a classifier layer of another width keeps its fresh weights.

    Args:
        backbone: has K outputs.
        given: a file, or the tensors themselves.
        head: dotted name of its classifier layer.
        class_names: K names; where ``their_names`` are the same in another order, the layer's rows are moved.
        their_names: the classes of the weights, where they are known.
        unused: beginnings of names that the network has no place for (auxiliary heads).

    Returns:
        Notes for a person.

    Raises:
        ModelError: tensors that the network has not, lacks, or has in another shape.
    """
    what = str(given) if not isinstance(given, Mapping) else "the pretrained weights"
    state = dict(given) if isinstance(given, Mapping) else read_weights(given)
    state = {k: v for k, v in state.items() if not k.startswith(unused)} if unused else state
    own = backbone.state_dict()
    layer = {k for k in own if k.rpartition(".")[0] == head}
    fresh = {k for k in layer if k not in state or state[k].shape != own[k].shape}
    notes: tuple[str, ...] = ()
    if fresh:
        state = {k: v for k, v in state.items() if k.rpartition(".")[0] != head}
        notes = (f"The classifier layer {head!r} was replaced by a fresh one for {len(class_names)} classes.",)
    elif their_names is not None and set(their_names) == set(class_names) and list(their_names) != list(class_names):
        order = [list(their_names).index(name) for name in class_names]
        state |= {k: state[k][order] for k in layer}
        notes = (f"The rows of the classifier layer {head!r} were put in the data's class order.",)
    elif their_names is None or set(their_names) != set(class_names):
        notes = (f"The classifier layer {head!r} was kept; its classes are taken to be the data's, in their order.",)
    missing = [k for k in own if k not in state and k not in layer and not k.endswith("num_batches_tracked")]
    extra = [k for k in state if k not in own]
    other = [
        f"{k} {tuple(state[k].shape)} for {tuple(own[k].shape)}"
        for k in state
        if k in own and state[k].shape != own[k].shape
    ]
    problems = [
        f"{name}: {', '.join(found[:4])}{f' and {len(found) - 4} more' if len(found) > 4 else ''}"
        for name, found in (("missing", missing), ("unknown", extra), ("of another shape", other))
        if found
    ]
    if problems:
        raise ModelError(
            f"{what} do not fit {type(backbone).__name__} ({'; '.join(problems)}). "
            "Give the weights of this very network, or the network of these weights."
        )
    backbone.load_state_dict(state, strict=False)
    return notes
