"""`krdistill share`: the student of a finished run as a folder in the Hugging Face layout."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import make_console, needs_packages


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.argument("folder", metavar="FOLDER", type=click.Path(path_type=Path))
@click.option("--title", help="Of the model card. [default: the run's name]")
@click.option("--license", help="Its name on the Hugging Face Hub, such as apache-2.0. [default: none is claimed]")
def share(run_folder: Path, folder: Path, title: str | None, license: str | None) -> None:
    """Write the student of a run as a folder that others can load: weights, config.json and a model card.

    The card is made of the run's files: accuracy of every group beside the teacher's and the baselines', the data, what
    the student is for and what not. Look at it before you hand it on.
    """
    with needs_packages():
        from ..sharing import share_run

        share_run(run_folder, folder, title=title, license=license)
    console = make_console()
    for file in sorted(folder.iterdir()):
        console.print(f"{file.stat().st_size / 1024:10,.1f} KiB  {file}", highlight=False, soft_wrap=True)
