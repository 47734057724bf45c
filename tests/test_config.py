from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from krdistill.config import RunConfig, TrainConfig, difference, dump_config, list_presets, load_config
from krdistill.errors import ConfigError
from krdistill.recipes import list_recipes, recipe, resolve_recipe


@pytest.mark.parametrize("name", sorted(list_presets()))
def test_every_preset_loads_and_its_recipes_resolve(name: str) -> None:
    config = load_config(name)
    assert config.name == name
    for item in (config.recipe, *config.baselines):
        resolve_recipe(item)
    assert list_presets()[name]


def test_resolved_config_round_trips(tmp_path: Path) -> None:
    config = load_config("cifar100-lt", [("recipe.tau", "auto"), ("seed", "3")])
    path = tmp_path / "again.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(str(path)) == config
    assert yaml.safe_load(dump_config(config))["recipe"]["tau"] == "auto"


def test_layers_merge_in_order_and_train_stands_for_both() -> None:
    config = load_config({"train": {"epochs": 7}, "student": {"train": {"epochs": 9}}}, [("teacher.train.lr", "1e-2")])
    assert (config.teacher.train.epochs, config.student.train.epochs) == (7, 9)
    assert config.teacher.train.lr == pytest.approx(0.01)
    # A later layer wins over an earlier one, also through the shared section.
    later = load_config({"student": {"train": {"epochs": 9}}}, [("train.epochs", "3")])
    assert (later.teacher.train.epochs, later.student.train.epochs) == (3, 3)


def test_another_recipe_does_not_inherit_the_options_of_the_former() -> None:
    base = {"recipe": {"name": "krdistill", "tau": 1.5}}
    assert load_config(base).recipe.options == {"tau": 1.5}
    assert load_config(base, [("recipe", "kd")]).recipe.options == {}
    assert load_config(base, [("recipe.correction", "swap")]).recipe.options == {"tau": 1.5, "correction": "swap"}


def test_file_may_start_from_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: cifar100-lt\nname: mine\ndata: {imbalance_factor: 10}\n", encoding="utf-8")
    config = load_config(str(path))
    assert (config.data.source, config.data.imbalance_factor, config.name) == ("cifar100", 10, "mine")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        (("data.imbalance_factor", "0.01"), "write 100"),
        (("data.imbalance_factor", "-3"), "at least 1"),
        (("data.imbalance_factor", ".inf"), "finite"),
        (("studnet.model", "x"), "Did you mean 'student'"),
        (("student.train.epoch", "4"), "Did you mean 'epochs'"),
        (("data.imbalance_facto", "4"), "Did you mean 'imbalance_factor'"),
        (("student.train.epochs", "many"), "valid integer"),
        (("student.train.epochs", "0"), "greater than or equal to 1"),
        (("student.train.milestones", "[0.5, 0.2]"), "rising fractions"),
        (("data.profile", "expo"), "'exp', 'step' or 'pareto'"),
        (("name", "../escape"), "name"),
        (("device", "gpu"), "device"),
        (("baselines", "kd,kd"), "kd stands twice"),
        (("train", "5"), "keys such as epochs"),
        (("student..model", "x"), "--student.train.epochs"),
    ],
)
def test_mistakes_are_explained(override: tuple[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({"data": {"profile": "exp"}}, [override])
    assert said in str(caught.value)


def test_a_cut_without_a_profile_is_not_ignored_silently() -> None:
    with pytest.raises(ConfigError, match="profile is 'none'"):
        load_config({"data": {"imbalance_factor": 10}})


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words", "a: [1", "!!python/object/apply:os.getcwd []"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError):
        load_config(str(path))


def test_unknown_preset_and_missing_file() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'cifar100-lt'"):
        load_config("cifar100lt")
    with pytest.raises(ConfigError, match="No configuration file"):
        load_config("missing/run.yaml")


def test_recipe_options_are_checked_by_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'krdistill'"):
        recipe("krdistil")
    config = load_config({"recipe": {"name": "krdistill", "temprature": 2}})
    with pytest.raises(ConfigError, match="Did you mean 'temperature'"):
        resolve_recipe(config.recipe)
    with pytest.raises(ConfigError, match="tau would have no effect, as prior is 'none'"):
        recipe("kd").resolve({"tau": 1.5})
    with pytest.raises(ConfigError, match="blend_strength would have no effect, as rectify is 'recentre'"):
        recipe("krdistill").resolve({"rectify": "recentre", "blend_strength": 0.9})
    with pytest.raises(ConfigError, match="distance would have no effect, as feature_weight is 0"):
        recipe("krdistill-lrd").resolve({"distance": "squared"})
    with pytest.raises(ConfigError, match="nothing would be trained"):
        recipe("kd").resolve({"classification_weight": 0, "logit_weight": 0})


def test_recipe_defaults_are_their_options() -> None:
    for entry in list_recipes():
        options = entry.resolve({})
        for key, value in entry.defaults.items():
            assert getattr(options, key) == value
        assert entry.source.title and (entry.source.arxiv or "PMLR" in entry.source.title)


def test_difference_names_each_changed_key() -> None:
    a, b = RunConfig(), load_config({"seed": 1, "train": {"epochs": 5}})
    assert difference(a.as_dict(), a.as_dict()) == []
    assert difference(a.as_dict(), b.as_dict()) == [
        "seed: 0 -> 1",
        "teacher.train.epochs: 30 -> 5",
        "student.train.epochs: 30 -> 5",
    ]


def test_configuration_does_not_change_after_loading() -> None:
    with pytest.raises(ValueError, match="frozen"):
        TrainConfig().epochs = 3  # type: ignore[misc]
