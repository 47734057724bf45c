"""A folder of images, `class/image.png`, from the first look to a file for the device.

`python examples/image_folder.py [FOLDER]`; without a folder one is written from handwritten digits. Small settings;
they are not a paper's.
"""

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image

from krdistill import Distiller, load_data


def write_digits(folder):
    """What a folder of your own looks like: one folder per class, any names, any sizes."""
    digits = load_data("digits", profile="exp", imbalance_factor=20)
    for part, data in (("train", digits.train), ("test", digits.test)):
        for number, (pixels, label) in enumerate(zip(data.images, data.labels, strict=True)):
            path = folder / part / f"digit {label}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[..., 0].numpy()).resize((12, 12)).save(path)


with TemporaryDirectory() as place:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(place)
    if len(sys.argv) == 1:
        write_digits(folder)
    data = load_data(folder, image_size=12)  # without a test folder, a fifth is put aside
    print(f"{len(data.train):,} training images of {data.num_classes} classes: {data.train.counts().tolist()}")
    distiller = Distiller(
        teacher="resnet8w32",
        student="resnet8w8",
        recipe="krdistill",
        train={"epochs": 8, "batch_size": 32, "augmentation": "crop-only"},
        groups="thirds",
    )
    scores = distiller.fit(data).evaluate()
    print({name: group["accuracy"] for name, group in scores["groups"].items()})
    distiller.save(Path(place) / "student")
    print(f"student: balanced accuracy {scores['balanced_accuracy']:.4f}")
