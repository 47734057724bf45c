"""Writes the figures of docs/performance.md from the committed JSON files, or checks that they are current.

python benchmarks/performance.py [--check]
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def _where(result: dict[str, Any], name: str) -> str:
    p = result["provenance"]
    threads = f"{p['threads']} thread{'s' if p['threads'] > 1 else ''}"
    place = p.get("processor") or f"{p['machine']}, {p['cpus']} cores"
    commit = f", commit `{p['git']}`" if p.get("git") else ""
    link = f"[{name.split('/')[-1]}.json](../benchmarks/results/{name}.json)"
    return f"{place}, {threads}, torch {p['torch']}{commit}: {link}."


def step(result: dict[str, Any]) -> str:
    rows = []
    for label in result["pairs"][0]["ratios"]:
        row = [label]
        for pair in result["pairs"]:
            value, bar = pair["ratios"][label], pair["bars"].get(label)
            row += [f"{value['median']:.3f}", f"{bar:g}" if bar else "-"]
        rows.append(row)
    head = ["ratio"]
    for pair in result["pairs"]:
        head += [f"{pair['teacher']} to {pair['student']}", "bar"]
    seconds = "; ".join(
        f"{p['teacher']} to {p['student']}: " + ", ".join(f"{n} {v:.3f}" for n, v in p["seconds_per_step"].items())
        for p in result["pairs"]
    )
    batch = result["provenance"]["batch"]
    compiling = " and ".join(f"{p['seconds_to_compile']:.0f} s" for p in result["pairs"])
    words = f"Seconds per step of {batch} images. {seconds}. Compiling the student took {compiling}."
    return f"{_table(head, rows)}\n\n{words} {_where(result, 'step')}"


def views(result: dict[str, Any]) -> str:
    place = result["places"][0]
    shown = {"all": "last.top1", "few": "last.groups.shot.few", "NLL": "last.nll"}
    rows = []
    for row in place["rows"]:
        cells = [row["method"]]
        for name, key in shown.items():
            value, scale = row["metrics"][key], 1 if name == "NLL" else 100
            digits = 3 if name == "NLL" else 2
            cells.append(f"{scale * value['mean']:.{digits}f} ± {scale * value['std']:.{digits}f}")
            apart = value["difference"]
            cells.append(
                f"{scale * apart['mean']:+.{digits}f} ± {scale * apart['half_width']:.{digits}f}" if apart else "-"
            )
        rows.append([*cells, str(row["metrics"]["last.top1"]["n"])])
    head = ["answers", "all", "less fresh", "few", "less fresh", "NLL", "less fresh", "seeds"]
    cell = next(c["result"] for c in result["cells"] if c["result"])
    split = cell["split"]
    about = (
        f"CIFAR-100-LT at 16 x 16, {split['train_images']:,} training images ({split['largest_class']} to "
        f"{split['smallest_class']} a class), {split['test_images']:,} test images; accuracy in percent and mean "
        f"negative log-likelihood, last of {cell['networks']['student']['last']['epoch']} epochs; "
        "mean and standard deviation, paired difference and 95 % interval."
    )
    provenance = {"provenance": cell["provenance"]}
    return f"{_table(head, rows)}\n\n{about} {_where(provenance, 'studies/views')}"


def losses(result: dict[str, Any]) -> str:
    timed, held = result["time"]["recipes"], result["memory"]["whole_objectives"]
    rows = [
        [name, f"{t['ms']:.2f}", f"{100 * t['share_of_step']:.2f} %", f"{held[name]['step_copies']:.2f}"]
        for name, t in timed.items()
        if name in held
    ]
    head = ["recipe", "ms", "of a step", "copies of the logits"]
    return f"{_table(head, rows)}\n\n{_where(result, 'losses')}"


def augment(result: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['images_per_second']:,.0f}", f"{row['times_pillow_crop_flip']:.1f}"]
        for name, row in result["results"].items()
    ]
    return f"{_table(['augmentation', 'images/s', 'times the loop'], rows)}\n\n{_where(result, 'augment')}"


def startup(result: dict[str, Any]) -> str:
    rows = [[f"`{name}`", f"{value:.2f} s"] for name, value in result["seconds"].items()]
    rows.append(["peak memory of a run of `cifar100-lt` (bar 1,536 MiB)", f"{result['peak_mib']:,.0f} MiB"])
    return f"{_table(['', 'median'], rows)}\n\n{_where(result, 'startup')}"


def scaling(result: dict[str, Any]) -> str:
    loss = [[f"{r['classes']:,}", f"{r['width']:,}", f"{r['milliseconds']:.2f}"] for r in result["loss"]]
    bank = [
        [f"{r['images']:,}", f"{r['mib']:.1f}", f"{r['images_per_second_written']:,.0f}",
         f"{r['images_per_second_read']:,.0f}", f"{r['seconds_to_check']:.3f}"]
        for r in result["bank"]
    ]  # fmt: skip
    spread = [[str(r["processes"]), f"{r['seconds']:.2f}"] for r in result["processes"]]
    parts = [
        _table(["classes", "width", "loss and gradient, ms"], loss),
        _table(["images", "MiB", "written/s", "read/s", "check, s"], bank),
        _table(["processes of one thread", "seconds per epoch"], spread),
        _where(result, "scaling"),
    ]
    return "\n\n".join(parts)


def refit(result: dict[str, Any]) -> str:
    ways = ("whole, float64", "pieces, float32")
    cost = [
        [f"{r['images']:,}", f"{r['classes']:,}", str(r["width"]), *(f"{r[w]['seconds']:.3f}" for w in ways),
         *(f"{r[w]['mib']:,.0f}" for w in ways)]
        for r in result["cost"]
    ]  # fmt: skip
    penalty = []
    for r in result["penalty"]:
        row = [f"{r['images']:,}", f"{r['classes']:,}", f"{r['largest']:,} to {r['smallest']}"]
        for part in ("all", "rarest third"):
            found = [[100 * seed[which][part] for which in ("fixed", "default")] for seed in r["seeds"]]
            row += [f"{statistics.mean(column):.1f}" for column in zip(*found, strict=True)]
        penalty.append(row)
    head = ["images", "classes", "width", *(f"{w}, s" for w in ways), *(f"{w}, MiB" for w in ways)]
    fixed = f"{result['provenance']['fixed']:.0e}".replace("e-0", "e-")
    columns = [f"{part}, {which}" for part in ("all", "rarest third") for which in (fixed, "default")]
    seeds = f"Mean of {len(result['provenance']['seeds'])} seeds."
    fitted = _table(["images", "classes", "a class", *columns], penalty)
    return "\n\n".join([_table(head, cost), fitted, f"{seeds} {_where(result, 'refit')}"])


def decode(result: dict[str, Any]) -> str:
    rows = [[name, f"{row['images_per_second']:,.0f}"] for name, row in result["results"].items()]
    return f"{_table(['', 'images/s'], rows)}\n\n{_where(result, 'decode')}"


def device(result: dict[str, Any]) -> str:
    bars = result["bars"]
    timed = {(r["model"], r["precision"], r["threads"], r["batch"]): r for r in result["latency"]["runs"]}
    settings = list(dict.fromkeys(key[2:] for key in timed))
    rows = []
    for model, precision in dict.fromkeys(key[:2] for key in timed):
        found = [timed[model, precision, t, b] for t, b in settings]
        rows.append([model, precision, *(f"{r['median_ms']:.3f} / {r['p95_ms']:.3f}" for r in found)])
    columns = [f"{t} thread{'s' if t > 1 else ''}, batch {b}" for t, b in settings]
    quotients = []
    for row in result["latency"]["ratios"]:
        for label, value in row.items():
            if isinstance(value, dict):
                quotients.append((f"{row['student']}: {label}", (row["threads"], row["batch"]), value["median"]))
    labels = dict.fromkeys(label for label, _, _ in quotients)
    ratios = [
        [label, *(f"{next(v for n, at, v in quotients if (n, at) == (label, s)):.2f}" for s in settings)]
        for label in labels
    ]
    beside = [
        [r["model"], str(r["threads"]), *(f"{r['median_ms'][side]:.3f}" for side in ("torch", "float32", "int8")),
         f"{r['torch / float32']['median']:.2f}", f"{bars['eager']:g}"]
        for r in result["eager"]
    ]  # fmt: skip
    sizes = [
        [r["model"], f"{r['parameters']:,}", f"{r['float32_bytes'] / 1024:.1f}", f"{r['int8_bytes'] / 1024:.1f}",
         f"{r['float32 / int8']:.2f}", f"{r['weights / int8']:.2f}", f"{bars['size']:g}"]
        for r in result["size"]
    ]  # fmt: skip
    kept = [
        [r["model"], r["data"], f"{r['images']:,}",
         *(f"{100 * r['before'][key]:.2f} to {100 * r['after'][key]:.2f}" for key in ("top1", "balanced_accuracy")),
         " to ".join(f"{100 * r[when]['groups'][r['drop']['rarest_group']]:.2f}" for when in ("before", "after"))]
        for r in result["accuracy"]
    ]  # fmt: skip
    own = result["install"]
    parts = ", ".join(f"{name} {n / 1e6:.1f}" for name, n in own["largest"].items())
    bare, whole = (f"{n / 1e6:.1f} MB" for n in (own["bytes"] - own["bytecode"], own["bytes"]))
    return "\n\n".join(
        [
            "Milliseconds of a batch in ONNX Runtime, median / 95th percentile:",
            _table(["", "precision", *columns], rows),
            "How many times faster, medians over the rounds:",
            _table(["", *columns], ratios),
            "One example at a time, milliseconds:",
            _table(["", "threads", "PyTorch", "ONNX Runtime", "int8", "PyTorch / ONNX Runtime", "bar"], beside),
            "Files:",
            _table(
                ["", "parameters", "float32, KiB", "int8, KiB", "times smaller", "than the weights alone", "bar"], sizes
            ),
            "What int8 costs, accuracy in percent before and after:",
            _table(["", "data", "test part", "all", "balanced", "rarest group"], kept),
            f"`krdistill[runtime]` and all it needs take {bare} (bar {bars['install_bytes'] / 1e6:g} MB), or {whole} "
            "with the bytecode that pip writes of every module unless it is told `--no-compile`; the largest "
            f"parts with it, in MB: {parts}. torch is {'among' if own['torch'] else 'not among'} them.",
            _where(result, "device"),
        ]
    )


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": step, "views": views, "losses": losses, "augment": augment, "decode": decode, "startup": startup,
    "scaling": scaling, "refit": refit, "device": device,
}  # fmt: skip


def updated(page: str) -> str:
    """The page with every section's figures put between its marks."""
    for name, write in SECTIONS.items():
        place = f"studies/{name}" if name == "views" else name
        path = RESULTS / f"{place}.json"
        text = write(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else "Not measured yet."
        marks = re.compile(rf"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.S)
        if not marks.search(page):
            raise SystemExit(f"docs/performance.md has no place for {name}")
        page = marks.sub(lambda m, text=text: f"{m[1]}{text}\n{m[2]}", page)  # type: ignore[misc]
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the page is not current")
    check = parser.parse_args().check
    old = PAGE.read_text(encoding="utf-8")
    new = updated(old)
    if check and new != old:
        sys.exit("docs/performance.md does not show the committed results; run python benchmarks/performance.py")
    if not check:
        PAGE.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
