"""Gives a study that has grown the cells that were run for it before, so that only what is new is run.

    python benchmarks/reuse.py lay STUDY.yaml DIR --from RESULTS.json --methods kd,bkd,plain=krdistill [--from ...]
    krdistill compare STUDY.yaml --out DIR
    python benchmarks/reuse.py take DIR --from RESULTS.json [--from ...]

``lay`` puts committed results of the named methods into the study's folder as finished cells. It refuses a method whose
options, or a study whose settings, differ. ``NEW=OLD`` says that OLD then was what NEW is now, whatever the file says.
``take`` copies what the study came to into ``benchmarks/results/studies``, if its teachers, trained anew, have come to
every figure of the reused cells' ones: only then are differences paired. Figures are held to be the same to twelve
digits: a mean over thousands of images is summed in another order on another maker's processor. A processor with other
vector instructions (AVX2 where it was AVX-512) trains another teacher, and is refused: the study is run anew there.

What it cannot know is whether the code of a method was changed since: name none of those.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from krdistill.errors import KrdistillError
from krdistill.files import write_json
from krdistill.study.plan import StudyConfig, plan_study, read_study
from krdistill.study.store import RESULTS, StudyFolder

COMMITTED = Path(__file__).parent / "results" / "studies"


def lay(study: StudyConfig, folder: StudyFolder, sources: Sequence[dict[str, Any]], methods: dict[str, str]) -> int:
    """Writes the cells of ``methods`` (label to former label) that ``sources`` hold as finished ones; how many."""
    plan = plan_study(study)
    now = study.model_dump(mode="json")
    asked = {m["label"] or m["name"]: m for m in now["methods"]}
    if unknown := [m for m in methods if m not in asked]:
        raise SystemExit(f"The study has no method {', '.join(unknown)}; it has {', '.join(asked)}.")
    laid = 0
    with folder.opened(plan):
        for source in sources:
            then = source["study"]
            for name in ("base", "set"):
                if then[name] != now[name]:
                    raise SystemExit(f"{source['name']}: {name} differs from the study's.")
            before = {m["label"] or m["name"]: m for m in then["methods"]}
            held = {
                (c["data"], c["pair"], c["teacher"], c["method"], c["seed"]): c["result"]
                for c in source["cells"]
                if c["result"] is not None
            }
            for cell in plan.cells:
                former = methods.get(cell.method)
                result = held.get((*cell.place, former, cell.seed))
                if former is None or result is None or folder.result(cell.item) is not None:
                    continue
                for axis, label in (("data", cell.data), ("pairs", cell.pair), ("teachers", cell.teacher)):
                    if then[axis].get(label) != now[axis].get(label):
                        raise SystemExit(f"{source['name']}: {axis}.{label} differs from the study's.")
                if former == cell.method and before[former] != asked[former]:
                    raise SystemExit(f"{source['name']}: the options of {cell.method} differ from the study's.")
                (folder.path / cell.item).mkdir(parents=True, exist_ok=True)
                folder.finish(cell.item, {**result, "key": cell.item, "config_hash": cell.item.rsplit("-", 1)[1]})
                laid += 1
    return laid


def take(folder: StudyFolder, sources: Sequence[dict[str, Any]], target: Path = COMMITTED) -> Path:
    """Copies a study's results to the committed ones, if its teachers are those of the reused cells."""
    found = json.loads((folder.path / RESULTS).read_text(encoding="utf-8"))
    if missing := [f"{c['method']}, seed {c['seed']}" for c in found["cells"] if c["state"] != "done"]:
        raise SystemExit(f"{len(missing)} cells are not done, among them {missing[0]}.")
    teachers = {_place(c): found["teachers"][c["teacher_folder"]] for c in found["cells"]}
    compared = 0
    for source in sources:
        before = {_place(c): source["teachers"][c["teacher_folder"]] for c in source["cells"]}
        for place in before.keys() & teachers.keys():
            old, new = before[place], teachers[place]
            same_split = old["provenance"]["split_checksum"] == new["provenance"]["split_checksum"]
            if not same_split or not _same(_figures(old), _figures(new)):
                raise SystemExit(f"{source['name']}: the teacher of {place} has come to other figures than before.")
            compared += 1
    if sources and not compared:
        raise SystemExit("No teacher of the study stands in what was reused.")
    path = target / f"{found['name']}.json"
    write_json(path, found)
    print(f"{path}: {len(found['cells'])} cells; {compared} teachers as before")
    return path


def _place(cell: dict[str, Any]) -> tuple[str, str, str, int]:
    return cell["data"], cell["pair"], cell["teacher"], cell["seed"]


def _figures(teacher: dict[str, Any]) -> Any:
    """What a teacher came to; how it is described may change, as may what is measured besides."""
    return [
        (n, teacher["networks"][n]["parameters"], teacher["networks"][n]["last"]) for n in sorted(teacher["networks"])
    ]


def _same(old: Any, new: Any) -> bool:
    """Whether two nested values are the same, numbers to twelve digits."""
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[k], new[k]) for k in old)
    if isinstance(old, list | tuple) and isinstance(new, list | tuple):
        return len(old) == len(new) and all(map(_same, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-12)
    return bool(old == new)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("lay", "take"):
        command = commands.add_parser(name)
        if name == "lay":
            command.add_argument("study", type=Path)
            command.add_argument("--methods", required=True, help="labels, or NEW=OLD, with commas")
        command.add_argument("folder", type=Path, help="of the study")
        command.add_argument(
            "--from", dest="sources", type=Path, action="append", default=[], help="its former results"
        )
    arguments = parser.parse_args()
    sources = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.sources]
    folder = StudyFolder(arguments.folder)
    try:
        if arguments.command == "lay":
            pairs = [label.partition("=") for label in arguments.methods.split(",")]
            methods = {new: old or new for new, _, old in pairs}
            laid = lay(read_study(arguments.study), folder, sources, methods)
            print(f"{folder.path}: {laid} cells that were run before")
        else:
            take(folder, sources)
    except KrdistillError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
