"""`krdistill bank`: the teacher's answers, stored for many students."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Commands, make_console, needs_packages


@click.group(cls=Commands)
def bank() -> None:
    """Store a teacher's answers once, for any number of students."""


@bank.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
@click.option("--views", type=click.IntRange(min=1), required=True, help="Views of every image.")
@click.option("--folder", type=click.Path(path_type=Path), required=True, help="Where banks are kept.")
@click.option("--top-k", type=click.IntRange(min=1), help="Logits kept of each answer. [default: all]")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", show_default=True)
@click.option("--features/--no-features", default=True, show_default=True, help="Store the teacher's features too.")
def build(run_folder: Path, views: int, folder: Path, top_k: int | None, dtype: str, features: bool) -> None:
    """Ask the teacher of a run for its answers to every view, and store them.

    Data, augmentation and seed are those of the run. What is there is not asked for again: an interrupted build goes
    on, and a bank is extended by more views. Runs use it with --teacher.run RUN_FOLDER --bank.folder FOLDER
    --bank.views VIEWS.
    """
    with needs_packages():
        from .. import console as show
        from .. import pipeline
    console = make_console()
    events = show.ConsoleEvents(console)
    options = {"views": views, "folder": str(folder), "top_k": top_k, "dtype": dtype, "features": features}
    try:
        made = pipeline.build_bank_of(run_folder, options, events=events)
    finally:
        events.close()
    console.print(f"bank  {made.folder}  ({made.views} views, {made.bytes / 2**20:,.1f} MiB)", highlight=False)


@bank.command("show")
@click.argument("folder", type=click.Path(path_type=Path))
def show_(folder: Path) -> None:
    """List the banks of a folder: what they hold, and whether they are whole."""
    with needs_packages():
        from ..bank import list_banks
    from ..console import print_table

    rows = [
        [b.name, f"{b.views}", f"{b.rows:,}", f"{b.bytes / 2**20:,.1f} MiB", b.augmentation, b.state]
        for b in list_banks(folder)
    ]
    print_table(make_console(), ["bank", "views", "images", "size", "augmentation", "state"], rows)
