"""A student as a folder in the Hugging Face layout: weights, ``config.json``, and a card that says what it is."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from ..calibrating import student_calibrator
from ..calibration import Calibrator
from ..config import load_config
from ..errors import ModelError, RunFolderError
from ..files import disk_errors, read_json, write_json, write_text
from ..models.network import CONFIG_NAME, Network, load_network, save_network
from ..models.registry import parse_model
from ..reporting.html import read_run
from ..reporting.model_card import model_card
from ..runfolder import CONFIG, DONE, EXPORT, ONNX

README = "README.md"
CALIBRATOR = "calibrator.json"
_CARD = "network.json"


def share_run(run: Path, folder: Path, *, title: str | None = None, license: str | None = None) -> Path:
    """Writes the student of a finished run as a folder to hand on, or to upload to the Hugging Face Hub.

    It holds ``model.safetensors``, ``config.json`` (:meth:`Network.card`), ``README.md`` (the model card), where the
    run exported one ``model.onnx``, and where its student was given a calibrator of its own ``calibrator.json``, which
    is applied for those alone who ask for it. :func:`krdistill.load_network` and ``HubNetwork.from_pretrained`` read
    the folder. Before it takes its place it is read back, and its answers are those of the run's student bit for bit.

    Args:
        run: the folder of a finished run.
        folder: where; it must not exist, or be empty.
        title: of the card; by default the run's name.
        license: its name on the Hub, such as ``apache-2.0``; by default none is claimed.

    Raises:
        RunFolderError: no finished run, the folder holds something, or the run's calibrator is damaged or of other
            weights.
        ModelError: a student that cannot be rebuilt from its name.
        MissingDependencyError: the ``train`` extra is not installed, or the network's library.
    """
    if not (run / CONFIG).is_file() or not (run / "student" / DONE).is_file():
        raise RunFolderError(f"No trained student in {run}. Expected the folder of a finished run.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{folder} holds something already. Give a folder that does not exist, or is empty.")
    files = read_run(run)
    if "student" not in files.metrics:
        raise RunFolderError(f"The metrics of {run} say nothing of its student. Finish the run first.")
    config = load_config(str(run / CONFIG))
    allowed = [parse_model(config.student.model).name]
    network = load_network(run / "student", allow_factories=allowed)
    onnx = "model.onnx" if (run / ONNX).is_file() and (run / EXPORT).is_file() else None
    calibrator = student_calibrator(run)
    text = model_card(
        files, network.card(), title=title or files.config.get("name") or run.resolve().name, license=license,
        onnx=onnx, calibrator=None if calibrator is None else calibrator.words(),
    )  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder), tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        made = Path(place) / "shared"
        save_shared(network, made, card=text, calibrator=calibrator)
        if onnx is not None:
            shutil.copyfile(run / ONNX, made / onnx)
        _check_same(network, load_network(made, allow_factories=allowed), made)
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    return folder


def load_calibrator(folder: Path, num_classes: int) -> Calibrator | None:
    """The calibrator of a shared folder, or None.

    Raises:
        ModelError: a damaged one, or one of another number of classes.
    """
    path = folder / CALIBRATOR
    if not path.is_file():
        return None
    found = Calibrator.load(path)
    if found.num_classes != num_classes:
        raise ModelError(f"{path}: expected a calibrator of {num_classes} classes, got one of {found.num_classes}.")
    return found


def save_shared(
    network: Network, folder: Path, *, card: str | None = None, calibrator: Calibrator | None = None
) -> None:
    """Writes ``model.safetensors``, ``config.json`` and, where given, the card (``README.md``) and the calibrator.

    A calibrator that lies there already is of the weights that are replaced, and goes with them.

    Raises:
        ModelError: a network that was not made by name, that came as a file, or an ensemble.
    """
    architecture = network.architecture or {}
    if not architecture or "file" in architecture or "members" in architecture:
        kind = "came as a file" if "file" in architecture else "is an ensemble" if architecture else "was made by hand"
        raise ModelError(
            f"This network {kind}: the layout holds one network that can be rebuilt from its name. Give one of "
            "build_network(...), or of a run."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".network.", dir=folder) as place:
        save_network(network, Path(place))
        described = read_json(Path(place) / _CARD)
        for file in Path(place).iterdir():
            if file.name != _CARD:
                os.replace(file, folder / file.name)
    origin, colon, rest = str(architecture["name"]).partition(":")
    if rest.startswith(("/", ".", "~")):  # a folder of this machine; "config" beside it has all that is needed
        described["architecture"]["name"] = origin + colon + rest.rpartition("/")[2]
    write_json(folder / CONFIG_NAME, {"library_name": "krdistill", **described})
    if calibrator is not None:
        calibrator.save(folder / CALIBRATOR)
    else:
        (folder / CALIBRATOR).unlink(missing_ok=True)
    if card is not None:
        write_text(folder / README, card)


def _check_same(network: Network, other: Network, where: Path) -> None:
    """Both answer the same rows with the same bits."""
    with torch.inference_mode():
        ours, theirs = (n.eval()(network.example_inputs()).logits for n in (network, other))
    if not torch.equal(ours, theirs) or network.class_names != other.class_names:
        raise ModelError(
            f"What was written to {where} does not answer as the run's student does. Nothing was left there; "
            "please report the network it came from."
        )
