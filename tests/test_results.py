"""Figures in the README and on the pages come from committed files."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from krdistill.study import StudyConfig, read_study

ROOT = Path(__file__).parents[1]
# What was the default when some studies were run, and is said in their files since it is another one.
PINNED = {"student.train.sampler": "instance"}
STUDIES = sorted((ROOT / "benchmarks" / "results" / "studies").glob("*.json"))


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_results_are_what_the_readme_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = _script("readme")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert module.updated(readme, module.section(module.results.read_studies())) == readme
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo-seed0.json").read_text(encoding="utf-8"))
    seconds = sum(demo["provenance"]["seconds"].values())
    assert f"export took {seconds:.0f} s on two cores" in " ".join(readme.split())


def test_committed_figures_are_what_the_performance_page_shows() -> None:
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert _script("performance").updated(page) == page
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        commit = json.loads(path.read_text(encoding="utf-8"))["provenance"].get("git") or ""
        assert not commit.endswith("-dirty"), f"{path.name}: measure from a committed state"


PAGES = ("concepts", "howto-calibrate", "howto-dlsa", "howto-condense", "howto-device", "reliability")


@pytest.mark.parametrize("name", PAGES)
def test_committed_figures_of_the_related_systems_are_what_their_pages_show(name: str) -> None:
    module = _script("systems")
    assert set(module.PAGES) == set(PAGES)
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert module.updated(page, name) == page


def test_wrong_labels_are_as_many_as_was_asked_for_in_every_class() -> None:
    mislabel = _script("mislabelled").mislabel
    labels = torch.arange(4).repeat_interleave(torch.tensor([10, 7, 3, 1]))
    made = mislabel(labels, 4, 0.4, seed=1)
    wrong = [int((made[labels == k] != k).sum()) for k in range(4)]
    assert wrong == [4, 2, 1, 0] and made.min() >= 0 and made.max() < 4
    assert torch.equal(made, mislabel(labels, 4, 0.4, seed=1))
    assert not torch.equal(made, mislabel(labels, 4, 0.4, seed=2))
    assert torch.equal(mislabel(labels, 4, 0.0, seed=1), labels)


def test_committed_studies_are_what_the_results_page_shows() -> None:
    module = _script("results")
    assert module.stale(module.files(module.read_studies())) == []


@pytest.mark.parametrize("path", STUDIES, ids=lambda p: p.stem)
def test_committed_studies_are_whole_and_those_of_their_files(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    states = {c["state"] for c in results["cells"]}
    assert results["name"] == path.stem and states == {"done"}, f"{path.name}: {states}"
    for found in [c["result"] for c in results["cells"]] + list(results["teachers"].values()):
        commit = found["provenance"]["git"] or "-dirty"
        assert not commit.endswith("-dirty"), f"{path.name}, {found['key']}: measure from a committed state"
    study = read_study(ROOT / "benchmarks" / "studies" / path.with_suffix(".yaml").name).model_dump(mode="json")
    ran = StudyConfig.model_validate(results["study"]).model_dump(mode="json")
    ran["set"] = {**{k: v for k, v in PINNED.items() if k in study["set"]}, **ran["set"]}
    apart = {k for k in study if study[k] != ran[k]} - {"jobs", "threads"}
    assert not apart, f"{path.name}: the study's file says something else of {', '.join(sorted(apart))}"
    asked = {(m["label"] or m["name"], seed) for m in study["methods"] for seed in study["seeds"]}
    assert {(c["method"], c["seed"]) for c in results["cells"]} == asked
    assert _script("results").asked(path.stem)[1], f"{path.stem}.yaml: say in a comment at its top what it asks"


def _relabelled(labels: dict[str, str]) -> dict[str, Any]:
    """The views' study under other recipes' names: its figures are real, and known in the file itself."""
    path = ROOT / "benchmarks" / "results" / "studies" / "views.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["study"]["methods"] = [{"name": new, "label": None, "set": {}} for new in labels.values()]
    results["baseline"] = labels[results["baseline"]]
    for entry in [*results["cells"], *results["places"][0]["rows"]]:
        entry["method"] = labels.get(entry["method"], entry["method"])
    return dict(results)


RIVALS = {"fresh": "krdistill", "views-4": "kd", "views-8": "bkd", "views-16": "ltkd"}


def test_bars_are_judged_by_intervals_and_points() -> None:
    module, results = _script("results"), _relabelled(RIVALS)
    place = results["places"][0]
    by_hand = {"krdistill": (50, 52, 54), "kd": (40, 43, 43), "bkd": (49, 54, 53), "ltkd": (49.5, 51.5, 53.5)}
    for row in place["rows"]:
        values = {str(seed): v / 100 for seed, v in enumerate(by_hand.get(row["method"], (10, 10, 10)))}
        for name in ("last.top1", "last.balanced_accuracy"):
            row["metrics"][name] |= {"values": values, "mean": sum(values.values()) / 3}
    found = {bar: (figures, verdict) for bar, figures, verdict in module.bars(results, place)}
    # 10, 9 and 11 points: mean 10, s 1, and t(2; 0.975) / sqrt(3) = 4.3027 / 1.7321 = 2.4841
    assert found["above kd, all classes, interval without 0"] == ("**+10.00 [+7.52, +12.48]** (n=3)", "yes")
    assert found["above bkd, all classes, interval without 0"] == ("+0.00 [-4.30, +4.30] (n=3)", "no")  # 1, -2, 1
    assert found["above ltkd, all classes, interval without 0"][1] == "yes"
    assert found["above dkd, all classes, interval without 0"] == ("", "not run")
    assert found["3 points or more above kd, balanced accuracy"][1] == "yes"
    assert found["1 point or more above the best rival (bkd), balanced accuracy"][1] == "no"
    ours, theirs = (
        100 * float(np.mean([n["last"]["groups"]["shot"]["few"] for n in networks]))
        for networks in (
            [c["result"]["networks"]["student"] for c in results["cells"] if c["method"] == "krdistill"],
            [t["networks"]["teacher_rectified"] for t in results["teachers"].values()],
        )
    )
    at = [m["label"] or m["name"] for m in results["study"]["methods"]].index("bkd")
    results["study"]["methods"][at]["set"] = {"student.train.sampler": "square-root"}  # no rival as it was published
    found |= {bar: (figures, verdict) for bar, figures, verdict in module.bars(results, place)}
    helped = found["above bkd, a rival with what we add, all classes, interval without 0"]
    assert helped == ("+0.00 [-4.30, +4.30] (n=3)", "no")
    assert found["1 point or more above the best rival (ltkd), balanced accuracy"][1] == "no"
    figures, verdict = found["few-shot accuracy above the teacher's own after prior removal"]
    assert figures.startswith(f"{ours:.2f} against {theirs:.2f}, ") and verdict == ("yes" if ours > theirs else "no")


def test_a_study_without_the_default_recipe_claims_nothing() -> None:
    module, results = _script("results"), _relabelled(RIVALS)
    results["study"]["methods"][0]["tau"] = 0.5  # an option, so no longer the default
    assert module.bars(results, results["places"][0]) == [("the default recipe", "", "not run")]
    assert "nothing is claimed" in module.headline({})


def test_published_figures_stand_beside_the_same_networks_only() -> None:
    module, results = _script("results"), _relabelled(RIVALS)
    published, place = module.read_published(), results["places"][0]
    assert module.published_here(results, place, published) == {}
    results["study"]["set"] |= {"data.image_size": None, "data.imbalance_factor": 100}
    for row in place["rows"]:
        row["model"] = "resnet8x4"
    for row in place["teachers"]:
        row["model"] = "resnet32x4"
    here = module.published_here(results, place, published)
    assert here == {"kd": "42.48 / 13.38", "ltkd": "51.08 / 27.21"}
    assert "| 51.08 / 27.21 |" in module.study_table(results, place, published)
    results["study"]["set"]["data.imbalance_factor"] = 50
    assert module.published_here(results, place, published) == {}


def test_methods_are_sorted_and_every_mean_says_its_seeds() -> None:
    module, results = _script("results"), _relabelled(RIVALS)
    place = results["places"][0]
    table = module.study_table(results, place, module.read_published())
    rows = [[c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    methods = [r for r in rows if not r[0].startswith("*teacher")]
    means = [float(r[1].split()[0]) for r in methods]
    assert means == sorted(means, reverse=True) and len(methods) == len(place["rows"])
    assert all(cell.endswith("(n=3)") for r in rows for cell in r[1:5])
    assert [r[-1] for r in methods if r[0] == "**krdistill**"] == ["baseline"]


def test_figures_are_the_same_every_time_and_well_formed() -> None:
    module, results = _script("results"), _relabelled(RIVALS)
    results["name"] = "a <b> & c"
    text = module.figure(results)
    assert text == module.figure(json.loads(json.dumps(results)))
    names = [e.text for e in ElementTree.fromstring(text).iter("{http://www.w3.org/2000/svg}text")]
    assert all(r["method"] in names for r in results["places"][0]["rows"])
    for row in results["places"][0]["rows"]:
        for entry in row["metrics"].values():
            entry["difference"] = None
    assert module.figure(results) == ""


def test_stale_files_and_figures_of_no_study_are_named(tmp_path: Path) -> None:
    module = _script("results")
    (tmp_path / "img").mkdir()
    wanted = {"results.md": "a\n", "img/results-x.svg": "b\n"}
    for name, text in wanted.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert module.stale(wanted, tmp_path) == []
    (tmp_path / "results.md").write_text("c\n", encoding="utf-8")
    (tmp_path / "img" / "results-gone.svg").write_text("", encoding="utf-8")
    assert module.stale(wanted, tmp_path) == ["results.md", "img/results-gone.svg"]


def test_what_methods_are_tuned_on_holds_no_test_image(tmp_path: Path) -> None:
    from krdistill.data import load_data

    script, path = _script("tuning"), tmp_path / "tuning.npz"
    made = script.tuning_data("digits", aside=30, rarest=5)
    script.write(made, path)
    read = load_data(path)
    whole = load_data("digits")
    known = {f.numpy().tobytes() for f in whole.train.inputs}
    for part, images in (("train", read.train), ("test", read.test)):
        assert {f.numpy().tobytes() for f in images.inputs} <= known, part
    assert not set(made.train.ids) & set(made.test.ids)
    assert read.test.counts().tolist() == [30] * 10
    counts = read.train.counts()
    assert int(counts[0]) == int(counts.max()) == int(whole.train.counts()[0]) - 30 and int(counts.min()) == 5
    assert read.train.class_names == whole.train.class_names


def test_tuned_methods_have_the_setting_that_was_best_on_the_images_put_aside() -> None:
    tuning = json.loads((ROOT / "benchmarks" / "results" / "studies" / "tuning.json").read_text(encoding="utf-8"))
    top1 = {c["method"]: c["result"]["networks"]["student"]["last"]["top1"] for c in tuning["cells"]}
    assert len(tuning["seeds"]) == 1 and len(top1) == len(tuning["cells"])
    settings: dict[str, list[dict[str, Any]]] = {}
    for method in tuning["study"]["methods"]:
        settings.setdefault(method["name"], []).append(method)
    best = {recipe: max(tried, key=lambda m: top1[m["label"] or m["name"]]) for recipe, tried in settings.items()}
    chosen = read_study(ROOT / "benchmarks" / "studies" / "tuned.yaml").model_dump(mode="json")["methods"]
    assert {m["name"]: m for m in chosen} == best
    assert {len(tried) for tried in settings.values()} == {4}  # as many for every method
    assert all(any(m["label"] is None for m in tried) for tried in settings.values())  # the published one among them
