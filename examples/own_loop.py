"""krdistill's losses in a training loop of your own: plain PyTorch, any two networks that give logits.

`python examples/own_loop.py`: real handwritten digits, cut long-tailed. Small settings for a CPU; they are not a
paper's, and one run ranks no methods.
"""

import torch
from sklearn.metrics import balanced_accuracy_score
from torch import nn

from krdistill import ClassPrior, load_data
from krdistill.losses import BalancedSoftmax, LogitRectifiedDistillation, cross_entropy

torch.manual_seed(0)
data = load_data("digits", profile="exp", imbalance_factor=20)  # the rarest class has a twentieth of the commonest
x, y = data.train.images.flatten(1) / 255, data.train.labels  # images are uint8 (N, H, W, C)
prior = ClassPrior.from_counts(data.train.counts())
balanced, lrd = BalancedSoftmax(prior.counts), LogitRectifiedDistillation(prior.log_prior)


def train(model, teacher=None):
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(30):
        for rows in torch.randperm(len(y)).split(64):
            logits = model(x[rows])
            if teacher is None:
                loss = cross_entropy(logits, y[rows])
            else:
                loss = balanced(logits, y[rows]) + lrd(logits, teacher(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.mean().backward()  # every loss gives one value per image
            optimizer.step()
    model.eval().requires_grad_(False)
    return balanced_accuracy_score(data.test.labels, model(data.test.images.flatten(1) / 255).argmax(1))


teacher, student = (nn.Sequential(nn.Linear(64, w), nn.ReLU(), nn.Linear(w, data.num_classes)) for w in (128, 32))
print(f"teacher: balanced accuracy {train(teacher):.4f}")
print(f"student: balanced accuracy {train(student, teacher):.4f}")
