"""krdistill's losses in Hugging Face's Trainer: `compute_loss` overridden, on long-tailed handwritten digits.

`pip install transformers accelerate`, then `python examples/hf_trainer.py`. Small settings; they are not a paper's.
"""

from tempfile import TemporaryDirectory

from sklearn.metrics import balanced_accuracy_score
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments, set_seed

from krdistill import ClassPrior, load_data
from krdistill.losses import BalancedSoftmax, LogitRectifiedDistillation

set_seed(0)
data = load_data("digits", profile="exp", imbalance_factor=20)
prior = ClassPrior.from_counts(data.train.counts())
balanced, lrd = BalancedSoftmax(prior.counts), LogitRectifiedDistillation(prior.log_prior)
train, test = (  # images are uint8 (N, H, W, C)
    [{"pixel_values": x.permute(2, 0, 1) / 255, "labels": int(y)} for x, y in zip(p.images, p.labels, strict=True)]
    for p in (data.train, data.test)
)
shape = {"num_channels": 1, "num_labels": data.num_classes, "layer_type": "basic", "depths": [1, 1]}
teacher, student = (ResNetForImageClassification(ResNetConfig(**shape, hidden_sizes=[w, 2 * w])) for w in (32, 16))


class DistillingTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs, told = model(inputs["pixel_values"]), teacher(inputs["pixel_values"])
        loss = balanced(outputs.logits, inputs["labels"]) + lrd(outputs.logits, told.logits, inputs["labels"])
        return (loss.mean(), outputs) if return_outputs else loss.mean()  # each loss is per image


with TemporaryDirectory() as folder:
    args = TrainingArguments(folder, max_steps=200, per_device_train_batch_size=64, learning_rate=3e-3, use_cpu=True)
    Trainer(teacher, args, train_dataset=train).train()
    teacher.eval().requires_grad_(False)
    trainer = DistillingTrainer(student, args, train_dataset=train)
    trainer.train()
    prediction = trainer.predict(test).predictions.argmax(1)
print(f"student: balanced accuracy {balanced_accuracy_score(data.test.labels, prediction):.4f}")
