"""`krdistill rerun`: a finished run, done again and compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import DataError, RunFolderError
from .run import start
from .shared import make_console, needs_packages

if TYPE_CHECKING:
    from rich.console import Console

    from ..pipeline import Plan

DIFFERS = 4
_SHOWN = 20


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the new run. [default: RUN-rerun]")
def rerun(run_folder: Path, out: Path | None) -> None:
    """Do a finished run again in a new folder, and compare what it comes to.

    Configuration, number of threads and number of processes are those of the run (config.yaml, provenance.json). What
    else is otherwise now (commit, versions, processor, files that the configuration names) is said first. Start it in
    the folder in which the run was started: relative paths mean the same there. Exit status: 0 where metrics,
    predictions and weights are the same, bit for bit; 4 where something differs, which is listed with figures.
    """
    from ..config import load_config

    with needs_packages():
        import torch

        from ..reproduction import circumstances, compare_runs, read_provenance
        from ..runfolder import CONFIG, METRICS

    for name in (CONFIG, METRICS):
        if not (run_folder / name).is_file():
            raise RunFolderError(f"No {name} in {run_folder}. Expected the folder of a finished run.")
    then = read_provenance(run_folder)
    again = out if out is not None else run_folder.absolute().with_name(f"{run_folder.absolute().name}-rerun")
    if again.resolve() == run_folder.resolve():
        raise RunFolderError(f"--out: {again} is the run itself. Choose another folder.")
    pinned = [("device", "cpu")] if then.get("device") == "cpu" else []
    config = load_config(str(run_folder / CONFIG), pinned)
    processes, threads = _number(then, "processes"), _number(then, "threads")
    told = os.environ.get("WORLD_SIZE", "1")
    here = int(told) if told.isdecimal() else 1
    if here != (processes or 1):
        how = f"torchrun --nproc-per-node {processes} -m krdistill" if processes and processes > 1 else "krdistill"
        raise RunFolderError(
            f"{run_folder} was made by {processes or 1} processes, and these are {here}. Start it as: "
            f"{how} rerun {run_folder}."
        )
    console, first = make_console(), os.environ.get("RANK", "0") == "0"

    def check(plan: Plan) -> None:
        """Other data are refused; what else is otherwise is said."""
        from ..pipeline import checksums
        from ..runfolder import environment

        split = plan.data.split["checksum"]
        if then.get("split_checksum") not in (None, split):
            raise DataError(
                f"The data are others than those of {run_folder}: split checksum {split[:12]}, then "
                f"{str(then['split_checksum'])[:12]}. Nothing was trained."
            )
        if first:
            now = {**environment(plan.device, here), "inputs": checksums(plan.config)}
            _say(console, "otherwise than in the first run", circumstances(then, now))

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        start(config, again, check=check)
    finally:
        torch.set_num_threads(before)
    if not first:
        return
    found = compare_runs(run_folder, again)
    console.print()
    if not found:
        console.print(
            f"equal to {run_folder}: metrics, predictions and weights, bit for bit", highlight=False, soft_wrap=True
        )
        return
    _say(console, f"differs from {run_folder}", found)
    _say(console, "what was otherwise", circumstances(then, read_provenance(again)) or ["nothing that is known"])
    sys.exit(DIFFERS)


def _number(facts: dict[str, object], name: str) -> int | None:
    value = facts.get(name)
    return value if isinstance(value, int) and value > 0 else None


def _say(console: Console, title: str, lines: list[str]) -> None:
    from rich.markup import escape

    if lines:
        more = [f"and {len(lines) - _SHOWN:,} more"] if len(lines) > _SHOWN else []
        console.print(escape("\n  ".join([f"{title}:", *lines[:_SHOWN], *more])), highlight=False, soft_wrap=True)
