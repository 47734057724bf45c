"""`krdistill inspect`: what a data set holds, before anything is trained on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ArgumentError, ConfigError
from .shared import OVERRIDES, make_console, needs_packages, overrides

if TYPE_CHECKING:
    from rich.console import Console

_LISTED = 12  # up to so many classes are all shown; of more, the largest and the smallest


@click.command(context_settings=OVERRIDES)
@click.argument("data", metavar="DATA")
@click.option("--out", type=click.Path(path_type=Path), help="Write a page (.html) or the figure (.png, .svg, .pdf).")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def inspect(ctx: click.Context, data: str, out: Path | None, as_json: bool) -> None:
    """Look at a data set: class counts and groups, sizes, unreadable files, copies within and across parts.

    DATA is a known data set, a folder of images, a manifest (.csv, .tsv, .parquet), list files (.txt), a NumPy archive
    (.npz) or a saved Hugging Face data set. --data.KEY VALUE as for run, such as --data.root, --data.groups thirds or
    --data.split_by group.
    """
    from ..config import DataConfig, load_config

    if out is not None and out.suffix.lower() not in (".html", ".png", ".svg", ".pdf"):
        raise ArgumentError(f"Expected --out with the suffix .html, .png, .svg or .pdf, got {out.name}.")
    given = overrides(ctx.args)
    strange = [key for key, _ in given if not key.startswith("data.")]
    if strange:
        raise ConfigError(f"--{strange[0]}: inspect takes --data.KEY VALUE only, such as --data.root FOLDER.")
    config: DataConfig = load_config({"data": {"source": data}}, given).data
    console = make_console()
    with needs_packages():
        from ..data.inspection import inspect_data

        with console.status("looking at the images") as status:
            found = inspect_data(
                config, lambda done, total: status.update(f"looking at the images: {done:,} of {total:,}")
            )
        if out is not None:
            _write(out, found)
    if as_json:
        click.echo(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False))
        return
    _print(console, found)
    if out is not None:
        console.print(f"\nwritten  {out}", highlight=False)


def _part_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["part", found["noun"], "classes", "largest", "smallest", "imbalance factor"]
    rows = [
        [part, *(f"{p[key]:,}" for key in ("images", "classes", "largest", "smallest")), f"{p['imbalance_factor']:.4g}"]
        for part, p in found["parts"].items()
    ]
    return head, rows


def _group_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    parts = list(found["parts"])
    rows = [[g["name"], f"{g['classes']:,}", *(f"{g[p]:,}" for p in parts)] for g in found["groups"]["rows"]]
    return ["group", "classes", *parts], rows


def _class_rows(found: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    parts = list(found["parts"])
    classes = sorted(found["classes"], key=lambda c: -c["train"])
    rows = [[c["name"], c["group"], *(f"{c[p]:,}" for p in parts)] for c in classes]
    if len(rows) > _LISTED:
        half = _LISTED // 2
        rows = [*rows[:half], [f"({len(rows) - 2 * half:,} more)", *[""] * (len(parts) + 1)], *rows[-half:]]
    return ["class", "group", *parts], rows


def _facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What there is to say beside the tables: a word and a line each."""
    facts: list[tuple[str, str]] = []
    sizes = found["sizes"]
    if sizes:
        common = ", ".join(f"{W}x{H} ({n:,})" for W, H, n in sizes[:4])
        facts.append(("sizes", common + (f" and {len(sizes) - 4:,} more sizes" if len(sizes) > 4 else "")))
        facts.append(("colours", f"{found['colour']:,} in colour, {found['grey']:,} grey"))
    images = found["noun"] == "images"
    for key, word in (("missing", "not there"), ("unreadable", "unreadable")) if images else ():
        number, first = found[key]["number"], found[key]["first"]
        more = f" and {number - len(first):,} more" if number > len(first) else ""
        facts.append((word, f"{number:,} images" + (f": {', '.join(first)}{more}" if number else "")))
    copies = (("copies", "exact copies"), ("near_duplicates", "near-duplicates"))
    for key, word in copies if images else copies[:1]:
        facts.append((word, _copies(found[key], found["noun"]) if sizes or not images else "not looked at"))
    groups = found.get("split_groups")
    if groups:
        across = ", ".join(f"{n:,} in {pair.replace('/', ' and ')}" for pair, n in groups["across"].items())
        facts.append((f"groups of {found['noun']}", f"{groups['number']:,}; {across or 'none in two parts'}"))
    for key, word in (("without_training", "no training"), ("without_test", "no test")):
        names = found[key]
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
            facts.append((f"{word} {found['noun'][:-1]}", f"{len(names):,} classes: {shown}"))
    if found["unseen"]:
        facts.append(("not looked at", found["unseen"]))
    facts += [("note", note) for note in found["notes"]]
    return facts


def _copies(copies: Mapping[str, Any], noun: str) -> str:
    if not copies["clusters"]:
        return "none"
    across = [f"{n:,} across {pair.replace('/', ' and ')}" for pair, n in copies["across"].items()]
    across += [f"{copies['several_labels']:,} with several labels"] if copies["several_labels"] else []
    example = f"; such as {' = '.join(copies['examples'][0])}"
    return (
        f"{copies['images']:,} {noun} in {copies['clusters']:,} clusters" + "".join(f", {a}" for a in across) + example
    )


def _print(console: Console, found: Mapping[str, Any]) -> None:
    from rich.markup import escape as plain
    from rich.table import Table

    from ..console import print_table

    console.print(f"[bold]{plain(found['name'])}[/bold]\n", highlight=False)
    for head, rows in (_part_rows(found), _group_rows(found), _class_rows(found)):
        print_table(console, head, rows)
        if head[0] == "group":
            console.print(f"[dim]{plain(found['groups']['rule'])}[/dim]", highlight=False)
        console.print()
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column()
    for word, text in _facts(found):
        grid.add_row(plain(word), plain(text))
    console.print(grid, highlight=False)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    from ..files import replacing, write_text

    if path.suffix.lower() == ".html":
        write_text(path, _page(found))
        return
    figure = _figure(found)
    with replacing(path) as part:
        figure.savefig(part, format=path.suffix.lower()[1:], dpi=160)


def _figure(found: Mapping[str, Any]) -> Any:
    """Training images of every class, most first, on a log scale, coloured by group."""
    import numpy as np
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    from ..reporting.figures import PALETTE, WIDE, group_color

    names = [g["name"] for g in found["groups"]["rows"]]
    classes = sorted(found["classes"], key=lambda c: -c["train"])
    counts = np.array([c["train"] for c in classes])
    group_of = np.array([names.index(c["group"]) for c in classes])
    K = len(counts)
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.add_subplot()
    low = 0.5 if counts.min() <= 1 else 10 ** np.floor(np.log10(counts.min()))
    width = 0.8 if K <= 60 else 1.0
    for g, name in enumerate(names):
        x = np.flatnonzero(group_of == g)
        number = f"{len(x):,} class{'' if len(x) == 1 else 'es'}"
        label = f"{name}: {number}"
        if len(x) and K <= 60:
            axes.bar(x, counts[x] - low, width, bottom=low, color=group_color(g), label=label)
        elif len(x):  # sorted by count, so a threshold group is one run of classes, and one shape
            axes.stairs(
                counts[x], np.r_[x - 0.5, x[-1] + 0.5], fill=True, baseline=low, color=group_color(g), label=label
            )
    for at, n in enumerate(counts.tolist() if K <= 14 else ()):
        axes.annotate(f"{n:,}", (at, n), (0, 2), textcoords="offset points", ha="center", fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if counts.max() < 100 * low else (1,), numticks=12))
    axes.set_ylim(low, counts.max() * 1.6)
    axes.set_xlim(-0.6, K - 0.4)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}" if v >= 1 else ""))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel(f"training {found['noun']} (log scale)", fontsize=8, color=PALETTE["ink"])
    if K <= 30:
        labels = [c["name"] if len(c["name"]) <= 16 else c["name"][:15] + "…" for c in classes]
        turned = sum(len(label) + 2 for label in labels) > 95
        axes.set_xticks(range(K), labels, rotation=40 if turned else 0, ha="right" if turned else "center")
        if turned:
            for tick in axes.get_xticklabels():
                tick.set_rotation_mode("anchor")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.set_xlabel(f"{K:,} classes, most training {found['noun']} first", fontsize=8, color=PALETTE["ink"])
    axes.tick_params(labelsize=8, labelcolor=PALETTE["ink"], color=PALETTE["line"], which="both")
    axes.set_axisbelow(True)
    axes.grid(axis="y", color=PALETTE["line"], linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(PALETTE["line"])
    train = found["parts"]["train"]
    what = f"{train['images']:,} training {found['noun']}"
    title = f"{found['name']}: {what}, imbalance factor {train['imbalance_factor']:.4g}"
    axes.set_title(title, fontsize=8.5, fontweight="bold", loc="left", color=PALETTE["ink"], parse_math=False)
    rule = found["groups"]["rule"]  # below the axes, where it covers no class
    figure.legend(
        frameon=False, fontsize=8, loc="outside lower left", ncols=len(names), title=rule, title_fontsize=7.5,
        alignment="left",
    )  # fmt: skip
    return figure


def _page(found: Mapping[str, Any]) -> str:
    import io

    drawn = io.StringIO()
    _figure(found).savefig(drawn, format="svg", metadata={"Date": None})
    svg = drawn.getvalue()
    tables = []
    for head, rows in (_part_rows(found), _group_rows(found)):
        lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows]
        tables.append(
            "<table><tr>" + "".join(f"<th>{escape(h)}</th>" for h in head) + "</tr>" + "".join(lines) + "</table>"
        )
    parts = list(found["parts"])
    classes = "".join(
        "<tr>" + "".join(f"<td>{escape(str(c[key]))}</td>" for key in ("name", "group", *parts)) + "</tr>"
        for c in sorted(found["classes"], key=lambda c: -c["train"])
    )
    heads = "".join(f"<th>{escape(h)}</th>" for h in ("class", "group", *parts))
    facts = "".join(f"<dt>{escape(word)}</dt><dd>{escape(text)}</dd>" for word, text in _facts(found))
    name = escape(found["name"])
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #23272e; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem }}
svg {{ width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ text-align: right; padding: .15rem .8rem; border-bottom: 1px solid #d9dde3 }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
dt {{ font-weight: 600; margin-top: .5rem }} dd {{ margin: 0; overflow-wrap: anywhere }}
</style></head><body><h1>{name}</h1>
{svg[svg.index("<svg") :]}
{"".join(tables)}
<p>{escape(found["groups"]["rule"])}</p>
<dl>{facts}</dl>
<details><summary>all classes</summary><table><tr>{heads}</tr>{classes}</table></details>
</body></html>
"""
