"""`krdistill report` and `krdistill show`: what a finished run left behind."""

from __future__ import annotations

from pathlib import Path

import click

from .shared import make_console, needs_packages, print_metrics


@click.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
def report(run_folder: Path) -> None:
    """Write report.html of a finished run again."""
    with needs_packages():
        from ..reporting import write_report

        make_console().print(f"report  {write_report(run_folder)}", highlight=False)


@click.command()
@click.argument("run_folder", type=click.Path(path_type=Path))
def show(run_folder: Path) -> None:
    """Print the table of a finished run."""
    from ..errors import RunFolderError
    from ..files import read_json

    path = run_folder / "metrics.json"
    if not path.is_file():
        raise RunFolderError(f"No metrics.json in {run_folder}. Expected the folder of a finished run.")
    try:
        print_metrics(make_console(), read_json(path))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(f"{path} is damaged ({error}). Delete it and run again.") from None
