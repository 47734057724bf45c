"""A student in the Hugging Face layout: what is read back answers with the same bits; nothing in it is trusted."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from krdistill import load_network
from krdistill.calibration import Calibrator
from krdistill.cli import main
from krdistill.data.containers import ImageData
from krdistill.errors import ArgumentError, ModelError, RunFolderError
from krdistill.models.network import Network, build_network, ensemble
from krdistill.sharing import save_shared, share_run

pytest.importorskip("huggingface_hub")
from krdistill import HubNetwork

NAMES = ("ein|s", "zwei", "<drei>")


@pytest.fixture(scope="module")
def shared(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return share_run(finished_run, tmp_path_factory.mktemp("hub") / "student", license="apache-2.0")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _network(model: str = "resnet8", **more: Any) -> Network:
    given = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25], "image_size": (16, 16), **more}
    return build_network(model, class_names=NAMES, **given).eval()


def _batch(network: Network, n: int = 5) -> torch.Tensor:
    shape = (n, network.channels, *network.image_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def _same(ours: Network, theirs: Network) -> None:
    images = _batch(ours)
    with torch.inference_mode():
        a, b = ours.eval()(images), theirs(images)
    assert not theirs.training
    assert torch.equal(a.logits, b.logits) and torch.equal(a.feature, b.feature)
    assert theirs.class_names == ours.class_names and theirs.image_size == ours.image_size
    assert torch.equal(theirs.mean, ours.mean) and torch.equal(theirs.std, ours.std)


def test_a_run_is_shared_whole(finished_run: Path, shared: Path) -> None:
    assert {p.name for p in shared.iterdir()} == {"README.md", "config.json", "model.onnx", "model.safetensors"}
    ours = load_network(finished_run / "student").eval()
    _same(ours, HubNetwork.from_pretrained(shared))
    _same(ours, load_network(shared).eval())  # without the Hub's package too
    assert (shared / "model.onnx").read_bytes() == (finished_run / "student.onnx").read_bytes()
    stored = load_file(finished_run / "student" / "model.safetensors")
    assert {k: v.dtype for k, v in load_file(shared / "model.safetensors").items()} == {
        k: v.dtype for k, v in stored.items()
    }
    config = json.loads((shared / "config.json").read_text(encoding="utf-8"))
    assert config["library_name"] == "krdistill" and config["class_names"] == [str(d) for d in range(10)]
    card = (shared / "README.md").read_text(encoding="utf-8")
    top1 = json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))["student"]["top1"]
    assert "license: apache-2.0" in card and f"{100 * top1:.1f}%" in card and "# small" in card
    assert str(finished_run.parent) not in card + json.dumps(config)


def test_the_snippet_of_the_card_runs(shared: Path, tmp_path: Path) -> None:
    text = (shared / "README.md").read_text(encoding="utf-8")
    code = text.partition("```python\n")[2].partition("```")[0].replace("path/to/this/folder", str(shared))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in {str([str(d)]) for d in range(10)}


def test_saved_and_loaded_by_the_mixin(tmp_path: Path, shared: Path) -> None:
    network = _network()
    HubNetwork(network).save_pretrained(tmp_path / "a")
    again = HubNetwork.from_pretrained(str(tmp_path / "a"))
    assert isinstance(again, Network) and isinstance(again, HubNetwork)
    _same(network, again)
    assert "Nothing is told here" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    HubNetwork.from_pretrained(shared).save_pretrained(tmp_path / "b")  # the card goes along
    assert (tmp_path / "b" / "README.md").read_bytes() == (shared / "README.md").read_bytes()
    again.save_pretrained(tmp_path / "b")  # the Hub's rule: weights are replaced, a card that is there stays
    _same(network, HubNetwork.from_pretrained(tmp_path / "b"))


def test_it_shares_the_weights_of_its_network() -> None:
    network = _network()
    hub = HubNetwork(network)
    with torch.no_grad():
        next(network.parameters()).add_(1)
    assert torch.equal(hub(_batch(hub)).logits, network(_batch(hub)).logits)


def test_what_is_pushed_is_what_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixin's own upload, up to the line that would ask the network."""
    from huggingface_hub import HfApi, RepoUrl

    sent: dict[str, bytes] = {}

    def upload(self: HfApi, *, repo_id: str, folder_path: Path, **_: Any) -> str:
        sent.update({p.name: p.read_bytes() for p in Path(folder_path).iterdir()})
        return repo_id

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: RepoUrl(f"https://huggingface.co/{repo_id}"))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    network = HubNetwork(_network(), card="---\nlibrary_name: krdistill\n---\n\nMine.\n")
    assert network.push_to_hub("me/mine") == "me/mine"
    assert set(sent) == {"README.md", "config.json", "model.safetensors"} and b"Mine." in sent["README.md"]


def test_a_transformers_student_is_rebuilt_without_its_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    source = tmp_path / "somebody" / "tiny-resnet"
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ).save_pretrained(source)
    network = _network(f"hf:{source}")
    HubNetwork(network).save_pretrained(tmp_path / "shared")
    shutil.rmtree(source)
    assert "somebody" not in (tmp_path / "shared" / "config.json").read_text(encoding="utf-8")
    _same(network, HubNetwork.from_pretrained(tmp_path / "shared"))


@pytest.mark.parametrize("kind", ["features", "text"])
def test_students_of_other_kinds(tmp_path: Path, kind: str) -> None:
    from krdistill.kinds import encode_texts

    if kind == "features":
        rows, model = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)), "mlp16"
    else:
        rows, model = torch.from_numpy(encode_texts(["who is it", "what is that", "where"])), "ngram64x8"
    network = build_network(model, class_names=NAMES, images=rows).eval()
    HubNetwork(network).save_pretrained(tmp_path)
    again = HubNetwork.from_pretrained(tmp_path)
    with torch.inference_mode():
        assert again.kind == kind and torch.equal(again(rows).logits, network(rows).logits)
    task = {"features": "tabular-classification", "text": "text-classification"}[kind]
    assert f"\npipeline_tag: {task}\n" in (tmp_path / "README.md").read_text(encoding="utf-8")


def _vector() -> Calibrator:
    return Calibrator("vector", 3, {"scale": [1.5, 0.5, 1.0], "offset": [0.0, 0.3, -0.2]})


def test_a_calibrator_goes_along_and_is_applied_where_that_is_asked_for(tmp_path: Path) -> None:
    network = _network()
    HubNetwork(network, calibrator=_vector()).save_pretrained(tmp_path / "a")
    plain = HubNetwork.from_pretrained(tmp_path / "a")
    _same(network, plain)  # nobody asked
    assert plain.calibrator == _vector()
    sure = HubNetwork.from_pretrained(tmp_path / "a", calibrated=True)
    with torch.inference_mode():
        out, want = sure(_batch(network)), network(_batch(network))
        # By hand: softmax(w log p + b).
        z = want.logits.double().log_softmax(1) * torch.tensor([1.5, 0.5, 1.0]) + torch.tensor([0.0, 0.3, -0.2])
        torch.testing.assert_close(out.logits.softmax(1), z.softmax(1).float())
        assert out.logits.dtype == torch.float32 and torch.equal(out.feature, want.feature)
        assert not torch.allclose(out.logits.softmax(1), want.logits.softmax(1), atol=1e-2)
        assert len(sure(_batch(network), maps=True).maps) == 3
    sure.save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "calibrator.json").read_bytes() == (tmp_path / "a" / "calibrator.json").read_bytes()
    HubNetwork(_network()).save_pretrained(tmp_path / "b")  # other weights: the calibrator is not theirs
    assert not (tmp_path / "b" / "calibrator.json").exists()


def test_a_probability_of_nothing_is_no_infinity(tmp_path: Path) -> None:
    values = [[0.0] * 15, [1.0] * 15, [0.0] * 15]
    sure = HubNetwork(_network(), calibrator=Calibrator("histogram", 3, {"values": values}), calibrated=True)
    with torch.inference_mode():
        logits = sure(_batch(sure)).logits
    assert logits.isfinite().all() and (logits.argmax(1) == 1).all()


def test_calibrators_that_do_not_fit(tmp_path: Path) -> None:
    other = Calibrator("temperature", 4, {"temperature": 2.0})
    with pytest.raises(ArgumentError, match="calibrator of 3 classes, got 4"):
        HubNetwork(_network(), calibrator=other)
    with pytest.raises(ArgumentError, match="expected a calibrator"):
        HubNetwork(_network(), calibrated=True)
    HubNetwork(_network()).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds no calibrator .*krdistill calibrate RUN"):
        HubNetwork.from_pretrained(tmp_path, calibrated=True)
    other.save(tmp_path / "calibrator.json")
    with pytest.raises(ModelError, match="calibrator of 3 classes, got one of 4"):
        HubNetwork.from_pretrained(tmp_path)
    for text in ("{", '{"method": "temperature"}', "[]"):
        (tmp_path / "calibrator.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match="is no calibrator"):
            HubNetwork.from_pretrained(tmp_path)


def test_a_timm_student(tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    network = _network("timm:resnet10t", image_size=(32, 32))
    HubNetwork(network).save_pretrained(tmp_path)
    _same(network, HubNetwork.from_pretrained(tmp_path))


FACTORY = """
from torch import nn
print("imported")
def build(num_classes, in_channels):
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * in_channels, num_classes))
"""


def test_a_factory_is_imported_only_where_that_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "shared_nets.py").write_text(FACTORY, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    network = _network("module:shared_nets:build")
    HubNetwork(network).save_pretrained(tmp_path / "a")
    monkeypatch.delitem(sys.modules, "shared_nets")
    capsys.readouterr()
    with pytest.raises(ModelError, match="trust it"):
        HubNetwork.from_pretrained(tmp_path / "a")
    assert "imported" not in capsys.readouterr().out
    _same(network, HubNetwork.from_pretrained(tmp_path / "a", allow_factories=["module:shared_nets:build"]))
    assert "imported" in capsys.readouterr().out


def test_a_shared_folder_can_teach(shared: Path, tmp_path: Path) -> None:
    from krdistill.config import load_config
    from krdistill.pipeline import prepare

    settings = [("teacher.run", str(shared)), ("student.model", "resnet8"), ("data.imbalance_factor", "20")]
    plan = prepare(load_config("digits-lt", settings))
    assert plan.config.teacher.run == str(shared)


# Bad input ------------------------------------------------------------------------------------------------------------


def test_a_name_without_a_network_is_a_clear_error() -> None:
    with pytest.raises(ModelError, match=r"no folder 'nobody/nothing', and the Hub did not give it .*OWNER/NAME"):
        HubNetwork.from_pretrained("nobody/nothing")
    with pytest.raises(ModelError, match=r"no folder '\./not/there', and the Hub"):
        HubNetwork.from_pretrained("./not/there")


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("config.json", None, "config.json is missing"),
        ("config.json", b"{", "damaged"),
        ("config.json", b"[1, 2]", "damaged"),
        ("config.json", b'{"model_type": "bert"}', "damaged"),
        ("model.safetensors", None, "model.safetensors missing"),
        ("model.safetensors", b"\x80\x04 a pickle", "damaged"),
    ],
)
def test_damaged_and_foreign_folders(
    shared: Path, tmp_path: Path, file: str, content: bytes | None, words: str
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shared, folder)
    (folder / file).unlink() if content is None else (folder / file).write_bytes(content)
    with pytest.raises(ModelError, match=words):
        HubNetwork.from_pretrained(folder)


def test_weights_of_another_width(shared: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(shared, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["class_names"].append("eleven")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelError, match="10 classes"):
        HubNetwork.from_pretrained(folder)


def test_networks_that_the_layout_cannot_hold(tmp_path: Path) -> None:
    by_hand = Network(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 3)), class_names=NAMES,
        mean=[0.5] * 3, std=[0.5] * 3, image_size=(16, 16),
    )  # fmt: skip
    for network, words in ((by_hand, "made by hand"), (ensemble([_network(), _network()]), "an ensemble")):
        with pytest.raises(ModelError, match=words):
            save_shared(network, tmp_path / "no")
        assert not (tmp_path / "no").exists()


def test_share_refuses_what_it_would_destroy_and_what_is_no_run(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunFolderError, match="holds something already"):
        share_run(finished_run, tmp_path / "full")
    with pytest.raises(SystemExit) as stopped:
        main(["share", str(tmp_path), str(tmp_path / "new")])
    assert stopped.value.code == 2 and "No trained student" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"full"}


def test_a_student_that_came_out_otherwise_is_not_shared(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from krdistill.sharing import folder as module

    def broken(network: Network, folder: Path, **more: Any) -> None:
        save_shared(network, folder, **more)
        state = load_file(folder / "model.safetensors")
        state["head.bias"] += 1e-3
        from safetensors.torch import save_file

        save_file(state, folder / "model.safetensors")

    monkeypatch.setattr(module, "save_shared", broken)
    with pytest.raises(ModelError, match="does not answer as the run's student"):
        share_run(finished_run, tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_the_command_into_an_empty_folder(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "to").mkdir()
    main(["share", str(finished_run), str(tmp_path / "to"), "--title", "Digits | <small>"])
    assert "model.safetensors" in capsys.readouterr().out
    assert r"# Digits \| \<small\>" in (tmp_path / "to" / "README.md").read_text(encoding="utf-8")


def test_answers_on_real_images(finished_run: Path, shared: Path) -> None:
    from krdistill import load_data

    test: ImageData = load_data("digits", profile="exp", imbalance_factor=20).test
    network = HubNetwork.from_pretrained(shared)
    with torch.inference_mode():
        said = network(test.images.permute(0, 3, 1, 2)).logits.argmax(1)
    measured = json.loads((finished_run / "metrics.json").read_text(encoding="utf-8"))["student"]["top1"]
    assert (said == test.labels).float().mean().item() == pytest.approx(measured, abs=1e-6)
