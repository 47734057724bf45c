"""The main job as one object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import stages
from .bank import Answers, Coding, ViewBank, build_bank, load_answers
from .bank.plan import DEFAULT_VIEWS
from .config import GroupRule, RecipeConfig, TrainConfig, validate
from .data import DataBundle, load_data
from .data.augment import augmentation_of
from .data.containers import Examples, FeatureData, ImageData, TextData
from .errors import ArgumentError, KrdistillError
from .events import Events
from .kinds import encode_texts
from .models.graphs import SUFFIXES
from .models.network import (
    Network,
    build_network,
    channel_statistics,
    check_needs,
    column_statistics,
    ensemble,
    file_network,
    load_network,
    probe,
    save_network,
)
from .models.teacher import Teacher
from .recipes import resolve_recipe
from .training.loop import collect_outputs
from .training.task import best_device


class Distiller:
    """Distils a teacher into a small student that stays accurate on the rare classes.

    Args:
        teacher: a network's name (it is trained first), a run folder or a saved network's folder, or any trained
            :class:`torch.nn.Module` that maps normalised images to logits (a :class:`Network` brings its own
            normalisation; of any other module the data's mean and standard deviation are taken), or the path of a file:
            a trained network (``.onnx``, ``.pt2``), or stored answers (:func:`krdistill.bank.load_answers`). Several
            networks in a list answer together, as an ensemble. None for the recipe ``none``. A name is one of
            krdistill's own, ``timm:NAME``, ``torchvision:NAME``, ``hf:NAME-or-folder`` or
            ``module:package.path:factory``, and may go on as in ``timm:resnet18?weights=pretrained``.
        student: a network's name, or any module.
        recipe: a name of ``krdistill list recipes``.
        options: the recipe's options, over its defaults.
        train: how the student is trained: a :class:`TrainConfig`, or a mapping of its fields.
        teacher_train: how a teacher given by name is trained; by default as the student.
        bank: a folder for the teacher's answers (:func:`krdistill.bank.build_bank`), which are then computed once for
            every view and shared by all that name the same folder; by default the teacher is asked in every step.
        groups: rule of the class groups.
        seed: of everything random.
        device: as in the configuration.
        events: hears what goes on.

    Example::

        distiller = Distiller(teacher="resnet20", student="resnet8", recipe="krdistill")
        distiller.fit("digits")
        print(distiller.evaluate()["groups"])
        distiller.export("student.onnx")
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module | Sequence[str | Path | nn.Module] | None = "resnet20",
        student: str | nn.Module = "resnet8",
        recipe: str = "krdistill",
        *,
        options: Mapping[str, Any] | None = None,
        train: TrainConfig | Mapping[str, Any] | None = None,
        teacher_train: TrainConfig | Mapping[str, Any] | None = None,
        bank: str | Path | None = None,
        groups: GroupRule = "shot",
        seed: int = 0,
        device: str = "auto",
        events: Events | None = None,
    ) -> None:
        self.recipe, self.options = resolve_recipe(RecipeConfig(name=recipe, **dict(options or {})))
        if teacher is None and "teacher" in self.recipe.needs:
            raise ArgumentError(f"The recipe {recipe!r} needs a teacher, got None. Give one, or use the recipe 'none'.")
        self.train = _train_config(train)
        self.teacher_train = self.train if teacher_train is None else _train_config(teacher_train)
        self.groups_rule, self.seed, self.device = groups, seed, best_device(device)
        self.events = events or Events()
        self._teacher, self._student, self._bank = teacher, student, bank
        self.student_: Network | None = None
        self.teacher_: Teacher | None = None
        self.history_: dict[str, Any] = {}

    def fit(self, data: DataBundle | str | Path) -> Distiller:
        """Trains the teacher where it is only a name, measures it, and distils it into the student.

        Args:
            data: a bundle (:func:`krdistill.data.load_data`, :meth:`DataBundle.from_arrays`), a source's name, or the
                path of a folder of images.
        """
        bundle = data if isinstance(data, DataBundle) else load_data(str(data))
        self.data_ = bundle
        self.prior_, self.groups_ = stages.measure(bundle, self.groups_rule)
        student = self._network(self._student, bundle, self.seed + 1)
        self._check(student, "student", None)
        profile = None
        answers: Answers | None = None
        if "teacher" in self.recipe.needs and _is_file(self._teacher):
            stored = load_answers(Path(str(self._teacher)), bundle)
            answers, profile = stored, stages.profile_answers(stored, bundle)
        elif "teacher" in self.recipe.needs:
            network = self._resolve_teacher(self._teacher, bundle)
            self._check(student, "teacher", network)
            self.teacher_ = Teacher(network, class_names=self.prior_.class_names)
            profile = stages.profile_teacher(self.teacher_, bundle, seed=self.seed, device=self.device)
        self.profile_ = profile
        experts = None
        if "experts" in self.recipe.needs:
            if not isinstance(self._teacher, str):
                raise ArgumentError(
                    f"The recipe {self.recipe.name!r} trains experts: give a network's name as teacher."
                )
            experts = stages.train_experts(
                bundle, self.groups_, model=self._teacher, train=self.teacher_train, seed=self.seed,
                device=self.device, events=self.events,
            )  # fmt: skip
        task = stages.build_task(
            self.recipe, self.options, student, bundle, self.prior_, self.groups_, teacher=self.teacher_,
            profile=profile, answers=answers, experts=experts, sampler=self.train.sampler,
            label_smoothing=self.train.label_smoothing, seed=self.seed, device=self.device,
        )  # fmt: skip
        if self._bank is not None and self.teacher_ is not None:
            answers = self._build_bank(Path(self._bank), bundle, self.teacher_)
        trained = stages.distil(
            task, bundle, self.groups_, self.train, seed=self.seed, device=self.device, answers=answers,
            events=self.events,
        )  # fmt: skip
        self.student_, self.history_ = trained.network, trained.record
        return self

    def evaluate(self, data: Examples | None = None) -> dict[str, Any]:
        """Metrics of the student on the test images, or on others of the same classes."""
        scores, _ = stages.evaluate_network(
            self._fitted(), data if data is not None else self.data_.test, self.groups_, device=self.device
        )
        return scores

    def predict(self, images: Tensor | Sequence[str]) -> Tensor:
        """Class probabilities ``(N, K)`` of uint8 images ``(N, H, W, C)``; or of vectors float32 ``(N, D)``, or
        sentences, where the student was trained on such."""
        student = self._fitted()
        rows = images if isinstance(images, Tensor) else torch.from_numpy(encode_texts(images))
        if not student.takes(rows) or (student.kind == "image" and rows.dtype != torch.uint8):
            height, width = student.image_size
            wanted = f"uint8 images (N, {height}, {width}, {student.channels})"
            raise ArgumentError(
                f"Expected {wanted if student.kind == 'image' else student.takes_words}, "
                f"got {rows.dtype} {tuple(rows.shape)}."
            )
        blank = torch.zeros(len(rows), dtype=torch.int64)
        made = {"image": ImageData, "features": FeatureData, "text": TextData}[student.kind]
        data = made(rows, blank, student.class_names, tuple(map(str, range(len(rows)))), "predict")
        return collect_outputs(student, data, device=self.device)[0].softmax(1)

    def save(self, folder: str | Path) -> Path:
        """Writes the student (``model.safetensors``, ``network.json``) into a folder."""
        save_network(self._fitted(), Path(folder))
        return Path(folder)

    def export(self, path: str | Path) -> dict[str, Any]:
        """Writes an ONNX file and checks it against PyTorch on the test images."""
        from .deploy import export_onnx, verify_onnx

        export_onnx(self._fitted(), Path(path), class_counts=self.data_.train.counts().tolist())
        return verify_onnx(Path(path), self._fitted(), self.data_.test.inputs)

    def _fitted(self) -> Network:
        if self.student_ is None:
            raise KrdistillError("There is no student yet. Call fit(data) first.")
        return self.student_

    def _build_bank(self, root: Path, bundle: DataBundle, teacher: Teacher) -> ViewBank | None:
        return build_bank(
            teacher, bundle.train, augmentation_of(self.train.augmentation, bundle.train),
            views=min(self.train.epochs, DEFAULT_VIEWS), root=root, seed=self.seed,
            coding=Coding(bundle.num_classes, teacher.feature_dim), device=self.device,
            on_step=lambda done, total: self.events.progress("bank", done, total),
        )  # fmt: skip

    def _check(self, student: Network, who: str, teacher: Network | None) -> None:
        network = student if teacher is None else teacher
        probe(network, what=f"The {who} {(network.architecture or {}).get('name', type(network.backbone).__name__)}")
        check_needs(self.recipe.name, self.recipe.needs_with(self.options), student=student, teacher=teacher)
        for note in network.notes:
            self.events.note(note)

    def _resolve_teacher(self, given: Any, bundle: DataBundle) -> Network:
        if isinstance(given, nn.Module):
            return self._network(given, bundle, self.seed)
        if isinstance(given, Sequence) and not isinstance(given, str):
            return ensemble([self._resolve_teacher(one, bundle) for one in given])
        path = Path(str(given))
        if path.suffix in SUFFIXES:
            return file_network(path, class_names=self.prior_.class_names, images=bundle.train.inputs)
        if isinstance(given, Path) or path.is_dir():
            return load_network(path / "teacher" if (path / "teacher").is_dir() else path)
        return stages.train_teacher(
            bundle, self.prior_, self.groups_, model=str(given), train=self.teacher_train, seed=self.seed,
            device=self.device, events=self.events,
        ).network  # fmt: skip

    def _network(self, given: str | nn.Module, bundle: DataBundle, seed: int) -> Network:
        if isinstance(given, Network):
            return given
        if isinstance(given, nn.Module):
            train, names = bundle.train, self.prior_.class_names
            if isinstance(train, ImageData):
                mean, std = channel_statistics(train.images)
                return Network(given, class_names=names, mean=mean, std=std, image_size=train.image_size)
            mean, std = column_statistics(train.inputs) if train.kind == "features" else ([], [])
            return Network(given, class_names=names, mean=mean, std=std, image_size=None, kind=train.kind)
        return build_network(given, class_names=self.prior_.class_names, images=bundle.train.inputs, seed=seed)


def _is_file(teacher: Any) -> bool:
    return isinstance(teacher, (str, Path)) and Path(teacher).suffix in (".npz", ".safetensors")


def _train_config(given: TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
    if isinstance(given, TrainConfig):
        return given
    config: TrainConfig = validate(TrainConfig, dict(given or {}), where="train")
    return config
