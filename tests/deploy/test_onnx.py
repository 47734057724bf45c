from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from krdistill.deploy import export_onnx, verify_onnx
from krdistill.deploy.onnx import ExportError
from krdistill.models.network import Network, build_network

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def _images(n: int = 40) -> torch.Tensor:
    return torch.randint(0, 256, (n, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _network(seed: int = 0) -> Network:
    network = build_network("resnet8", class_names=("a", "b", "ç"), images=_images(), seed=seed).train()
    with torch.no_grad():
        network(_images().permute(0, 3, 1, 2))  # batch statistics of its own, so that normalisation layers matter
    return network.eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Network]:
    network = _network()
    return export_onnx(network, tmp_path_factory.mktemp("onnx") / "student.onnx"), network


def test_file_takes_raw_images_of_any_batch_and_gives_probabilities(exported: tuple[Path, Network]) -> None:
    path, network = exported
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert (given.name, given.type, given.shape[1:]) == ("images", "tensor(uint8)", [3, 8, 8])
    for n in (1, 3, 17):
        raw = _images(n).permute(0, 3, 1, 2).contiguous()
        (got,) = session.run(["probabilities"], {"images": raw.numpy()})
        with torch.no_grad():
            want = network((raw.double() / 255).float()).logits.softmax(1).numpy()
        assert got.shape == (n, 3)
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_file_is_one_and_carries_its_class_names(exported: tuple[Path, Network]) -> None:
    path, _ = exported
    assert [p.name for p in path.parent.iterdir()] == ["student.onnx"]
    facts = {
        p.key: json.loads(p.value)
        for p in onnx.load(str(path)).metadata_props
        if p.key in ("class_names", "image_size")
    }
    assert facts == {"class_names": ["a", "b", "ç"], "image_size": [8, 8]}


def test_verification_says_how_well_it_agrees(exported: tuple[Path, Network]) -> None:
    path, network = exported
    check = verify_onnx(path, network, _images())
    assert check["agreement"] == 1.0 and check["largest_difference"] < 1e-4 and check["images"] == 40
    assert check["bytes"] == path.stat().st_size
    assert "40 of 40" in check["sentence"]


def test_another_networks_file_is_not_passed_off(exported: tuple[Path, Network]) -> None:
    path, _ = exported
    with pytest.raises(ExportError, match="Do not deploy"):
        verify_onnx(path, _network(seed=1), _images())


def test_export_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    network = _network().to(memory_format=torch.channels_last)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    export_onnx(network, tmp_path / "a.onnx")
    kernels = [p for p in network.parameters() if p.ndim == 4 and min(p.shape) > 1]
    assert kernels and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    assert not network.training


def test_a_file_that_takes_float_images_answers_as_the_other(tmp_path: Path, exported: tuple[Path, Network]) -> None:
    from krdistill.deploy import DeviceModel
    from krdistill.models.network import file_network

    path, network = exported
    floats = export_onnx(network, tmp_path / "floats.onnx", float_images=True)
    session = onnxruntime.InferenceSession(str(floats), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == "tensor(float)"
    images = _images()
    batch = images.permute(0, 3, 1, 2).contiguous()
    (got,) = session.run(None, {"images": (batch.float() / 255).numpy()})
    (want,) = onnxruntime.InferenceSession(str(path)).run(None, {"images": batch.numpy()})
    np.testing.assert_allclose(got, want, atol=1e-6)
    model = DeviceModel(floats)
    np.testing.assert_array_equal(model(images.numpy()), got)  # raw images will do, as for every file
    np.testing.assert_array_equal(model((images.float() / 255).numpy()), got)
    teacher = file_network(floats, class_names=network.class_names, images=images)  # normalised once, not twice
    with torch.no_grad():
        np.testing.assert_allclose(teacher(batch).logits.softmax(1).numpy(), want, atol=1e-5)


def test_float_images_are_for_images(tmp_path: Path) -> None:
    from krdistill.errors import ArgumentError

    rows = torch.randn(20, 5, generator=torch.Generator().manual_seed(0))
    network = build_network("mlp8", class_names=("a", "b"), images=rows)
    with pytest.raises(ArgumentError, match="takes rows"):
        export_onnx(network, tmp_path / "no.onnx", float_images=True)
