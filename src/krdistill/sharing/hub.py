"""Networks from and to the Hugging Face Hub, through huggingface_hub's mixin; local folders need no network."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..calibration import Calibrator
from ..errors import ArgumentError, MissingDependencyError, ModelError
from ..models.network import CONFIG_NAME, Network, load_network
from ..outputs import Outputs
from ..reporting.model_card import TASKS
from .folder import CALIBRATOR, README, load_calibrator, save_shared

try:
    from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError
except ImportError as error:
    raise MissingDependencyError(
        f"The Hugging Face layout needs the package {error.name}: pip install 'krdistill[hub]'."
    ) from None

# What is fetched: nothing that could be unpickled or run.
_FILES = (CONFIG_NAME, "model.safetensors", README, CALIBRATOR)


class HubNetwork(Network, ModelHubMixin):
    """A :class:`Network` with ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    It shares its weights with the network it is made of.

    Args:
        network: made by name (:func:`krdistill.models.network.build_network`, a run, a shared folder).
        card: text of ``README.md``; by default one that says no more than ``config.json``. ``krdistill share`` writes
            a whole one.
        calibrator: how sure it may be; ``save_pretrained`` writes it along.
        calibrated: whether it answers so: its logits are then the logarithms of the calibrator's probabilities, so
            that their softmax is calibrated. Features and stages stay as they are.

    Raises:
        ArgumentError: a calibrator of another number of classes, or none where ``calibrated`` asks for one.

    Example::

        network = HubNetwork.from_pretrained("shared/student")
        network.save_pretrained("copy")
    """

    def __init__(
        self, network: Network, *, card: str | None = None, calibrator: Calibrator | None = None,
        calibrated: bool = False,
    ) -> None:  # fmt: skip
        if calibrator is not None and calibrator.num_classes != network.num_classes:
            raise ArgumentError(
                f"Expected a calibrator of {network.num_classes} classes, got {calibrator.num_classes}."
            )
        if calibrated and calibrator is None:
            raise ArgumentError("calibrated: expected a calibrator along with it, got none.")
        self.__dict__.update(network.__dict__)  # a module's whole state
        self.readme, self.calibrator, self.calibrated = card, calibrator, calibrated

    def forward(self, images: Tensor, *, maps: bool = False) -> Outputs:
        """As :meth:`Network.forward`; logits that are calibrated, where it was made so."""
        out = super().forward(images, maps=maps)
        if not self.calibrated or self.calibrator is None:
            return out
        return out._replace(logits=self.calibrator.log_probabilities(out.logits).to(out.logits.dtype))

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        force_download: bool = False,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        revision: str | None = None,
        calibrated: bool = False,
        backbone: nn.Module | None = None,
        allow_factories: bool | Collection[str] = False,
    ) -> HubNetwork:
        """A network from a local folder or from the Hub, in evaluation mode. Nothing is unpickled.

        Args:
            pretrained_model_name_or_path: a folder that ``save_pretrained`` or ``krdistill share`` wrote, or
                ``OWNER/NAME`` on the Hub.
            force_download: fetch it though it is in the cache.
            token: of the Hub; True takes the stored one.
            cache_dir: where fetched files are kept.
            local_files_only: take what is in the cache, and ask no network.
            revision: a branch, tag or commit on the Hub.
            calibrated: apply the calibrator that lies beside the weights (``calibrator.json``); without it the network
                answers as it was trained to.
            backbone: as in :func:`krdistill.load_network`.
            allow_factories: as in :func:`krdistill.load_network`: whether its card may have modules imported.

        Raises:
            ModelError: no such folder or name, no connection, a damaged or foreign folder, or ``calibrated`` and no
                calibrator in it.
            MissingDependencyError: the network's library is not installed.
        """
        given = str(pretrained_model_name_or_path)
        folder = Path(given)
        if not folder.is_dir():
            try:
                folder = Path(
                    snapshot_download(
                        given,
                        revision=revision,
                        cache_dir=cache_dir,
                        force_download=force_download,
                        token=token,
                        local_files_only=local_files_only,
                        allow_patterns=list(_FILES),
                    )
                )
            except (HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".")
                raise ModelError(
                    f"There is no folder {given!r}, and the Hub did not give it ({first}). Expected a folder that "
                    "krdistill share wrote, or OWNER/NAME of a model on the Hub, and a connection to it."
                ) from None
        if not (folder / CONFIG_NAME).is_file():
            raise ModelError(
                f"No network of krdistill in {given}: {CONFIG_NAME} is missing. Expected what krdistill share wrote."
            )
        network = load_network(folder, backbone=backbone, allow_factories=allow_factories)
        readme = folder / README
        card = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else None
        calibrator = load_calibrator(folder, network.num_classes)
        if calibrated and calibrator is None:
            raise ModelError(
                f"{given} holds no calibrator ({CALIBRATOR}). Leave calibrated out, or calibrate the run that it comes "
                "from (krdistill calibrate RUN) and share it again."
            )
        made = cls(network, card=card, calibrator=calibrator, calibrated=calibrated)
        made.eval()
        return made

    def _save_pretrained(self, save_directory: Path) -> None:
        there = (save_directory / README).exists()  # a card that is there stays, as the mixin has it
        save_shared(self, save_directory, card=None if there else self.readme, calibrator=self.calibrator)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """The card it was given, or a short one."""
        name = str((self.architecture or {}).get("name"))
        short = (
            f"---\nlibrary_name: krdistill\npipeline_tag: {TASKS[self.kind]}\n---\n\n"
            f"A `{name}` with {self.parameter_count:,} parameters for {self.num_classes} classes. Nothing is told here "
            "of its data or its accuracy.\n"
        )
        return ModelCard(self.readme or short, ignore_metadata_errors=True)
