"""`krdistill data`."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import Commands, make_console


@click.group(cls=Commands)
def data() -> None:
    """Fetch data sets from their upstream addresses."""


@data.command()
@click.argument("name")
@click.option("--root", type=click.Path(path_type=Path), help="Folder of data sets. [default: $KRDISTILL_DATA]")
@click.option("--url", help="Another address for the same archive; the checksum stays the same.")
def download(name: str, root: Path | None, url: str | None) -> None:
    """Fetch cifar10, cifar100 or tiny-imagenet, with checksum and resume."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from ..data import data_root
    from ..data import download as fetch

    console = make_console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(name, total=None)

        def update(done: int, total: int | None) -> None:
            progress.update(task, completed=done, total=total)

        folder = fetch(name, data_root(root), url=url, progress=update)
    console.print(f"{name}  {folder}", highlight=False)
