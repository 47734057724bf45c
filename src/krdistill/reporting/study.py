"""The pages of a study: tables, figures, Markdown and HTML, made from what ``results.json`` holds and nothing else."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from ..kinds import noun_of
from .tables import NA, clean, count

Place = Mapping[str, Any]
_GROUP_WORDS = {
    "shot": "many, medium, few: classes of more than 100, 20 to 100, fewer than 20 training {}",
    "thirds": "head, medium, tail third: the first 33 %, next 34 % and last 33 % of the classes by training {}",
    "own": "many, medium, few (own): by the study's own thresholds",
}
_SCALARS = (
    ("top1", "all", "accuracy over all {}", "high"),
    ("balanced_accuracy", "balanced", "mean of the classes' accuracies", "high"),
)


@dataclass(frozen=True)
class StudyColumn:
    """A column of a study's tables: the metric's name in ``results.json``, its header and what it means."""

    metric: str
    header: str
    title: str
    better: str = "high"


# Tables ---------------------------------------------------------------------------------------------------------------


def study_columns(place: Place) -> list[StudyColumn]:
    """The metrics of one place that are shown, the last epoch's first and the best epoch's apart from them."""
    names = dict.fromkeys(n for row in (*place["rows"], *place["teachers"]) for n in row["metrics"])
    noun = noun_of(place["split"])
    columns = [StudyColumn(f"last.{m}", header, title.format(noun), better) for m, header, title, better in _SCALARS]
    for name in names:
        part, *rest = name.split(".")
        if part == "last" and rest[0] == "groups":
            columns.append(StudyColumn(name, group_header(name), f"mean accuracy of the classes: {group_header(name)}"))
    columns.append(StudyColumn("last.ece", "ECE", "expected calibration error", "low"))
    part = next((r["chosen_on"] for r in place["rows"] if r.get("chosen_on")), None)
    if part:
        rare = rare_metric(place)
        for name, header in (("top1", "all"), (rare.removeprefix("last.") if rare else "", group_header(rare))):
            if f"best.{name}" in names:
                title = f"{header}, of the epoch that was best over all {part} {noun}, on those"
                columns.append(StudyColumn(f"best.{name}", f"{header}, best epoch ({clean(part)})", title))
    return [c for c in columns if c.metric in names]


def group_header(metric: str | None) -> str:
    """A group's metric in words.

    >>> group_header("last.groups.shot.few"), group_header("last.groups.thirds.tail")
    ('few', 'tail third')
    """
    if metric is None:
        return NA
    _, _, rule, name = metric.split(".", 3)
    return clean(name) + {"thirds": " third", "own": " (own)"}.get(rule, "")


def group_words(metric: str) -> str:
    """A group's classes within a sentence.

    >>> group_words("last.groups.shot.few"), group_words("last.groups.thirds.tail")
    ('few-shot classes', 'tail third of the classes')
    """
    _, _, rule, name = metric.split(".", 3)
    return f"{clean(name)} third of the classes" if rule == "thirds" else f"{clean(name)}-shot classes"


def rare_metric(place: Place) -> str | None:
    """The metric of the rarest classes: of the run's own groups the last one, of the usual ones where that is empty."""
    last: dict[str, str] = {}
    seen = set()
    for row in place["rows"]:
        for name, entry in row["metrics"].items():
            if name.startswith("last.groups."):
                last[name.split(".")[2]] = name
                seen |= {name} if entry["n"] else set()
    return next((name for name in last.values() if name in seen), None)


def mean_cell(entry: Mapping[str, Any] | None, digits: int = 1) -> str:
    """Mean, sample standard deviation and number of seeds, in percent.

    >>> mean_cell({"mean": 0.456, "std": 0.0123, "n": 3}), mean_cell({"mean": 0.456, "std": None, "n": 1}, digits=2)
    ('45.6 ± 1.2 (n=3)', '45.60 (n=1)')
    >>> mean_cell(None)
    'n/a'
    """
    if entry is None or entry["mean"] is None:
        return NA
    spread = "" if entry["std"] is None else f" ± {100 * entry['std']:.{digits}f}"
    return f"{100 * entry['mean']:.{digits}f}{spread} (n={entry['n']})"


def difference_cell(entry: Mapping[str, Any] | None, digits: int = 1) -> str:
    """A paired difference in percentage points with its interval and number of seeds.

    >>> difference_cell({"mean": 0.012, "half_width": 0.02, "n": 3})
    '+1.2 [-0.8, +3.2] (n=3)'
    >>> difference_cell({"mean": 0.012, "half_width": None, "n": 1})
    '+1.2 (one seed, no interval)'
    """
    if entry is None:
        return NA
    mean, half = 100 * entry["mean"], entry["half_width"]
    if half is None:
        return f"{mean:+.{digits}f} (one seed, no interval)"
    low, high = mean - 100 * half, mean + 100 * half
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}] (n={entry['n']})"


def clear(entry: Mapping[str, Any] | None) -> bool:
    """Whether an interval leaves zero out."""
    return bool(entry and entry["half_width"] is not None and abs(entry["mean"]) > entry["half_width"])


def means_table(place: Place) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: the shared teachers, then every method, with the seeds it lacks."""
    columns = study_columns(place)
    lines = [(row["label"], row, "") for row in place["teachers"]]
    lines += [(row["method"], row, ", ".join(map(str, row["missing"])) or "none") for row in place["rows"]]
    return ["", *(c.header for c in columns), "missing seeds"], [
        [clean(name), *(mean_cell(row["metrics"].get(c.metric)) for c in columns), missing]
        for name, row, missing in lines
    ]


def differences_table(place: Place, baseline: str) -> tuple[list[str], list[list[str]]]:
    """Headers and rows: every other method minus the baseline, over the seeds that both have."""
    columns = study_columns(place)
    rows = []
    for row in place["rows"]:
        if row["method"] != baseline:
            entries = [(row["metrics"].get(c.metric) or {}).get("difference") for c in columns]
            rows.append([clean(row["method"]), *(difference_cell(e) for e in entries)])
    return ["", *(c.header for c in columns)], rows


def place_title(place: Place, name: str) -> str:
    """What a place is called: its labels, or the study's name where it has none."""
    return ", ".join(clean(v) for v in (place["data"], place["pair"], place["teacher"]) if v) or clean(name)


def place_facts(place: Place) -> list[tuple[str, str]]:
    """What was learnt from, by which networks, and how the groups are cut."""
    facts = []
    split = place["split"]
    if split is not None:
        facts.append(
            (
                "data",
                f"{clean(split['name'])}, {split['classes']:,} classes of {split['largest_class']:,} to "
                f"{split['smallest_class']:,} training {noun_of(split)}",
            )
        )
        parts = [f"{split[f'{k}_images']:,} {words}" for k, words in _PARTS if split[f"{k}_images"]]
        facts.append((noun_of(split), ", ".join(parts)))
    for what, rows in (("teacher", place["teachers"]), ("student", place["rows"])):
        models = dict.fromkeys((r["model"], r["parameters"], r["macs"]) for r in rows if r.get("model"))
        words = [
            f"{clean(m)}, {count(p)} parameters" + (f", {count(macs)} MACs" if macs else "") for m, p, macs in models
        ]
        if words:
            facts.append((what, "; ".join(words)))
    rules = dict.fromkeys(n.split(".")[2] for r in place["rows"] for n in r["metrics"] if n.startswith("last.groups."))
    facts += [("groups", _GROUP_WORDS[rule].format(noun_of(split))) for rule in rules if rule in _GROUP_WORDS]
    return facts


_PARTS = (("train", "training"), ("val", "validation"), ("test", "test"))


# Compression ----------------------------------------------------------------------------------------------------------


_SIZES = {  # and how an axis calls them
    "parameters": "parameters of the student",
    "macs": "multiply-accumulates of the student",
    "milliseconds": "milliseconds of the student for one example",
}


def pareto_points(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Accuracy against size, where a study's pairs differ in the student.

    Args:
        results: what ``results.json`` holds.

    Returns:
        One entry per data set and kind of teacher with students of several sizes: ``data``, ``teacher``, ``rare`` (the
        metric of the rarest classes) and ``points``: ``pair``, ``method``, ``model``, ``parameters``, ``macs``,
        ``milliseconds`` (of one example as an ONNX file, one thread), ``ratio`` (the teacher's parameters over the
        student's), ``all`` and ``few`` (summaries) and ``front``: for each of the pairs ``"all parameters"``,
        ``"few macs"`` ... whether no other point is as small and better, or as good and smaller.
    """
    groups: dict[tuple[str, str], list[Place]] = {}
    for place in results["places"]:
        groups.setdefault((place["data"], place["teacher"]), []).append(place)
    found = []
    for (data, teacher), places in groups.items():
        points = []
        rare = next((r for r in map(rare_metric, places) if r), None)
        for place in places:
            size = next((t["parameters"] for t in place["teachers"] if t["parameters"]), None)
            for row in place["rows"]:
                if not row["parameters"]:
                    continue
                points.append(
                    {
                        "pair": place["pair"], "method": row["method"], "model": row["model"],
                        "parameters": row["parameters"], "macs": row["macs"],
                        "milliseconds": (place.get("device") or {}).get("median_ms"),
                        "ratio": size / row["parameters"] if size else None,
                        "all": row["metrics"].get("last.top1"), "few": row["metrics"].get(rare) if rare else None,
                    }
                )  # fmt: skip
        if len({p["parameters"] for p in points}) < 2:
            continue
        for point in points:
            point["front"] = {
                f"{what} {size}": _on_front(point, points, what, size) for what in ("all", "few") for size in _SIZES
            }
        noun = noun_of(next((place["split"] for place in places if place["split"]), None))
        found.append({"data": data, "teacher": teacher, "rare": rare, "points": points, "noun": noun})
    return found


def _on_front(point: Mapping[str, Any], points: Sequence[Mapping[str, Any]], what: str, size: str) -> bool:
    known = [(p[size], p[what]["mean"]) for p in points if p[size] and p[what] and p[what]["mean"] is not None]
    if not point[size] or not point[what] or point[what]["mean"] is None:
        return False
    x, y = point[size], point[what]["mean"]
    return not any(a <= x and b >= y and (a, b) != (x, y) for a, b in known)


def pareto_table(entry: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Headers and rows of one entry of :func:`pareto_points`, smallest student first."""
    rows = []
    for p in sorted(entry["points"], key=lambda p: (p["parameters"], p["method"])):
        marks = [
            what
            for what, key in (("all", "all parameters"), (group_header(entry["rare"]), "few parameters"))
            if p["front"][key]
        ]
        ratio = NA if p["ratio"] is None else f"{p['ratio']:.1f}x"
        time = NA if p["milliseconds"] is None else f"{p['milliseconds']:.3f}"
        rows.append(
            [
                *map(clean, (p["pair"], p["model"], p["method"])), count(p["parameters"]), count(p["macs"]), time,
                ratio, mean_cell(p["all"]), mean_cell(p["few"]), ", ".join(marks) or "-",
            ]
        )  # fmt: skip
    sizes = ["parameters", "MACs", "ms", "compression"]
    return ["pair", "student", "method", *sizes, "all", group_header(entry["rare"]), "on the front of"], rows


# Figures --------------------------------------------------------------------------------------------------------------


def dot_plot(place: Place, metric: str, title: str, name: str) -> str:
    """Every method's mean with its 95 % interval, and its seeds as small dots; the teachers stand above them.

    Args:
        place: of the results.
        metric: such as ``last.top1``.
        title: of the figure.
        name: of the figure within its page.

    Returns:
        An SVG element for :mod:`krdistill.reporting.html`'s pages.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    from .figures import PALETTE, _drawing, _short

    lines = [(r["label"], r["metrics"].get(metric), "grey") for r in place["teachers"]]
    lines += [(r["method"], r["metrics"].get(metric), "vermilion") for r in place["rows"]]
    with _drawing(name, (4.2, 0.75 + 0.26 * len(lines)), title) as (axes, done):
        for y, (_, entry, color) in enumerate(lines):
            if not entry or entry["mean"] is None:
                axes.annotate(NA, (0.02, y), xycoords=axes.get_yaxis_transform(), va="center", color=PALETTE["muted"])
                continue
            values = list(entry["values"].values())
            axes.scatter(
                values, [y + 0.26] * len(values), s=7, color=PALETTE[color], alpha=0.55, linewidth=0, zorder=2,
                clip_on=False,
            )  # fmt: skip
            if entry["half_width"] is not None:
                low, high = (max(0.0, min(1.0, entry["mean"] + s * entry["half_width"])) for s in (-1, 1))
                axes.hlines(y, low, high, color=PALETTE[color], linewidth=1.4, zorder=2)
            axes.scatter([entry["mean"]], [y], s=26, color=PALETTE[color], linewidth=0, zorder=3, clip_on=False)
        axes.set_yticks(range(len(lines)), [_short(label, 30) for label, _, _ in lines])
        axes.set_ylim(len(lines) - 0.4, -0.5)
        low, high = axes.get_xlim()
        axes.set_xlim(max(0.0, low), min(1.0, high) if high <= 1.0 else 1.02)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0 if high - low > 0.05 else 1))
        axes.tick_params(axis="y", length=0)
        axes.set_title(title)
    return done()


def pareto_plot(entry: Mapping[str, Any], what: str, size: str, name: str) -> str:
    """Accuracy against size on a log axis, one colour per method; a line joins the front.

    Args:
        entry: of :func:`pareto_points`.
        what: ``all`` or ``few``.
        size: ``parameters``, ``macs`` or ``milliseconds``.
        name: of the figure within its page.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator, PercentFormatter

    from .figures import PALETTE, _drawing, _short

    words = f"all {entry.get('noun', 'images')}" if what == "all" else group_words(entry["rare"])
    points = [p for p in entry["points"] if p[size] and p[what] and p[what]["mean"] is not None]
    methods = list(dict.fromkeys(p["method"] for p in points))
    shades = ("vermilion", "blue", "green", "orange", "purple", "sky", "grey")
    with _drawing(name, (4.6, 3.0), f"accuracy on {words} against {size}") as (axes, done):
        axes.set_xscale("log")
        for i, method in enumerate(methods):
            color, marker = PALETTE[shades[i % len(shades)]], "osD^v<>"[i % 7]
            aside = 1.025 ** (i - (len(methods) - 1) / 2)  # methods of one student stand side by side
            mine = [p for p in points if p["method"] == method]
            for p in mine:
                if p[what]["half_width"] is not None:
                    low, high = (max(0.0, min(1.0, p[what]["mean"] + s * p[what]["half_width"])) for s in (-1, 1))
                    axes.vlines(p[size] * aside, low, high, color=color, linewidth=1)
            axes.scatter(
                [p[size] * aside for p in mine], [p[what]["mean"] for p in mine], s=24, color=color, marker=marker,
                linewidth=0, zorder=3, label=_short(method, 18),
            )  # fmt: skip
        sizes = [p[size] for p in points]
        low, high = min(sizes) / 1.4, max(sizes) * 1.4
        front = sorted({(p[size], p[what]["mean"]) for p in points if p["front"][f"{what} {size}"]})
        axes.step(
            [*(x for x, _ in front), high], [*(y for _, y in front), front[-1][1]], where="post",
            color=PALETTE["muted"], linewidth=0.9, linestyle=(0, (4, 3)), zorder=1,
        )  # fmt: skip
        axes.set_xlim(low, high)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: re.sub(r"\.0(?=\D|$)", "", count(v))))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes.set(xlabel=f"{_SIZES[size]} (log scale)", ylabel="accuracy")
        axes.set_title(words)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), handletextpad=0.2)
    return done()


# Pages ----------------------------------------------------------------------------------------------------------------


def study_markdown(results: Mapping[str, Any]) -> str:
    """The study as Markdown."""
    lines = [f"# {_plain(results['name'])}", "", *map(_plain, _summary_lines(results)), ""]
    for place in results["places"]:
        lines += [f"## {_plain(place_title(place, results['name']))}", ""]
        lines += [f"- {name}: {_plain(text)}" for name, text in place_facts(place)]
        lines += [f"- {_plain(note)}" for note in place["notes"]]
        lines += ["", MEANS_WORDS, "", *_pipes(*means_table(place)), ""]
        headers, rows = differences_table(place, results["baseline"])
        if rows:
            lines += [differences_words(results), "", *_pipes(headers, rows), ""]
    for entry in pareto_points(results):
        title = ", ".join(_plain(v) for v in (entry["data"], entry["teacher"]) if v)
        lines += [f"## Accuracy against size{f': {title}' if title else ''}", "", *_pipes(*pareto_table(entry)), ""]
    return "\n".join(lines).rstrip() + "\n"


MEANS_WORDS = (
    "Mean ± sample standard deviation over the seeds, in percent (n: number of seeds). The last epoch is the headline; "
    "what the best epoch reached stands in columns of its own."
)


def differences_words(results: Mapping[str, Any]) -> str:
    return (
        f"Difference to {clean(results['baseline'])} in percentage points, paired by seed, with the "
        f"{100 * results['confidence']:g} % interval of Student's t."
    )


def _summary_lines(results: Mapping[str, Any]) -> list[str]:
    """How much of the study is done, and on what it was run."""
    states = [c["state"] for c in results["cells"]]
    done, failed, missing = (states.count(s) for s in ("done", "failed", "missing"))
    words = f"{done} of {len(states)} cells are done"
    words += "".join(f", {n} {what}" for n, what in ((failed, "failed"), (missing, "not run yet")) if n)
    lines = [f"{words}. Seeds {', '.join(map(str, results['seeds']))}; baseline {clean(results['baseline'])}."]
    found = [c["result"] for c in results["cells"] if c["result"]] + list(results["teachers"].values())
    for key, what in _SAID.items():
        values = dict.fromkeys(str(r["provenance"][key]) for r in found if r["provenance"].get(key) is not None)
        if values:
            lines.append(f"{what} {', '.join(map(clean, values))};")
    seconds = {r["key"]: r["seconds"] for r in found}
    if len(lines) > 1:
        lines = [
            lines[0],
            "",
            "Run with " + " ".join(lines[1:]) + f" {sum(seconds.values()) / 3600:.2f} hours of work.",
        ]
    return lines


_SAID = {k: k for k in ("krdistill", "git", "torch", "processor", "device", "threads")} | {"git": "commit"}


def _pipes(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_plain(cell) for cell in cells) + " |"

    return [line(headers), "|" + "---|" * len(headers), *map(line, rows)]


def _plain(text: str) -> str:
    return clean(text).replace("|", "\\|").replace("<", "&lt;")


def study_html(results: Mapping[str, Any]) -> str:
    """The study as one HTML page: no script, no network, figures inside, everything escaped.

    Raises:
        MissingDependencyError: matplotlib or jinja2 is not installed.
    """
    from .html import Markup, _finalize, jinja2  # matplotlib and jinja2 are not needed before

    places = []
    for i, place in enumerate(results["places"]):
        columns = study_columns(place)
        shown = [("last.top1", f"all {noun_of(place['split'])}")]
        rare = rare_metric(place)
        if rare:
            shown.append((rare, group_words(rare)))
        any_done = any(row["metrics"] for row in (*place["rows"], *place["teachers"]))
        gaps = []
        for row in place["rows"]:
            if row["method"] != results["baseline"]:
                entries = [(row["metrics"].get(c.metric) or {}).get("difference") for c in columns]
                gaps.append((row["method"], [(difference_cell(e), clear(e)) for e in entries]))
        places.append(
            {
                "title": place_title(place, results["name"]),
                "facts": place_facts(place),
                "notes": place["notes"],
                "columns": columns,
                "teachers": [
                    (r["label"], [mean_cell(r["metrics"].get(c.metric)) for c in columns]) for r in place["teachers"]
                ],
                "rows": [(r, [mean_cell(r["metrics"].get(c.metric)) for c in columns]) for r in place["rows"]],
                "gaps": gaps,
                "figures": [
                    Markup(dot_plot(place, metric, f"accuracy, {words}", f"dots-{i}-{j}"))
                    for j, (metric, words) in enumerate(shown)
                ]
                if any_done
                else [],
            }
        )
    fronts = []
    for i, entry in enumerate(pareto_points(results)):
        sizes = [size for size in _SIZES if all(p[size] for p in entry["points"])]
        kinds = [(w, s) for s in sizes for w in ("all", "few") if any(p[w] and p[w]["n"] for p in entry["points"])]
        fronts.append(
            {
                "title": ", ".join(v for v in (entry["data"], entry["teacher"]) if v),
                "table": pareto_table(entry),
                "figures": [Markup(pareto_plot(entry, w, s, f"front-{i}-{w}-{s}")) for w, s in kinds],
            }
        )
    template = resources.files(__package__).joinpath("template.html.j2").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", template, re.DOTALL)
    assert style is not None
    source = resources.files(__package__).joinpath("study.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_finalize
    )
    cells = results["cells"]
    return environment.from_string(source).render(
        title=results["name"], style=Markup(style[1]), summary=[s for s in _summary_lines(results) if s], places=places,
        means_words=MEANS_WORDS, differences_words=differences_words(results), fronts=fronts, cell_list=cells,
        cells_done=sum(c["state"] == "done" for c in cells), confidence=results["confidence"], NA=NA,
    )  # fmt: skip
