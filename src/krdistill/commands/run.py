"""`krdistill run` and `krdistill demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import OVERRIDES, make_console, needs_packages, overrides, print_metrics

if TYPE_CHECKING:
    from ..config import RunConfig


@click.command(context_settings=OVERRIDES)
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
        from .. import console as show
        from .. import pipeline
    console = make_console()
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
    print_metrics(console, metrics)
    console.print(f"\nreport   {folder / 'report.html'}", highlight=False)
    if (folder / "student.onnx").is_file():
        console.print(f"student  {folder / 'student.onnx'}", highlight=False)
