"""krdistill's rectified logits (LRD) and features (RRD) in a LightningModule, on long-tailed handwritten digits.

`pip install lightning`, then `python examples/lightning_module.py`. Small settings for a CPU; they are not a paper's.
"""

import argparse

import torch
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader, TensorDataset

from krdistill import losses
from krdistill.anchors import align_anchors, balanced_anchors
from krdistill.data import load_data
from krdistill.models.network import build_network
from krdistill.models.teacher import Teacher
from krdistill.priors import ClassPrior
from krdistill.rectify import class_means

try:
    import lightning.pytorch as pl
except ImportError:
    import pytorch_lightning as pl


class Distilled(pl.LightningModule):
    def __init__(self, network, prior, teacher=None, means=None):
        super().__init__()
        self.network, self.teacher, self.balanced = network, teacher, losses.BalancedSoftmax(prior.counts)
        if teacher is not None:
            rectified = {"anchors": align_anchors(balanced_anchors(*means.shape), means), "class_means": means}
            self.lrd = losses.LogitRectifiedDistillation(prior.log_prior)
            self.rrd = losses.RepresentationRectifiedDistillation(**rectified, student_dim=network.feature_dim)

    def training_step(self, batch, _):
        (images, labels), said = batch, self.network(batch[0])
        if self.teacher is None:
            return losses.cross_entropy(said.logits, labels).mean()
        told = self.teacher(images)
        loss = self.balanced(said.logits, labels) + self.lrd(said.logits, told.logits, labels)
        return (loss + 5 * self.rrd(said.feature, told.feature, labels)).mean()  # each is per image

    def configure_optimizers(self):
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=3e-3)


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--epochs", type=int, default=20)
options = {"max_epochs": parser.parse_args().epochs, "accelerator": "cpu", "logger": False}
pl.seed_everything(0)
data = load_data("digits", profile="exp", imbalance_factor=20)
prior, images = ClassPrior.from_counts(data.train.counts()), data.train.images.permute(0, 3, 1, 2)
loader = DataLoader(TensorDataset(images, data.train.labels), batch_size=64, shuffle=True)
large, small = (build_network(m, class_names=data.class_names, images=data.train.images) for m in ("mlp128", "mlp32"))
pl.Trainer(**options, enable_checkpointing=False).fit(Distilled(large, prior), loader)
teacher = Teacher(large, class_names=data.class_names)  # frozen, in evaluation mode whatever Lightning does
means = class_means(teacher(images).feature, data.train.labels, data.num_classes)
pl.Trainer(**options, enable_checkpointing=False).fit(Distilled(small, prior, teacher, means), loader)
prediction = small.eval()(data.test.images.permute(0, 3, 1, 2)).logits.argmax(1)
print(f"student: balanced accuracy {balanced_accuracy_score(data.test.labels, prediction):.4f}")
