"""An exported file through ONNX Runtime: what it says of itself, and its answers. Nothing here imports torch."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..calibration import Calibrator
from ..errors import ArgumentError, ConfigError, MissingDependencyError, ModelError, unknown_name
from ..kinds import Kind

_AGAIN = "Write the file with: krdistill export RUN."


def open_session(path: Path, *, threads: int | None = None) -> Any:
    """Opens an ONNX file on the CPU.

    Args:
        path: the file.
        threads: within an operator; None leaves it to ONNX Runtime.

    Raises:
        ModelError: no such file, or one that ONNX Runtime cannot open.
        MissingDependencyError: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingDependencyError(
            "Running an exported file needs ONNX Runtime: pip install 'krdistill[runtime]'."
        ) from None
    if not path.is_file():
        raise ModelError(f"{path} is {'a folder' if path.exists() else 'not there'}; expected an .onnx file. {_AGAIN}")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what matters comes back as an exception
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # every status of ONNX Runtime has its own class, without a common one
        raise ModelError(f"{path} cannot be opened as an ONNX file ({_first_line(error)}). {_AGAIN}") from None


class DeviceModel:
    """A student as :func:`~krdistill.deploy.export_onnx` writes it: raw images in, class probabilities out.

    Args:
        path: the ``.onnx`` file.
        threads: as in :func:`open_session`.

    Attributes:
        kind: of what it takes: ``image``, ``features`` or ``text`` (:mod:`krdistill.kinds`).
        class_names: K names, in the order of the probabilities.
        image_size: (H, W) of its images.
        channels: 1 for grey, 3 for RGB; of rows of numbers, how many there are in each.
        class_counts: training images of each class, where the file says so, else None.
        calibrator: how sure it may be, where the file says so, else None; its answers are not calibrated.

    Raises:
        ModelError: no file, a damaged one, or one that krdistill did not write: other inputs or outputs, no class
            names, or not as many as there are outputs.
        MissingDependencyError: ONNX Runtime is not installed.
    """

    def __init__(self, path: Path, *, threads: int | None = None) -> None:
        self.path = path
        self._session = open_session(path, threads=threads)
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        kind, card = _kind_of(inputs), _card(self._session)
        self._floats = kind == "image" and inputs[0].type == "tensor(float)"
        # Floats of a stranger's file may have to be normalised in a way of its own.
        if kind is None or (self._floats and card.get("float_images") is not True):
            raise ModelError(
                f"{path} takes {_described(inputs)}; expected one input of raw images, uint8 (batch, 1 or 3, H, W), "
                f"with the normalisation inside. {_AGAIN}"
            )
        if [(o.type, len(o.shape)) for o in outputs] != [("tensor(float)", 2)]:
            raise ModelError(
                f"{path} answers {_described(outputs)}; expected class probabilities, float32 (batch, K). {_AGAIN}"
            )
        names = card.get("class_names")
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            raise ModelError(f"{path} does not say what its classes are called (metadata class_names). {_AGAIN}")
        K = outputs[0].shape[1]
        if len(names) != K:
            raise ModelError(f"{path} answers {K} classes and names {len(names)}; it does not fit together. {_AGAIN}")
        counts = card.get("class_counts")
        if counts is not None and not (
            isinstance(counts, list) and len(counts) == K and all(isinstance(n, int) and n >= 0 for n in counts)
        ):
            raise ModelError(f"{path}: expected {K} whole numbers as class_counts, got {counts!r:.80}. {_AGAIN}")
        self.kind: Kind = kind
        self._input = inputs[0].name
        self.class_names: tuple[str, ...] = tuple(names)
        self.channels: int = inputs[0].shape[1] if self.kind != "text" else 1
        self.image_size: tuple[int, int] = tuple(inputs[0].shape[2:]) if self.kind == "image" else (0, 0)
        self.class_counts: tuple[int, ...] | None = None if counts is None else tuple(counts)
        self.calibrator: Calibrator | None = _calibrator(card, K, path)

    def __call__(self, images: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
        """Class probabilities of images, or of what else it takes.

        Args:
            images: uint8, shape ``(B, H, W, C)``, as :func:`krdistill.data.decoding.decode` gives them, whatever the
                file takes (one that takes floats, takes float32 in [0, 1] too); float32
                ``(B, D)``; or sentences as bytes, uint8 ``(B, L)`` (:func:`krdistill.kinds.encode_texts`).

        Returns:
            float32, shape ``(B, K)``.

        Raises:
            ModelError: the file cannot be run on them.
        """
        batch = np.ascontiguousarray(images.transpose(0, 3, 1, 2) if self.kind == "image" else images)
        if self._floats and batch.dtype == np.uint8:
            batch = batch.astype(np.float32) / np.float32(255)
        if self.kind == "text":  # no graph takes fewer than four bytes
            batch = np.pad(batch, ((0, 0), (0, max(0, 4 - batch.shape[1]))))
        try:
            answer: npt.NDArray[np.float32] = self._session.run(None, {self._input: batch})[0]
        except Exception as error:  # as in open_session
            raise ModelError(f"{self.path} cannot be run ({_first_line(error)}). {_AGAIN}") from None
        return answer


def _kind_of(inputs: Any) -> Kind | None:
    """What a file with these inputs takes; None of one that krdistill did not write."""
    if len(inputs) != 1 or not inputs[0].shape or isinstance(inputs[0].shape[0], int):
        return None
    dtype, (_, *shape) = inputs[0].type, inputs[0].shape
    known = [isinstance(n, int) for n in shape]
    if dtype in ("tensor(uint8)", "tensor(float)") and len(shape) == 3 and all(known) and shape[0] in (1, 3):
        return "image"
    if dtype == "tensor(uint8)" and known == [False]:
        return "text"
    return "features" if dtype == "tensor(float)" and known == [True] else None


def class_weights(model: DeviceModel, prior: str) -> npt.NDArray[np.float64] | None:
    """The weights of a test-time class prior.

    Args:
        model: knows the classes, and how frequent they were in training.
        prior: ``uniform``, ``natural`` (the training frequencies), or a CSV file with the columns ``class`` and
            ``weight``, one row for every class.

    Returns:
        Weights that sum to 1, float64, shape ``(K,)``; None for ``uniform``.

    Raises:
        ConfigError: the file does not say its class counts, or the CSV file is not there, names other classes, a class
            twice or not at all, or has weights that are negative, not numbers, or all zero.
    """
    if prior == "uniform":
        return None
    if prior == "natural":
        if model.class_counts is None or not sum(model.class_counts):
            raise ConfigError(
                f"--prior natural: {model.path} does not say how many training images each class had. Export it again "
                "from its run (krdistill export RUN), or give a CSV file of class,weight."
            )
        weights = np.array(model.class_counts, dtype=np.float64)
    else:
        weights = _read_weights(Path(prior), model.class_names)
    return weights / weights.sum()


def with_prior(
    probabilities: npt.NDArray[np.floating], weights: npt.NDArray[np.float64] | None
) -> npt.NDArray[np.float64]:
    r"""Class probabilities under another class prior.

    .. math:: p'_k \propto p_k w_k, \qquad \text{that is, } z'_k = z_k + \log w_k

    The student answers as if every class were equally likely; this puts the prior of the place of use back in.

    Args:
        probabilities: shape ``(B, K)``, rows that sum to 1.
        weights: the prior, shape ``(K,)``; None leaves the probabilities as they are.

    Returns:
        float64, shape ``(B, K)``, rows that sum to 1.

    Source: label shift with a known prior; Saerens et al., "Adjusting the outputs of a classifier to new a priori
        probabilities", Neural Computation 14, 2002.
    """
    p = probabilities.astype(np.float64)
    if weights is None:
        return p
    # A probability that float32 rounded to 0 is not impossible; a weight of 0 is.
    p = np.maximum(p, np.finfo(np.float32).smallest_subnormal) * weights
    return p / p.sum(axis=1, keepdims=True)


def _read_weights(path: Path, names: tuple[str, ...]) -> npt.NDArray[np.float64]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"class", "weight"} <= set(rows.fieldnames or ()):
                raise ConfigError(
                    f"--prior: expected the columns class and weight in {path}, got {', '.join(rows.fieldnames or ())}."
                )
            given = [(row["class"], row["weight"]) for row in rows]
    except FileNotFoundError:
        raise ConfigError(f"--prior: expected uniform, natural, or a CSV file; there is no {str(path)!r}.") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--prior: {path} cannot be read ({_first_line(error)}).") from None
    weights: dict[str, float] = {}
    for name, text in given:
        if name not in names:
            raise ConfigError(f"--prior: {unknown_name('class', str(name), names)}")
        if name in weights:
            raise ConfigError(f"--prior: {path} names the class {name!r} twice; keep one row.")
        try:
            weights[name] = float(text)
        except (TypeError, ValueError):
            weights[name] = math.nan
        if not (math.isfinite(weights[name]) and weights[name] >= 0):
            raise ConfigError(f"--prior: expected a number of at least 0 as weight of {name!r}, got {text!r}.")
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConfigError(
            f"--prior: {path} says nothing of {len(missing)} classes, such as {missing[0]!r}; give every class a row."
        )
    if not any(weights.values()):
        raise ConfigError(f"--prior: all weights in {path} are 0.")
    return np.array([weights[name] for name in names], dtype=np.float64)


def _calibrator(card: dict[str, Any], K: int, path: Path) -> Calibrator | None:
    if "calibrator" not in card:
        return None
    try:
        found = Calibrator.from_dict(card["calibrator"])
    except ArgumentError as error:
        raise ModelError(f"{path}: {error} {_AGAIN}") from None
    if found.num_classes != K:
        raise ModelError(f"{path}: expected a calibrator of {K} classes, got one of {found.num_classes}. {_AGAIN}")
    return found


def _card(session: Any) -> dict[str, Any]:
    """The metadata; values that are no JSON are left out, since krdistill writes none."""
    card = {}
    for key, value in session.get_modelmeta().custom_metadata_map.items():
        try:
            card[key] = json.loads(value)
        except ValueError:
            continue
    return card


def _described(values: Any) -> str:
    return ", ".join(f"{v.name}: {v.type} {v.shape}" for v in values) or "nothing"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
