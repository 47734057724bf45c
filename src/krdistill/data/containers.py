"""Data sets: :class:`Examples` is one part of one, :class:`DataBundle` a training and a test part."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..errors import ArgumentError, DataError
from ..kinds import NOUNS, Kind
from .cache import MappedImages
from .decoding import pixels_of

_CHUNK = 4096

E = TypeVar("E", bound="Examples")


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples of one kind, in memory or memory-mapped; what :class:`ImageData`, :class:`FeatureData` and
    :class:`TextData` share.

    Attributes:
        inputs: the rows, N of them (:mod:`krdistill.kinds`).
        labels: int64, shape ``(N,)``, in ``[0, K)``.
        class_names: K distinct names, in the order of the labels.
        ids: one text per row that says which one it is: a file's path under the data's root, or part and upstream
            row, such as ``train/123``.
        name: name of the data set.
        units: one text per row, where some belong together (a patient, near-duplicates): rows with the same text
            are never parted by a split. None where each is on its own.

    Raises:
        ArgumentError: shapes, dtypes, labels, names or ids that do not fit each other.
    """

    kind: ClassVar[Kind]

    inputs: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    ids: tuple[str, ...]
    name: str = "images"
    units: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "ids", tuple(map(str, self.ids)))
        rows, labels, K, noun = self.inputs, self.labels, len(self.class_names), NOUNS[self.kind]
        self._check_inputs()
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or labels.ndim != 1:
            raise ArgumentError(f"Expected labels to be int64 of shape (N,), got {_describe(labels)}.")
        if not len(rows) == len(labels) == len(self.ids):
            raise ArgumentError(
                f"Expected as many labels and ids as {noun}, got {len(rows)} {noun}, {len(labels)} labels and "
                f"{len(self.ids)} ids."
            )
        if self.units is not None and len(self.units) != len(labels):
            raise ArgumentError(f"Expected as many units as {noun}, got {len(self.units)} for {len(labels)} {noun}.")
        twice = [name for name, count in Counter(self.class_names).items() if count > 1]
        if K == 0 or twice or not all(isinstance(name, str) and name for name in self.class_names):
            raise ArgumentError(
                f"Expected distinct, non-empty class names, got {f'{twice[0]!r} twice' if twice else self.class_names}."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= K:
            raise ArgumentError(f"Expected labels from 0 to {K - 1} for {K} class names, got {low} to {high}.")

    def _check_inputs(self) -> None:
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        words = (repr(self.name), f"{len(self)} {NOUNS[self.kind]}", self.shape, f"{self.num_classes} classes")
        return f"{type(self).__name__}({', '.join(filter(None, words))})"

    @property
    def shape(self) -> str:
        """What every row looks like, in words for a person: ``32x32x3``, ``of 64 numbers``; empty of sentences."""
        return ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def counts(self) -> Tensor:
        """Rows per class, shape ``(K,)``, int64; a class without any has 0."""
        return torch.bincount(self.labels, minlength=self.num_classes)

    def checksum(self) -> str:
        """SHA-256 over labels, class names, ids and every row's own SHA-256, in hexadecimal; computed once.

        Of memory-mapped images these are the ones noted when they were decoded: nothing is read again, and the result
        is that of the same images in memory.
        """
        return self._checksum

    @cached_property
    def _checksum(self) -> str:
        digest = hashlib.sha256(repr(tuple(self.inputs.shape)).encode())
        _hash_texts(digest, self.class_names)
        _hash_texts(digest, self.ids)
        digest.update(self.labels.cpu().numpy().astype("<i8").tobytes())
        if isinstance(self.inputs, MappedImages):
            digest.update(self.inputs.row_digests())
        else:
            for rows in self.inputs.split(_CHUNK):
                for row in rows.cpu().contiguous().numpy():
                    digest.update(hashlib.sha256(row.data).digest())
        return digest.hexdigest()

    def subset(self: E, index: Tensor | npt.ArrayLike) -> E:
        """The examples at these rows, in this order; of memory-mapped images none is read.

        Args:
            index: row numbers, or a mask of N truth values.

        Raises:
            ArgumentError: a row that does not exist, or no row at all.
        """
        rows = _positions(index, len(self), "rows")
        return self._at(rows)

    def _at(self: E, rows: Tensor) -> E:
        index = rows.tolist()
        return replace(
            self,
            inputs=self.inputs.select_rows(rows) if isinstance(self.inputs, MappedImages) else self.inputs[rows],
            labels=self.labels[rows],
            ids=tuple(self.ids[i] for i in index),
            units=None if self.units is None else tuple(self.units[i] for i in index),
        )

    def keep_classes(self: E, kept: Tensor | npt.ArrayLike) -> E:
        """Only the examples of these classes, which become classes 0, 1, ... in the order given.

        Args:
            kept: class numbers, or a mask of K truth values.

        Raises:
            ArgumentError: a class that does not exist or is named twice, or no example left.
        """
        classes = _positions(kept, self.num_classes, "classes")
        if len(classes.unique()) != len(classes):
            raise ArgumentError(f"Expected every class once, got {classes.tolist()}.")
        if torch.equal(classes, torch.arange(self.num_classes)):
            return self
        new_label = torch.full((self.num_classes,), -1)
        new_label[classes] = torch.arange(len(classes))
        labels = new_label[self.labels]
        rows = torch.nonzero(labels >= 0).squeeze(1)
        if not len(rows):
            raise ArgumentError(f"{self.name}: none of the {len(classes)} classes kept has an image here.")
        return replace(
            self._at(rows), labels=labels[rows], class_names=tuple(self.class_names[k] for k in classes.tolist())
        )


@dataclass(frozen=True, eq=False, repr=False)
class FeatureData(Examples):
    """Labelled vectors: ``inputs`` is float32, shape ``(N, D)``, every number finite."""

    kind: ClassVar[Kind] = "features"
    name: str = "features"

    def _check_inputs(self) -> None:
        rows = self.inputs
        if not isinstance(rows, Tensor) or rows.dtype != torch.float32 or rows.ndim != 2 or 0 in rows.shape:
            raise ArgumentError(f"Expected vectors to be float32 of shape (N, D), got {_describe(rows)}.")
        if not bool(rows.isfinite().all()):
            bad = torch.nonzero(~rows.isfinite().all(1)).flatten().tolist()
            raise ArgumentError(
                f"Expected finite numbers, got NaN or infinity in {len(bad):,} rows: {first_few(map(str, bad))}."
            )

    @property
    def shape(self) -> str:
        return f"of {self.inputs.shape[1]} numbers"


@dataclass(frozen=True, eq=False, repr=False)
class TextData(Examples):
    """Labelled sentences: ``inputs`` is uint8, shape ``(N, L)``, their UTF-8 bytes with zeros behind them
    (:func:`krdistill.kinds.encode_texts`)."""

    kind: ClassVar[Kind] = "text"
    name: str = "sentences"

    def _check_inputs(self) -> None:
        rows = self.inputs
        if not isinstance(rows, Tensor) or rows.dtype != torch.uint8 or rows.ndim != 2 or 0 in rows.shape:
            raise ArgumentError(f"Expected sentences as bytes, uint8 of shape (N, L), got {_describe(rows)}.")


@dataclass(frozen=True, eq=False, repr=False)
class ImageData(Examples):
    """Labelled images: ``inputs``, also called ``images``, is uint8, shape ``(N, H, W, C)``; of a data set larger than
    memory a :class:`~krdistill.data.cache.MappedImages`, of which some rows at a time should be taken."""

    kind: ClassVar[Kind] = "image"

    def _check_inputs(self) -> None:
        images = self.inputs
        if not isinstance(images, Tensor) or images.dtype != torch.uint8 or images.ndim != 4:
            raise ArgumentError(f"Expected images to be uint8 of shape (N, H, W, C), got {_describe(images)}.")
        if 0 in images.shape:
            raise ArgumentError(f"Expected at least one image with pixels, got shape {tuple(images.shape)}.")

    @property
    def images(self) -> Tensor:
        return self.inputs

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return self.inputs.shape[1], self.inputs.shape[2]

    @property
    def channels(self) -> int:
        return self.inputs.shape[3]

    @property
    def shape(self) -> str:
        return "x".join(map(str, self.inputs.shape[1:]))

    @classmethod
    def from_arrays(
        cls,
        images: Tensor | npt.ArrayLike,
        labels: Tensor | npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        *,
        ids: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> ImageData:
        """Images and labels as NumPy arrays or tensors.

        Args:
            images: uint8, shape ``(N, H, W, C)``, or ``(N, H, W)`` for grey ones.
            labels: whole numbers, shape ``(N,)``.
            class_names: by default ``"0"``, ``"1"``, ... up to the largest label.
            ids: by default the name and the row, such as ``arrays/7``.
            name: name of the data set.

        Raises:
            ArgumentError: float images, a wrong rank or channel order, labels that are no whole numbers, or lengths
                that differ.
        """
        pixels, numbers = _as_images(images, "images"), _as_labels(labels, "labels")
        if len(pixels) != len(numbers):
            raise ArgumentError(f"Expected as many labels as images, got {len(numbers)} for {len(pixels)} images.")
        if class_names is None:
            class_names = [str(k) for k in range(int(numbers.max()) + 1)]
        if ids is None:
            ids = [f"{name}/{i}" for i in range(len(pixels))]
        return cls(pixels, numbers, tuple(class_names), tuple(ids), name)

    @classmethod
    def from_dataset(
        cls, dataset: Any, class_names: Sequence[str] | None = None, *, name: str = "dataset"
    ) -> ImageData:
        """A map-style ``torch.utils.data.Dataset`` that gives ``(image, label)``.

        An image may be a PIL image, a uint8 array ``(H, W)`` or ``(H, W, C)``, or a uint8 tensor ``(H, W)`` or, as
        torchvision has it, ``(C, H, W)``. All must be of one size. Grey images among coloured ones become RGB.

        Args:
            dataset: has a length, and is indexed from 0.
            class_names: by default ``dataset.classes`` where there is one, else ``"0"``, ``"1"``, ...
            name: name of the data set.

        Raises:
            ArgumentError: no length, float images (a transform such as ``ToTensor``), or labels that are no whole
                numbers.
            DataError: images of different sizes.
        """
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise ArgumentError(
                f"Expected a data set with a length and rows to index, got {type(dataset).__name__}; "
                "collect its images and use ImageData.from_arrays."
            )
        if not len(dataset):
            raise DataError("Expected a data set with at least one image, got an empty one.")
        images: list[npt.NDArray[np.uint8]] = []
        labels: list[int] = []
        for i in range(len(dataset)):
            item = dataset[i]
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise ArgumentError(f"Expected the data set to give (image, label), got {_describe(item)} at row {i}.")
            images.append(_sample(item[0], i))
            labels.append(_label(item[1], i))
        shapes = Counter(image.shape[:2] for image in images)
        if len(shapes) > 1:
            raise DataError(
                f"Expected images of one size, got {_sizes(shapes)}. Give the data set a transform that resizes."
            )
        channels = {image.shape[2] for image in images}
        if channels == {1, 3}:
            images = [np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image for image in images]
        elif len(channels) > 1:
            raise DataError(f"Expected images with the same number of channels, got {sorted(channels)}.")
        if class_names is None:
            class_names = getattr(dataset, "classes", None)
        if class_names is not None:
            class_names = [str(c) for c in class_names]
        return cls.from_arrays(np.stack(images), labels, class_names, name=name)


class LoadedImages(NamedTuple):
    """What a source holds, uncut.

    Attributes:
        train: the training part.
        test: the test part.
        val: the source's own validation part, where it has one beside its test part.
        notes: what the reader should know, such as files that were left out.
    """

    train: Examples
    test: Examples
    val: Examples | None = None
    notes: tuple[str, ...] = ()


@dataclass(eq=False)
class DataBundle:
    """The examples of a run, all of one kind: training, test and, where there is one, validation part.

    Attributes:
        train: what the networks are trained on.
        test: what they are evaluated on.
        val: what choices are made on, if any.
        name: name of the data set.
        split: everything that defines the split, as plain JSON-able data. ``counts`` (images per class and part) and
            ``checksum`` (see :func:`split_checksum`) are always filled in here.

    Raises:
        ArgumentError: parts with different classes, kinds or shapes of rows.
    """

    train: Examples
    test: Examples
    val: Examples | None = None
    name: str = ""
    split: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.name = self.name or self.train.name
        for label, part in (("test", self.test), ("val", self.val)):
            if part is None:
                continue
            if part.class_names != self.train.class_names:
                raise ArgumentError(
                    f"Expected {label} to have the classes of train, in the same order; "
                    f"{_first_difference(self.train.class_names, part.class_names)}."
                )
            if part.kind != self.train.kind:
                raise ArgumentError(
                    f"Expected {label} to be {NOUNS[self.train.kind]} as in train, got {NOUNS[part.kind]}."
                )
            if part.kind != "text" and part.inputs.shape[1:] != self.train.inputs.shape[1:]:
                raise ArgumentError(
                    f"Expected {label} {NOUNS[part.kind]} of shape {tuple(self.train.inputs.shape[1:])} as in train, "
                    f"got {tuple(part.inputs.shape[1:])}."
                )
        parts = {"train": self.train, "val": self.val, "test": self.test}
        self.split = {
            "source": self.name,
            **self.split,
            "num_classes": self.num_classes,
            "counts": {k: None if part is None else part.counts().tolist() for k, part in parts.items()},
            "checksum": split_checksum(self.train, self.val, self.test),
        }

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.class_names

    @property
    def num_classes(self) -> int:
        return self.train.num_classes

    def keep_classes(self, kept: Tensor | npt.ArrayLike) -> DataBundle:
        """Every part with these classes alone (see :meth:`ImageData.keep_classes`); the split says which."""
        train = self.train.keep_classes(kept)
        if train is self.train:
            return self
        return DataBundle(
            train=train,
            test=self.test.keep_classes(kept),
            val=None if self.val is None else self.val.keep_classes(kept),
            name=self.name,
            split={**self.split, "kept_classes": list(train.class_names)},
        )

    @classmethod
    def from_arrays(
        cls,
        train_images: Tensor | npt.ArrayLike,
        train_labels: Tensor | npt.ArrayLike,
        test_images: Tensor | npt.ArrayLike,
        test_labels: Tensor | npt.ArrayLike,
        class_names: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> DataBundle:
        """Two pairs of NumPy arrays or tensors.

        Args:
            train_images: uint8, shape ``(N, H, W, C)``, or ``(N, H, W)`` for grey ones.
            train_labels: whole numbers, shape ``(N,)``.
            test_images: as ``train_images``.
            test_labels: as ``train_labels``.
            class_names: by default ``"0"``, ``"1"``, ... up to the largest label of both.
            name: name of the data set.

        Raises:
            ArgumentError: as :meth:`ImageData.from_arrays`, and parts that do not fit each other.
        """
        train_y, test_y = _as_labels(train_labels, "train_labels"), _as_labels(test_labels, "test_labels")
        if class_names is None:
            class_names = [str(k) for k in range(int(max(train_y.max(), test_y.max())) + 1)]
        parts = []
        for part, images, y in (("train", train_images, train_y), ("test", test_images, test_y)):
            x = _as_images(images, f"{part}_images")
            if len(x) != len(y):
                raise ArgumentError(f"Expected as many {part}_labels as {part}_images, got {len(y)} and {len(x)}.")
            ids = [f"{part}/{i}" for i in range(len(x))]
            parts.append(ImageData.from_arrays(x, y, class_names, ids=ids, name=name))
        return cls(train=parts[0], test=parts[1], name=name)


def split_checksum(train: Examples, val: Examples | None, test: Examples) -> str:
    """SHA-256 over the ids and labels of train, validation and test part, in order: two splits with the same checksum
    have the same images under the same labels in the same rows."""
    digest = hashlib.sha256()
    for name, part in (("train", train), ("val", val), ("test", test)):
        _hash_texts(digest, [name] if part is None else [name, *part.ids])
        if part is not None:
            digest.update(part.labels.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def first_few(names: Iterable[str]) -> str:
    """Names for a message, no more than five of them."""
    items = list(names)
    return ", ".join(items[:5]) + (f" and {len(items) - 5:,} more" if len(items) > 5 else "")


def _hash_texts(digest: Any, texts: Sequence[str]) -> None:
    # Every text with its length before it, so that no two lists of texts run into the same bytes.
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    digest.update(len(encoded).to_bytes(8, "little"))
    digest.update(b"".join(len(text).to_bytes(8, "little") + text for text in encoded))


def _positions(index: Tensor | npt.ArrayLike, length: int, what: str) -> Tensor:
    """Row or class numbers, given as numbers or as a mask."""
    numbers = index.cpu() if isinstance(index, Tensor) else torch.as_tensor(np.array(index))
    if numbers.ndim != 1 or not len(numbers):
        raise ArgumentError(f"Expected a non-empty list of {what}, got shape {tuple(numbers.shape)}.")
    if numbers.dtype == torch.bool:
        if len(numbers) != length:
            raise ArgumentError(f"Expected a mask over {length} {what}, got {len(numbers)} truth values.")
        numbers = torch.nonzero(numbers).squeeze(1)
        if not len(numbers):
            raise ArgumentError(f"Expected a mask with at least one of {length} {what}, got none.")
    if numbers.is_floating_point() or numbers.is_complex():
        raise ArgumentError(f"Expected {what} as whole numbers, got {numbers.dtype}.")
    numbers = numbers.to(torch.int64)
    if int(numbers.min()) < 0 or int(numbers.max()) >= length:
        raise ArgumentError(
            f"Expected {what} from 0 to {length - 1}, got {int(numbers.min())} to {int(numbers.max())}."
        )
    return numbers


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    return type(value).__name__


def _tensor(value: Any, what: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise ArgumentError(f"Expected {what} to be an array of numbers, got {_describe(array)}.")
    if array.dtype.kind in "ui" and array.dtype.itemsize > 1:
        array = array.astype(np.int64)  # torch has no arithmetic for the wider unsigned ones
    return torch.from_numpy(np.ascontiguousarray(array))


def _as_images(value: Any, what: str) -> Tensor:
    images = _tensor(value, what)
    if images.dtype != torch.uint8:
        hint = "multiply by 255, round and convert" if images.is_floating_point() else "convert"
        raise ArgumentError(
            f"Expected {what} to be uint8 pixels from 0 to 255, got {_describe(images)}; {hint} them to uint8. "
            "Normalisation is the network's business, not the data's."
        )
    if images.ndim == 3:
        images = images.unsqueeze(3)
    if images.ndim != 4:
        raise ArgumentError(f"Expected {what} of shape (N, H, W, C) or (N, H, W), got {tuple(images.shape)}.")
    if images.shape[1] <= 4 < images.shape[3]:
        raise ArgumentError(
            f"Expected {what} with channels last, (N, H, W, C), got {tuple(images.shape)}, which looks like "
            "(N, C, H, W); permute(0, 2, 3, 1) puts them last."
        )
    return images.contiguous()


def _as_labels(value: Any, what: str) -> Tensor:
    labels = _tensor(value, what)
    if not len(labels):
        raise ArgumentError(f"Expected {what} with at least one label, got none.")
    if labels.ndim != 1:
        hint = "; argmax(1) turns one-hot rows into class numbers" if labels.ndim == 2 else ""
        raise ArgumentError(f"Expected {what} of shape (N,), got {tuple(labels.shape)}{hint}.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ArgumentError(f"Expected {what} to be class numbers, whole numbers from 0, got {labels.dtype}.")
    return labels.to(torch.int64)


def _sample(image: Any, row: int) -> npt.NDArray[np.uint8]:
    if isinstance(image, Tensor):
        image = image.permute(1, 2, 0).cpu().numpy() if image.ndim == 3 else image.cpu().numpy()
    elif not isinstance(image, np.ndarray):
        if not hasattr(image, "convert"):
            raise ArgumentError(f"Expected a PIL image, an array or a tensor, got {_describe(image)} at row {row}.")
        image = pixels_of(image)
    if image.dtype != np.uint8:
        raise ArgumentError(
            f"Expected uint8 images, got {_describe(image)} at row {row}; give the data set without transforms such as "
            "ToTensor and Normalize."
        )
    image = image[..., None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[2] > 4:
        raise ArgumentError(
            f"Expected an array (H, W, C) or a tensor (C, H, W), got channels last {image.shape} at row {row}."
        )
    return image


def _label(label: Any, row: int) -> int:
    if isinstance(label, (Tensor, np.ndarray, np.generic)) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, int) or isinstance(label, bool):
        raise ArgumentError(f"Expected a class number as label, got {label!r} at row {row}.")
    return label


def _sizes(shapes: Counter[tuple[int, ...]]) -> str:
    """Sizes of images by how often they occur, the most frequent first."""
    common = [f"{W}x{H} ({count})" for (H, W), count in shapes.most_common(4)]
    return ", ".join(common) + (f" and {len(shapes) - 4} more sizes" if len(shapes) > 4 else "")


def _first_difference(old: Iterable[str], new: Iterable[str]) -> str:
    old, new = list(old), list(new)
    for k, (a, b) in enumerate(zip(old, new, strict=False)):
        if a != b:
            return f"class {k} is {a!r} there and {b!r} here"
    return f"there are {len(old)} there and {len(new)} here"
