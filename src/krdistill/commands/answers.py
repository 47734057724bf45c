"""`krdistill answers`: what a network of a finished run says, with another head where asked for, as a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from .shared import make_console, needs_packages

_HEADS = "own|balanced-softmax|crt|tau-norm|lws|ncm|dlsa"


@click.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--head", default="own", show_default=True, metavar=_HEADS, help="What answers on its frozen features.")
@click.option(
    "--network", default="teacher", show_default=True, metavar="teacher|student|BASELINE",
    help="Which network of the run; a baseline by its key.",
)  # fmt: skip
@click.option("--calibrated", metavar="METHOD", help="Calibrate the answers, as krdistill calibrate does.")
@click.option("--depth", type=click.IntRange(min=0), help="dlsa: levels at most; chosen up to it.  [default: 2]")
@click.option("--clusters", type=click.IntRange(min=1), help="dlsa: clusters of a level.  [default: 50]")
@click.option("--out", type=click.Path(path_type=Path), help=".npz file.  [default: RUN/answers-NETWORK-HEAD.npz]")
def answers(
    run_folder: Path,
    head: str,
    network: str,
    calibrated: str | None,
    depth: int | None,
    clusters: int | None,
    out: Path | None,
) -> None:
    """Store what a network of a run answers, as a teacher for other runs: --teacher.answers FILE.

    Another head is fitted on its frozen features of the training part; tau-norm and dlsa choose, and a calibrator is
    fitted, on the validation part (data.val_fraction). The accuracy on the run's test part is printed, over all and per
    group.
    """
    from ..errors import ConfigError

    options: dict[str, Any] = {k: v for k, v in (("depth", depth), ("clusters", clusters)) if v is not None}
    if options and head != "dlsa":
        raise ConfigError(f"--{next(iter(options))} is for --head dlsa.")
    with needs_packages():
        from ..answering import answer_run
        from ..calibration import Calibrator
    console = make_console()
    with console.status("reading the data") as status:
        path, found = answer_run(
            run_folder, head=head, network=network, calibrated=calibrated, out=out, on_step=status.update, **options
        )
    for key in ("tau", "depth"):
        if key in found:
            console.print(f"{key} {found[key]:g}, chosen on the validation part", highlight=False)
    if "calibrator" in found:
        words = Calibrator.from_dict(found["calibrator"]).words()
        console.print(f"calibrated by {words}, fitted on the validation part", highlight=False)
    groups = [f"{n} {100 * g['accuracy']:.1f}" for n, g in found["test"]["groups"].items() if g is not None]
    console.print(f"test  {100 * found['test']['top1']:.1f} %   {'   '.join(groups)}", highlight=False)
    console.print(f"written  {path}", highlight=False, markup=False)
