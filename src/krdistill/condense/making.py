"""A long-tailed set and a teacher become a small set with soft labels, in a folder that an ordinary run reads."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from .._checks import check_choice, check_integer, check_logits
from ..config import RunConfig, difference, load_config
from ..data import ImageData
from ..data.augment import Augmentation, augmentation_of
from ..data.containers import first_few
from ..errors import ArgumentError, ConfigError, RunFolderError
from ..events import Events
from ..files import check_unpacked, locked, read_json, replacing, sha256, write_json, write_text
from ..kinds import NOUNS, as_batch, as_rows
from ..models.network import load_network
from ..models.registry import parse_model
from ..pipeline import Plan, prepare, run_teacher
from ..rectify import auto_tau, remove_prior
from ..runfolder import SPLIT, environment
from ..training.loop import collect_outputs
from .matching import match_distributions
from .selection import check_enough, herd, random_rows

METHODS = ("random", "herding", "dm")
RECTIFIERS = ("none", "adsa")
RECORD, IMAGES, LABELS, STUDENT = "condense.json", "condensed.npz", "labels.npz", "run.yaml"
_STATE, _LOCK, _TEACHER = "matching.pt", "condense.lock", "teacher"
_SAVE_SECONDS = 30.0
_STEPS = 2000  # of the student's training on the small set, at most
_TAUS = (0.0, 3.0)
_ITERATIONS = 2000


@dataclass(frozen=True)
class CondenseOptions:
    """What is asked for.

    Args:
        ipc: images per class.
        method: ``random`` or ``herding`` choose real images, ``dm`` makes some by distribution matching.
        rectify: what is done to the teacher's answers: ``none``, or ``adsa``.
        views: the label of an image is the teacher's mean logits over so many augmented views; 0 asks about the image
            as it is.
        iterations: steps of ``dm``; by default 2,000.

    Raises:
        ArgumentError: a value out of range, or ``iterations`` without ``dm``.
    """

    ipc: int
    method: str = "dm"
    rectify: str = "none"
    views: int = 8
    iterations: int | None = None

    def __post_init__(self) -> None:
        check_integer("ipc", self.ipc, at_least=1)
        check_choice("method", self.method, METHODS)
        check_choice("rectify", self.rectify, RECTIFIERS)
        check_integer("views", self.views, at_least=0)
        if self.method != "dm" and self.iterations is not None:
            raise ArgumentError(f"iterations are those of method 'dm'; leave them out for {self.method!r}.")
        if self.method == "dm":
            steps = _ITERATIONS if self.iterations is None else self.iterations
            object.__setattr__(self, "iterations", check_integer("iterations", steps, at_least=1))


@dataclass(frozen=True, eq=False)
class Condensed:
    """A small set as images and labels.

    Attributes:
        images: uint8, shape ``(K * ipc, H, W, C)``, class by class.
        labels: shape ``(K * ipc,)``, int64.
        rows: which real images they are, shape ``(K * ipc,)``; None of synthetic ones.
        losses: of every step of ``dm``.
    """

    images: Tensor
    labels: Tensor
    rows: Tensor | None = None
    losses: tuple[float, ...] = ()


def condense_images(
    data: ImageData,
    options: CondenseOptions,
    *,
    features: Tensor | None = None,
    flip: bool = True,
    seed: int = 0,
    device: torch.device | None = None,
    **matching: Any,
) -> Condensed:
    """Chooses or makes the images; what follows from the seed and the arguments alone.

    Args:
        data: the long-tailed set.
        options: what is asked for.
        features: the teacher's to ``data``, shape ``(N, D)``; ``herding`` needs them.
        flip: for ``dm``: whether a horizontal flip leaves the class what it is.
        seed: of everything random.
        device: where ``dm`` works.
        matching: further arguments of :func:`~krdistill.condense.match_distributions`, for ``dm``.
    """
    K, ipc = data.num_classes, options.ipc
    labels = torch.arange(K).repeat_interleave(ipc)
    if options.method == "dm":
        images, losses = match_distributions(
            data.images, data.labels, K, ipc, iterations=int(options.iterations or _ITERATIONS), flip=flip, seed=seed,
            device=device, **matching,
        )  # fmt: skip
        return Condensed(images, labels, losses=tuple(losses))
    if options.method == "herding":
        if features is None:
            raise ArgumentError("features: method 'herding' needs the teacher's features of every image.")
        rows = herd(features, data.labels, K, ipc)
    else:
        rows = random_rows(data.labels, K, ipc, seed=seed)
    return Condensed(data.images[rows], labels, rows)


def soft_labels(
    network: nn.Module,
    data: ImageData,
    log_prior: Tensor,
    *,
    rectify: str = "none",
    views: int = 8,
    augment: Augmentation | None = None,
    seed: int = 0,
    device: torch.device | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    r"""The teacher's answers to a small set, rectified.

    The answer to an image x is the mean over its views v of the teacher's logits, :math:`z(x) = \operatorname{mean}_v
    f(A_v(x))`; ``adsa`` makes of it

    .. math::
        \tilde z = z - \tau^* \log \pi, \qquad
        \tau^* = \arg\min_{\tau \in [0, 3]} \operatorname{std}_k \operatorname{mean}_{x \in \text{class } k}
        \operatorname{softmax}(z(x) - \tau \log \pi)_k

    which is :func:`~krdistill.rectify.auto_tau` on the small set: no more images than these are asked for.

    Args:
        network: the teacher.
        data: the small set.
        log_prior: log pi of the set that the teacher was trained on, shape ``(K,)``, finite.
        rectify: ``none`` or ``adsa``.
        views: how many augmented views of every image are answered; 0 is the image as it is.
        augment: what makes the views; needed where there are any.
        seed: of the views.
        device: where the teacher works.

    Returns:
        Logits, float32, shape ``(N, K)``, and a record: ``views``, ``rectify``, ``tau`` (0 where nothing is removed),
        ``spread`` of the class-mean confidence ``{"before", "after"}``, ``top1`` of the labels ``{"before", "after"}``.

    Source: Jiang et al., "Rectifying Soft-Label Entangled Bias in Long-Tailed Dataset Distillation", NeurIPS 2025,
    arXiv 2511.17914.
    Deviation: means over views, which are softer than the teacher's answer to an image that it was fitted to; the
    interval and the search for tau are ours.
    """
    check_choice("rectify", rectify, RECTIFIERS)
    where = device or torch.device("cpu")
    if views and augment is None:
        raise ArgumentError("augment: expected what makes the views; views=0 asks about the images as they are.")
    total = torch.zeros(1)
    for view in range(max(1, views)):
        shown = data
        if views and augment is not None:
            index = torch.arange(len(data))
            batch = augment(as_batch(data.images), index, seed=seed, epoch=view)
            shown = replace(data, inputs=as_rows(batch).contiguous())
        total = total + collect_outputs(network, shown, device=where)[0]
    logits = total / max(1, views)
    tau = auto_tau(logits, data.labels, log_prior, bounds=_TAUS) if rectify == "adsa" else 0.0
    rectified = remove_prior(logits, log_prior, tau) if tau else logits
    record: dict[str, Any] = {"views": views, "rectify": rectify, "tau": tau}
    for key, value in (
        ("spread", lambda z: float(class_confidence(z, data.labels).std(correction=0))),
        ("top1", lambda z: float((z.argmax(1) == data.labels).double().mean())),
    ):
        record[key] = {"before": value(logits), "after": value(rectified)}
    return rectified, record


def class_confidence(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean probability of the true class, by class; float64, shape ``(K,)``; every class has a row."""
    K = check_logits("logits", logits).shape[1]
    own = logits.double().softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
    return torch.bincount(labels, weights=own, minlength=K) / torch.bincount(labels, minlength=K)


def condense(config: RunConfig, options: CondenseOptions, out: Path, *, events: Events | None = None) -> dict[str, Any]:
    """Makes a small set with soft labels of a configuration's training images, and writes it into a folder.

    The teacher is the configuration's: trained in ``out/teacher``, a run folder, or taken from an earlier run. What is
    written: ``condensed.npz`` (the images, with the test and validation part as they are; a data source),
    ``labels.npz`` (the teacher's answers, ``teacher.answers``), ``run.yaml`` (a run that trains the configuration's
    student on both) and ``condense.json`` (what was done). Begun again with the same request, it goes on.

    Args:
        config: data, teacher and student; recipe and baselines play no part.
        options: what is asked for.
        out: the folder.
        events: hears what goes on.

    Returns:
        What is in ``condense.json``.

    Raises:
        ConfigError: no images, or a teacher that cannot be asked.
        DataError: see :func:`herd` and :func:`match_distributions`.
        RunFolderError: the folder holds something else, or another request.
    """
    events = events or Events()
    if config.teacher.answers:
        raise ConfigError("teacher.answers: the small set is new to stored answers; give a teacher that can be asked.")
    given = {**config.as_dict(), "recipe": {"name": "kd"}, "baselines": [], "bank": {}}
    config = load_config(given)
    request = {"options": asdict(options), "config": given}
    done = _claimed(out, request)
    if done is not None:
        events.skipped("condense", "already done")
        return done
    plan = prepare(config)
    data = plan.data.train
    if not isinstance(data, ImageData):
        raise ConfigError(f"data.source: condensing works on images, and these are {NOUNS[data.kind]}.")
    if options.method != "dm":
        check_enough(data.counts(), options.ipc)
    out.mkdir(parents=True, exist_ok=True)
    with locked(out / _LOCK, busy=lambda: _busy(out)):
        write_json(out / RECORD, {"state": "begun", "request": request})
        record = _make(plan, data, options, out, events)
        record = {"state": "done", "request": request, **record}
        write_json(out / RECORD, record)
        (out / _STATE).unlink(missing_ok=True)
    return record


def _make(plan: Plan, data: ImageData, options: CondenseOptions, out: Path, events: Events) -> dict[str, Any]:
    config, notes, started = plan.config, list(_other_split(plan)), time.perf_counter()
    run_teacher(plan, out / _TEACHER, events=events)
    named = parse_model(config.teacher.model).name
    network = load_network(out / _TEACHER / "teacher", allow_factories=[named])
    features = None
    words = f"{options.ipc:,} images of each of {data.num_classes:,} classes by {options.method}"
    events.stage("condense", words)
    if options.method == "herding":
        features = collect_outputs(network, data, device=plan.device)[1]
    began = time.perf_counter()
    small = condense_images(
        data, options, features=features, flip=config.student.train.augmentation not in ("none", "crop-only"),
        seed=config.seed, device=plan.device, **(_kept_state(out, events) if options.method == "dm" else {}),
    )  # fmt: skip
    seconds = time.perf_counter() - began
    ids = tuple(f"train/{i}" for i in range(len(small.labels)))
    images = ImageData(small.images, small.labels, data.class_names, ids, Path(IMAGES).stem)
    short = [k for k, n in enumerate(data.counts().tolist()) if n < options.ipc]
    if short:
        how = "start from noisy copies" if options.method == "dm" else "stand in the small set several times"
        names = first_few(f"{data.class_names[k]} ({int(data.counts()[k])})" for k in short)
        notes.append(
            f"{len(short):,} of {data.num_classes:,} classes have fewer than {options.ipc:,} images, "
            f"which {how}: {names}."
        )
    events.stage("labels", f"the teacher's answers, rectified: {options.rectify}")
    logits, labels = soft_labels(
        network, images, plan.prior.log_prior, rectify=options.rectify, views=options.views,
        augment=augmentation_of(config.student.train.augmentation, images), seed=config.seed, device=plan.device,
    )  # fmt: skip
    if options.rectify == "adsa" and labels["tau"] > _TAUS[1] - 1e-3:
        notes.append(f"tau is at the end of its interval, {_TAUS[1]:g}: the confidences could be more even.")
    write_condensed(out, plan, images, logits)
    for note in notes:
        events.note(note)
    losses = small.losses
    return {
        "class_names": list(data.class_names),
        "from": {
            "name": plan.data.name,
            "checksum": plan.data.split["checksum"],
            "counts": plan.prior.counts.tolist(),
            "groups": plan.groups.as_dict(),
            "ids": None if small.rows is None else [data.ids[i] for i in small.rows.tolist()],
        },
        "labels": labels,
        "matching": {"first_loss": losses[0], "last_loss": losses[-1], "steps": len(losses)} if losses else None,
        "notes": notes,
        "seconds": {"images": round(seconds, 2), "all": round(time.perf_counter() - started, 2)},
        "files": {name: sha256(out / name) for name in (IMAGES, LABELS)},
        "environment": environment(plan.device),
    }


def _kept_state(out: Path, events: Events) -> dict[str, Any]:
    """``state`` and ``on_step`` of a matching that may be interrupted."""
    path, saved = out / _STATE, time.perf_counter()
    state = None
    if path.is_file():
        try:
            check_unpacked(path, stored=True)
            state = torch.load(path, weights_only=True)
            done = len(state["losses"])
        except Exception as error:  # torch's unpickler raises nearly anything on a damaged file
            raise RunFolderError(f"{path} is damaged ({error}). Delete it; the images are made again.") from None
        events.note(f"going on after step {done:,}")

    def on_step(done: int, total: int, snapshot: Any) -> None:
        nonlocal saved
        events.progress("condense", done, total)
        if done == total or time.perf_counter() - saved > _SAVE_SECONDS:
            with replacing(path) as part, part.open("wb") as file:
                torch.save(snapshot(), file)
            saved = time.perf_counter()

    return {"state": state, "on_step": on_step}


def write_condensed(out: Path, plan: Plan, images: ImageData, logits: Tensor) -> None:
    """Writes the data source, the answers by image id, and the configuration of a run on both.

    The student is the plan's, taught by ``kd`` for as many epochs as make 2,000 steps, or for as many steps as the plan
    has on the whole set, whichever is less.

    Args:
        out: the folder.
        plan: of the whole set; its test and validation part go along.
        images: the small set, with ids ``train/0``, ``train/1``, ...
        logits: the answers, shape ``(N, K)``.
    """
    arrays = {"images": images.images.numpy(), "labels": images.labels.numpy()}
    for name, part in (("test", plan.data.test), ("val", plan.data.val)):
        if part is not None:
            arrays[f"{name}_images"] = part.inputs[torch.arange(len(part))].numpy()
            arrays[f"{name}_labels"] = part.labels.numpy()
    names = np.array(images.class_names)
    with replacing(out / IMAGES) as file:
        np.savez_compressed(file, class_names=names, **arrays)  # type: ignore[arg-type]
    with replacing(out / LABELS) as file:
        np.savez_compressed(file, ids=np.array(images.ids), class_names=names, logits=logits.numpy())
    classes = [[images.class_names[k] for k in plan.groups.members(name).tolist()] for name in plan.groups.names]
    groups = dict(zip(plan.groups.names, classes, strict=True))  # of the whole set: in this one no class is rare
    config = plan.config.as_dict()
    student = config["student"]
    batch = min(student["train"]["batch_size"], len(images))
    per_epoch = math.ceil(len(images) / batch)
    whole = student["train"]["epochs"] * math.ceil(len(plan.data.train) / batch)
    epochs = max(1, min(_STEPS, whole) // per_epoch)
    student["train"] |= {"batch_size": batch, "epochs": epochs, "evaluate_every": max(1, epochs // 10)}
    made = {
        "name": out.resolve().name if _is_name(out.resolve().name) else "condensed",
        "seed": config["seed"],
        "device": config["device"],
        "data": {"source": str((out / IMAGES).resolve()), "groups": groups},
        "teacher": {"model": config["teacher"]["model"], "answers": str((out / LABELS).resolve())},
        "student": student,
        "recipe": {"name": "kd"},
        "baselines": [{"name": "none"}],
        "export": config["export"],
    }
    load_config(made)
    write_text(out / STUDENT, yaml.safe_dump(made, sort_keys=False, allow_unicode=True))


def _is_name(text: str) -> bool:
    return text.isascii() and text[:1].isalnum() and all(c.isalnum() or c in "_.+-" for c in text)


def _other_split(plan: Plan) -> list[str]:
    """Says so where an earlier run's teacher was trained on other images than are condensed."""
    run = plan.config.teacher.run
    path = Path(run) / SPLIT if isinstance(run, str) else None
    try:
        same = path is None or read_json(path)["checksum"] == plan.data.split["checksum"]
    except (OSError, ValueError, KeyError, TypeError):  # a folder without it tells nothing
        return []
    if same:
        return []
    return [f"The teacher in {run} was trained on another split than is condensed here; are the data options the same?"]


def _claimed(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """What is in the folder where it is this request and done; None where it is to be done."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / RECORD).is_file():
        raise RunFolderError(f"{out} holds something else. Nothing was touched. Choose another folder with --out.")
    try:
        known: dict[str, Any] = read_json(out / RECORD)
        lines = difference(known["request"], request)
    except (ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{out / RECORD} is damaged ({error}). Choose another folder with --out.") from None
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[:8])
        raise RunFolderError(
            f"{out} holds another request. Nothing was touched. Choose another folder with --out.\n{shown}"
        )
    whole = all((out / name).is_file() for name in (IMAGES, LABELS, STUDENT))
    return known if known.get("state") == "done" and whole else None


def _busy(out: Path) -> None:
    raise RunFolderError(f"Another process is condensing into {out}. Wait for it, or choose another folder with --out.")
