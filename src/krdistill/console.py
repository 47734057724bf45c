"""What a person sees in the terminal: tables, the plan of a run, progress bars, errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table

from .events import Events
from .kinds import NOUNS
from .reporting.tables import clean

if TYPE_CHECKING:
    from .pipeline import Plan


def duration(seconds: float) -> str:
    """Seconds in the words a person would use.

    >>> duration(42), duration(200), duration(7300)
    ('42 s', '3 min 20 s', '2 h 2 min')
    """
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    if s < 600:
        return f"{s // 60} min {s % 60} s" if s % 60 else f"{s // 60} min"
    if s < 3600:
        return f"{round(s / 60)} min"
    return f"{s // 3600} h {s % 3600 // 60} min"


class PlainConsole(Console):
    """A console on which no text commands the terminal: a class or file that a stranger named may hold escapes."""

    def render(self, renderable: Any, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield Segment("\n".join(map(clean, segment.text.split("\n"))), segment.style)


def print_table(console: Console, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A plain table of one text column and number columns, cut into several below each other where it is too wide."""
    rows = [[clean(cell) for cell in row] for row in rows]
    widths = [max(len(line) for line in column) for column in zip(headers, *rows, strict=True)]
    blocks: list[list[int]] = [[]]
    for i in range(1, len(headers)):
        taken = widths[0] + sum(widths[j] + 2 for j in blocks[-1])
        if blocks[-1] and taken + widths[i] + 2 > console.width:
            blocks.append([])
        blocks[-1].append(i)
    for number, block in enumerate(blocks):
        made = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for i in (0, *block):
            made.add_column(escape(headers[i]), justify="right" if i else "left", no_wrap=True)
        for row in rows:
            made.add_row(*(escape(row[i]) for i in (0, *block)))
        if number:
            console.print()
        console.print(made, highlight=False)


def print_list(console: Console, title: str, entries: Iterable[tuple[str, str, str]]) -> None:
    """Names with what they are, and a dimmed line of facts below."""
    made = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    made.add_column(title, no_wrap=True)
    made.add_column("")
    for name, words, facts in entries:
        made.add_row(escape(name), escape(words) + (f"\n[dim]{escape(facts)}[/dim]" if facts else ""))
    console.print(made, highlight=False)


def print_facts(console: Console, facts: Iterable[tuple[str, str]]) -> None:
    """Names in bold, what there is to say beside them."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for name, text in facts:
        grid.add_row(name, escape(text))
    console.print(grid)


def print_plan(console: Console, plan: Plan, out: Path) -> None:
    """What a run will do: data, networks, recipes, where the files go."""
    config, prior, groups = plan.config, plan.prior, plan.groups
    counts = prior.counts
    sizes = groups.sizes()
    data = plan.data
    noun = NOUNS[data.train.kind]
    shape = " ".join(filter(None, (noun, data.train.shape)))
    sampler = plan.recipe.drawn(config.student.train.sampler)
    drawn = "" if sampler == "instance" else f"; {noun} drawn {sampler}"
    lines = [
        (
            "data",
            f"{data.name}: {len(data.train.labels):,} training {shape}, "
            + (f"{len(data.val.labels):,} validation, " if data.val is not None else "")
            + f"{len(data.test.labels):,} test; {prior.num_classes} classes, {int(counts.max()):,} to "
            f"{int(counts.min()):,} {noun} (imbalance factor {prior.imbalance_factor:.4g})",
        ),
        ("groups", ", ".join(f"{n} {sizes[n]}" for n in groups.names) + f" classes  ({groups.rule})"),
        ("teacher", _teacher_words(plan)),
        (
            "student",
            f"{config.student.model}, {_train_words(config.student.train)}",
        ),
        ("recipe", f"{config.recipe.key}: {plan.recipe.summary}{drawn}"),
    ]
    if plan.baselines:
        lines.append(("beside it", ", ".join(c.key for c, _, _ in plan.baselines)))
    lines += [("device", f"{plan.device}, seed {config.seed}"), ("files", str(out))]
    print_facts(console, lines)


def _teacher_words(plan: Plan) -> str:
    teacher = plan.config.teacher
    if teacher.run or teacher.file:
        places = [teacher.run] if isinstance(teacher.run, str) else [*(teacher.run or [teacher.file])]
        return f"taken from {', '.join(map(str, places))}"
    if teacher.answers:
        return f"stored answers, {teacher.answers}"
    return f"{teacher.model}, {teacher.classification}, {_train_words(teacher.train)}"


def _train_words(train: Any) -> str:
    extra = f", mixup {train.mixup:g}" if train.mixup else ""
    return (
        f"{train.epochs} epochs, batch {train.batch_size}, {train.optimizer} {train.lr:g}, {train.augmentation}{extra}"
    )


class ConsoleEvents(Events):
    """Shows a run's stages with progress bars; on a plain pipe, a line per stage."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = ""

    def stage(self, name: str, detail: str) -> None:
        self.close()
        self.console.print(f"[bold]{escape(name)}[/bold]  {escape(detail)}", highlight=False)

    def skipped(self, name: str, detail: str) -> None:
        self.close()
        self.console.print(f"[bold]{escape(name)}[/bold]  [dim]{escape(detail)}[/dim]", highlight=False)

    def progress(self, name: str, done: int, total: int) -> None:
        if not self.console.is_terminal:
            return
        if self._bar is None:
            self._bar = Progress(
                SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
                TextColumn("steps"), TimeRemainingColumn(), console=self.console, transient=True,
            )  # fmt: skip
            self._bar.start()
            self._task = self._bar.add_task("training", total=total)
        self._bar.update(self._task, completed=done, total=total, description=self._last or "training")

    def epoch(self, name: str, line: Mapping[str, Any]) -> None:
        test = line.get("test") or line.get("val")
        score = f", {100 * test['top1']:.1f}% {'test' if line.get('test') else 'validation'}" if test else ""
        words = f"epoch {line['epoch']}/{line['epochs']}, loss {line['loss']['total']:.3f}{score}"
        self._last = words
        if line["epoch"] == line["epochs"]:
            self.close()
            self.console.print(f"  [dim]{escape(words)}[/dim]", highlight=False)

    def note(self, text: str) -> None:
        self.close()
        self.console.print(Padding(escape(text), (0, 0, 0, 2)), highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._last = ""
