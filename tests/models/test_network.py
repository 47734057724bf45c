from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from krdistill.errors import ModelError
from krdistill.models.network import Network, build_network, channel_statistics, load_network, save_network
from krdistill.models.reuse import reuse_classifier
from krdistill.models.teacher import Teacher, class_order

NAMES = ("cat", "dog", "owl")


def _images(n: int = 6, size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randint(
        0, 256, (n, size, size, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _network(seed: int = 0) -> Network:
    return build_network("resnet8", class_names=NAMES, images=_images(), seed=seed)


class _Foreign(nn.Module):
    """A user's module: nothing of ours, two linear layers, features nowhere to be asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.squeeze = nn.Linear(5, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.relu(self.squeeze(self.conv(x).mean((2, 3)))))


def test_channel_statistics_equal_float64() -> None:
    images = _images(20)
    mean, std = channel_statistics(images)
    reference = images.double().div(255)
    assert mean == pytest.approx(reference.mean((0, 1, 2)).tolist(), abs=1e-12)
    assert std == pytest.approx(reference.std((0, 1, 2), correction=0).tolist(), abs=1e-12)
    assert min(channel_statistics(torch.zeros(2, 8, 8, 1, dtype=torch.uint8))[1]) > 0


def test_uint8_and_float_images_get_the_same_answer() -> None:
    network = _network().eval()
    images = _images().permute(0, 3, 1, 2)
    a, b = network(images), network(images.float() / 255)
    assert torch.allclose(a.logits, b.logits, atol=1e-5)
    assert a.feature.shape == (6, network.feature_dim)
    assert torch.allclose(network.backbone.head(a.feature), a.logits)


def test_any_module_has_its_feature_found() -> None:
    module = _Foreign().eval()
    network = Network(module, class_names=NAMES, mean=[0.5] * 3, std=[0.25] * 3, image_size=(8, 8))
    out = network(_images().permute(0, 3, 1, 2))
    assert network.head_name == "out" and out.feature.shape == (6, 4)
    assert torch.equal(module.out(out.feature), out.logits)
    assert not module.out._forward_pre_hooks
    named = Network(_Foreign(), class_names=NAMES, mean=[0.5] * 3, std=[0.25] * 3, image_size=(8, 8), head="out")
    assert named.feature_dim == 4


def test_save_and_load_give_the_same_network(tmp_path: Path) -> None:
    network = _network().eval()
    save_network(network, tmp_path / "net")
    again = load_network(tmp_path / "net").eval()
    x = _images().permute(0, 3, 1, 2)
    assert torch.equal(network(x).logits, again(x).logits)
    assert again.class_names == NAMES and again.image_size == (8, 8)
    assert sorted(p.name for p in (tmp_path / "net").iterdir()) == ["model.safetensors", "network.json"]


def test_a_users_module_is_saved_and_needs_itself_to_load(tmp_path: Path) -> None:
    network = Network(_Foreign(), class_names=NAMES, mean=[0.5] * 3, std=[0.25] * 3, image_size=(8, 8)).eval()
    save_network(network, tmp_path)
    with pytest.raises(ModelError, match="backbone="):
        load_network(tmp_path)
    again = load_network(tmp_path, backbone=_Foreign()).eval()
    x = _images().permute(0, 3, 1, 2)
    assert torch.equal(network(x).logits, again(x).logits)


@pytest.mark.parametrize("damage", ["missing", "card", "weights", "other"])
def test_damaged_networks_are_refused(tmp_path: Path, damage: str) -> None:
    save_network(_network(), tmp_path)
    if damage == "missing":
        (tmp_path / "model.safetensors").unlink()
    elif damage == "card":
        (tmp_path / "network.json").write_text("{", encoding="utf-8")
    elif damage == "weights":
        data = (tmp_path / "model.safetensors").read_bytes()
        (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    else:
        card = json.loads((tmp_path / "network.json").read_text(encoding="utf-8"))
        card["architecture"]["name"] = "resnet20"
        (tmp_path / "network.json").write_text(json.dumps(card), encoding="utf-8")
    with pytest.raises(ModelError):
        load_network(tmp_path)


def test_networks_that_do_not_fit_are_refused() -> None:
    arguments = {"mean": [0.5] * 3, "std": [0.25] * 3, "image_size": (8, 8)}
    with pytest.raises(ModelError, match=r"answers 3 classes .* 2 class names"):
        Network(_Foreign(), class_names=NAMES[:2], **arguments)
    with pytest.raises(ModelError, match="No linear layer 'fc'"):
        Network(_Foreign(), class_names=NAMES, head="fc", **arguments)
    with pytest.raises(ModelError, match="linear layer"):
        Network(nn.Conv2d(3, 3, 1), class_names=NAMES, **arguments)
    with pytest.raises(ModelError, match="positive std"):
        Network(_Foreign(), class_names=NAMES, mean=[0.5], std=[0.0], image_size=(8, 8))
    with pytest.raises(ModelError, match="Expected logits"):
        Network(_TwoCalls(), class_names=NAMES, **arguments)(_images().permute(0, 3, 1, 2))


class _TwoCalls(_Foreign):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + super().forward(x)


def test_teacher_is_frozen_and_its_answers_can_be_used_in_a_loss() -> None:
    network = _network()
    teacher = Teacher(network, class_names=NAMES)
    teacher.train()
    assert not network.training and not any(p.requires_grad for p in teacher.parameters())
    out = teacher(_images().permute(0, 3, 1, 2))
    weight = torch.ones(3, requires_grad=True)
    (out.logits.softmax(1) * weight.log_softmax(0)).sum().backward()
    assert weight.grad is not None and not out.logits.is_inference()


def test_teacher_remaps_another_order_and_refuses_other_names() -> None:
    network = _network()
    x = _images().permute(0, 3, 1, 2)
    same, turned = Teacher(network, class_names=NAMES), Teacher(network, class_names=("owl", "cat", "dog"))
    assert torch.equal(turned(x).logits, same(x).logits[:, [2, 0, 1]])
    assert class_order(("a", "b"), ("b", "a")) == [1, 0]
    with pytest.raises(ModelError, match="1 of the data's 3 classes are unknown to the teacher: 'cow'"):
        Teacher(network, class_names=("cat", "dog", "cow"))
    with pytest.raises(ModelError, match="knows 3 classes, the data have 2"):
        Teacher(network, class_names=("cat", "dog"))


def test_heads_and_a_reused_classifier_are_rebuilt_from_the_card(tmp_path: Path) -> None:
    x = _images().permute(0, 3, 1, 2)
    teacher = Teacher(_network(seed=3), class_names=("owl", "cat", "dog"))
    student = build_network("resnet8w8", class_names=("owl", "cat", "dog"), images=_images(), seed=1)
    networks = {
        "cosine": build_network("resnet8", class_names=NAMES, head="cosine", images=_images(), seed=1),
        "etf": build_network("resnet8", class_names=NAMES, head="etf", images=_images(), seed=1),
        "reused": reuse_classifier(student, teacher, seed=1),
    }
    for name, network in networks.items():
        save_network(network, tmp_path / name)
        again = load_network(tmp_path / name)
        assert torch.equal(network.eval()(x).logits, again.eval()(x).logits), name
    # The teacher's classes stand in another order than ours; its classifier comes along in ours.
    source = teacher.network.backbone.head.weight
    assert torch.equal(networks["reused"].backbone.head.weight, source[[2, 0, 1]])
    assert not networks["reused"].backbone.head.weight.requires_grad
    with pytest.raises(ModelError, match="head of linear, cosine, etf"):
        build_network("resnet8", class_names=NAMES, head="round", images=_images())
