"""Networks of other libraries, held against the libraries themselves; nothing is downloaded."""

from __future__ import annotations

import importlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from krdistill._torchvision import import_torchvision
from krdistill.errors import ConfigError, KrdistillError, MissingDependencyError, ModelError
from krdistill.models.graphs import load_graph
from krdistill.models.network import (
    Network,
    build_network,
    check_needs,
    ensemble,
    file_network,
    load_network,
    probe,
    resize,
    save_network,
)
from krdistill.models.registry import ModelName, model_info, parse_model
from krdistill.models.teacher import Teacher

NAMES = ("cat", "dog", "owl")
PLAIN: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": (8, 8)}


@pytest.fixture(scope="module", autouse=True)
def _guard() -> None:
    if find_spec("torchvision") is not None:
        import_torchvision()  # beside a CPU torch nothing that looks for it imports without the guard


def _need(package: str) -> Any:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return importlib.import_module(package)


def _images(n: int = 6, size: int = 32, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, size, size, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _batch(n: int = 6, size: int = 32, channels: int = 3) -> torch.Tensor:
    return _images(n, size, channels).permute(0, 3, 1, 2)


def _build(name: str, size: int = 32, channels: int = 3, **options: Any) -> Network:
    options = {"class_names": NAMES, "seed": 3, **options}
    return build_network(name, images=_images(40, size, channels), **options).eval()


def _same(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, atol=atol, rtol=1e-5)


# Names ----------------------------------------------------------------------------------------------------------------


def test_names_are_taken_apart_and_put_together() -> None:
    asked = parse_model("timm:resnet18.a1_in1k?weights=pretrained&tap=fc")
    assert asked == ModelName("timm:resnet18.a1_in1k", "pretrained", "fc") and asked.origin == "timm"
    odd = ModelName("hf:./my model", "a folder/w&v=1.safetensors", "head.1")
    assert parse_model(str(odd)) == odd
    assert str(parse_model("resnet8", weights="none")) == "resnet8" and parse_model("resnet8").origin == ""
    assert parse_model("module:nets.small:build", weights="w.pt").weights == "w.pt"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet9x", "Did you mean"),
        ("tim:resnet18", "timm:, torchvision:, hf:, module:"),
        ("timm:", "Unknown network 'timm:'"),
        ("module:nets.small", "module:package.path:factory"),
        ("timm:resnet18?weigths=x", r"weights=\.\.\."),
        ("timm:resnet18?weights=", "weights="),
        (3, "name of a network"),
    ],
)
def test_names_that_are_none_are_refused(name: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        parse_model(name)


def test_only_krdistills_own_networks_have_a_listing() -> None:
    with pytest.raises(ModelError, match="none of krdistill's own networks; build_network makes it"):
        model_info("timm:resnet18")


# timm -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "channels", "head"),
    [("resnet10t", 1, "fc"), ("mobilenetv3_small_050", 3, "classifier"), ("vit_tiny_patch16_224", 3, "head")],
)
def test_timm_networks_answer_as_timm_has_them(tmp_path: Path, name: str, channels: int, head: str) -> None:
    _need("timm")
    network = _build(f"timm:{name}", channels=channels)
    assert network.head_name == head and network.input_size == (32, 32) and network.notes == ()
    x = _batch(channels=channels)
    with torch.no_grad():
        out, inside = network(x), network.normalise(x)
        timm_model: Any = network.backbone
        _same(out.logits, timm_model(inside))
        _same(out.feature, timm_model.forward_head(timm_model.forward_features(inside), pre_logits=True))
        save_network(network, tmp_path)
        again = load_network(tmp_path).eval()
        assert torch.equal(again(x).logits, out.logits)
    assert again.class_names == NAMES and again.channels == channels and again.feature_dim == out.feature.shape[1]


def test_a_network_that_cannot_work_at_the_images_size_resizes_inside() -> None:
    _need("timm")
    network = _build("timm:convnext_atto", size=8)
    assert network.image_size == (8, 8) and network.input_size == (224, 224)
    assert any("8x8 are resized to 224x224" in note for note in network.notes)
    probe(network)
    assert network(_batch(2, size=8)).logits.shape == (2, 3)


def test_fresh_weights_depend_on_the_seed_alone() -> None:
    _need("timm")
    images, before = _images(), torch.random.get_rng_state()
    states = [
        build_network("timm:mobilenetv3_small_050", class_names=NAMES, images=images, seed=seed).backbone.state_dict()
        for seed in (1, 1, 2)
    ]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["classifier.weight"], states[2]["classifier.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


def test_several_heads_are_told_apart_or_named() -> None:
    _need("timm")
    with pytest.raises(ModelError, match=r"head, head_dist.*tap: head"):
        _build("timm:deit_tiny_distilled_patch16_224")
    network = _build("timm:deit_tiny_distilled_patch16_224?tap=head_dist")
    assert network.head_name == "head_dist" and network(_batch(2)).logits.shape == (2, 3)


def test_other_heads_stand_in_foreign_networks_too(tmp_path: Path) -> None:
    _need("timm")
    for head in ("cosine", "etf"):
        network = _build("timm:mobilenetv3_small_050", head=head)
        save_network(network, tmp_path / head)
        again = load_network(tmp_path / head).eval()
        assert type(again.backbone.classifier) is not nn.Linear
        assert torch.equal(again(_batch()).logits, network(_batch()).logits)


def test_unknown_networks_of_a_library_are_refused_with_the_nearest() -> None:
    _need("timm")
    with pytest.raises(ModelError, match="Did you mean 'resnet18'"):
        _build("timm:resnet18x")
    with pytest.raises(ModelError, match="mobilenet_v3_small"):
        _build("torchvision:mobilenet_v3_smal")
    with pytest.raises(ModelError, match="classifier"):  # a detector
        _build("torchvision:fasterrcnn_resnet50_fpn")


# Weights --------------------------------------------------------------------------------------------------------------


def test_weights_of_a_file_are_taken_and_another_head_is_replaced(tmp_path: Path) -> None:
    timm = _need("timm")
    torch.manual_seed(5)
    source = timm.create_model("mobilenetv3_small_050", num_classes=7).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pth")
    for file in ("w.safetensors", "w.pth"):
        network = _build("timm:mobilenetv3_small_050", weights=str(tmp_path / file))
        state = network.backbone.state_dict()
        assert all(torch.equal(v, state[k]) for k, v in source.state_dict().items() if not k.startswith("classifier"))
        assert "'classifier' was replaced by a fresh one for 3 classes" in " ".join(network.notes)
        config = timm.data.resolve_model_data_config(source)
        assert network.mean.flatten().tolist() == pytest.approx(config["mean"])
        assert network.std.flatten().tolist() == pytest.approx(config["std"])
        assert network.input_size == config["input_size"][1:] == (224, 224)
    kept = _build("timm:mobilenetv3_small_050", weights=str(tmp_path / "w.pth"), class_names=tuple("abcdefg"))
    assert torch.equal(kept.backbone.classifier.weight, source.classifier.weight)
    assert "taken to be the data's" in " ".join(kept.notes)
    grey = _build("timm:mobilenetv3_small_050", weights=str(tmp_path / "w.pth"), channels=1)
    assert "grey images are repeated over the network's 3 channels" in " ".join(grey.notes)
    with torch.no_grad():
        x = _batch(2, channels=1)
        _same(grey(x).logits, grey.backbone((resize(x / 255, (224, 224)).expand(-1, 3, -1, -1) - grey.mean) / grey.std))
    with pytest.raises(ModelError, match=r"takes images of 3 channel\(s\), the data have 2 \(32x32x2\)"):
        _build("timm:mobilenetv3_small_050", weights=str(tmp_path / "w.pth"), channels=2)
    with pytest.raises(ModelError, match=r"do not fit .*missing: .*unknown: "):
        _build("timm:resnet10t", weights=str(tmp_path / "w.pth"))


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_pickles_are_refused_unread(tmp_path: Path) -> None:
    for name, value in (
        ("bare.pt", _Trap(tmp_path / "sprung")),
        ("dict.pt", {"head.weight": _Trap(tmp_path / "sprung")}),
    ):
        torch.save(value, tmp_path / name)
        with pytest.raises(ModelError, match=r"could run code.*state_dict\(\)"):
            build_network("resnet8", class_names=NAMES, weights=str(tmp_path / name), **PLAIN)
    assert not (tmp_path / "sprung").exists()


def test_weights_of_krdistills_own_networks(tmp_path: Path) -> None:
    source = build_network("resnet8", class_names=NAMES, seed=9, **PLAIN).eval()
    save_network(source, tmp_path)
    text = f"resnet8?weights={tmp_path / 'model.safetensors'}"
    again = build_network(text, class_names=NAMES, **PLAIN).eval()
    assert torch.equal(again(_batch(size=8)).logits, source(_batch(size=8)).logits)
    for weights, said in (
        ("pretrained", "no pretrained weights for krdistill's own 'resnet8'"),
        (str(tmp_path / "none.pt"), "No file of weights"),
        (str(tmp_path / "network.json"), "damaged"),
    ):
        with pytest.raises(ModelError, match=said):
            build_network("resnet8", class_names=NAMES, weights=weights, **PLAIN)
    torch.save([torch.zeros(3)], tmp_path / "list.pt")
    with pytest.raises(ModelError, match="state dict, got list"):
        build_network("resnet8", class_names=NAMES, weights=str(tmp_path / "list.pt"), **PLAIN)


def test_without_a_network_the_message_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    timm = _need("timm")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setattr("torch.hub.urlopen", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("timm:mobilenetv3_small_050", "torchvision:mobilenet_v3_small"):
        with pytest.raises(ModelError, match=rf"pretrained weights of '{name}' could not be had.*a file as weights"):
            _build(name, weights="pretrained")
    bare = next(name for name in timm.list_models() if not timm.is_model_pretrained(name))
    with pytest.raises(ModelError, match=f"no pretrained weights for '{bare}' in timm"):
        _build(f"timm:{bare}", weights="pretrained")


# torchvision ----------------------------------------------------------------------------------------------------------


def test_the_guard_gives_a_torchvision_that_works() -> None:
    _need("torchvision")
    torchvision = import_torchvision()
    assert import_torchvision() is torchvision
    from torchvision.transforms import v2

    assert v2.RandomCrop(4)(torch.zeros(3, 8, 8)).shape == (3, 4, 4)


def test_torchvision_networks_answer_as_torchvision_has_them(tmp_path: Path) -> None:
    _need("torchvision")
    network = _build("torchvision:mobilenet_v3_small", channels=1)
    assert network.head_name == "classifier.3" and "repeated" in network.notes[0]
    with torch.no_grad():
        out, model = network(_batch(channels=1)), network.backbone
        inside = network.normalise(_batch(channels=1))
        assert inside.shape == (6, 3, 32, 32) and torch.equal(inside[:, 0], inside[:, 2])
        _same(out.feature, model.classifier[:3](model.avgpool(model.features(inside)).flatten(1)))
        _same(out.logits, model(inside))
        save_network(network, tmp_path)
        assert torch.equal(load_network(tmp_path).eval()(_batch(channels=1)).logits, out.logits)


def test_a_convolution_as_classifier_has_the_mean_of_its_input_as_feature() -> None:
    _need("torchvision")
    network = _build("torchvision:squeezenet1_1")
    assert network.head_name == "classifier.1" and "1x1 convolution (classifier.1)" in " ".join(network.notes)
    with torch.no_grad():
        out, inside = network(_batch()), network.normalise(_batch())
        _same(out.feature, network.backbone.features(inside).mean((2, 3)))
        _same(out.logits, network.backbone(inside))
    with pytest.raises(ModelError, match="takes the place of a linear layer"):
        _build("torchvision:squeezenet1_1", head="etf")


def test_pretrained_weights_bring_their_normalisation_size_and_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    torchvision = _need("torchvision")
    entry = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT
    torch.manual_seed(2)
    source = torchvision.models.squeezenet1_1(weights=None).eval()
    place = tmp_path / "hub" / "checkpoints" / entry.url.rpartition("/")[2]
    place.parent.mkdir(parents=True)
    torch.save(source.state_dict(), place)  # what an earlier download would have left
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    categories = entry.meta["categories"]
    turned = tuple(f"{i} {c}" for i, c in enumerate(categories))  # some ImageNet names stand twice
    network = _build("torchvision:squeezenet1_1?weights=pretrained", class_names=turned)
    assert network.input_size == (224, 224) and network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    x = _batch(2)
    with torch.no_grad():
        _same(network(x).logits, source((resize(x / 255, (224, 224)) - network.mean) / network.std))
    few = _build("torchvision:squeezenet1_1", weights="pretrained")
    assert "'classifier.1' was replaced by a fresh one for 3 classes" in " ".join(few.notes)


# transformers ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = _need("transformers")
    folder = tmp_path_factory.mktemp("hf")
    torch.manual_seed(4)
    labels = {0: "owl", 1: "cat", 2: "dog"}
    config = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels,
        label2id={v: k for k, v in labels.items()},
    )  # fmt: skip
    transformers.ResNetForImageClassification(config).save_pretrained(folder / "resnet")
    processor = {
        "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3], "do_normalize": True, "size": {"shortest_edge": 24}
    }  # fmt: skip
    (folder / "resnet" / "preprocessor_config.json").write_text(json.dumps(processor))
    tiny = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    vit = transformers.ViTConfig(**tiny, image_size=16, patch_size=4, num_labels=5)
    transformers.ViTForImageClassification(vit).save_pretrained(folder / "vit")
    clip = transformers.CLIPVisionConfig(**tiny, image_size=16, patch_size=4)
    transformers.AutoModel.from_config(clip).save_pretrained(folder / "backbone")
    return folder


@pytest.mark.parametrize("name", ["resnet", "vit", "backbone"])
def test_transformers_networks_are_rebuilt_from_their_card_alone(hf_folders: Path, tmp_path: Path, name: str) -> None:
    network = _build(f"hf:{hf_folders / name}", channels=1)
    assert network.input_size == (32, 32) and network.feature_dim == 16
    save_network(network, tmp_path)
    card = json.loads((tmp_path / "network.json").read_text())
    card["architecture"]["name"] = "hf:gone"
    (tmp_path / "network.json").write_text(json.dumps(card))
    again = load_network(tmp_path).eval()
    assert torch.equal(again(_batch(channels=1)).logits, network(_batch(channels=1)).logits)
    del card["architecture"]["config"]  # nothing is fetched to make up for it
    (tmp_path / "network.json").write_text(json.dumps(card))
    with pytest.raises(ModelError, match="Unknown kind of transformers network"):
        load_network(tmp_path)


def test_transformers_weights_bring_processor_size_and_class_order(hf_folders: Path) -> None:
    transformers = _need("transformers")
    network = _build(f"hf:{hf_folders / 'resnet'}?weights=pretrained")
    assert network.input_size == (24, 24) and network.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert "put in the data's class order" in " ".join(network.notes)
    model = transformers.ResNetForImageClassification.from_pretrained(hf_folders / "resnet").eval()
    with torch.no_grad():
        inside = (resize(_batch() / 255, (24, 24)) - network.mean) / network.std
        out = network(_batch())
        _same(out.logits, model(inside).logits[:, [1, 2, 0]])
        _same(out.feature, model.resnet(inside).pooler_output.flatten(1))
    vit = _build(f"hf:{hf_folders / 'vit'}", weights="pretrained")
    assert vit.input_size == (16, 16) and "replaced by a fresh one for 3 classes" in " ".join(vit.notes)
    base = _build(f"hf:{hf_folders / 'backbone'}", weights="pretrained")
    model = transformers.AutoModel.from_pretrained(hf_folders / "backbone").eval()
    with torch.no_grad():
        inside = (resize(_batch() / 255, (16, 16)) - base.mean) / base.std
        _same(base(_batch()).feature, model(inside).pooler_output)


def test_transformers_names_that_cannot_be_had(
    hf_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"configuration of 'hf:nobody/nothing' could not be had.*local folder"):
        _build("hf:nobody/nothing")
    with pytest.raises(ModelError, match=r"folder with config\.json"):
        _build(f"hf:{tmp_path}")
    only = tmp_path / "pickled"
    only.mkdir()
    (only / "config.json").write_text((hf_folders / "resnet" / "config.json").read_text())
    torch.save(_Trap(tmp_path / "sprung"), only / "pytorch_model.bin")
    with pytest.raises(ModelError, match="could not be had"):
        _build(f"hf:{only}", weights="pretrained")
    assert not (tmp_path / "sprung").exists()


# Factories ------------------------------------------------------------------------------------------------------------

_FACTORIES = """
import torch
from torch import nn
given = []
class Small(nn.Sequential):
    def __init__(self, K, C, width=4):
        super().__init__(nn.Conv2d(C, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, K))
def some(num_classes, in_channels):
    given.append((num_classes, in_channels))
    return Small(num_classes, in_channels)
def everything(**options):
    given.append(options)
    return Small(options["num_classes"], options["in_channels"])
def nothing(num_classes):
    return "a network"
def fixed(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, num_classes))
def exploding(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, num_classes + 1))
constant = 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "my_nets.py").write_text(_FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    yield lambda: importlib.import_module("my_nets")
    sys.modules.pop("my_nets", None)


def test_a_factory_gets_what_it_takes(factories: Callable[[], Any]) -> None:
    network = _build("module:my_nets:some", channels=1)
    assert factories().given == [(3, 1)] and network.feature_dim == 4 and network.head_name == "4"
    assert network(_batch(channels=1)).logits.shape == (6, 3)
    _build("module:my_nets:everything")
    assert factories().given[1] == {"num_classes": 3, "in_channels": 3, "image_size": (32, 32)}
    twice = [_build("module:my_nets:some", seed=7).backbone.state_dict() for _ in range(2)]
    assert all(torch.equal(v, twice[1][k]) for k, v in twice[0].items())


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_nets:sum", "Did you mean 'some'"),
        ("my_nets:constant", "Unknown factory in my_nets"),
        ("my_nets:nothing", r"torch\.nn\.Module, got str"),
        ("no_such_nets:build", "PYTHONPATH"),
        ("my_nets:fixed", r"cannot answer images of 32x32 with 3 channel\(s\).*data\.image_size"),
        ("my_nets:exploding", "answers 4 classes .* 3 class names"),
        ("my_nets:some?weights=pretrained", "no pretrained weights"),
    ],
)
def test_factories_that_do_not_fit_are_refused(factories: Any, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        _build(f"module:{name}")


def test_a_strangers_card_imports_nothing_unless_allowed(factories: Callable[[], Any], tmp_path: Path) -> None:
    network = _build("module:my_nets:some")
    save_network(network, tmp_path / "net")
    del sys.modules["my_nets"]
    for allowed in (False, ("module:my_nets:everything",)):
        with pytest.raises(ModelError, match=r"import and run.*allow_factories=True"):
            load_network(tmp_path / "net", allow_factories=allowed)
        assert "my_nets" not in sys.modules
    for allowed in (True, ("module:my_nets:some",)):
        again = load_network(tmp_path / "net", allow_factories=allowed).eval()
        assert torch.equal(again(_batch()).logits, network(_batch()).logits)


# What is missing ------------------------------------------------------------------------------------------------------


class _Blocked:
    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("timm:resnet18", "timm", "timm"),
        ("torchvision:resnet18", "torchvision", "timm"),
        ("hf:some/model", "transformers", "hf"),
    ],
)
def test_a_missing_library_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, package: str, extra: str
) -> None:
    for module in [m for m in sys.modules if m.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [_Blocked(package), *sys.meta_path])
    with pytest.raises(MissingDependencyError, match=rf"{package}.*pip install 'krdistill\[{extra}\]'"):
        _build(name)
    network = build_network("resnet8", class_names=NAMES, **PLAIN)
    save_network(network, tmp_path)  # a card that asks for it, on a machine that has it not
    card = json.loads((tmp_path / "network.json").read_text())
    card["architecture"] = {"name": name, "num_classes": 3, "in_channels": 3, "image_size": [32, 32]}
    (tmp_path / "network.json").write_text(json.dumps(card))
    with pytest.raises(MissingDependencyError, match=rf"pip install 'krdistill\[{extra}\]'"):
        load_network(tmp_path)


# Taps, sizes, probes --------------------------------------------------------------------------------------------------


class _Aux(nn.Module):
    """A classifier with an auxiliary head of the same width, registered last."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.ReLU())
        self.main, self.aux, self.mixed = nn.Linear(6, 3), nn.Linear(6, 3), mixed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.body(x)
        return self.main(f) + self.aux(f) if self.mixed else self.main(f)


def test_the_head_that_answers_is_found_among_several() -> None:
    module = _Aux().train()
    network = Network(module, class_names=NAMES, **PLAIN)
    assert network.head_name == "main" and module.training and module.body.training
    with pytest.raises(ModelError, match="several layers"):
        Network(_Aux(mixed=True), class_names=NAMES, **PLAIN)
    named = Network(_Aux(mixed=True), class_names=NAMES, head="aux", **PLAIN).eval()
    x = _batch(size=8)
    assert torch.equal(named(x).logits, named.backbone(named.normalise(x)))


def test_resizing_inside_is_pillows() -> None:
    x = torch.rand(1, 1, 20, 28, generator=torch.Generator().manual_seed(1))
    for H, W in ((10, 14), (7, 9), (33, 50), (12, 40)):
        want = Image.fromarray(x[0, 0].numpy(), mode="F").resize((W, H), Image.Resampling.BILINEAR)
        np.testing.assert_allclose(resize(x, (H, W))[0, 0], np.asarray(want), atol=1e-5)
    network = Network(
        _Aux(), class_names=NAMES, mean=[0.5] * 3, std=[0.25] * 3, image_size=(20, 28), input_size=(8, 8)
    )  # fmt: skip
    images = torch.randint(0, 256, (4, 3, 20, 28), dtype=torch.uint8)
    _same(network(images).logits, network.backbone((resize(images / 255, (8, 8)) - 0.5) / 0.25))
    with pytest.raises(ModelError, match=r"shape \(B, 3, H, W\), got \(4, 1, 20, 28\)"):
        network(images[:, :1])


def test_a_network_that_resizes_is_exported_as_it_answers(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    from krdistill.deploy import export_onnx, verify_onnx

    network = Network(
        _Aux(), class_names=NAMES, mean=[0.4] * 3, std=[0.2] * 3, image_size=(20, 28), input_size=(8, 8), channels=1
    ).eval()
    images = torch.randint(0, 256, (16, 20, 28, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    export_onnx(network, tmp_path / "net.onnx")
    assert verify_onnx(tmp_path / "net.onnx", network, images)["agreement"] == 1.0


class _Odd(_Aux):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.main(self.body(x))
        return {"nan": logits * float("nan"), "more": torch.cat((logits, logits), 1)}.get(self.kind, logits)


def test_a_probe_finds_what_would_fail_after_hours() -> None:
    def wrapped(kind: str, **other: Any) -> Network:
        return Network(_Odd(kind), class_names=NAMES, head="main", **{**PLAIN, **other})

    fine = wrapped("none")
    probe(fine)
    assert fine.training and fine.backbone.body.training
    with pytest.raises(ModelError, match=r"The student x answers images of 8x8 .* not finite"):
        probe(wrapped("nan"), what="The student x")
    with pytest.raises(ModelError, match=r"logits \(2, 6\) and features \(2, 6\).*expected \(2, 3\)"):
        probe(wrapped("more"))
    with pytest.raises(ModelError, match=r"cannot answer images of 9x9 with 3 channel.*data\.image_size"):
        probe(wrapped("none", image_size=(9, 9)))
    with pytest.raises(ModelError, match=r"takes images of 3 channel.*the data have 4"):
        wrapped("none", channels=4)


def test_recipes_are_refused_where_networks_do_not_show_what_they_need() -> None:
    own, other = build_network("resnet8", class_names=NAMES, **PLAIN), Network(_Aux(), class_names=NAMES, **PLAIN)
    check_needs("reviewkd", {"teacher", "maps"}, student=own, teacher=own)
    with pytest.raises(ModelError, match=r"'reviewkd' needs the stages.*the teacher \(_Aux\)"):
        check_needs("reviewkd", {"teacher", "maps"}, student=own, teacher=other)


# Files as teachers ----------------------------------------------------------------------------------------------------


class _Classifier(nn.Module):
    """Float images to logits (or probabilities), with normalisation layers, halves that are added, and a bias."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.out, self.soft = nn.Linear(4, 3), soft

    def features(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.norm(self.conv(x)).chunk(2, 1)
        return (torch.relu(left) + torch.sigmoid(right)).mean((2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.features(x))
        return logits.softmax(1) if self.soft else logits


def _classifier(soft: bool = False) -> _Classifier:
    torch.manual_seed(6)
    model = _Classifier(soft).train()
    model(torch.randn(16, 3, 8, 8))  # statistics of its own
    return model.eval()


def _pt2(path: Path, model: nn.Module, *, dynamic: bool = True, card: Any = None, core: bool = False) -> Path:
    shapes = ({0: torch.export.Dim("batch")},) if dynamic else None
    program = torch.export.export(model, (torch.zeros(4, 3, 8, 8),), dynamic_shapes=shapes)
    program = program.run_decompositions() if core else program
    torch.export.save(program, path, extra_files={"network.json": json.dumps(card)} if card else None)
    return path


@pytest.mark.parametrize(
    ("dynamic", "soft", "core"), [(True, True, False), (True, False, True), (False, True, True), (False, False, False)]
)
def test_an_exported_program_answers_as_its_module(tmp_path: Path, dynamic: bool, soft: bool, core: bool) -> None:
    model = _classifier(soft)
    graph = load_graph(_pt2(tmp_path / "t.pt2", model, dynamic=dynamic, core=core))
    x = torch.randn(11, 3, 8, 8)  # no multiple of the batch it was made with
    with torch.no_grad():
        logits, feature = graph.answer(x)
        _same(feature, model.features(x))
        _same(logits, model.out(model.features(x)))
    assert (graph.num_classes, graph.feature_dim, graph.has_feature) == (3, 4, True)
    assert graph.facts.batch == (None if dynamic else 4)
    assert graph.parameter_count == sum(v.numel() for v in model.state_dict().values())


def test_an_exported_program_says_its_classes_and_normalisation(tmp_path: Path) -> None:
    model = _classifier()
    card = {"class_names": ["owl", "cat", "dog"], "mean": [0.1, 0.2, 0.3], "std": [0.3, 0.2, 0.1]}
    path = _pt2(tmp_path / "t.pt2", model, card=card)
    network = file_network(path, class_names=NAMES, images=_images(20, 16))
    teacher = Teacher(network, class_names=NAMES)
    mean, std = (torch.tensor(card[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    x = _batch(5, 16)
    with torch.no_grad():
        want = model((resize(x / 255, (8, 8)) - mean) / std)[:, [1, 2, 0]]
    _same(teacher(x).logits, want)
    assert [n for n in network.notes if "resized to 8x8" in n] == list(network.notes)
    save_network(network, tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["model.pt2", "network.json"]
    path.unlink()
    again = Teacher(load_network(tmp_path / "saved"), class_names=NAMES)
    _same(again(x).logits, want)
    bare = file_network(_pt2(tmp_path / "b.pt2", model), class_names=NAMES, images=_images(20, 8))
    assert "names no classes" in bare.notes[0] and "data's mean" in bare.notes[1]
    odd = {"class_names": [1, 2, 3], "mean": ["a", "b", "c"], "std": [0.1]}
    odd_network = file_network(_pt2(tmp_path / "o.pt2", model, card=odd), class_names=NAMES, images=_images(20, 8))
    assert odd_network.notes == tuple(note.replace("b.pt2", "o.pt2") for note in bare.notes)
    with pytest.raises(ModelError, match="keys such as class_names"):
        load_graph(_pt2(tmp_path / "l.pt2", model, card=["cat"]))
    with pytest.raises(ModelError, match="answers 3 classes, the data have 2"):
        file_network(tmp_path / "b.pt2", class_names=NAMES[:2], images=_images(20, 8))


def _rewritten(path: Path, to: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(to, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return to


def test_an_exported_program_runs_no_code_of_its_own(tmp_path: Path) -> None:
    path = _pt2(tmp_path / "t.pt2", _classifier())

    def operator(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return data.replace(b"torch.ops.aten.sigmoid.default", b"torch.os.system")

    def reader(name: str, data: bytes) -> bytes:
        return data.replace(b"aten.sigmoid.default", b"aten.from_file.default") if name.endswith("l.json") else data

    def pickled(name: str, data: bytes) -> bytes:
        if name.endswith("model_weights_config.json"):
            return data.replace(b'"use_pickle": false', b'"use_pickle": true')
        if name.endswith("weights/weight_0"):
            buffer = io.BytesIO()
            torch.save(_Trap(tmp_path / "sprung"), buffer)
            return buffer.getvalue()
        return data

    def sample(name: str, data: bytes) -> bytes:
        return pickle.dumps(_Trap(tmp_path / "sprung")) if "sample_inputs" in name else data

    for change, said in ((operator, r"'torch\.os\.system' is none"), (reader, "files"), (pickled, "could run code")):
        with pytest.raises(ModelError, match=said):
            load_graph(_rewritten(path, tmp_path / "bad.pt2", change))
    load_graph(_rewritten(path, tmp_path / "sample.pt2", sample))  # the example that lies in it is not read
    assert not (tmp_path / "sprung").exists()


def test_files_that_are_no_teachers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No file"):
        load_graph(tmp_path / "none.pt2")
    with pytest.raises(ModelError, match=r"\.onnx or \.pt2"):
        load_graph(tmp_path / "weights.pth")
    (tmp_path / "damaged.pt2").write_bytes(b"no archive")
    with pytest.raises(ModelError, match="damaged"):
        load_graph(tmp_path / "damaged.pt2")
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pt2")
    with pytest.raises(ModelError, match=r"no archive of torch\.export\.save"):
        load_graph(tmp_path / "weights.pt2")
    with pytest.raises(ModelError, match="training mode"):
        load_graph(_pt2(tmp_path / "training.pt2", _classifier().train()))
    cubes = torch.export.export(nn.Linear(4, 3), (torch.zeros(2, 5, 4),))
    torch.export.save(cubes, tmp_path / "cubes.pt2")
    with pytest.raises(ModelError, match=r"expected images .* rows .* sentences .* got float32 \[2, 5, 4\]"):
        load_graph(tmp_path / "cubes.pt2")


class _ConvHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.out = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.out(torch.relu(self.body(x)))).mean((2, 3))


def test_a_file_without_a_feature_says_so_and_a_tensor_can_be_named(tmp_path: Path) -> None:
    model = _ConvHead().eval()
    path = _pt2(tmp_path / "conv.pt2", model)
    network = file_network(path, class_names=NAMES, images=_images(20, 8))
    assert not network.has_feature and "no feature was found" in " ".join(network.notes)
    own = build_network("resnet8", class_names=NAMES, **PLAIN)
    needs = frozenset({"teacher", "features"})
    with pytest.raises(ModelError, match=r"'krdistill' needs the teacher's features.*teacher\.tap.*kd"):
        check_needs("krdistill", needs, student=own, teacher=network)
    check_needs("kd", {"teacher"}, student=own, teacher=network)
    named = file_network(path, class_names=NAMES, images=_images(20, 8), tap="relu")
    check_needs("krdistill", needs, student=own, teacher=named)
    x = _batch(5, 8)
    with torch.no_grad():
        out = named(x)
        _same(out.feature, torch.relu(model.body(named.normalise(x))).mean((2, 3)))
    save_network(named, tmp_path / "saved")
    assert torch.equal(load_network(tmp_path / "saved")(x).feature, out.feature)
    with pytest.raises(ModelError, match=r"no tensor 'rely'.*relu"):
        load_graph(path, tap="rely")


def test_krdistills_own_onnx_file_is_a_teacher(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from krdistill.deploy import export_onnx

    source = build_network("resnet8", class_names=("owl", "cat", "dog"), images=_images(40, 8), seed=2).train()
    with torch.no_grad():
        source(_batch(40, 8))
    source.eval()
    path = export_onnx(source, tmp_path / "student.onnx")
    network = file_network(path, class_names=NAMES, images=_images(40, 8))
    assert network.class_names == ("owl", "cat", "dog") and network.notes == () and network.feature_dim == 64
    teacher = Teacher(network, class_names=NAMES)
    with torch.no_grad():
        out, want = teacher(_batch(9, 8)), source(_batch(9, 8))
    _same(out.logits, want.logits[:, [1, 2, 0]])  # the softmax at its end is undone by looking before it
    _same(out.feature, want.feature)
    save_network(network, tmp_path / "saved")
    _same(load_network(tmp_path / "saved")(_batch(9, 8)).feature, want.feature)
    import copy

    assert copy.deepcopy(network)(_batch(2, 8)).logits.shape == (2, 3)


def test_a_foreign_onnx_file_is_a_teacher(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    helper, rng = onnx.helper, np.random.default_rng(0)
    weight, bias = rng.normal(size=(3, 4)).astype(np.float32), rng.normal(size=4).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["pixels"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weight"], ["product"]),
            helper.make_node("Add", ["bias", "product"], ["scores"]),
        ],
        "g",
        [helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", 3, None, None])],
        [helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(weight, "weight"), onnx.numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    onnx.save(model, str(tmp_path / "t.onnx"))
    network = file_network(tmp_path / "t.onnx", class_names=tuple("abcd"), images=_images(20, 12))
    assert network.input_size is None and len(network.notes) == 2 and network.parameter_count == 16
    out = network(_batch(5, 12))
    feature = network.normalise(_batch(5, 12)).mean((2, 3)).numpy()
    np.testing.assert_allclose(out.feature, feature, atol=1e-5)
    np.testing.assert_allclose(out.logits, feature @ weight + bias, atol=1e-5)
    for damage, said in ((b"nothing", "damaged"), (b"", "damaged|input")):
        (tmp_path / "bad.onnx").write_bytes(damage)
        with pytest.raises(ModelError, match=said):
            load_graph(tmp_path / "bad.onnx")
    with pytest.raises(ModelError, match=r"no tensor 'flaty'.*flat"):
        load_graph(tmp_path / "t.onnx", tap="flaty")


# Ensembles ------------------------------------------------------------------------------------------------------------


def test_an_ensemble_is_the_mean_of_probabilities_in_the_first_ones_order(tmp_path: Path) -> None:
    turned = ("owl", "cat", "dog")
    one = build_network("resnet8", class_names=NAMES, images=_images(40, 8), seed=1).eval()
    two = build_network("resnet8w8", class_names=turned, images=_images(40, 8), seed=2).eval()
    both = ensemble([one, two])
    x = _batch(7, 8)
    with torch.no_grad():
        out, a, b = both(x), one(x), two(x)
    p = [v.double().numpy() for v in (a.logits.softmax(1), b.logits.softmax(1)[:, [1, 2, 0]])]
    np.testing.assert_allclose(out.logits.numpy(), np.log((p[0] + p[1]) / 2), atol=1e-5)
    assert both.class_names == NAMES and both.map_channels == ()
    assert torch.equal(out.feature, torch.cat((a.feature, b.feature), 1)) and both.feature_dim == out.feature.shape[1]
    assert both.parameter_count == one.parameter_count + two.parameter_count
    teacher = Teacher(both, class_names=turned)
    _same(teacher(x).logits, out.logits[:, [2, 0, 1]])
    assert not any(p.requires_grad for p in both.parameters()) and not both.train().backbone.networks[0].training
    save_network(both, tmp_path)
    again = load_network(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x).logits, out.logits)
    assert again.card()["architecture"]["members"] == 2
    with pytest.raises(ModelError, match=r"stages of both networks, but the teacher .resnet8 . resnet8w8."):
        check_needs("reviewkd", {"maps"}, student=one, teacher=both)


def test_ensembles_that_do_not_fit_are_refused() -> None:
    one = build_network("resnet8", class_names=NAMES, **PLAIN)
    assert ensemble([one]) is one
    with pytest.raises(ModelError, match="at least two networks"):
        ensemble([])
    larger = build_network("resnet8", class_names=NAMES, **{**PLAIN, "image_size": (16, 16)})
    with pytest.raises(ModelError, match=r"first takes 8x8 with 3 channel.*number 2 16x16"):
        ensemble([one, larger])
    other = build_network("resnet8", class_names=("cat", "dog", "cow"), **PLAIN)
    with pytest.raises(ModelError, match="unknown to the teacher"):
        ensemble([one, other])


# The whole job --------------------------------------------------------------------------------------------------------

_RUN: dict[str, Any] = {
    "data": {"source": "digits", "profile": "exp", "imbalance_factor": 20, "groups": "thirds"},
    "train": {"epochs": 1, "augmentation": "crop-only", "evaluate_every": 1},
    "student": {"model": "resnet8"},
    "export": {"onnx": False},
}


def test_the_whole_job_with_networks_of_timm(tmp_path: Path) -> None:
    _need("timm")
    from krdistill.cli import main

    (tmp_path / "run.yaml").write_text(json.dumps({**_RUN, "recipe": "krdistill"}))
    command = ["run", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    command += ["--teacher.model", "timm:resnet10t", "--student.model", "timm:mobilenetv3_small_050"]
    try:
        main(command)
    except SystemExit as stop:
        assert not stop.code
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["teacher"]["model"] == "timm:resnet10t"
    assert metrics["student"]["model"] == "timm:mobilenetv3_small_050"
    student = load_network(tmp_path / "run" / "student")
    assert student.channels == 1 and student.image_size == (8, 8)
    from krdistill.config import load_config
    from krdistill.pipeline import prepare

    second = [("student.second_stage", "tau-norm"), ("data.val_fraction", "0.1")]
    prepare(load_config({**_RUN, "student": {"model": "timm:mobilenetv3_small_050"}}, second))
    with pytest.raises(ModelError, match=r"student\.second_stage 'tau-norm' balances a plain linear head.*Conv2d"):
        prepare(load_config({**_RUN, "student": {"model": "torchvision:squeezenet1_1"}}, second))


def test_the_whole_job_with_files_and_ensembles_as_teachers(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from krdistill.config import load_config
    from krdistill.deploy import export_onnx
    from krdistill.events import Events
    from krdistill.pipeline import prepare, run

    class Heard(Events):
        def __init__(self) -> None:
            self.notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    def plan(**teacher: Any) -> Any:
        return prepare(load_config({**_RUN, "teacher": {"train": {"epochs": 1}, **teacher}, "recipe": "kd"}))

    first = plan(model="resnet8")
    for seed in (0, 1):
        network = build_network(
            "resnet8", class_names=first.prior.class_names, images=first.data.train.images, seed=seed
        )
        save_network(network, tmp_path / f"net{seed}")
    path = export_onnx(network, tmp_path / "teacher.onnx")
    metrics = run(plan(file=str(path)), tmp_path / "file", report=False)
    assert metrics["teacher"]["model"] == "teacher.onnx" and metrics["student"]["epochs"] == 1
    assert (tmp_path / "file" / "teacher" / "model.onnx").is_file()
    runs = [str(tmp_path / f"net{seed}") for seed in (0, 1)]
    heard = Heard()
    metrics = run(plan(run=runs), tmp_path / "both", events=heard, report=False)
    assert metrics["teacher"]["model"] == "resnet8 + resnet8"
    assert metrics["teacher"]["parameters"] == 2 * network.parameter_count
    with pytest.raises(ModelError, match="No file"):
        plan(file=str(tmp_path / "none.onnx"))
    with pytest.raises(ConfigError, match="run and file"):
        plan(file=str(path), run=runs)
    with pytest.raises(ConfigError, match="weights and tap would have no effect, as run"):
        plan(run=runs, weights="pretrained", tap="head")
    assert plan(model="resnet8", tap="head").config.teacher.tap == "head"
    assert load_config(_RUN, [("teacher.tap", "4")]).teacher.tap == "4"  # a name, as nn.Sequential has them
    with pytest.raises(KrdistillError, match="needs the stages"):
        prepare(load_config({**_RUN, "teacher": {"run": runs}, "recipe": "reviewkd"}))


def test_the_distiller_takes_names_files_and_several_teachers(tmp_path: Path) -> None:
    from krdistill.config import load_config
    from krdistill.distiller import Distiller
    from krdistill.pipeline import prepare

    data = prepare(load_config({**_RUN, "recipe": "kd"})).data
    train = {"epochs": 1, "augmentation": "none", "evaluate_every": 1}
    names = data.train.class_names
    nets = [build_network("resnet8", class_names=names, images=data.train.images, seed=s) for s in (0, 1)]
    save_network(nets[0], tmp_path / "net")
    program = torch.export.export(
        nets[1].eval().backbone, (torch.zeros(4, 1, 8, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(program, tmp_path / "t.pt2", extra_files={"network.json": json.dumps(nets[1].card())})
    given = [tmp_path / "net", nets[0], str(tmp_path / "t.pt2")]
    distiller = Distiller(given, "resnet8", "krdistill", train=train, groups="thirds").fit(data)
    assert distiller.teacher_ is not None and distiller.teacher_.feature_dim == 3 * 64
    with pytest.raises(ModelError, match="needs the stages"):
        Distiller(given, "resnet8", "reviewkd", train=train, groups="thirds").fit(data)
