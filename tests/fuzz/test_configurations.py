"""Configurations, study files and command lines of any kind."""

from __future__ import annotations

import os
import tempfile
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from fuzzing import floats, fuzz, mutated
from hypothesis import strategies as st
from pydantic import BaseModel

import krdistill
from krdistill.cli import main
from krdistill.config import RunConfig, dump_config, list_presets, load_config, parse_yaml
from krdistill.pipeline import check_names
from krdistill.recipes import list_recipes
from krdistill.study.plan import plan_study, read_study

ROOT = Path(krdistill.__file__).parents[2]
PRESETS = [resources.files("krdistill").joinpath("presets", f"{n}.yaml").read_bytes() for n in list_presets()]
STUDIES = [path.read_bytes() for path in sorted((ROOT / "benchmarks" / "studies").glob("*.yaml"))]
RECIPES = [r.name for r in list_recipes()]

words = st.sampled_from(
    ["none", "auto", "kd", "krdistill", "resnet8", "digits", "thirds", "shot", "exp", "cpu", "linear", "etf", "all", "",
     "yes", "crop-flip", "1", "-1", "1e9", "nan", "timm:x", "hf:x", "[", "{}", "a.b", "\x1b[2J", "../..", "null"]
)  # fmt: skip
scalars = st.none() | st.booleans() | st.integers(-(2**65), 2**65) | floats | words | st.text(max_size=12)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words | st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _known(section: type[BaseModel]) -> st.SearchStrategy[dict[Any, Any]]:
    """Mappings with a section's own keys, as a rule, and any values."""
    fields: dict[Any, st.SearchStrategy[Any]] = {}
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        fields[name] = st.one_of(_known(kind) if inner else values, values) if not inner else _known(kind) | values  # type: ignore[arg-type]
    keys = st.sampled_from(sorted(fields))
    chosen = st.lists(keys, max_size=4, unique=True).flatmap(
        lambda names: st.fixed_dictionaries({name: fields[name] for name in names})
    )
    return chosen | st.builds(lambda a, b: {**a, **b}, chosen, st.dictionaries(scalars, values, max_size=1))


configurations = _known(RunConfig)
overrides = st.lists(
    st.tuples(
        st.sampled_from([
            "name", "seed", "recipe", "recipe.tau", "recipe.temperature", "baselines", "train.epochs", "train.lr",
            "train.milestones", "student.train.epochs", "student.model", "teacher.model", "teacher.run", "data.groups",
            "data.imbalance_factor", "data.profile", "bank.views", "train", "data", "student-x", "..",
        ])
        | st.text(max_size=8),
        words | st.text(max_size=12) | floats.map(str) | st.integers().map(str) | values.map(str),
    ),
    max_size=3,
)  # fmt: skip


@fuzz(given=configurations, pairs=overrides)
def test_configurations(given: dict[Any, Any], pairs: list[tuple[str, str]]) -> None:
    config = load_config(given, pairs)
    assert dump_config(load_config(parse_yaml(dump_config(config), "it"))) == dump_config(config)
    check_names(config)


@fuzz(content=mutated(st.sampled_from(PRESETS) | st.binary(max_size=200) | configurations.map(
    lambda c: yaml.safe_dump(c, allow_unicode=True).encode("utf-8", "surrogatepass"))
))  # fmt: skip
def test_configuration_texts(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "config.yaml")
        path.write_bytes(content)
        load_config(str(path))


@fuzz(content=mutated(st.sampled_from(STUDIES)))
def test_study_files(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        path = Path(place, "study.yaml")
        path.write_bytes(content)
        plan_study(read_study(path))


arguments = st.lists(
    st.sampled_from([
        "run", "list", "show", "report", "inspect", "data", "bank", "export", "predict", "rerun", "--help", "-h",
        "digits-lt", "digits", "--dry-run", "--out", "out", "--", "-", "--train.epochs", "--seed", "--top", "--batch",
        "list", "download", "build", "--recipe", "--data.profile", "none", "--format", "--data.n_max", "no.yaml", ".",
    ])
    | words | st.text(alphabet=st.characters(exclude_characters="/~\x00"), max_size=8) | st.integers().map(str),
    max_size=6,
)  # fmt: skip


@fuzz(given=arguments, run=st.booleans())
def test_command_lines(given: list[str], run: bool) -> None:
    if "download" in given or "demo" in given:  # asks the network, or trains
        return
    args = ["run", "digits-lt", *given] if run else given
    if args[:1] == ["run"]:
        args = ["run", "--dry-run", *args[1:]]
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        try:
            main(args)
        except SystemExit as stop:
            assert stop.code in (None, 0, 1, 2, 3), stop.code
        finally:
            os.chdir(before)
