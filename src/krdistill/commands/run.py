"""`krdistill run` and `krdistill demo`."""

from __future__ import annotations

import os
import sys
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


@click.command(context_settings=OVERRIDES)
@click.argument("config", metavar="PRESET|CONFIG.yaml")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder. [default: runs/<name>]")
@click.option("--dry-run", is_flag=True, help="Check everything and print the plan; train nothing.")
@click.pass_context
def run(ctx: click.Context, config: str, out: Path | None, dry_run: bool) -> None:
    """Run the main job: teacher, diagnosis, student, baselines, evaluation, export, report.

    Any value of the configuration can be given as --section.key VALUE, such as --student.train.epochs 100,
    --recipe kd, --recipe.tau auto or --seed 1; --train.KEY sets it for teacher and student alike. A run that was
    interrupted goes on where it stopped when the same command is given again. Many processes share a run when they are
    started by torchrun: torchrun --nproc-per-node 2 -m krdistill run PRESET.
    """
    from ..config import load_config

    _run(load_config(config, overrides(ctx.args)), out, dry_run=dry_run)


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
    _run(load_config("digits-lt", given), out, dry_run=False)


def _run(config: RunConfig, out: Path | None, *, dry_run: bool) -> None:
    from ..recipes import resolve_recipe

    for item in (config.recipe, *config.baselines):  # names first: no torch is needed to refuse a wrong one
        resolve_recipe(item)
    with needs_packages():
        from .. import pipeline
        from ..distributed import DistributedError, join
    folder = out if out is not None else Path("runs") / config.name
    try:
        with join(config.device) as world:
            try:
                if world.first:
                    _show(config, folder, world, dry_run=dry_run)
                elif not dry_run:
                    pipeline.run(pipeline.prepare(config), folder, world=world)
            except DistributedError:
                raise
            except KrdistillError:
                if world.first:
                    raise
                sys.exit(2)  # the first process says why
    except DistributedError as error:
        print_error(str(error))
        sys.stdout.flush()
        os._exit(1)  # what is left of the process group may hang on the way out


def _show(config: RunConfig, folder: Path, world: World, *, dry_run: bool) -> None:
    """The run with all that a person sees of it."""
    from .. import console as show
    from .. import pipeline

    console = make_console()
    with console.status("reading the data") as status:
        plan = pipeline.prepare(
            config, lambda done, total: status.update(f"decoding the images, once: {done:,} of {total:,}")
        )
    show.print_plan(console, plan, folder)
    if world.size > 1:
        console.print(f"{world.size} processes, each with its share of every batch", highlight=False)
    if dry_run:
        return
    events = show.ConsoleEvents(console)
    try:
        if world.size == 1:
            pipeline.open_folder(plan, folder)  # a folder that cannot be used is refused before anything is measured
            _print_estimate(console, plan, folder)
        metrics = pipeline.run(plan, folder, events=events, world=world)
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
