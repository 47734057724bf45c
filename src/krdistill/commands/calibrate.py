"""`krdistill calibrate`: how sure a network of a finished run may be."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from ..errors import ConfigError
from .shared import make_console, needs_packages

_METHODS = "none|temperature|balanced-temperature|vector|head-to-tail|ets|isotonic|histogram|all"


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option(
    "--method", "methods", required=True, multiple=True, metavar=_METHODS,
    help="How; several may be given, or all. One alone becomes the network's own, which export takes along.",
)  # fmt: skip
@click.option(
    "--network", default="student", show_default=True, metavar="student|teacher|BASELINE",
    help="Which network of the run; a baseline by its key.",
)  # fmt: skip
def calibrate(run_folder: Path, methods: tuple[str, ...], network: str) -> None:
    """Fit how sure a network of a finished run may be, and judge it on the run's test part.

    Fitted on the run's validation part (data.val_fraction), which is as long-tailed as training. Errors are printed
    over all and per group, before and after; calibration.json and the reliability plots are written into RUN.
    """
    from ..calibration import METHODS

    chosen = tuple(METHODS) if "all" in methods else tuple(dict.fromkeys(methods))
    if "all" in methods and len(set(methods)) > 1:
        raise ConfigError("--method all is every method; leave the others out.")
    with needs_packages():
        from ..calibrating import CALIBRATION, calibrate_run, check_methods, figure_name
    check_methods(chosen)
    console = make_console()
    with console.status("reading the data") as status:
        found = calibrate_run(run_folder, chosen, network=network, on_step=status.update)
    from ..console import print_table
    from ..reporting.tables import calibration_rows

    for i, (head, rows) in enumerate(calibration_rows(found, chosen)):
        if i:
            console.print()
        print_table(console, head, rows)
    for note in found["notes"]:
        console.print(note, style="dim", highlight=False, markup=False)
    console.print(f"\n{network}'s own  {_own(found)}", highlight=False, markup=False)
    console.print(f"written  {run_folder / CALIBRATION}, {figure_name(network)}", highlight=False, markup=False)


def _own(found: Mapping[str, Any]) -> str:
    from ..calibration import Calibrator

    if found["method"] is None:
        return "none yet: give one --method alone to choose it"
    return Calibrator.from_dict(found["methods"][found["method"]]["calibrator"]).words()
