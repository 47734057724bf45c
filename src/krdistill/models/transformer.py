"""Networks for sentences from transformers: tokenizer, encoder, pooling and a linear layer, trained as a whole."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .backbone import Backbone
from .foreign import _drawing, _fetched, _first_line, _library, _plain
from .registry import ModelName
from .weights import load_weights, read_weights

POOLINGS = ("mean", "cls")
LONGEST = 256  # tokens; what is longer is cut there
_TOKENS = "tokenizer._extra_state"


class Tokenizer(nn.Module):
    """Sentences to token numbers, by the ``tokenizer.json`` of the encoder.

    That text is part of the state, so that the file of the weights holds all that the network needs.

    Args:
        text: of ``tokenizer.json``; empty where the state brings it.
        max_length: tokens that are kept of a sentence, the special ones among them.
        pad: ``id``, ``token``, ``type_id`` and ``side`` of what fills a batch up.
        inputs: which of ``input_ids``, ``attention_mask`` and ``token_type_ids`` the encoder takes.
        vocabulary: how many numbers the encoder knows.
    """

    def __init__(
        self, text: str, *, max_length: int, pad: Mapping[str, Any], inputs: Sequence[str], vocabulary: int
    ) -> None:
        super().__init__()
        self.text, self.max_length, self.pad = text, int(max_length), dict(pad)
        self.inputs, self.vocabulary = tuple(inputs), int(vocabulary)
        self._made: Any = None

    def get_extra_state(self) -> Tensor:
        return torch.frombuffer(bytearray(self.text.encode() or b"\0"), dtype=torch.uint8).clone()

    def set_extra_state(self, state: Tensor) -> None:
        try:
            self.text = state.cpu().numpy().tobytes().rstrip(b"\0").decode()
        except (AttributeError, UnicodeDecodeError) as error:
            raise ModelError(f"The tokenizer among the weights is damaged: {error}.") from None
        self._made = None

    def forward(self, texts: Sequence[str], device: torch.device) -> dict[str, Tensor]:
        """Token numbers of B sentences: tensors int64 ``(B, L)`` by the names the encoder knows them under.

        Raises:
            ModelError: a damaged tokenizer, or a number that the encoder does not know.
        """
        if self._made is None:
            self._made = self._make()
        found = self._made.encode_batch(list(texts))
        values = {
            "input_ids": [e.ids for e in found],
            "attention_mask": [e.attention_mask for e in found],
            "token_type_ids": [e.type_ids for e in found],
        }
        tensors = {name: torch.tensor(rows, dtype=torch.int64) for name, rows in values.items()}
        if tensors["input_ids"].shape[1] == 0:  # a tokenizer without special tokens, and nothing but empty sentences
            tensors = {name: t.new_full((len(t), 1), int(name == "attention_mask")) for name, t in tensors.items()}
        if int(tensors["input_ids"].max()) >= self.vocabulary:
            raise ModelError(
                f"The tokenizer gives the number {int(tensors['input_ids'].max())}, and the encoder knows "
                f"{self.vocabulary:,}. Give the tokenizer that the encoder was trained with."
            )
        return {name: t.to(device) for name, t in tensors.items()}

    def _make(self) -> Any:
        try:
            made = _library("tokenizers", "hf").Tokenizer.from_str(self.text)
            made.enable_truncation(self.max_length)
            made.enable_padding(
                direction=self.pad["side"], pad_id=self.pad["id"], pad_type_id=self.pad["type_id"],
                pad_token=self.pad["token"],
            )  # fmt: skip
        except ModelError:
            raise
        except Exception as error:  # its errors have no common base
            raise ModelError(f"The tokenizer of the network is damaged: {_first_line(error)}") from None
        return made


class TextTransformer(Backbone):
    """A transformers encoder with a linear classifier on its pooled states; all of it is trained.

    The feature is the pooled vector: with ``mean`` the mean of the last hidden states over the tokens of the sentence
    (the attention mask), with ``cls`` the last hidden state of its first token.

    Args:
        base: gives ``last_hidden_state`` ``(B, L, D)``.
        tokenizer: what it is given its sentences by.
        pooling: ``mean`` or ``cls``.
        width: D.
        num_classes: K.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding", 2019,
    arXiv 1810.04805 (fine-tuning); Reimers, Gurevych, "Sentence-BERT", 2019, arXiv 1908.10084 (the mean).
    Deviation: for ``cls``, no tanh layer between the first state and the classifier.
    """

    takes_texts = True

    def __init__(self, base: nn.Module, tokenizer: Tokenizer, *, pooling: str, width: int, num_classes: int) -> None:
        super().__init__(nn.Identity(), [], [width], in_channels=1, num_classes=num_classes)
        self.base, self.tokenizer, self.pooling = base, tokenizer, pooling

    def forward_maps(self, x: Sequence[str]) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The pooled states of B sentences as a map of one pixel, ``(B, D, 1, 1)``."""
        tokens = self.tokenizer(x, self.head.weight.device)
        states = self.base(**{name: tokens[name] for name in self.tokenizer.inputs}).last_hidden_state
        mask = tokens["attention_mask"].to(states.dtype)
        if self.pooling == "cls":
            pooled = states[torch.arange(len(states), device=states.device), mask.argmax(1)]
        else:
            pooled = (states * mask.unsqueeze(2)).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return (pooled[:, :, None, None],)


def create_transformer(
    asked: ModelName, *, class_names: Sequence[str], seed: int = 0
) -> tuple[TextTransformer, dict[str, Any], tuple[str, ...]]:
    """A network for sentences from a folder that transformers wrote, or from the Hugging Face Hub.

    A sentence-transformers folder says how it pools (``1_Pooling/config.json``); a classifier of sequences was trained
    on its first token; all others take the mean. Pretrained weights are read from safetensors alone.

    Args:
        asked: ``hf:NAME-or-folder``, with ``pretrained`` weights, fresh ones, or a file of them.
        class_names: K names.
        seed: of fresh weights.

    Returns:
        The network, what :func:`rebuild_transformer` makes it from again, and notes for a person.

    Raises:
        ModelError: no such folder or name, no network for sentences, no fast tokenizer, or weights that cannot be had.
        MissingDependencyError: transformers is not installed.
    """
    transformers = _library("transformers", "hf")
    place = asked.name.partition(":")[2]
    local = Path(place).expanduser()
    if local.exists() and not (local / "config.json").is_file():
        raise ModelError(f"{asked.name}: expected a folder with config.json, as save_pretrained writes it.")
    place = str(local) if local.exists() else place
    settings = _fetched(
        asked.name,
        lambda: transformers.AutoConfig.from_pretrained(place, trust_remote_code=False),
        what="configuration",
    )
    pooling, said, longest = _pooling(transformers, place, settings)
    tokenizer = _tokenizer_of(transformers, asked.name, place)
    pad_id, width = _numbers(asked.name, settings, tokenizer)
    # RoBERTa and its kin count positions from pad + 1 in a table of this size; others lose nothing that counts.
    start = max(pad_id, getattr(settings, "pad_token_id", None) or 0)
    taken = start + 1 if start < 8 else 0
    positions = int(getattr(settings, "max_position_embeddings", None) or LONGEST + taken) - taken
    length = max(1, min(LONGEST, longest or LONGEST, int(tokenizer.model_max_length), positions))
    config: dict[str, Any] = {
        "model": _plain(settings),
        "width": width,
        "pooling": pooling,
        "max_length": length,
        "pad": {
            "id": pad_id,
            "token": tokenizer.pad_token or tokenizer.eos_token or "",
            "type_id": int(getattr(tokenizer, "pad_token_type_id", 0) or 0),
            "side": str(tokenizer.padding_side),
        },
        "inputs": [n for n in ("input_ids", "attention_mask", "token_type_ids") if n in tokenizer.model_input_names],
    }
    architecture = {
        "name": asked.name, "num_classes": len(class_names), "in_channels": 1, "kind": "text", "config": config
    }  # fmt: skip
    made = rebuild_transformer(architecture, seed=seed)
    accepted = inspect.signature(made.base.forward).parameters
    config["inputs"] = [n for n in config["inputs"] if n in accepted]
    made.tokenizer.inputs = tuple(config["inputs"])
    made.tokenizer.text = _plain_tokenizer(tokenizer)
    notes = [f"{asked.name}: sentences are cut at {length} tokens, and pooled by {said}."]
    if asked.weights == "pretrained":
        made.base.load_state_dict(_pretrained(transformers, asked.name, place, settings, made.base))
        notes.append(f"{asked.name}: the encoder is pretrained; its classifier layer is a fresh one.")
    elif asked.weights == "none":
        notes.append(
            f"{asked.name}: its weights are fresh, as for every network; weights: pretrained takes those of the folder "
            "or the hub."
        )
    else:
        notes += _from_file(made, asked, class_names)
    return made, architecture, tuple(notes)


def rebuild_transformer(architecture: Mapping[str, Any], *, seed: int | None = None) -> TextTransformer:
    """The network of :func:`create_transformer` with fresh weights, and without its tokenizer, which is part of the
    state; nothing is fetched.

    Raises:
        ModelError: a kind of network that the installed transformers does not know.
        MissingDependencyError: transformers is not installed.
    """
    transformers, config = _library("transformers", "hf"), architecture["config"]
    kind = str(config["model"].get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise ModelError(f"Unknown kind of transformers network {kind!r}; transformers may be too old for it.")
    if config["pooling"] not in POOLINGS:
        raise ModelError(f"Expected a pooling of {', '.join(POOLINGS)}, got {config['pooling']!r}.")
    settings = transformers.CONFIG_MAPPING[kind].from_dict(_plain(config["model"]))
    with _drawing(seed):
        base = _auto(transformers, settings).from_config(settings, trust_remote_code=False).float()
        if "add_pooling_layer" in inspect.signature(type(base).__init__).parameters:
            base.pooler = None  # as add_pooling_layer=False leaves it: nothing here asks it
        tokenizer = Tokenizer(
            "", max_length=config["max_length"], pad=config["pad"], inputs=config["inputs"],
            vocabulary=int(settings.vocab_size),
        )  # fmt: skip
        return TextTransformer(
            base, tokenizer, pooling=config["pooling"], width=int(config["width"]),
            num_classes=int(architecture["num_classes"]),
        )  # fmt: skip


def _auto(transformers: Any, settings: Any) -> Any:
    """The class that makes the encoder; of an encoder and a decoder, the encoder alone."""
    if not getattr(settings, "is_encoder_decoder", False):
        return transformers.AutoModel
    if type(settings) not in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise ModelError(
            f"A {settings.model_type} has an encoder and a decoder, and transformers has no class for its encoder "
            "alone. Take an encoder, such as one of BERT's family."
        )
    return transformers.AutoModelForTextEncoding


def _numbers(name: str, settings: Any, tokenizer: Any) -> tuple[int, int]:
    """The number that fills a batch up, and the width of the states."""
    vocabulary, width = getattr(settings, "vocab_size", None), getattr(settings, "hidden_size", None)
    if not isinstance(vocabulary, int) or not isinstance(width, int):
        raise ModelError(
            f"{name} is no network for sentences: the configuration of a {settings.model_type} names no vocab_size and "
            "hidden_size. Take an encoder for text, such as one of BERT's family."
        )
    if len(tokenizer) > vocabulary:
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer):,} tokens, and the encoder an embedding for {vocabulary:,}. "
            "Give the folder the tokenizer that the encoder was trained with."
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return int(pad or 0), width


def _pooling(transformers: Any, place: str, settings: Any) -> tuple[str, str, int | None]:
    """How states are pooled, in words too, and how many tokens a sentence-transformers folder keeps."""
    said = _beside(transformers, place, "1_Pooling/config.json")
    length = _beside(transformers, place, "sentence_bert_config.json").get("max_seq_length")
    length = length if isinstance(length, int) and length > 0 else None
    own = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
    for pooling, key in own.items():
        if said.get(key) is True or said.get("pooling_mode") == pooling:
            return pooling, _WORDS[pooling] + " (as 1_Pooling/config.json says)", length
    if said:
        return "mean", _WORDS["mean"] + " (1_Pooling/config.json asks for another way, which is not had here)", length
    names = getattr(settings, "architectures", None) or []
    if any(str(n).endswith("ForSequenceClassification") for n in names):
        return "cls", _WORDS["cls"] + " (it was trained as a classifier of sequences)", length
    return "mean", _WORDS["mean"], length


_WORDS = {"mean": "the mean over their tokens", "cls": "the state of their first token"}


def _beside(transformers: Any, place: str, name: str) -> dict[str, Any]:
    """A JSON file of a folder or repository; empty where there is none."""
    try:
        path = transformers.utils.cached_file(place, name, _raise_exceptions_for_missing_entries=False)
        found = json.loads(Path(path).read_text(encoding="utf-8")) if path is not None else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _tokenizer_of(transformers: Any, name: str, place: str) -> Any:
    try:
        found = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # their errors have no common base
        raise ModelError(
            f"The tokenizer of {name!r} could not be had: {_first_line(error)} Expected tokenizer.json beside "
            "config.json: tokenizer.save_pretrained(folder) writes it."
        ) from None
    if not getattr(found, "is_fast", False) or set(found.get_vocab()) <= set(found.all_special_tokens):
        raise ModelError(
            f"{name!r} has no fast tokenizer (tokenizer.json), got {type(found).__name__} with {len(found)} tokens. "
            "Load the encoder's own with AutoTokenizer.from_pretrained(...), and save it: save_pretrained(folder)."
        )
    return found


def _plain_tokenizer(tokenizer: Any) -> str:
    """``tokenizer.json`` as it stands in memory, without what this process set for its batches."""
    own = _library("tokenizers", "hf").Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    own.no_truncation()
    own.no_padding()
    text: str = own.to_str()
    return text


def _pretrained(transformers: Any, name: str, place: str, settings: Any, base: nn.Module) -> dict[str, Tensor]:
    logs = transformers.utils.logging
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()  # that a head is left out is said in the notes
    logs.disable_progress_bar()
    try:
        with _drawing(0):  # it draws what it lacks
            found, lacking = _auto(transformers, settings).from_pretrained(
                place, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
    except Exception as error:  # their errors have no common base
        raise ModelError(
            f"The pretrained weights of {name!r} could not be had: {_first_line(error)} Expected model.safetensors "
            "beside config.json (pickled weights are not read: save_pretrained(folder) writes safetensors), or a "
            "network that reaches the hub; without one, give a local folder, as hf:path/to/folder."
        ) from None
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()
    own = base.state_dict()
    lost = [k for k in lacking.get("missing_keys", ()) if k in own]
    if lost:
        raise ModelError(
            f"The weights of {name!r} lack {len(lost)} of the encoder's tensors, such as {lost[0]}. Give the folder "
            "of the whole encoder."
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in found.state_dict().items() if k in own}


def _from_file(made: TextTransformer, asked: ModelName, class_names: Sequence[str]) -> list[str]:
    """Weights of a file that krdistill wrote for this network, or those of the encoder alone."""
    state = read_weights(asked.weights)
    if not any(k.startswith("base.") for k in state):
        state = {f"base.{k}": v for k, v in state.items()}
    own = made.tokenizer.get_extra_state()
    if not torch.equal(state.setdefault(_TOKENS, own), own):
        raise ModelError(
            f"{asked.weights} was trained with another tokenizer than that of {asked.name!r}. Give the folder that it "
            "came from, or the run as teacher.run."
        )
    found = load_weights(made, state, head="head", class_names=class_names, unused=("base.pooler.",))
    return [f"{asked.name}: {note[0].lower()}{note[1:]}" for note in found]
