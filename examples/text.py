"""Sentences: which library does a line of documentation come from? A large network of n-grams teaches a small one.

`python examples/text.py`: real sentences, the first lines of functions' docstrings, as long-tailed as the libraries are
large. A CSV file with the columns text and label is read alike. Small settings; they are not a paper's.
"""

import csv
import inspect
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from krdistill import Distiller, load_data

LIBRARIES = ("numpy", "scipy.special", "matplotlib.axes", "os", "statistics")


def first_lines(module):
    """Of all public functions and methods of a module."""
    owners = [module, *(c for _, c in inspect.getmembers(module, inspect.isclass))]
    found = [inspect.getdoc(f) for o in owners for n, f in inspect.getmembers(o, callable) if not n.startswith("_")]
    lines = {next((line for line in text.splitlines() if " " in line), "") for text in found if text}
    return sorted(line for line in lines if 20 < len(line) < 200)


with TemporaryDirectory() as place:
    table = Path(place) / "lines.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["text", "label"])
        for name in LIBRARIES:
            rows.writerows([line, name] for line in first_lines(import_module(name)))
    data = load_data(table)  # a fifth is put aside for testing
    print(f"{len(data.train):,} sentences: {dict(zip(data.class_names, data.train.counts().tolist(), strict=True))}")
    distiller = Distiller(
        teacher="ngram2048x32",
        student="ngram256x16",
        recipe="krdistill",
        train={"epochs": 10, "optimizer": "adamw", "lr": 0.01, "augmentation": "word-dropout"},
        groups="thirds",
    )
    scores = distiller.fit(data).evaluate()
print({name: group["accuracy"] for name, group in scores["groups"].items()})
print(f"student: balanced accuracy {scores['balanced_accuracy']:.4f}")
