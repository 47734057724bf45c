"""`krdistill condense`: a small set with soft labels in place of a long-tailed one."""

from __future__ import annotations

from pathlib import Path

import click

from ..errors import ConfigError
from .shared import OVERRIDES, make_console, needs_packages, overrides


@click.command(context_settings=OVERRIDES)
@click.argument("data", metavar="PRESET|CONFIG.yaml|DATA")
@click.option("--ipc", type=int, required=True, help="Images per class.")
@click.option(
    "--method", required=True, metavar="random|herding|dm",
    help="Real images by lot, real images near the class mean, or synthetic ones by distribution matching.",
)  # fmt: skip
@click.option("--rectify", default="none", show_default=True, metavar="none|adsa", help="Of the teacher's answers.")
@click.option("--teacher", type=click.Path(path_type=Path), metavar="RUN", help="Take the teacher of an earlier run.")
@click.option("--views", type=int, default=8, show_default=True, help="A label is the mean over so many; 0: as it is.")
@click.option("--iterations", type=int, help="Steps of dm. [default: 2000]")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the small set.")
@click.pass_context
def condense(
    ctx: click.Context, data: str, ipc: int, method: str, rectify: str, teacher: Path | None, views: int,
    iterations: int | None, out: Path,
) -> None:  # fmt: skip
    """Make a small set of so many images per class, with a teacher's soft labels, of a long-tailed set.

    The teacher is trained as the preset or configuration says, or taken with --teacher; for DATA (a known data set or
    a path) it has to be. --section.key VALUE as for run. OUT/run.yaml then trains a student on the small set:
    krdistill run OUT/run.yaml. Given again, an interrupted command goes on.
    """
    from ..config import list_presets, load_config

    given = overrides(ctx.args)
    if data in list_presets() or Path(data).suffix.lower() in (".yaml", ".yml"):
        config = load_config(data, given)
    elif teacher is None and not {"teacher.run", "teacher.file"} & {key for key, _ in given}:
        raise ConfigError(
            f"No teacher: {data} says nothing of one. Give --teacher RUN, the folder of a finished run, or a preset "
            "(`krdistill list presets`) that trains one, with --data.source for other data."
        )
    else:
        config = load_config({"data": {"source": data}}, given)
    if teacher is not None:
        plain = config.as_dict()
        config = load_config({**plain, "teacher": {**plain["teacher"], "run": str(teacher)}})
    with needs_packages():
        from .. import console as show
        from ..condense import CondenseOptions
        from ..condense import condense as make
    options = CondenseOptions(ipc, method, rectify, views, iterations)
    console = make_console()
    events = show.ConsoleEvents(console)
    try:
        found = make(config, options, out, events=events)
    finally:
        events.close()
    labels = found["labels"]
    spread, top1 = labels["spread"], labels["top1"]
    say = f"tau {labels['tau']:.2f}, spread of the class confidences {spread['before']:.3f} -> {spread['after']:.3f}"
    if rectify == "none":
        say = f"not rectified, spread of the class confidences {spread['before']:.3f}"
    console.print(f"labels   {say}, right {100 * top1['after']:.1f} %", highlight=False, markup=False)
    console.print(f"images   {out / 'condensed.npz'}", highlight=False, markup=False)
    console.print(f"student  krdistill run {out / 'run.yaml'}", highlight=False, markup=False)
