"""krdistill's losses in Hugging Face's Trainer: `compute_loss` overridden, on long-tailed handwritten digits.

`pip install transformers accelerate`, then `python examples/hf_trainer.py`. Nothing is downloaded: small networks
of its library learn from scratch. Small settings for a CPU; they are not a paper's.
"""

import argparse
import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
from sklearn.metrics import balanced_accuracy_score
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from krdistill.data import load_data
from krdistill.losses import BalancedSoftmax, LogitRectifiedDistillation
from krdistill.priors import ClassPrior


class DistillingTrainer(Trainer):
    def __init__(self, *args, prior, teacher, **kwargs):
        super().__init__(*args, **kwargs)
        self.balanced = BalancedSoftmax(prior.counts).to(self.args.device)
        self.lrd = LogitRectifiedDistillation(prior.log_prior).to(self.args.device)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, labels = model(pixel_values=inputs["pixel_values"]), inputs["labels"]
        with torch.no_grad():
            told = self.teacher(pixel_values=inputs["pixel_values"])
        loss = self.balanced(outputs.logits, labels) + self.lrd(outputs.logits, told.logits, labels)
        return (loss.mean(), outputs) if return_outputs else loss.mean()  # each loss is per image


def rows(part):
    images = part.images.permute(0, 3, 1, 2) / 255
    return [{"pixel_values": image, "labels": int(label)} for image, label in zip(images, part.labels, strict=True)]


def resnet(width):
    shape = {"num_channels": 1, "num_labels": data.num_classes, "embedding_size": width}
    size = {"hidden_sizes": [width, 2 * width], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**shape, **size))


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--steps", type=int, default=200)
options = {"max_steps": parser.parse_args().steps, "per_device_train_batch_size": 64, "learning_rate": 3e-3}
set_seed(0)
data = load_data("digits", profile="exp", imbalance_factor=20)
train, prior, teacher, student = rows(data.train), ClassPrior.from_counts(data.train.counts()), resnet(32), resnet(16)
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(folder, use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, **options)
    Trainer(teacher, args, train_dataset=train).train()
    trainer = DistillingTrainer(student, args, train_dataset=train, prior=prior, teacher=teacher)
    trainer.train()
    prediction = trainer.predict(rows(data.test)).predictions.argmax(1)
print(f"student: balanced accuracy {balanced_accuracy_score(data.test.labels, prediction):.4f}")
