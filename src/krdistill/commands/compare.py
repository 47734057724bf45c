"""`krdistill compare`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .shared import make_console, needs_packages

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..study import Executor, Status, StudyConfig, StudyEvents, StudyPlan


@click.command()
@click.argument("study", metavar="STUDY.yaml", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Study folder. [default: studies/<name>]")
@click.option("--jobs", type=click.IntRange(1), help="Runs at once, instead of the file's.")
@click.option("--threads", type=click.IntRange(1), help="Threads of each, instead of the file's.")
@click.option("--executor", type=click.Choice(["local", "ray"]), default="local", show_default=True)
@click.option("--address", help="Of a Ray cluster that sees the same files. [default: a cluster on this machine]")
@click.option("--retry", is_flag=True, help="Try again what failed before.")
@click.option("--dry-run", is_flag=True, help="Check every cell and print the plan; train nothing.")
def compare(
    study: Path, out: Path | None, jobs: int | None, threads: int | None, executor: str, address: str | None,
    retry: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Run methods x seeds x data sets x network pairs under one protocol.

    A study that was interrupted goes on where it stopped when the same command is given again, and methods, seeds and
    data sets may be added to its file. The exit status is 1 where a cell failed.
    """
    from ..errors import ConfigError

    if address is not None and executor != "ray":
        raise ConfigError("--address is for --executor ray.")
    with needs_packages():
        from ..study import StudyFolder, collect, measure_students, plan_study, read_study, run_study
    config = read_study(study, jobs=jobs, threads=threads)
    plan = plan_study(config)
    folder = StudyFolder(out if out is not None else Path("studies") / config.name)
    console = make_console()
    _print_plan(console, plan, folder.path)
    if dry_run:
        return
    events = _live(console) if console.is_terminal else _lines(console)
    try:
        status = run_study(plan, folder, _executor(config, executor, address), retry=retry, events=events)
    except KeyboardInterrupt:
        folder.write_results(collect(plan, folder))
        raise
    with console.status("measuring the students") as shown:
        measure_students(plan, folder, on_step=shown.update)
    results = collect(plan, folder)
    folder.write_results(results)
    if not console.is_terminal:
        console.print()
        console.print(_table(status))
    for key, message in status.failures.items():
        console.print(f"failed   {key}: {message}", style="red", highlight=False, markup=False)
    for name in ("results.html", "results.md", "results.json"):
        console.print(f"{name:13}{folder.path / name}", highlight=False)
    if status.failed_cells:
        total = len(plan.cells)
        console.print(
            f"{len(status.failed_cells)} of {total} cells failed; --retry tries them again.", style="bold red"
        )
        sys.exit(1)


def _executor(config: StudyConfig, name: str, address: str | None) -> Executor:
    from ..study import LocalExecutor, RayExecutor

    if name == "ray":
        return RayExecutor(address, config.jobs, config.threads_each)
    return LocalExecutor(config.jobs, config.threads_each)


def _print_plan(console: Console, plan: StudyPlan, out: Path) -> None:
    from ..console import print_facts

    study = plan.study
    teachers = sum(i.kind == "teacher" for i in plan.items.values())
    axes = [("data", study.data), ("pairs", study.pairs), ("teachers", study.teachers)]
    lines = [
        ("study", f"{study.name}, on {study.base}"),
        *((name, ", ".join(labels)) for name, labels in axes if labels),
        ("methods", ", ".join(m.key for m in study.methods) + f"  (differences to {study.reference})"),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("cells", f"{len(plan.cells)} in {len(plan.items) - teachers} runs, {teachers} shared teachers"),
        ("at once", f"{study.jobs}, threads {study.threads_each} each"),
        ("files", str(out)),
    ]
    print_facts(console, lines)


def _title(place: tuple[str, str, str], name: str) -> str:
    return ", ".join(v for v in place if v) or name


def _table(status: Status) -> Table:
    """Rows: methods; columns: places; cells: seeds done of all, mean accuracy so far, time left."""
    from rich.markup import escape
    from rich.table import Table

    from ..console import duration
    from ..study.running import seconds_left
    from ..study.statistics import summarise

    plan = status.plan
    made = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column("accuracy, all images")
    for place in plan.places:
        made.add_column(escape(_title(place, plan.study.name)), justify="right")
    lines = [("teacher", {p: {c.teacher_item for c in plan.cells if c.place == p} for p in plan.places}, "teacher")]
    for method in plan.study.methods:
        own = {p: {c.item for c in plan.cells if c.place == p and c.method == method.key} for p in plan.places}
        lines.append((method.key, own, "student"))
    for label, by_place, network in lines:
        texts = []
        for keys in by_place.values():
            done = [status.results[k]["networks"][network]["last"]["top1"] for k in keys if k in status.results]
            failed = sum(status.states[k] == "failed" for k in keys)
            running = sum(status.states[k] == "running" for k in keys)
            mean = summarise(done).mean
            words = [f"{len(done)}/{len(keys)}" + (f" [red]{failed} failed[/red]" if failed else "")]
            words += [f"{100 * mean:.1f}%"] if mean is not None else []
            words += ["[cyan]running[/cyan]"] if running else []
            left = seconds_left(status, {k: label for k in keys}) if len(done) + failed < len(keys) else None
            words += [f"[dim]{duration(left)} left[/dim]"] if left else []
            texts.append("  ".join(words))
        made.add_row(escape(label), *texts)
    return made


def _live(console: Console) -> StudyEvents:
    """A table that is drawn again while the study goes on."""
    from rich.live import Live

    from ..study import StudyEvents

    live = Live(console=console, auto_refresh=False)

    class Shown(StudyEvents):
        def tick(self, status: Status) -> None:
            live.update(_table(status), refresh=True)

        def __enter__(self) -> Shown:
            live.start()
            return self

        def __exit__(self, *_: object) -> None:
            live.stop()

    return Shown()


def _lines(console: Console) -> StudyEvents:
    """A line for whatever ends, where nobody looks on."""
    from ..console import duration
    from ..study import StudyEvents
    from ..study.running import seconds_left

    class Printed(StudyEvents):
        def _say(self, key: str, words: str, status: Status) -> None:
            plan = status.plan
            over = sum(s in ("done", "failed") for s in status.states.values())
            left = seconds_left(status, {c.item: c.method for c in plan.cells})
            name = next((c.title for c in plan.cells if c.item == key), key)
            rest = f", {duration(left)} left" if left else ""
            console.print(f"[{over}/{len(plan.items)}{rest}] {name}: {words}", highlight=False, markup=False)

        def finished(self, key: str, status: Status) -> None:
            result = status.results[key]
            network = result["networks"]["teacher" if result["kind"] == "teacher" else "student"]
            self._say(key, f"{100 * network['last']['top1']:.1f}%, {duration(result['seconds'])}", status)

        def failed(self, key: str, message: str, status: Status) -> None:
            self._say(key, f"failed: {message}", status)

    return Printed()
