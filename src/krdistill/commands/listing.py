"""`krdistill list`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ..errors import ConfigError, unknown_name
from .shared import make_console

if TYPE_CHECKING:
    from rich.console import Console


@click.command("list")
@click.argument("what", required=False, default="all", metavar="[recipes|models|presets|augmentations|all]")
def list_(what: str) -> None:
    """List what there is: recipes, models, presets, augmentations."""
    kinds = {
        "recipes": _print_recipes,
        "models": _print_models,
        "presets": _print_presets,
        "augmentations": _print_augmentations,
    }
    if what not in (*kinds, "all"):
        raise ConfigError(unknown_name("list", what, [*kinds, "all"]))
    console = make_console()
    for i, (name, show) in enumerate(kinds.items()):
        if what in (name, "all"):
            if what == "all" and i:
                console.print()
            show(console)


def _print_recipes(console: Console) -> None:
    from ..console import print_list
    from ..recipes import list_recipes

    rows = []
    for r in list_recipes():
        arxiv = f", arXiv {r.source.arxiv}" if r.source.arxiv else ""
        options = r.resolve({}).model_dump(mode="json")
        off = {"none", 0}  # 0 stands for False and 0.0 too
        shown = ", ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in options.items() if v not in off
        )
        needs = f"needs {', '.join(sorted(r.needs))}\n" if r.needs else ""
        drawn = "" if r.sampler == "instance" else f"; images drawn {r.sampler}"
        facts = f"{r.source.title} ({r.source.year}{arxiv})\n{needs}defaults: {shown}{drawn} [{r.defaults_from}]"
        rows.append((r.name, r.summary, facts))
    print_list(console, "recipe", rows)


def _print_models(console: Console) -> None:
    from ..console import print_list
    from ..models import list_models

    print_list(
        console,
        "model",
        [
            (m.name, f"{m.parameters / 1e6:6.2f} M parameters  {m.summary}", words)
            for kind, words in (("image", ""), ("features", "for rows of numbers"), ("text", "for sentences"))
            for m in list_models(kind)
            if kind == "image" or "image" not in m.kinds
        ],
    )


def _print_presets(console: Console) -> None:
    from ..config import list_presets
    from ..console import print_list

    print_list(console, "preset", [(name, words, "") for name, words in list_presets().items()])


def _print_augmentations(console: Console) -> None:
    from ..console import print_list
    from ..data.augment_names import list_augmentations

    entries = [
        (name, words, facts)
        for kind, facts in (("image", ""), ("text", "for sentences"), ("features", "for rows of numbers"))
        for name, words in list_augmentations(kind).items()
    ]
    print_list(console, "augmentation", entries)
