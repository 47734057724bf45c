"""The table of data sources, where their files are looked for, and the one door through which they are read.

This module imports neither torch nor Pillow until images are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import ArgumentError, DataError, unknown_name
from ..kinds import NOUNS, Kind

if TYPE_CHECKING:
    from .containers import Examples, LoadedImages
    from .listing import Listing

OnUnreadable = Literal["error", "skip"]
CacheUse = Literal["auto", "always", "never"]
SplitBy = Literal["none", "group", "duplicates"]


@dataclass(frozen=True)
class Archive:
    """The file a data set is published as.

    Attributes:
        url: its address.
        filename: the name it is stored under.
        md5: checksum of the whole file, as published with the data set.
    """

    url: str
    filename: str
    md5: str


@dataclass(frozen=True)
class SourceInfo:
    """One data source.

    Attributes:
        name: what it is called here.
        description: one line for a list.
        citation: title, authors and year.
        folder: the upstream folder under the data root; None where there are no files.
        files: what has to be in the folder, each with its md5 checksum where one is published.
        archive: what is downloaded; None where there is nothing to download.
        kind: of its examples.
        page: where its files are published, where they are no archive.
    """

    name: str
    description: str
    citation: str
    folder: str | None = None
    files: Mapping[str, str | None] = field(default_factory=dict)
    archive: Archive | None = None
    kind: Kind = "image"
    page: str | None = None


_TORONTO = "https://www.cs.toronto.edu/~kriz"
_KRIZHEVSKY = 'Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009'
_LARSON = 'Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019'

SOURCES: dict[str, SourceInfo] = {
    info.name: info
    for info in (
        SourceInfo(
            name="digits",
            description="1,797 handwritten digits, grey 8x8, 10 classes; comes with scikit-learn",
            citation='Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998',
        ),
        SourceInfo(
            name="cifar10",
            description="60,000 photographs, RGB 32x32, 10 classes",
            citation=_KRIZHEVSKY,
            folder="cifar-10-batches-py",
            files={
                "data_batch_1": "c99cafc152244af753f735de768cd75f",
                "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
                "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
                "data_batch_4": "634d18415352ddfa80567beed471001a",
                "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
                "test_batch": "40351d587109b95175f43aff81a1287e",
                "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
            },
            archive=Archive(
                f"{_TORONTO}/cifar-10-python.tar.gz", "cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a"
            ),
        ),
        SourceInfo(
            name="cifar100",
            description="60,000 photographs, RGB 32x32, 100 classes",
            citation=_KRIZHEVSKY,
            folder="cifar-100-python",
            files={
                "train": "16019d7e3df5f24257cddd939b257f8d",
                "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
                "meta": "7973b15100ade9c7d40fb424638fde48",
            },
            archive=Archive(
                f"{_TORONTO}/cifar-100-python.tar.gz", "cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85"
            ),
        ),
        SourceInfo(
            name="tiny-imagenet",
            description="110,000 photographs, RGB 64x64, 200 classes; the validation part is the test part",
            citation='Le and Yang, "Tiny ImageNet Visual Recognition Challenge", Stanford CS231n, 2015',
            folder="tiny-imagenet-200",
            files={"wnids.txt": None, "train": None, "val/images": None, "val/val_annotations.txt": None},
            archive=Archive(
                "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
                "tiny-imagenet-200.zip",
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
        SourceInfo(
            name="digits-features",
            description="the digits as rows of 64 numbers; comes with scikit-learn",
            citation='Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998',
            kind="features",
        ),
        SourceInfo(
            name="banking77",
            description="13,083 questions to a bank, 77 intents, 187 to 35 sentences each",
            citation='Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020',
            folder="text",
            files=dict.fromkeys(("banking77_train.csv", "banking77_test.csv")),
            kind="text",
            page="https://github.com/PolyAI-LDN/task-specific-datasets",
        ),
        SourceInfo(
            name="trec",
            description="5,952 questions, 50 kinds of answers, 962 to 4 questions each",
            citation='Li and Roth, "Learning Question Classifiers", COLING 2002',
            folder="text",
            files=dict.fromkeys(("trec_train_5500.label", "trec_TREC_10.label")),
            kind="text",
            page="https://cogcomp.seas.upenn.edu/Data/QA/QC/",
        ),
        SourceInfo(
            name="hwu64",
            description="11,036 requests to a home assistant, 64 intents, 175 to 35 sentences each; fold 1",
            citation='Liu et al., "Benchmarking Natural Language Understanding Services", IWSDS 2019',
            folder="text",
            files=dict.fromkeys(("hwu64_fold1.tsv",)),
            kind="text",
            page="https://github.com/xliuhw/NLU-Evaluation-Data",
        ),
        SourceInfo(
            name="clinc150",
            description="22,500 requests to an assistant, 150 intents, 100 sentences each",
            citation=_LARSON,
            folder="text",
            files=dict.fromkeys(("clinc150_data_full.json",)),
            kind="text",
            page="https://github.com/clinc/oos-eval",
        ),
        SourceInfo(
            name="clinc150-imbalanced",
            description="18,025 requests to an assistant, 150 intents, 100 to 25 sentences each",
            citation=_LARSON,
            folder="text",
            files=dict.fromkeys(("clinc150_data_imbalanced.json",)),
            kind="text",
            page="https://github.com/clinc/oos-eval",
        ),
    )
}


def list_sources() -> dict[str, str]:
    """Names of the known sources, each with its one-line description."""
    return {name: info.description for name, info in SOURCES.items()}


def data_root(root: str | os.PathLike[str] | None = None) -> Path:
    """The folder that holds data sets: ``root``, else ``$KRDISTILL_DATA``, else ``~/.cache/krdistill/data``."""
    return Path(root or os.environ.get("KRDISTILL_DATA") or "~/.cache/krdistill/data").expanduser()


def source_info(name: str) -> SourceInfo:
    """The record of a known source.

    Raises:
        DataError: there is no source of that name; the message names the nearest ones.
    """
    if name not in SOURCES:
        raise DataError(
            unknown_name(
                "data source",
                name,
                SOURCES,
                hint="A folder of images or a file is given by its path, such as ./my-images.",
            )
        )
    return SOURCES[name]


_FILE_SUFFIXES = (".csv", ".tsv", ".parquet", ".npz", ".txt", ".txt.xz", ".txt.gz")


def is_path(source: str | os.PathLike[str]) -> bool:
    """Whether ``source`` names a folder or a file: a path object, a text with a path separator or with the suffix of a
    manifest, list or archive, or a folder there is.

    The name of a known source always means that source.
    """
    if not isinstance(source, str):
        return True
    if source in SOURCES:
        return False
    named = "/" in source or os.sep in source or source.lower().endswith(_FILE_SUFFIXES)
    return named or Path(source).expanduser().is_dir()


def list_files(source: str | os.PathLike[str], *, root: str | os.PathLike[str] | None = None) -> Listing | None:
    """The image files and labels of a folder of images, a manifest or list files, unopened.

    Args:
        source: the path.
        root: what the relative paths of a manifest or a list start from; by default its own folder.

    Returns:
        The listing; None where the path leads to a NumPy archive or a data set of the Hugging Face library.

    Raises:
        DataError: as :func:`krdistill.data.folder.list_folder`, :func:`krdistill.data.manifest.list_manifest` and
            :func:`krdistill.data.lists.list_lists`; or a file of another kind.
    """
    from .arrays import is_hub_folder
    from .folder import list_folder
    from .lists import find_lists, is_list, list_lists
    from .manifest import MANIFEST_SUFFIXES, list_manifest

    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    if path.is_dir():
        if is_hub_folder(path):
            return None
        listed = any("train" in parts for parts in find_lists(path).values()) or _only_lists(path)
        return list_lists(path, root=root) if listed else list_folder(path)
    if suffix == ".npz":
        return None
    if suffix in MANIFEST_SUFFIXES:
        return list_manifest(path, root=root)
    if is_list(path):
        return list_lists(path, root=root)
    if path.exists():
        raise DataError(
            f"{path} is a file; expected a folder of class folders, a manifest (.csv, .tsv, .parquet), list files "
            "(.txt) or a NumPy archive (.npz)."
        )
    return list_folder(path)


def _only_lists(folder: Path) -> bool:
    """Whether a folder holds list files and no other folder, so that lists are what was meant."""
    from .lists import find_lists

    return bool(find_lists(folder)) and not any(e.is_dir() and not e.name.startswith(".") for e in folder.iterdir())


def locate(info: SourceInfo, root: str | os.PathLike[str] | None = None) -> Path:
    """The folder of a source under the data root, with all its files there.

    Raises:
        DataError: the folder or one of its files is missing; the message holds the command that fetches it and says
            where to put it by hand.
    """
    if info.folder is None:
        raise ArgumentError(f"{info.name} has no files of its own.")
    base = data_root(root)
    folder = base / info.folder
    missing = [name for name in info.files if not (folder / name).exists()]
    if not missing:
        return folder
    what = f"{folder} does not exist" if not folder.is_dir() else f"{folder} lacks {', '.join(missing)}"
    if info.archive is None:
        raise DataError(
            f"{info.name} is not at hand: {what}. Put {' and '.join(info.files)} there, from {info.page}. Another data "
            "root is named by data.root or the environment variable KRDISTILL_DATA."
        )
    raise DataError(
        f"{info.name} is not at hand: {what}. Run `krdistill data download {info.name} --root {base}`, or unpack "
        f"{info.archive.url} there by hand, so that {folder / next(iter(info.files))} exists. "
        "Another data root is named by the environment variable KRDISTILL_DATA."
    )


def load_images(
    source: str | os.PathLike[str],
    *,
    root: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    on_unreadable: OnUnreadable = "error",
    test_fraction: float | None = None,
    test_seed: int = 0,
    split_by: SplitBy = "none",
    cache: CacheUse = "auto",
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadedImages:
    """Reads a data source whole, uncut: images, sentences, or rows of numbers.

    Args:
        source: a name of :data:`SOURCES`; or the path of a table or NumPy archive that holds sentences or numbers
            itself (:func:`krdistill.data.tables.load_table`, :func:`krdistill.data.tables.load_features`), of a folder
            of images
            (:func:`krdistill.data.folder.load_folder`), a manifest ``.csv``, ``.tsv`` or ``.parquet``
            (:func:`krdistill.data.manifest.list_manifest`), lists ``path label`` or their folder
            (:func:`krdistill.data.lists.list_lists`), a NumPy archive ``.npz``
            (:func:`krdistill.data.arrays.load_npz`), or a data set that the Hugging Face library saved
            (:func:`krdistill.data.arrays.load_hub`).
        root: folder that holds the known data sets (see :func:`data_root`); for a manifest or lists, what their
            relative paths start from, by default their own folder. Other paths do not depend on it.
        image_size: side in pixels. Images are scaled so that the shorter side fits, and cropped to the centre square
            (bicubic, antialiased). None keeps the size they have, which then must be the same for all.
        on_unreadable: for image files: ``error`` lists those that cannot be decoded, ``skip`` leaves them out and
            says so in the notes.
        test_fraction: for a path without a test part: the share of images that is put aside as one (0.2).
        test_seed: for ``digits`` and a path without a test part: which images those are.
        split_by: what no split separates: ``none``, every image is on its own; ``group``, the images of one group as
            the source names it (a manifest's column ``group``); ``duplicates``, near-duplicates
            (:mod:`krdistill.data.duplicates`). It holds for the test part that is put aside and for a validation
            part. Of parts that the source has itself, a group in two of them is an error, near-duplicates in two of
            them a note.
        cache: for image files: whether its images are decoded once into a memory-mapped file (see
            :func:`krdistill.data.folder.load_folder`).
        on_progress: called with the images decoded into that file so far and their number.

    Returns:
        ``(train, test, val, notes)``; ``val`` is None unless a folder has both a test and a validation part.

    Raises:
        DataError: the source is unknown, missing, damaged, unreadable or inconsistent.
        ArgumentError: an option is out of range or does not apply to the source.
    """
    from . import arrays, cifar, digits, tiny_imagenet
    from .listing import check_test_fraction, finish, load_listed

    if image_size is not None and (not isinstance(image_size, int) or image_size < 1):
        raise ArgumentError(f"Expected image_size to be a positive number of pixels, got {image_size!r}.")
    if on_unreadable not in ("error", "skip"):
        raise ArgumentError(f"Expected on_unreadable to be 'error' or 'skip', got {on_unreadable!r}.")
    rows = load_rows(source, root)
    if rows is not None:
        noun = NOUNS[rows[0]["train"].kind]
        if image_size is not None or cache == "always":
            option = "image_size" if image_size is not None else "cache"
            raise ArgumentError(f"{option} does not apply to {source}, which holds {noun}; leave data.{option} out.")
        return finish(*rows, split_by, test_fraction, test_seed)
    if is_path(source):
        listing = list_files(source, root=root)
        if listing is not None:
            return load_listed(
                listing,
                image_size=image_size,
                on_unreadable=on_unreadable,
                test_fraction=test_fraction,
                test_seed=test_seed,
                split_by=split_by,
                cache=cache,
                on_progress=on_progress,
            )
        if cache == "always":
            raise ArgumentError(f"cache 'always' does not apply to {source}, which is read into memory; use 'auto'.")
        check_test_fraction(test_fraction, (), str(source))
        if Path(source).suffix.lower() == ".npz":
            parts, notes = arrays.load_npz(source)
            return finish(_resized(parts, image_size), notes, split_by, test_fraction, test_seed)
        parts, notes = arrays.load_hub(source, image_size=image_size, on_unreadable=on_unreadable)
        return finish(parts, notes, split_by, test_fraction, test_seed)
    info = source_info(str(source))
    if cache == "always":
        raise ArgumentError(f"cache 'always' does not apply to {info.name}, which is read into memory; use 'auto'.")
    if test_fraction is not None:
        raise ArgumentError(f"test_fraction does not apply to {info.name}, which has a test part of its own.")
    if info.name == "tiny-imagenet":
        loaded = tiny_imagenet.load_tiny_imagenet(
            locate(info, root), image_size=image_size, on_unreadable=on_unreadable
        )
    elif info.name == "digits":
        loaded = digits.load_digits(test_seed=test_seed)
    else:
        loaded = cifar.load_cifar(locate(info, root), info.files, name=info.name)
    known = _resized({"train": loaded.train, "test": loaded.test}, image_size)
    return finish(known, loaded.notes, split_by)


def load_rows(
    source: str | os.PathLike[str], root: str | os.PathLike[str] | None
) -> tuple[dict[str, Examples], list[str]] | None:
    """The parts of a source of sentences or numbers; None of one of images."""
    from . import digits, sentences, tables

    if not is_path(source):
        info = source_info(str(source))
        if info.kind == "text":
            return sentences.load_sentences(info.name, locate(info, root))
        return ({"train": digits.load_digit_features()}, []) if info.kind == "features" else None
    path = Path(source).expanduser()
    kind = tables.kind_of_table(path)
    if kind is None:
        return None
    return tables.load_features(path) if path.suffix.lower() == ".npz" else tables.load_table(path, kind)


def _resized(parts: Mapping[str, Examples], image_size: int | None) -> dict[str, Examples]:
    from .containers import ImageData
    from .decoding import resize_images

    if image_size is None:
        return dict(parts)
    return {part: resize_images(d, image_size) if isinstance(d, ImageData) else d for part, d in parts.items()}
