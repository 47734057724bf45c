"""The command line: a thin face over the library; nothing is computed here.

Neither torch nor matplotlib is imported until a command needs it.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import __version__
from .errors import ConfigError, KrdistillError, MissingDependencyError, unknown_name

if TYPE_CHECKING:
    from rich.console import Console

    from .config import RunConfig

_EXIT_USER_ERROR = 2


class _Commands(click.Group):
    """A group that names the nearest command for an unknown one."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise click.UsageError(unknown_name("command", args[0], self.list_commands(ctx)), ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="krdistill")
def app() -> None:
    """Distil a biased teacher into a small student that stays accurate on the rare classes."""


_OVERRIDES = {"ignore_unknown_options": True, "allow_extra_args": True}


@app.command(context_settings=_OVERRIDES)
@click.argument("config", metavar="PRESET|CONFIG.yaml")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/<name>]")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; train nothing.")
@click.pass_context
def run(ctx: click.Context, config: str, out: Path | None, dry_run: bool) -> None:
    """Run the main job: teacher, diagnosis, student, baselines, evaluation, export, report.

    Any value of the configuration can be given as --section.key VALUE, such as --student.train.epochs 100,
    --recipe kd, --recipe.tau auto or --seed 1; --train.KEY sets it for teacher and student alike. A run that was
    interrupted goes on where it stopped when the same command is given again.
    """
    from .config import load_config

    _run(load_config(config, _overrides(ctx.args)), out, dry_run=dry_run)


@app.command(context_settings=_OVERRIDES)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/demo]")
@click.pass_context
def demo(ctx: click.Context, out: Path | None) -> None:
    """Run the whole job on a long-tailed cut of real handwritten digits, in a minute or so.

    Takes the same overrides as run. The preset is digits-lt.
    """
    from .config import load_config

    overrides = _overrides(ctx.args)
    if "name" not in dict(overrides):
        overrides = [("name", "demo"), *overrides]
    _run(load_config("digits-lt", overrides), out, dry_run=False)


@app.command("list")
@click.argument("what", required=False, default="all", metavar="[recipes|models|presets|augmentations|all]")
def list_(what: str) -> None:
    """List what there is: recipes, models, presets, augmentations."""
    kinds = {
        "recipes": _print_recipes,
        "models": _print_models,
        "presets": _print_presets,
        "augmentations": _print_augmentations,
    }
    if what not in (*kinds, "all"):
        raise ConfigError(unknown_name("list", what, [*kinds, "all"]))
    console = _console()
    for i, (name, show) in enumerate(kinds.items()):
        if what in (name, "all"):
            if what == "all" and i:
                console.print()
            show(console)


@app.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
def report(run_folder: Path) -> None:
    """Write report.html of a finished run again."""
    with _needs_packages():
        from .reporting import write_report

        _console().print(f"report  {write_report(run_folder)}", highlight=False)


@app.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
def show(run_folder: Path) -> None:
    """Print the table of a finished run."""
    import json

    from .errors import RunFolderError

    path = run_folder / "metrics.json"
    if not path.is_file():
        raise RunFolderError(f"No metrics.json in {run_folder}. Expected the folder of a finished run.")
    _print_metrics(_console(), json.loads(path.read_text(encoding="utf-8")))


@app.group(cls=_Commands)
def data() -> None:
    """Fetch data sets from their upstream addresses."""


@data.command()
@click.argument("name")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of data sets. [default: $KRDISTILL_DATA]")
@click.option("--url", help="Another address for the same archive; the checksum stays the same.")
def download(name: str, root: Path | None, url: str | None) -> None:
    """Fetch cifar10, cifar100 or tiny-imagenet, with checksum and resume."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from .data import data_root
    from .data import download as fetch

    console = _console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def update(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        folder = fetch(name, data_root(root), url=url, progress=update)
    console.print(f"{name}  {folder}", highlight=False)


def _run(config: RunConfig, out: Path | None, *, dry_run: bool) -> None:
    from .recipes import resolve_recipe

    for item in (config.recipe, *config.baselines):  # names first: no torch is needed to refuse a wrong one
        resolve_recipe(item)
    with _needs_packages():
        from . import console as show
        from . import pipeline
    console = _console()
    folder = out if out is not None else Path("runs") / config.name
    with console.status("reading the data"):
        plan = pipeline.prepare(config)
    show.print_plan(console, plan, folder)
    if dry_run:
        return
    pipeline.open_folder(plan, folder)  # a folder that cannot be used is refused before anything is measured
    events = show.ConsoleEvents(console)
    try:
        with console.status("measuring a few steps"):
            left = pipeline.estimate_seconds(plan, folder)
        if left:
            parts = ", ".join(f"{name} {show.duration(s)}" for name, s in left.items())
            console.print(
                f"\n[bold]about {show.duration(sum(left.values()))}[/bold] of training  ({parts})\n", highlight=False
            )
        metrics = pipeline.run(plan, folder, events=events)
    finally:
        events.close()
    console.print()
    _print_metrics(console, metrics)
    console.print(f"\nreport   {folder / 'report.html'}", highlight=False)
    if (folder / "student.onnx").is_file():
        console.print(f"student  {folder / 'student.onnx'}", highlight=False)


def _print_metrics(console: Console, metrics: dict[str, Any]) -> None:
    from .console import print_table
    from .reporting.tables import comparison_rows

    print_table(console, *comparison_rows(metrics))


def _print_recipes(console: Console) -> None:
    from .console import print_list
    from .recipes import list_recipes

    rows = []
    for r in list_recipes():
        arxiv = f", arXiv {r.source.arxiv}" if r.source.arxiv else ""
        options = r.resolve({}).model_dump(mode="json")
        off = {"none", 0}  # 0 stands for False and 0.0 too
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items() if v not in off
        )
        needs = f"needs {', '.join(sorted(r.needs))}\n" if r.needs else ""
        facts = f"{r.source.title} ({r.source.year}{arxiv})\n{needs}defaults: {shown} [{r.defaults_from}]"
        rows.append((r.name, r.summary, facts))
    print_list(console, "recipe", rows)


def _print_models(console: Console) -> None:
    from .console import print_list
    from .models import list_models

    print_list(
        console,
        "model",
        [(m.name, f"{m.parameters / 1e6:6.2f} M parameters  {m.summary}", "") for m in list_models()],
    )


def _print_presets(console: Console) -> None:
    from .config import list_presets
    from .console import print_list

    print_list(console, "preset", [(name, words, "") for name, words in list_presets().items()])


def _print_augmentations(console: Console) -> None:
    from .console import print_list
    from .data.augment_names import list_augmentations

    print_list(console, "augmentation", [(name, words, "") for name, words in list_augmentations().items()])


def _overrides(args: Sequence[str]) -> list[tuple[str, str]]:
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


def _console() -> Console:
    from rich.console import Console

    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120  # a pipe has no width of its own
    return Console(width=width)


@contextlib.contextmanager
def _needs_packages() -> Iterator[None]:
    """Turns a missing package into the command that installs it."""
    try:
        yield
    except KrdistillError:
        raise
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"This command needs the package {error.name!r}: pip install 'krdistill[train,onnx]'."
        ) from None


def main(args: Sequence[str] | None = None) -> None:
    """Entry point: a user's mistake is one message and exit code 2, never a traceback."""
    try:
        app.main(args=None if args is None else list(args), prog_name="krdistill", standalone_mode=False)
    except click.exceptions.Abort:
        _fail("Stopped. The same command goes on from the last checkpoint.", 130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except KrdistillError as error:
        _fail(str(error), _EXIT_USER_ERROR)
    except KeyboardInterrupt:
        _fail("Stopped. The same command goes on from the last checkpoint.", 130)


def _fail(message: str, code: int) -> None:
    from rich.console import Console
    from rich.markup import escape

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error[/bold red]  {escape(message)}")
    sys.exit(code)


if __name__ == "__main__":
    main()
