"""The folder that a plan is carried out in: opened for this plan alone, left in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ..config import dump_config
from ..distributed import World, first_then_all, same_everywhere
from ..errors import RunFolderError
from ..files import DiskError, read_json
from ..models.network import Network, save_network
from ..runfolder import SPLIT, RunFolder, environment, owned
from ..stages import StoppedError
from .plan import Plan, checksums


def open_folder(plan: Plan, out: Path, world: World | None = None) -> RunFolder:
    """Opens the run folder for this plan, or makes it; one that holds another run or other data is refused."""
    world = world or World.alone()
    same_everywhere(dump_config(plan.config) + plan.data.split["checksum"], world, what="configuration and data")
    return first_then_all(lambda: _open(plan, out, world), world)


def _open(plan: Plan, out: Path, world: World) -> RunFolder:
    folder = RunFolder(out, plan.config, world=world)
    split = {
        **plan.data.split,
        "name": plan.data.name,
        "kind": plan.data.train.kind,
        "class_names": list(plan.prior.class_names),
        "counts": plan.prior.counts.tolist(),
        "test_counts": plan.data.test.counts().tolist(),
        "imbalance_factor": plan.prior.imbalance_factor,
        "groups": plan.groups.as_dict(),
        "train_images": len(plan.data.train.labels),
        "val_images": len(plan.data.val.labels) if plan.data.val is not None else 0,
        "test_images": len(plan.data.test.labels),
    }
    known = folder.path / SPLIT
    if known.is_file():
        old = read_json(known).get("checksum")
        if old != split["checksum"]:
            raise RunFolderError(
                f"{folder.path} was begun on other data (split checksum {str(old)[:12]}, "
                f"now {split['checksum'][:12]}): the files changed since. Nothing was touched. "
                "Choose another folder with --out."
            )
    folder.write_json(SPLIT, split)
    if folder.writes:
        folder.note_environment(environment(plan.device, world.size), checksums(plan.config))
    folder.note_provenance(seed=plan.config.seed, split_checksum=split["checksum"])
    return folder


@contextmanager
def at_work(
    plan: Plan, out: Path, world: World | None = None, stop: Callable[[], bool] | None = None
) -> Iterator[RunFolder]:
    """The run folder, for this run alone; a full disk is explained."""
    together = world or World.alone()
    with ExitStack() as stack:
        first_then_all(lambda: stack.enter_context(owned(out, plan.config, world=together)), together)
        folder = open_folder(plan, out, together)
        folder.stopping = stop or folder.stopping
        try:
            yield folder
        except DiskError as error:
            raise DiskError(f"{error} {folder.safe()}", error.errno or 0) from None


def stop_here(folder: RunFolder) -> None:
    """Ends the run between two stages where that was asked for."""
    if folder.writes and folder.stopping():
        raise StoppedError(f"Stopped. {folder.safe()} Give the same command again.")


def keep_network(folder: RunFolder, stage: str, network: Network) -> None:
    """Stores a network in its part of the folder; of many processes, the first does."""
    if folder.writes:
        save_network(network, folder.part(stage))
