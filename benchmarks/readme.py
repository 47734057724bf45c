"""Writes the README's results from the committed study of rivals, or checks that they are current.

python benchmarks/readme.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import results

README = Path(__file__).resolve().parents[1] / "README.md"
STUDY = "rivals"
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"


def section(studies: dict[str, dict[str, Any]]) -> str:
    """The README's results section: the first place of the study, its setting and its table, and the overview."""
    found = studies[STUDY]
    place = found["places"][0]
    note = (
        "Mean ± standard deviation over the seeds, last epoch, in percent; differences are paired by seed, with their "
        "95 % intervals, bold where they leave 0 out."
    )
    table = results.study_table(found, place, {})
    made = f"Made by `krdistill compare benchmarks/studies/{STUDY}.yaml`: "
    made += f"[{STUDY}.json](benchmarks/results/studies/{STUDY}.json)."
    others = (
        "The same recipes, set alike, on other data (tail: the few-shot classes, or the rarest third of the classes):"
    )
    parts = [results.place_setting(found, place), note, table, made, others, results.overview(studies)]
    return "\n\n".join(parts)


def updated(readme: str, text: str) -> str:
    """The README with the results put between their marks."""
    before, rest = readme.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description="The README's results from the committed JSON files.")
    parser.add_argument("--check", action="store_true", help="exit with 1 if the README is not current")
    check = parser.parse_args().check
    readme = README.read_text(encoding="utf-8")
    new = updated(readme, section(results.read_studies()))
    if check and new != readme:
        sys.exit("README.md is not current; run python benchmarks/readme.py")
    if not check:
        README.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
