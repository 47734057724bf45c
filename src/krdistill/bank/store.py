"""A view bank on disk: what it is the answer to, where everything lies, and how it is read.

A bank is a folder named after its key::

    <root>/<key>/bank.json      the key in words, and how many views
                 <field>.bin    one array (V, N, ...) per field of the coding, view after view
                 marks.bin      one 8-byte number per view and chunk of rows: 0, or done and the CRC-32 of its data

A view is the whole training set under the augmentation's draws for one epoch: view v shows what epoch v would show.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.augment import Augmentation
from ..data.containers import Examples
from ..errors import KrdistillError
from ..files import read_json
from ..kinds import as_batch
from ..outputs import Outputs
from .answers import Answers
from .coding import Coding

FORMAT = 1
CHUNK = 256  # rows that are asked for, written and checked together
DONE = 1 << 32
CARD, MARKS = "bank.json", "marks.bin"
_PROBE = 16


class BankError(KrdistillError):
    """A bank cannot be built, or its files are damaged."""


@dataclass(frozen=True)
class BankKey:
    """Everything that a bank's answers depend on; another value of any of them is another bank.

    Attributes:
        teacher: fingerprint of the network that answers (see :func:`fingerprint`).
        data: checksum of the training images, their labels, names and order.
        augmentation: the augmentation in words, every number in it.
        seed: of its draws.
        views: checksum of a few views, so that other code for the same words is another bank.
        rows: N.
        coding: how answers are stored.
    """

    teacher: str
    data: str
    augmentation: str
    seed: int
    views: str
    rows: int
    coding: Coding

    @classmethod
    def of(cls, teacher: nn.Module, data: Examples, augment: Augmentation, seed: int, coding: Coding) -> BankKey:
        index = torch.arange(min(_PROBE, len(data)))
        images = as_batch(data.inputs[: len(index)].cpu())
        digest = hashlib.sha256()
        for view in (0, 1):
            digest.update(augment(images, index, seed=seed, epoch=view).contiguous().numpy().data)
        return cls(fingerprint(teacher), data.checksum(), repr(augment), seed, digest.hexdigest(), len(data), coding)

    @property
    def name(self) -> str:
        """The name of the bank's folder."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:20]

    def as_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    def bytes(self, views: int) -> int:
        """Size of a bank of so many views, the marks not counted."""
        return views * self.rows * self.coding.row_bytes


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over a network's class and its state (names, dtypes, shapes, values), in hexadecimal."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


class ViewBank(Answers):
    """A bank that is complete for ``views`` views; epoch e of a training reads view ``e mod views``.

    Args:
        folder: of the bank.
        views: how many of its views to use; by default all.

    Raises:
        BankError: no bank, one of another format, files of the wrong size, or views that are not there yet.
    """

    def __init__(self, folder: Path, *, views: int | None = None) -> None:
        self.folder = folder
        try:
            card = read_json(folder / CARD)
            if card["key"]["format"] != FORMAT:
                raise BankError(f"{folder} holds a bank of format {card['key']['format']}, expected {FORMAT}.")
            self.coding = Coding(**card["key"]["coding"])
            self.seed, self.rows, there = int(card["key"]["seed"]), int(card["key"]["rows"]), int(card["views"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BankError(
                f"{folder} holds no bank that can be read ({error}). Delete it and build it again."
            ) from None
        self.views = there if views is None else views
        if not 1 <= self.views <= there:
            raise BankError(f"{folder} holds {there} views, {self.views} were asked for. Build it with more.")
        self.feature_dim = self.coding.feature_dim
        self.chunks = math.ceil(self.rows / CHUNK)
        marks = self._map(MARKS, torch.int64, (there, self.chunks))
        missing = int((marks[: self.views] == 0).sum())
        if missing:
            raise BankError(f"{folder} is not finished: {missing} of {self.views * self.chunks} parts are missing.")
        self._marks = marks
        self._arrays = {
            name: self._map(f"{name}.bin", dtype, (there, self.rows, *shape))
            for name, (dtype, shape) in self.coding.fields.items()
        }
        self._checked: set[int] = set()
        self._held: tuple[int, torch.device, dict[str, Tensor]] | None = None

    def __repr__(self) -> str:
        return f"ViewBank({str(self.folder)!r}, {self.views} views of {self.rows} images)"

    @property
    def bytes(self) -> int:
        """Size of the views in use."""
        return self.views * self.rows * self.coding.row_bytes

    def replay(self, epoch: int) -> tuple[int, int]:
        return self.seed, epoch % self.views

    def read(self, epoch: int, index: Tensor, device: torch.device) -> Outputs:
        view = epoch % self.views
        if self._held is None or self._held[:2] != (view, device):
            self._held = (view, device, self._load(view, device))
        arrays = self._held[2]
        held_on = next(iter(arrays.values())).device
        rows = index.to(held_on)
        return self.coding.decode({name: a.index_select(0, rows).to(device) for name, a in arrays.items()})

    def check(self, view: int) -> None:
        """Compares a view's data with the checksums taken when it was built.

        Raises:
            BankError: they differ.
        """
        for chunk in range(self.chunks):
            rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            if checksum(a[view, rows] for a in self._arrays.values()) | DONE != int(self._marks[view, chunk]):
                raise BankError(
                    f"{self.folder}: view {view}, rows {rows.start} to {rows.stop - 1} are not what was written. "
                    "Delete the folder; it is built again."
                )
        self._checked.add(view)

    def _load(self, view: int, device: torch.device) -> dict[str, Tensor]:
        """A view's arrays: on the device where they fit there easily, else mapped from the disk."""
        if view not in self._checked:
            self.check(view)
        arrays = {name: a[view] for name, a in self._arrays.items()}
        if device.type == "cuda":
            size = sum(a.nbytes for a in arrays.values())
            if size * 8 < torch.cuda.mem_get_info(device)[0]:
                return {name: a.to(device) for name, a in arrays.items()}
        return arrays

    def _map(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        path, count = self.folder / name, math.prod(shape)
        size = path.stat().st_size if path.is_file() else -1
        if size != count * dtype.itemsize:
            raise BankError(
                f"{path}: expected {count * dtype.itemsize:,} bytes, "
                f"got {'no file' if size < 0 else f'{size:,}'}. Delete {self.folder} and build it again."
            )
        return torch.from_file(str(path), shared=False, size=count, dtype=dtype).view(shape)


def checksum(arrays: Any) -> int:
    """CRC-32 over arrays in a row."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(array.numpy().data, crc)
    return crc


def open_bank(root: Path, key: BankKey, views: int) -> ViewBank | None:
    """The bank of a key under ``root``, or None where it is not there with so many finished views."""
    folder = root / key.name
    if not (folder / CARD).is_file():
        return None
    try:
        return ViewBank(folder, views=views)
    except BankError:
        return None


@dataclass(frozen=True)
class BankInfo:
    """What a bank's card says: its name, views, images, size in bytes, augmentation, and whether it is whole."""

    name: str
    views: int
    rows: int
    bytes: int
    augmentation: str
    state: str


def list_banks(root: Path) -> list[BankInfo]:
    """The banks of a folder.

    Raises:
        BankError: no such folder, or no bank in it.
    """
    found = []
    for card in sorted(root.glob(f"*/{CARD}")):
        try:
            values = read_json(card)
            key, views = values["key"], int(values["views"])
            coding = Coding(**key["coding"])
            facts = (views, int(key["rows"]), views * int(key["rows"]) * coding.row_bytes, str(key["augmentation"]))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # no bank of ours
        try:
            ViewBank(card.parent)
            state = "whole"
        except BankError as error:
            state = "not finished" if "not finished" in str(error) else "damaged"
        found.append(BankInfo(card.parent.name, *facts, state))
    if not found:
        raise BankError(f"No bank in {str(root)!r}. `krdistill bank build` makes one.")
    return found


def free_bytes(folder: Path) -> int:
    """Free space on the disk that holds a folder, or would."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
