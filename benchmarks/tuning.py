"""What methods may be tuned on: CIFAR-100-LT made of training images alone, so that no test image has a say.

    python benchmarks/tuning.py cifar100-tuning.npz --side 16
    krdistill compare benchmarks/studies/tuning.yaml

Fifty of the five hundred training images of every class are put aside and stand for the test part; what is left is cut
as the data set is, imbalance factor 100, 450 images to 5. The archive's test part holds no image of the data set's own.
``tuned.yaml`` is what was chosen there, run on the whole of CIFAR-100-LT.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from krdistill.data import DataBundle, load_data
from krdistill.data.splits import cut_long_tail

ASIDE, FACTOR, RAREST = 50, 100, 5


def tuning_data(source: str, *, side: int | None = None, aside: int = ASIDE, rarest: int = RAREST) -> DataBundle:
    """A long-tailed training part and a balanced part beside it, both out of the training images of ``source``."""
    whole = load_data(source, image_size=side, val_per_class=aside)
    assert whole.val is not None
    largest = int(whole.train.counts().min())
    factor = min(FACTOR, largest / rarest)
    return DataBundle(train=cut_long_tail(whole.train, "exp", factor), test=whole.val)


def write(data: DataBundle, path: Path) -> None:
    """As an archive that ``data.source`` takes."""
    np.savez_compressed(
        path,
        train_images=data.train.inputs.numpy(),
        train_labels=data.train.labels.numpy(),
        test_images=data.test.inputs.numpy(),
        test_labels=data.test.labels.numpy(),
        class_names=np.array(data.train.class_names),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--source", default="cifar100")
    parser.add_argument("--side", type=int, help="pixels; by default as they are")
    arguments = parser.parse_args()
    data = tuning_data(arguments.source, side=arguments.side)
    write(data, arguments.path)
    counts = data.train.counts()
    print(
        f"{arguments.path}: {len(data.train):,} images of {len(counts)} classes ({counts.max()} to {counts.min()} a "
        f"class) and {len(data.test):,} beside them, {arguments.path.stat().st_size / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    main()
