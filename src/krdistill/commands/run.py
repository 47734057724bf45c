"""`krdistill run` and `krdistill demo`."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import KrdistillError
from .shared import OVERRIDES, make_console, needs_packages, overrides, print_error, print_metrics

if TYPE_CHECKING:
    from rich.console import Console

    from ..config import RunConfig
    from ..distributed import World
    from ..pipeline import Plan

STOPPED = 75  # "temporary failure": what a scheduler may simply start again
_ONE_STOP_SECONDS = 5.0


@click.command(context_settings=OVERRIDES)
@click.argument("config", metavar="PRESET|CONFIG.yaml")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/<name>]")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; train nothing.")
@click.pass_context
def run(ctx: click.Context, config: str, out: Path | None, dry_run: bool) -> None:
    """Run the main job: teacher, diagnosis, student, baselines, evaluation, export, report.

    Any value of the configuration can be given as --section.key VALUE, such as --student.train.epochs 100,
    --recipe kd, --recipe.tau auto or --seed 1; --train.KEY sets it for teacher and student alike. A run that was
    interrupted goes on where it stopped when the same command is given again. Ctrl-C or SIGTERM saves after the step
    that is under way and ends with exit code 75; a second one ends at once. Many processes share a run when they are
    started by torchrun: torchrun --nproc-per-node 2 -m krdistill run PRESET.
    """
    from ..config import load_config

    start(load_config(config, overrides(ctx.args)), out, dry_run=dry_run)


@click.command(context_settings=OVERRIDES)
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/demo]")
@click.pass_context
def demo(ctx: click.Context, out: Path | None) -> None:
    """Run the whole job on a long-tailed cut of real handwritten digits, in a minute or so.

    Takes the same overrides as run. The preset is digits-lt.
    """
    from ..config import load_config

    given = overrides(ctx.args)
    if "name" not in dict(given):
        given = [("name", "demo"), *given]
    start(load_config("digits-lt", given), out, dry_run=False)


def start(
    config: RunConfig, out: Path | None, *, dry_run: bool = False, check: Callable[[Plan], None] = lambda plan: None
) -> None:
    """Runs a configuration for a person who watches; ``check`` may refuse the plan before anything is trained."""
    from ..recipes import resolve_recipe

    for item in (config.recipe, *config.baselines):  # names first: no torch is needed to refuse a wrong one
        resolve_recipe(item)
    with needs_packages():
        from .. import pipeline
        from ..distributed import DistributedError, join
        from ..stages import StoppedError
    folder = out if out is not None else Path("runs") / config.name
    stop = _never
    try:
        with join(config.device) as world, stop_by_signal(world) as stop:
            try:
                if world.first:
                    _show(config, folder, world, stop, check, dry_run=dry_run)
                elif not dry_run:
                    plan = pipeline.prepare(config)
                    check(plan)
                    pipeline.run(plan, folder, world=world)
            except DistributedError:
                raise
            except StoppedError as stopped:
                make_console().print(str(stopped), markup=False, highlight=False)
                sys.stdout.flush()
                if world.size > 1:
                    os._exit(STOPPED)  # not by way of the process group: the others wait in it
                sys.exit(STOPPED)
            except KrdistillError:
                if world.first:
                    raise
                sys.exit(2)  # the first process says why
    except DistributedError as error:
        if stop():
            os._exit(STOPPED)  # the first process has saved and gone
        print_error(str(error))
        sys.stdout.flush()
        os._exit(1)  # what is left of the process group may hang on the way out


def _never() -> bool:
    return False


@contextmanager
def stop_by_signal(world: World) -> Iterator[Callable[[], bool]]:
    """A block in which the first SIGINT or SIGTERM is only noted, and a second one ends the process at once.

    Under torchrun a person's Ctrl-C comes twice, from the terminal and from torchrun, so what follows within seconds
    is the same one there. Yields what says whether a signal came.
    """
    since: list[float] = []
    signals = (signal.SIGINT, signal.SIGTERM)

    def heard(number: int, frame: object) -> None:
        if not since:
            since.append(time.monotonic())
            if world.first:  # not print: the signal may have come in the middle of one
                os.write(2, b"\nsaving after this step, then stopping; once more stops at once\n")
        elif world.size == 1 or time.monotonic() - since[0] > _ONE_STOP_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    if threading.current_thread() is not threading.main_thread():  # signals are for the main thread alone
        yield _never
        return
    before = {number: signal.signal(number, heard) for number in signals}
    try:
        yield lambda: bool(since)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(
    config: RunConfig, folder: Path, world: World, stop: Callable[[], bool], check: Callable[[Plan], None], *,
    dry_run: bool,
) -> None:  # fmt: skip
    """The run with all that a person sees of it."""
    from .. import console as show
    from .. import pipeline
    from ..stages import StoppedError

    console = make_console()
    with console.status("reading the data") as status:

        def on_progress(done: int, total: int) -> None:
            if stop():
                raise StoppedError(f"Stopped while decoding image {done:,} of {total:,}. Give the same command again.")
            status.update(f"decoding the images, once: {done:,} of {total:,}")

        plan = pipeline.prepare(config, on_progress)
    check(plan)
    show.print_plan(console, plan, folder)
    if world.size > 1:
        console.print(f"{world.size} processes, each with its share of every batch", highlight=False)
    if dry_run:
        return
    events = show.ConsoleEvents(console)

    def opened() -> None:  # a folder that cannot be used is refused before anything is measured
        if world.size == 1:
            _print_estimate(console, plan, folder)

    try:
        metrics = pipeline.run(plan, folder, events=events, world=world, stop=stop, opened=opened)
    finally:
        events.close()
    console.print()
    print_metrics(console, metrics)
    console.print(f"\nreport   {folder / 'report.html'}", highlight=False)
    if (folder / "student.onnx").is_file():
        console.print(f"student  {folder / 'student.onnx'}", highlight=False)


def _print_estimate(console: Console, plan: Plan, folder: Path) -> None:
    from .. import pipeline
    from ..console import duration

    with console.status("measuring a few steps"):
        left = pipeline.estimate_seconds(plan, folder)
    if left:
        parts = ", ".join(f"{name} {duration(s)}" for name, s in left.items())
        console.print(f"\n[bold]about {duration(sum(left.values()))}[/bold] of training  ({parts})\n", highlight=False)
