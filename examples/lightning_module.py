"""A recipe of krdistill (its losses, its projector, its teacher) in a LightningModule, on long-tailed digits.

`pip install pytorch-lightning`, then `python examples/lightning_module.py`. Small settings; they are not a paper's.
"""

import pytorch_lightning as pl  # or lightning.pytorch
import torch
from torch.utils.data import DataLoader, TensorDataset

from krdistill import Teacher, TrainConfig, load_data, stages
from krdistill.models.network import build_network
from krdistill.recipes import recipe


class Distilling(pl.LightningModule):
    def __init__(self, task):
        super().__init__()
        self.task = task  # its parameters are the student's and those of the recipe's projector

    def training_step(self, batch, _):
        images, labels, index = batch
        terms = self.task(images, labels, index=index, progress=self.current_epoch / self.trainer.max_epochs).terms
        return terms.total().mean()  # one value per image

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


data = load_data("digits", profile="exp", imbalance_factor=20)
prior, groups = stages.measure(data)
large = stages.train_teacher(data, prior, groups, model="mlp128", train=TrainConfig(augmentation="crop-only")).network
teacher = Teacher(large, class_names=data.class_names)
student = build_network("mlp32", class_names=data.class_names, images=data.train.images)
method, profile = recipe("krdistill"), stages.profile_teacher(teacher, data)
task = stages.build_task(method, method.resolve({}), student, data, prior, groups, teacher=teacher, profile=profile)
rows = TensorDataset(data.train.images.permute(0, 3, 1, 2), data.train.labels, torch.arange(len(data.train)))
pl.Trainer(max_epochs=20, accelerator="cpu", logger=False, enable_checkpointing=False).fit(
    Distilling(task), DataLoader(rows, batch_size=64, shuffle=True)
)
print(f"student: balanced accuracy {stages.evaluate_network(student, data.test, groups)[0]['balanced_accuracy']:.4f}")
