"""krdistill's losses in a training loop of your own: plain PyTorch, any two networks that give logits.

`python examples/own_loop.py`: real handwritten digits, cut so that the rarest class has a twentieth of the commonest
one's images. Small settings for a few seconds on a CPU; they are not a paper's, and one run of it ranks no methods.
"""

import argparse

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from krdistill.data import load_data
from krdistill.losses import BalancedSoftmax, LogitRectifiedDistillation, cross_entropy
from krdistill.priors import ClassPrior

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=30)
epochs = parser.parse_args().epochs

torch.manual_seed(0)
data = load_data("digits", profile="exp", imbalance_factor=20)
x, y = data.train.images.flatten(1) / 255, data.train.labels  # images are uint8 (N, H, W, C)
prior = ClassPrior.from_counts(data.train.counts())
balanced, lrd = BalancedSoftmax(prior.counts), LogitRectifiedDistillation(prior.log_prior)


def train(model, teacher=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(y)).split(64):
            logits = model(x[rows])
            if teacher is None:
                loss = cross_entropy(logits, y[rows])
            else:
                with torch.no_grad():
                    teacher_logits = teacher(x[rows])
                loss = balanced(logits, y[rows]) + lrd(logits, teacher_logits, y[rows])
            optimizer.zero_grad()
            loss.mean().backward()  # every loss gives one value per image
            optimizer.step()
    with torch.no_grad():
        prediction = model.eval()(data.test.images.flatten(1) / 255).argmax(1)
    return balanced_accuracy_score(data.test.labels, prediction)


teacher, student = (nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, data.num_classes)) for w in (128, 32))
print(f"teacher: balanced accuracy {train(teacher):.4f}")
print(f"student: balanced accuracy {train(student, teacher):.4f}")
