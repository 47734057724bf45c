"""The errors a user can meet: each says what was expected, what came, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class KrdistillError(Exception):
    """Base of every error this library raises on purpose; the command line prints it without a traceback."""


class ArgumentError(KrdistillError, ValueError):
    """A function was called with a value, shape or dtype that it cannot work with."""


class ConfigError(KrdistillError, ValueError):
    """A configuration file or an override on the command line is wrong."""


class DataError(KrdistillError, ValueError):
    """Data are missing, unreadable or inconsistent."""


class ModelError(KrdistillError, ValueError):
    """A network is unknown, or does not fit the data or the other network."""


class RunFolderError(KrdistillError):
    """A run folder cannot be used as asked."""


class MissingDependencyError(KrdistillError, ImportError):
    """An optional part is not installed; the message holds the command that installs it."""


def unknown_name(kind: str, name: str, known: Iterable[str], *, hint: str = "") -> str:
    """A message for a name that is not known, with the nearest known names.

    Args:
        kind: what was being named, such as ``"recipe"``.
        name: what came.
        known: the names there are.
        hint: a last sentence, such as the command that lists them.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    text = f"Unknown {kind} {name!r}."
    if near:
        text += f" Did you mean {' or '.join(repr(n) for n in near)}?"
    elif len(names) <= 30:
        text += f" Known: {', '.join(names)}."
    return f"{text} {hint}".strip()
