"""What an ONNX file needs in order to be run, and nothing else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

_OWN = ("", "ai.onnx")  # both are ONNX's own operator set


def compact(model: Any, *, rename: bool = False) -> None:
    """Takes out of an ONNX model, in place, what no runtime needs: the answers stay the same, bit for bit.

    Gone are what the exporter and the quantiser note of graph, nodes and tensors (where in the source a node comes
    from), shapes of inner tensors, which every runtime infers, names of nodes, initialisers that nobody reads, and
    operator sets that no node is of; initialisers that are equal in type, shape and every bit become one. The model's
    own metadata, and the names of its inputs and outputs, stay. A model in which a node holds a graph of its own
    (``If``, ``Loop``), or that has functions, keeps its initialisers, names and operator sets.

    Args:
        model: an ``onnx.ModelProto`` with its weights inside.
        rename: inner tensors get names of a letter or two. A file of small integers holds many scales and zero points
            beside few bytes of weights; where the weights are floats, names that say which layer they are of cost
            next to nothing, and stay.
    """
    graph = model.graph
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    for part in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    for node in graph.node:
        node.ClearField("name")
    if model.functions or any(a.HasField("g") or a.graphs for node in graph.node for a in node.attribute):
        return  # their insides may speak of any name
    _share_initialisers(graph)
    if rename:
        _shorten_names(graph)
    used = {*_OWN, *(node.domain for node in graph.node)}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _outside(graph: Any) -> set[str]:
    return {value.name for value in (*graph.input, *graph.output)}


def _share_initialisers(graph: Any) -> None:
    """Leaves one of those that are the same, and none that nobody reads."""
    outside = _outside(graph)
    read = {name for node in graph.node for name in node.input} | outside
    first: dict[Any, str] = {}
    same: dict[str, str] = {}
    kept = []
    for tensor in graph.initializer:
        name = tensor.name
        if name not in read:
            continue
        tensor.ClearField("name")
        what = name if name in outside else hashlib.sha256(tensor.SerializeToString(deterministic=True)).digest()
        tensor.name = name
        same[name] = first.setdefault(what, name)
        if same[name] == name:
            kept.append(type(tensor).FromString(tensor.SerializeToString()))
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for node in graph.node:
        node.input[:] = [same.get(name, name) for name in node.input]


def _shorten_names(graph: Any) -> None:
    outside = _outside(graph)
    names = _names(outside)
    short = {name: name for name in ("", *outside)}  # an input that is left out is called ""

    def renamed(name: str) -> str:
        if name not in short:
            short[name] = next(names)
        return short[name]

    for node in graph.node:  # in their order, so that the shortest names are those of the first
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)


def _names(taken: set[str]) -> Iterator[str]:
    """``a`` to ``z``, ``aa``, ``ab`` and so on, without those that are taken."""
    number = 0
    while True:
        number += 1
        rest, name = number, ""
        while rest:
            rest, letter = divmod(rest - 1, 26)
            name = chr(ord("a") + letter) + name
        if name not in taken:
            yield name
