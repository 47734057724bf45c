"""Whether a run that was done again came to what the first one came to, and what was otherwise when it was done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RunFolderError
from .files import read_json, sha256
from .runfolder import METRICS, PREDICTIONS, PROVENANCE

_WORDS = {
    "krdistill": "version of krdistill",
    "git": "commit",
    "python": "Python",
    "torch": "PyTorch",
    "packages": "package",
    "platform": "system",
    "processor": "processor",
    "instructions": "processor's instructions",
    "device": "device",
    "deterministic": "deterministic algorithms",
    "threads": "threads",
    "processes": "processes",
    "inputs": "file",
}
_WEIGHTS, EXPORTS = "model.safetensors", "exports"


def circumstances(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a run's numbers depend on besides its configuration, and is otherwise now.

    Args:
        then: the first run's ``provenance.json``.
        now: that of the second, or :func:`krdistill.runfolder.environment`.

    Returns:
        A line for each thing that differs, or is not known of the first run; empty where all is alike.
    """
    found = []
    for key, words in _WORDS.items():
        if key not in now:
            continue
        if key not in then:
            found.append(f"{words}: not known of the first run, now {_shown(now[key])}")
        elif isinstance(now[key], Mapping):
            old = then[key] if isinstance(then[key], Mapping) else {}
            names = [name for name in {**old, **now[key]} if old.get(name) != now[key].get(name)]
            found += [f"{words} {n}: {_shown(old.get(n))} then, {_shown(now[key].get(n))} now" for n in names]
        elif then[key] != now[key]:
            found.append(f"{words}: {_shown(then[key])} then, {_shown(now[key])} now")
    if str(then.get("git") or "").endswith("-dirty"):
        found.append(f"commit: the first run's source had changes that {then['git']} does not hold")
    for earlier in then.get("earlier") or ():
        told = ", ".join(f"{_WORDS.get(k, k)} {_shown(v)}" for k, v in earlier.items())
        found.append(f"the first run was begun otherwise than it was ended: {told}")
    return found


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "on", False: "off"}[value]
    return str(value)


def compare_runs(first: Path, second: Path) -> list[str]:
    """What a finished run came to that another did not: metrics, predictions and weights, bit for bit.

    Args:
        first: a run's folder.
        second: that of the run which did it again.

    Returns:
        A line with figures for each thing that differs; empty where nothing does.

    Raises:
        RunFolderError: one of them is not finished, or damaged.
    """
    metrics = [_metrics(folder) for folder in (first, second)]
    found = [f"metrics.json: {line}" for line in _numbers(*metrics)]
    found += list(_predictions(first, second))
    found_weights = {p.relative_to(f) for f in (first, second) for p in f.rglob(_WEIGHTS)}
    names = sorted(str(p) for p in found_weights if p.parts[0] != EXPORTS)  # those were asked for afterwards
    for name in names:
        missing = [str(folder) for folder in (first, second) if not (folder / name).is_file()]
        if missing:
            found.append(f"{name}: not in {missing[0]}")
        elif sha256(first / name) != sha256(second / name):
            found.append(f"{name}: other weights")
    return found


def _metrics(folder: Path) -> Any:
    path = folder / METRICS
    if not path.is_file():
        raise RunFolderError(f"No {METRICS} in {folder}. Expected the folder of a finished run.")
    try:
        return read_json(path)
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it and run again.") from None


def _numbers(old: Any, new: Any, path: str = "") -> Iterator[str]:
    """Lines ``key: old, new (by how much)`` for every value that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in {**old, **new}:
            yield from _numbers(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _numbers(*pair, f"{path}[{i}]")
    elif old != new:
        numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (old, new))
        yield f"{path}: {_shown(old)}, now {_shown(new)}" + (f" ({new - old:+.3g})" if numbers else "")


def _predictions(first: Path, second: Path) -> Iterator[str]:
    paths = [folder / PREDICTIONS for folder in (first, second)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        yield f"{PREDICTIONS}: not in {' and '.join(missing)}"
        return
    try:
        with np.load(paths[0], allow_pickle=False) as a, np.load(paths[1], allow_pickle=False) as b:
            stored = [{name: file[name] for name in file.files} for file in (a, b)]
    except Exception as error:  # NumPy raises nearly anything on a damaged archive
        raise RunFolderError(f"{paths[0]} or {paths[1]} is damaged ({error}).") from None
    for name in {**stored[0], **stored[1]}:
        x, y = (values.get(name) for values in stored)
        if x is None or y is None or x.shape != y.shape:
            yield f"{PREDICTIONS}: {name} is there, or of one length, in one of them alone"
        elif not np.array_equal(x, y, equal_nan=x.dtype.kind == "f"):
            yield f"{PREDICTIONS}: {int((x != y).sum()):,} of {x.size:,} values of {name}"


def read_provenance(folder: Path) -> dict[str, Any]:
    """A run's ``provenance.json``.

    Raises:
        RunFolderError: there is none, or it is damaged.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise RunFolderError(f"No {PROVENANCE} in {folder}. Expected the folder of a finished run.")
    try:
        found = read_json(path)
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}); what the run was made with is not known.") from None
    if not isinstance(found, dict):
        raise RunFolderError(f"{path} is damaged; what the run was made with is not known.")
    return found
