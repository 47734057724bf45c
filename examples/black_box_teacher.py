"""A teacher that cannot be asked, such as a model behind an API: its answers to the training images come as a file.

`python examples/black_box_teacher.py`: scikit-learn's random forest answers; krdistill sees its probabilities
alone. Small settings; they are not a paper's.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from sklearn.ensemble import RandomForestClassifier
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import cross_val_predict

from krdistill import Distiller, load_data

data = load_data("digits", profile="exp", imbalance_factor=20)
x, y = data.train.images.flatten(1).numpy(), data.train.labels.numpy()
forest = RandomForestClassifier(random_state=0)
# What it says of images that it was not fitted to: of its own training images it would only repeat the labels.
probabilities = cross_val_predict(forest, x, y, cv=3, method="predict_proba")
said = forest.fit(x, y).predict(data.test.images.flatten(1).numpy())
print(f"teacher: balanced accuracy {balanced_accuracy_score(data.test.labels, said):.4f}")

with TemporaryDirectory() as place:
    answers = Path(place) / "answers.npz"
    np.savez(answers, ids=list(data.train.ids), probabilities=probabilities, class_names=list(data.class_names))
    distiller = Distiller(
        teacher=str(answers),
        student="mlp32",
        recipe="krdistill-lrd",
        train={"epochs": 20, "augmentation": "none"},
        groups="thirds",
    )
    scores = distiller.fit(data).evaluate()
print({name: group["accuracy"] for name, group in scores["groups"].items()})
print(f"student: balanced accuracy {scores['balanced_accuracy']:.4f}")
