"""Teachers and students for sentences and rows that come from elsewhere: transformers, factories, files."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from krdistill.errors import MissingDependencyError, ModelError
from krdistill.kinds import encode_texts
from krdistill.models.graphs import load_graph
from krdistill.models.network import Network, build_network, file_network, load_network, probe, save_network
from krdistill.models.teacher import Teacher

NAMES = ("a", "b", "c")
TEXTS = ["where is my card", "late", "", "the cards", "my " * 100]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "my", "card", "is", "late", "the", "##s", "a", "where"]


def _rows(texts: list[str] = TEXTS) -> torch.Tensor:
    return torch.from_numpy(encode_texts(texts))


def _numbers(n: int = 50, columns: int = 4) -> torch.Tensor:
    return torch.randn(n, columns, generator=torch.Generator().manual_seed(1)) * 3 + 1


def _write(folder: Path, config: Any, *, weights: bool = True) -> Path:
    """A small encoder with random weights and its tokenizer, as transformers writes them."""
    transformers = pytest.importorskip("transformers")
    folder.mkdir(exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    if weights:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            transformers.AutoModel.from_config(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    return folder


def _bert(**changes: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.BertConfig(
        **{"vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
           "intermediate_size": 32, "max_position_embeddings": 64, **changes}
    )  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write(tmp_path_factory.mktemp("hf") / "bert", _bert())


def _build(name: str, rows: torch.Tensor | None = None, **options: Any) -> Network:
    given: dict[str, Any] = {"class_names": NAMES, "seed": 3, "images": _rows() if rows is None else rows, **options}
    return build_network(name, **given).eval()


def _states(folder: Path, text: str, *, length: int) -> torch.Tensor:
    """What transformers itself says of a sentence alone: its last states ``(L, D)``."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tokens = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
        return model(**tokens).last_hidden_state[0]


# transformers ---------------------------------------------------------------------------------------------------------


def test_an_encoder_answers_as_transformers_does(bert: Path, tmp_path: Path) -> None:
    network = _build(f"hf:{bert}?weights=pretrained")
    probe(network)
    assert network.kind == "text" and network.feature_dim == 16 and network.head_name == "head"
    assert "cut at 63 tokens, and pooled by the mean" in network.notes[0]
    with torch.no_grad():
        out = network(_rows())
    head = network.backbone.head
    for text, logits, feature in zip(TEXTS, out.logits, out.feature, strict=True):
        want = _states(bert, text, length=63).mean(0)
        torch.testing.assert_close(feature, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(logits, want @ head.weight.T + head.bias, rtol=1e-4, atol=1e-5)
    saved = tmp_path / "saved"
    save_network(network, saved)
    shutil.copytree(saved, tmp_path / "elsewhere")
    again = load_network(tmp_path / "elsewhere").eval()  # needs nothing of the encoder's folder
    assert torch.equal(again(_rows()).logits, out.logits)
    assert torch.equal(copy.deepcopy(again)(_rows()).logits, out.logits)
    assert str(bert.parent) not in json.dumps(
        json.loads((saved / "network.json").read_text())["architecture"]["config"]
    )


def test_all_of_it_is_trained(bert: Path) -> None:
    network = _build(f"hf:{bert}?weights=pretrained").train()
    network(_rows()).logits.square().sum().backward()
    silent = {k for k, p in network.backbone.named_parameters() if p.grad is None or not p.grad.any()}
    # Adding one number to all keys changes no attention; the second half of the pairs is never there.
    assert silent <= {k for k in silent if k.endswith("key.bias")} and len(list(network.backbone.parameters())) > 30
    assert not any("pooler" in k for k, _ in network.backbone.named_parameters())


def test_weights_are_fresh_pretrained_or_of_a_file(bert: Path, tmp_path: Path) -> None:
    fresh, same, taken = _build(f"hf:{bert}"), _build(f"hf:{bert}"), _build(f"hf:{bert}?weights=pretrained")
    assert "weights are fresh" in fresh.notes[1] and "encoder is pretrained" in taken.notes[1]
    key = "base.encoder.layer.0.output.dense.weight"
    states = [n.backbone.state_dict()[key] for n in (fresh, same, taken)]
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
    assert torch.equal(states[2], load_file(bert / "model.safetensors")[key.removeprefix("base.")])
    alone = _build(f"hf:{bert}", weights=str(bert / "model.safetensors"))  # the encoder's own file: no head in it
    assert torch.equal(alone.backbone.state_dict()[key], states[2]) and "replaced" in alone.notes[-1]
    save_network(taken, tmp_path)
    whole = _build(f"hf:{bert}", weights=str(tmp_path / "model.safetensors"), seed=9)
    assert torch.equal(whole(_rows()).logits, taken(_rows()).logits)
    other = load_file(tmp_path / "model.safetensors")
    other["tokenizer._extra_state"] = other["tokenizer._extra_state"][:-5]
    save_file(other, tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="another tokenizer"):
        _build(f"hf:{bert}", weights=str(tmp_path / "other.safetensors"))


def test_the_pooling_is_that_of_the_encoders_own_training(bert: Path, tmp_path: Path) -> None:
    def made(name: str, **files: Any) -> Network:
        folder = Path(shutil.copytree(bert, tmp_path / name))
        for file, values in files.items():
            path = folder / file.replace("__", "/").replace("_json", ".json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values))
        return _build(f"hf:{folder}?weights=pretrained")

    first = made("cls", **{"1_Pooling__config_json": {"pooling_mode_cls_token": True}})
    assert "the state of their first token (as 1_Pooling" in first.notes[0]
    want = _states(bert, TEXTS[0], length=63)[0]
    torch.testing.assert_close(first(_rows()).feature[0], want, rtol=1e-4, atol=1e-5)
    kept = json.loads((bert / "config.json").read_text())
    classifier = made("classifier", config_json={**kept, "architectures": ["BertForSequenceClassification"]})
    assert "trained as a classifier of sequences" in classifier.notes[0]
    assert torch.equal(classifier(_rows()).feature, first(_rows()).feature)
    short = made(
        "short", **{"1_Pooling__config_json": {"pooling_mode_mean_tokens": True}},
        sentence_bert_config_json={"max_seq_length": 5},
    )  # fmt: skip
    torch.testing.assert_close(
        short(_rows()).feature[4], _states(bert, TEXTS[4], length=5).mean(0), rtol=1e-4, atol=1e-5
    )
    odd = made("odd", **{"1_Pooling__config_json": {"pooling_mode_lasttoken": True}})
    assert "another way, which is not had here" in odd.notes[0]


def test_other_families_of_encoders(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    long = _rows(["card " * 200, "a"])
    for config, length in (
        (transformers.RobertaConfig(**small, intermediate_size=16, max_position_embeddings=40), 38),
        (transformers.DistilBertConfig(vocab_size=20, dim=16, n_layers=1, n_heads=2, hidden_dim=16), 256),
        (transformers.T5Config(vocab_size=20, d_model=16, num_layers=1, num_heads=2, d_kv=8, d_ff=16), 256),
    ):
        folder = _write(tmp_path / config.model_type, config)
        network = _build(f"hf:{folder}?weights=pretrained", long)
        assert network.architecture is not None and network.architecture["config"]["max_length"] == length
        assert network(long).logits.isfinite().all()
    with pytest.raises(ModelError, match="encoder and a decoder"):
        _build(f"hf:{_write(tmp_path / 'bart', transformers.BartConfig(vocab_size=20, d_model=16), weights=False)}")


def test_other_heads_stand_on_an_encoder(bert: Path, tmp_path: Path) -> None:
    network = _build(f"hf:{bert}", head="cosine")
    save_network(network, tmp_path)
    assert torch.equal(load_network(tmp_path).eval()(_rows()).logits, network(_rows()).logits)


def test_encoders_that_cannot_be_had(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError, match=r"expected a folder with config\.json"):
        _build(f"hf:{tmp_path}")
    with pytest.raises(ModelError, match=r"configuration of 'hf:no/such-thing'.*give a local folder"):
        _build("hf:no/such-thing?weights=pretrained")
    pickled = Path(shutil.copytree(bert, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    with pytest.raises(
        ModelError, match=r"pretrained weights of .*Expected model\.safetensors.*pickled weights are not"
    ):
        _build(f"hf:{pickled}?weights=pretrained")
    bare = tmp_path / "bare"
    _bert().save_pretrained(bare)
    with pytest.raises(ModelError, match=r"tokenizer"):
        _build(f"hf:{bare}")
    less = _write(tmp_path / "less", _bert(vocab_size=8))
    with pytest.raises(ModelError, match=r"tokenizer has 13 tokens, and the encoder an embedding for 8"):
        _build(f"hf:{less}")
    part = Path(shutil.copytree(bert, tmp_path / "part"))
    state = {k: v for k, v in load_file(part / "model.safetensors").items() if "layer.1" not in k}
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack .* of the encoder's tensors"):
        _build(f"hf:{part}?weights=pretrained")
    seeing = _write(tmp_path / "vit", transformers.ViTConfig(), weights=False)
    with pytest.raises(ModelError, match="no network for sentences: the configuration of a vit"):
        _build(f"hf:{seeing}")
    with pytest.raises(ModelError, match="is for images or sentences, the data are rows"):
        _build(f"hf:{bert}", _numbers())
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"krdistill\[hf\]"):
        _build(f"hf:{bert}")


def test_a_damaged_tokenizer_in_a_strangers_folder(bert: Path, tmp_path: Path) -> None:
    network = _build(f"hf:{bert}")
    save_network(network, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for text, said in ((b"{", "tokenizer of the network is damaged"), (b"\xff", "among the weights is damaged")):
        state["tokenizer._extra_state"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        save_file(state, tmp_path / "model.safetensors")
        with pytest.raises(ModelError, match=said):
            load_network(tmp_path)(_rows())
    state = load_file(bert / "model.safetensors")
    more = json.loads((bert / "tokenizer.json").read_text())
    more["model"]["vocab"]["zebra"] = 99
    backbone = copy.deepcopy(network.backbone)
    backbone.tokenizer.set_extra_state(torch.frombuffer(bytearray(json.dumps(more).encode()), dtype=torch.uint8))
    with pytest.raises(ModelError, match="gives the number 99, and the encoder knows 13"):
        backbone(["zebra"])


# Factories ------------------------------------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn


class Letters(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.table, self.out = nn.Embedding(256, 8, padding_idx=0), nn.Linear(8, num_classes)

    def forward(self, text):
        return self.out(self.table(text.long()).sum(1))


class Lengths(nn.Module):
    takes_texts = True

    def __init__(self, num_classes):
        super().__init__()
        self.fc, self.last = nn.Linear(2, 6), nn.Linear(6, num_classes)

    def forward(self, texts):
        rows = torch.tensor([[len(t), t.count(" ")] for t in texts], dtype=torch.float32)
        return self.last(torch.tanh(self.fc(rows)))


def rows(num_classes, in_features):
    return nn.Sequential(nn.Linear(in_features, 8), nn.ReLU(), nn.Linear(8, num_classes))


def channels(num_classes, in_channels, **others):
    return rows(num_classes, in_channels)


def fixed(num_classes):
    return rows(num_classes, 7)


def many(in_features):
    return rows(9, in_features)


def asks(num_classes, vocabulary):
    return Letters(num_classes)
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "textnets.py").write_text(FACTORIES)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("textnets", None)


def test_a_factory_for_sentences_gets_bytes_or_texts(factories: Any, tmp_path: Path) -> None:
    for name in ("Letters", "Lengths"):
        network = _build(f"module:textnets:{name}")
        probe(network)
        out = network(_rows())
        if name == "Letters":
            backbone = network.backbone
            want = torch.stack([backbone.table.weight[list(t.strip().encode())].sum(0) for t in TEXTS])
            assert network.feature_dim == 8
        else:
            said = torch.tensor([[len(t.strip()), t.strip().count(" ")] for t in TEXTS], dtype=torch.float32)
            want = torch.tanh(network.backbone.fc(said))
            assert network.head_name == "last"
        torch.testing.assert_close(out.feature, want, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(out.logits, network.backbone.get_submodule(network.head_name)(want))
        save_network(network, tmp_path / name)
        with pytest.raises(ModelError, match="import and run that module"):
            load_network(tmp_path / name)
        again = load_network(tmp_path / name, allow_factories=[f"module:textnets:{name}"]).eval()
        assert torch.equal(again(_rows()).logits, out.logits)
    same = _build("module:textnets:Lengths")
    assert torch.equal(same(_rows()).logits, out.logits)
    tapped = _build("module:textnets:Lengths?tap=last", head="cosine")
    save_network(tapped, tmp_path / "cosine")
    again = load_network(tmp_path / "cosine", allow_factories=True).eval()
    assert torch.equal(again(_rows()).logits, tapped(_rows()).logits)


def test_a_factory_for_rows_gets_their_width(factories: Any, tmp_path: Path) -> None:
    x = _numbers()
    for name in ("rows", "channels"):
        network = _build(f"module:textnets:{name}", x)
        probe(network)
        normal = (x - x.mean(0)) / x.std(0, correction=0)
        torch.testing.assert_close(network(x).logits, network.backbone(normal), rtol=1e-4, atol=1e-5)
        save_network(network, tmp_path / name)
        again = load_network(tmp_path / name, allow_factories=True).eval()
        assert again.kind == "features" and torch.equal(again(x).logits, network(x).logits)
    given = _build("module:textnets:rows", x, weights=str(tmp_path / "rows" / "model.safetensors"), seed=8)
    assert torch.equal(given(x).logits, _build("module:textnets:rows", x)(x).logits)


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("fixed", True, r"cannot answer rows \(2, 4\).*data have 4 columns: let the factory take in_features"),
        ("many", True, r"answers rows \(2, 4\) with \(2, 9\); expected logits \(2, 3\)"),
        ("rows", False, r"could not be called for sentences.*given those of num_classes that it takes"),
        ("asks", False, r"could not be called for sentences.*vocabulary"),
        ("fixed", False, r"cannot answer sentences as bytes, uint8 \(2, 23\).*takes_texts = True"),
        ("Lengths?weights=pretrained", False, "no pretrained weights"),
        ("none", True, "factory in textnets"),
    ],
)
def test_factories_that_do_not_fit_are_refused(factories: Any, name: str, rows: bool, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        _build(f"module:textnets:{name}", _numbers() if rows else _rows())


def test_a_network_of_hands_may_take_texts(factories: Any) -> None:
    import textnets

    network = Network(textnets.Lengths(3), class_names=NAMES, mean=[], std=[], image_size=None, kind="text").eval()
    probe(network)
    assert network.takes_texts and network(_rows()).logits.shape == (5, 3)


# Files ----------------------------------------------------------------------------------------------------------------


def _exported(network: Network, path: Path) -> Path:
    from krdistill.deploy.onnx import deployed, device_card, dynamic_shapes, example_images, export_onnx

    if path.suffix == ".onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
        return export_onnx(network, path)
    program = torch.export.export(
        deployed(network), (example_images(network),), dynamic_shapes=dynamic_shapes(network)
    )  # fmt: skip
    torch.export.save(program, path, extra_files={"network.json": json.dumps(device_card(network, None))})
    return path


@pytest.mark.parametrize("form", ["onnx", "pt2"])
@pytest.mark.parametrize("name", ["ngram64x8", "text_cnn8", "mlp_8"])
def test_krdistills_own_files_are_teachers(name: str, form: str, tmp_path: Path) -> None:
    rows = _numbers() if name == "mlp_8" else _rows()
    source = build_network(name, class_names=("c", "a", "b"), images=rows, seed=4).eval()
    network = file_network(_exported(source, tmp_path / f"t.{form}"), class_names=NAMES, images=rows)
    assert network.notes == () and network.class_names == ("c", "a", "b") and network.has_feature
    teacher = Teacher(network, class_names=NAMES)
    for part in (rows, rows[:1], _rows(["a"]) if name != "mlp_8" else rows[1:3]):
        with torch.no_grad():
            want, out = source(part), teacher(part)
        torch.testing.assert_close(out.logits.softmax(1), want.logits[:, [1, 2, 0]].softmax(1), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(out.feature, want.feature, rtol=1e-3, atol=1e-4)
    probe(network)
    save_network(network, tmp_path / "saved")
    again = load_network(tmp_path / "saved")
    assert again.kind == network.kind and torch.equal(again(rows).logits, network(rows).logits)
    assert network.takes(rows)


def _program(path: Path, module: nn.Module, example: torch.Tensor, **card: Any) -> Path:
    free = {0: torch.export.Dim("batch")} if example.shape[0] > 1 else {}
    program = torch.export.export(module.eval(), (example,), dynamic_shapes=(free,))
    torch.export.save(program, path, extra_files={"network.json": json.dumps(card)} if card else None)
    return path


def test_a_foreign_file_for_rows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), _numbers()
    path = _program(tmp_path / "t.pt2", module, x[:2])
    plain = file_network(path, class_names=NAMES, images=x)
    assert "rows are given as they are" in " ".join(plain.notes) and "names no classes" in plain.notes[0]
    torch.testing.assert_close(plain(x).logits, module(x))
    said = _program(tmp_path / "said.pt2", module, x[:2], mean=[1.0] * 4, std=[3.0] * 4, class_names=list(NAMES))
    scaled = file_network(said, class_names=NAMES, images=x)
    assert scaled.notes == ()
    torch.testing.assert_close(scaled(x).logits, module((x - 1) / 3))
    torch.testing.assert_close(scaled(x).feature, module[:2]((x - 1) / 3))


class _Bytes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(256, 8), nn.Linear(8, 3)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        return self.out(self.table(text.long()).mean(1))


def test_a_foreign_file_for_sentences_of_one_length(tmp_path: Path) -> None:
    module = _Bytes()
    path = _program(tmp_path / "t.pt2", module, torch.zeros(2, 12, dtype=torch.uint8))
    network = file_network(path, class_names=NAMES, images=_rows())
    assert "takes 12 bytes; longer sentences are cut" in " ".join(network.notes)
    rows = nn.functional.pad(_rows(["late", "a"]), (0, 8))
    torch.testing.assert_close(network(_rows(["late", "a"])).logits, module(rows))
    torch.testing.assert_close(network(_rows()).logits, module(_rows()[:, :12]))


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    rows = _program(tmp_path / "rows.pt2", nn.Linear(7, 3), torch.zeros(2, 7))
    with pytest.raises(ModelError, match=r"takes rows, float32 \(B, 7\); the data are rows of 4 numbers, \(B, 4\)"):
        file_network(rows, class_names=NAMES, images=_numbers())
    with pytest.raises(
        ModelError, match=r"takes rows, float32 \(B, 7\); the data are sentences, bytes, uint8 \(B, L\)"
    ):
        file_network(rows, class_names=NAMES, images=_rows())
    images = torch.zeros(5, 8, 8, 1, dtype=torch.uint8)
    with pytest.raises(ModelError, match=r"takes rows.*the data are images, \(B, C, H, W\) = \(B, 1, 8, 8\)"):
        file_network(rows, class_names=NAMES, images=images)
    with pytest.raises(ModelError, match=r"answers 3 classes, the data have 2"):
        file_network(rows, class_names=("a", "b"), images=_numbers(columns=7))
    tokens = torch.export.export(_Bytes(), (torch.zeros(2, 5, dtype=torch.int64),))
    torch.export.save(tokens, tmp_path / "tokens.pt2")
    with pytest.raises(
        ModelError, match=r"got int64 \[2, 5\]. A network that takes token numbers is given as hf:FOLDER"
    ):
        load_graph(tmp_path / "tokens.pt2")
