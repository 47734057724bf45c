"""What the commands have in common."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError, KrdistillError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}


class Commands(click.Group):
    """A group that names the nearest command for an unknown one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(unknown_name("command", args[0], self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)


def overrides(args: Sequence[str]) -> list[tuple[str, str]]:
    """``--section.key value`` and ``--section.key=value`` to pairs."""
    pairs: list[tuple[str, str]] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise ConfigError(f"Expected --section.key VALUE, got {word!r}. Example: --student.train.epochs 100.")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ConfigError(f"--{key} needs a value, as in --{key} VALUE.")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def make_console() -> Console:
    from ..console import PlainConsole

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a pipe has no width of its own
    return PlainConsole(width=width)


@contextlib.contextmanager
def needs_packages() -> Iterator[None]:
    """Turns a missing package into the command that installs it."""
    try:
        yield
    except KrdistillError:
        raise
    except ModuleNotFoundError as error:
        raise MissingDependencyError(missing_package(error)) from None


def missing_package(error: ModuleNotFoundError) -> str:
    """What to install where a package is not there."""
    return f"This command needs the package {error.name!r}: pip install 'krdistill[train,onnx]'."


def print_error(message: str) -> None:
    """A red word and the message on standard error. No package besides click: a device has no other."""
    from ..reporting.tables import clean

    lines = "\n".join(map(clean, message.split("\n")))
    click.echo(f"{click.style('error', fg='red', bold=True)}  {lines}", err=True)


def print_metrics(console: Console, metrics: dict[str, Any]) -> None:
    from ..console import print_table
    from ..reporting.tables import comparison_rows

    print_table(console, *comparison_rows(metrics))
