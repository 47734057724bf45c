"""Time and memory of every recipe's loss.

    python benchmarks/losses.py [--threads N] [--rounds N] [--recipe NAME ...] [--json PATH] [--quick]

Time: forward and backward of the whole objective (its projectors too) on what resnet8x4 and resnet32x4 give of 64
images of 100 classes: random logits, features of 256, maps of 64 x 32 x 32, 128 x 16 x 16 and 256 x 8 x 8 numbers. It
is a share of one step without a loss of ours, measured in the same round: resnet8x4 forward, cross-entropy, backward
and SGD, and resnet32x4 forward. Medians over the rounds, of each loss's best time in a round. SimKD's projector belongs
to its student and is not in it.

Memory: the most that is alive at once beyond the inputs, by the profiler's record of every allocation on the CPU, at
8,142 classes and 256 images, in copies of the student's logits in float32 (8.3 MB). ``forward`` is what the terms on
logits (and on heads that make logits of their own) hold for their gradient and what they need on the way; ``total`` is
with the backward pass, the gradient of the logits included. ``step`` is the same of the whole objective, its feature,
map and memory terms and the gradients of all their inputs and weights included, and ``held`` is what the objective
keeps between the steps (memory banks of 100,000 images, anchors, projectors), where it says so as estimated before
any of it is taken. ReviewKD's and SimKD's terms take maps of 64 x 32 x 32 numbers and deeper, whatever the classes:
the gradient of the widest map alone is as large as 8 copies of the logits.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch: the profiler is quiet
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from krdistill.data.long_tail import long_tail_counts
from krdistill.losses import ContrastiveRepresentationDistillation
from krdistill.models.network import build_network
from krdistill.objective import (
    Objective,
    ObjectiveContext,
    TeacherProfile,
    Term,
    on_labels,
    on_labels_and_progress,
    on_logits,
    on_logits_and_progress,
    on_student_feature,
)
from krdistill.outputs import Outputs, Step
from krdistill.priors import ClassPrior
from krdistill.recipes import Recipe, list_recipes, recipe
from krdistill.runfolder import environment
from krdistill.training.task import place

BATCH, CLASSES, DIM = 64, 100, 256
MAPS = ((64, 32), (128, 16), (256, 8))
MANY_BATCH, MANY_CLASSES, MANY_IMAGES = 256, 8142, 100_000
MIB = 1 << 20
STUDENT, TEACHER = "resnet8x4", "resnet32x4"
ON_LOGITS = (on_labels, on_labels_and_progress, on_logits, on_logits_and_progress, on_student_feature)
# What takes long to build, or large memories of its own, and has no part in the memory of the terms on logits.
LIGHT: dict[str, Any] = {"rectify": "none", "negatives": 1, "embed_dim": 1, "scale_epochs": 1}
QUICK: dict[str, Any] = {"scale_epochs": 1}  # takes long to train, and its number changes no size


def context(K: int, images: int) -> ObjectiveContext:
    """Long-tailed counts, and a random teacher profile with so many images, the classes in turn."""
    g = torch.Generator().manual_seed(1)
    labels = torch.arange(images) % K
    features = torch.randn(len(labels), DIM, generator=g)
    prior = ClassPrior.from_counts(long_tail_counts(K, 500, 100))
    teacher = TeacherProfile(
        class_means=nn.functional.normalize(features[:K], dim=1),
        view_logits=torch.randn(K, K, generator=g),
        view_labels=labels[:K],
        views="random",
        features=features,
        labels=labels,
    )
    channels = tuple(c for c, _ in MAPS)
    return ObjectiveContext(
        prior, prior.groups("thirds"), DIM, teacher, student_maps=channels, teacher_maps=channels,
        labels=labels, teacher_head=nn.Linear(DIM, K),
    )  # fmt: skip


def channels_last(x: Tensor) -> Tensor:
    """As the training has its maps."""
    return x.contiguous(memory_format=torch.channels_last)


def step_of(B: int, K: int, rows: int, *, maps: bool) -> Step:
    """Random outputs of both networks; the student's take gradients."""
    g = torch.Generator().manual_seed(2)

    def outputs(grad: bool) -> Outputs:
        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).requires_grad_(grad)

        sizes = MAPS if maps else ()
        return Outputs(
            3 * noise(B, K).detach(), noise(B, DIM), tuple(channels_last(noise(B, c, s, s).relu()) for c, s in sizes)
        )

    said, told = outputs(True), outputs(False)
    said.logits.requires_grad_()
    said = said._replace(maps=tuple(m.detach().requires_grad_() for m in said.maps))
    index = torch.randperm(rows, generator=g)[:B]
    return Step(said, index % K, told, index, progress=0.9)


def forward(objective: Objective, step: Step) -> Tensor:
    return objective(step).total().mean()


def backward(objective: Objective, step: Step) -> None:
    forward(objective, step).backward()


def clear(objective: Objective, step: Step) -> None:
    """Drops the gradients."""
    for leaf in (step.student.logits, step.student.feature, *step.student.maps, *objective.parameters()):
        leaf.grad = None


# Time -----------------------------------------------------------------------------------------------------------------


def reference() -> Callable[[], None]:
    """One training step of the student without distillation, and the teacher's forward."""
    about: dict[str, Any] = {
        "class_names": [str(k) for k in range(CLASSES)], "mean": [0.5] * 3, "std": [0.25] * 3, "image_size": (32, 32),
    }  # fmt: skip
    student, teacher = build_network(STUDENT, **about), build_network(TEACHER, **about).eval()
    for network in (student, teacher):
        if network.map_channels != tuple(c for c, _ in MAPS) or network.feature_dim != DIM:
            raise SystemExit(f"the sizes here are not the networks': {network.map_channels}, {network.feature_dim}")
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
    g = torch.Generator().manual_seed(3)
    images = torch.rand(BATCH, 3, 32, 32, generator=g)
    labels = torch.randint(CLASSES, (BATCH,), generator=g)

    def run() -> None:
        with torch.inference_mode():
            teacher(images)
        optimizer.zero_grad()
        nn.functional.cross_entropy(student(images).logits, labels).backward()
        optimizer.step()

    return run


def seconds(job: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    job()
    return time.perf_counter() - begin


def measure_time(recipes: list[Recipe], rounds: int) -> dict[str, Any]:
    """Per recipe: milliseconds and the share of the reference step."""
    about = context(CLASSES, 100 * CLASSES)
    assert about.labels is not None
    step = step_of(BATCH, CLASSES, len(about.labels), maps=True)
    objectives = {entry.name: entry.build(entry.resolve({}), about) for entry in recipes}
    for objective in objectives.values():
        place(objective, torch.device("cpu"))
    base = reference()
    base()
    for objective in objectives.values():
        backward(objective, step)  # once, unmeasured
    steps: list[float] = []
    taken: dict[str, list[float]] = {name: [] for name in objectives}
    for _ in range(rounds):
        steps.append(seconds(base))
        for name, objective in objectives.items():
            again: list[float] = []  # a loss may take less than the machine's hiccups: the best of ten, or of a second
            while len(again) < 10 and sum(again) < 1:
                clear(objective, step)
                again.append(seconds(partial(backward, objective, step)))
            taken[name].append(min(again))
    return {
        "reference_ms": 1e3 * statistics.median(steps),
        "recipes": {
            name: {
                "ms": 1e3 * statistics.median(times),
                "share_of_step": statistics.median(t / s for t, s in zip(times, steps, strict=True)),
            }
            for name, times in taken.items()
        },
    }


# Memory ---------------------------------------------------------------------------------------------------------------


def peak_bytes(job: Callable[[], Any]) -> int:
    """The most bytes of tensors alive at once of those that ``job`` makes, on the CPU.

    What a library takes inside an operator without torch's allocator is not seen.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = job()
    del kept
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        record.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [(e["ts"], e["args"]) for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    alive: dict[int, int] = {}
    now = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        if change["Bytes"] > 0:
            alive[change["Addr"]] = change["Bytes"]
            now += change["Bytes"]
            peak = max(peak, now)
        else:  # tensors from before the job may be freed in it; they are not its own
            now -= alive.pop(change["Addr"], 0)
    return peak


def check_peak(B: int, K: int) -> dict[str, float]:
    """Measures jobs whose peak is known by hand; a wrong answer ends the benchmark."""
    x = torch.randn(B, K, requires_grad=True)

    def chain() -> None:  # b, c and d are alive at the end; a went before c came
        with torch.no_grad():
            a = x + 1
            b = a + 1
            del a
            c = b + 1
            d = c + b
            del b, c, d

    def saved() -> Tensor:  # exp and sin keep what they need: exp(x), and no copy of it; then sin(exp(x))
        return x.exp().sin().sum(1)

    def there_and_back() -> None:  # exp(x), which is saved, and the gradient of x; the sum's gradient is a view
        x.grad = None
        x.exp().sum().backward()

    copies = {}
    for job, expected in ((chain, 3), (saved, 2), (there_and_back, 2)):
        copies[job.__name__] = found = peak_bytes(job) / (4 * B * K)
        if abs(found - expected) > 0.01:
            raise SystemExit(f"the measure of memory is off: {job.__name__} needs {expected} copies, found {found:.3f}")
    return copies


def measure_memory(recipes: list[Recipe], B: int, K: int) -> dict[str, Any]:
    """Per recipe: copies of the logits that its terms on logits need; None where it has none."""
    about = context(K, K)
    assert about.labels is not None
    step = step_of(B, K, len(about.labels), maps=False)
    result: dict[str, Any] = {}
    for entry in recipes:
        light = {name: value for name, value in LIGHT.items() if name in entry.options.model_fields}
        built = entry.build(entry.resolve(light), about)
        terms = [term for term in built.terms if isinstance(term, Term) and term.call in ON_LOGITS]
        result[entry.name] = None
        if terms:
            objective = Objective(terms)
            backward(objective, step)
            clear(objective, step)
            result[entry.name] = {
                "terms": [term.name for term in terms],
                "forward_copies": peak_bytes(partial(forward, objective, step)) / (4 * B * K),
                "total_copies": peak_bytes(partial(backward, objective, step)) / (4 * B * K),
            }
        del built, terms
    return result


def measure_step(recipes: list[Recipe], B: int, K: int, N: int) -> dict[str, Any]:
    """Per recipe: what the whole objective holds between the steps, and what a step takes beyond that."""
    about = replace(context(K, K), labels=torch.arange(N) % K)
    step = step_of(B, K, N, maps=True)
    result: dict[str, Any] = {}
    for entry in recipes:
        quick = {name: value for name, value in QUICK.items() if name in entry.options.model_fields}
        objective = entry.build(entry.resolve(quick), about)
        place(objective, torch.device("cpu"))
        backward(objective, step)  # the first step may do more than the others
        clear(objective, step)
        held = sum(x.numel() * x.element_size() for x in (*objective.parameters(), *objective.buffers()))
        taken = peak_bytes(partial(backward, objective, step))
        clear(objective, step)
        crd = [m for m in objective.modules() if isinstance(m, ContrastiveRepresentationDistillation)]
        estimates = [[m.estimate_bytes(N, m.embed_dim, rows, m.negatives) for rows in (0, B)] for m in crd]
        result[entry.name] = {
            "terms": [term.name for term in objective.terms],
            "held_copies": held / (4 * B * K),
            "held_mib": held / MIB,
            "held_estimate_mib": sum(before for before, _ in estimates) / MIB if crd else None,
            "step_copies": taken / (4 * B * K),
            "step_mib": taken / MIB,
            "step_estimate_mib": sum(most - before for before, most in estimates) / MIB if crd else None,
        }
        del objective, crd
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the measurements here")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of the timing (default 9)")
    parser.add_argument("--recipe", action="append", metavar="NAME", help="this recipe alone; may be given again")
    parser.add_argument("--quick", action="store_true", help="two rounds")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    recipes = [recipe(name) for name in options.recipe] if options.recipe else list_recipes()
    rounds = 2 if options.quick else options.rounds
    B, K = MANY_BATCH, MANY_CLASSES

    checked = check_peak(B, K)
    memory = measure_memory(recipes, B, K)
    whole = measure_step(recipes, B, K, MANY_IMAGES)
    timed = measure_time(recipes, rounds)
    print(f"reference step {timed['reference_ms']:.0f} ms   |   copies of ({B}, {K}) logits   |   MiB")
    print(
        f"{'recipe':<16}{'ms':>9}{'share':>9}{'forward':>11}{'total':>9}{'step':>9}{'held':>9}{'step':>11}{'held':>9}"
        "  terms (on logits)"
    )
    for entry in recipes:
        row, need, all_ = timed["recipes"][entry.name], memory[entry.name], whole[entry.name]
        copies = f"{need['forward_copies']:11.2f}{need['total_copies']:9.2f}" if need else f"{'n/a':>11}{'n/a':>9}"
        copies += f"{all_['step_copies']:9.2f}{all_['held_copies']:9.2f}{all_['step_mib']:11.1f}{all_['held_mib']:9.1f}"
        which = ", ".join(f"({name})" if need and name in need["terms"] else name for name in all_["terms"])
        print(f"{entry.name:<16}{row['ms']:9.2f}{row['share_of_step']:9.1%}{copies}  {which}")
    if options.json:
        content = {
            "provenance": {**environment(torch.device("cpu")), "cpus": os.cpu_count(), "quick": options.quick},
            "time": {
                "batch": BATCH, "classes": CLASSES, "feature": DIM, "maps": [list(m) for m in MAPS], "rounds": rounds,
                "student": STUDENT, "teacher": TEACHER, **timed,
            },
            "memory": {
                "batch": B, "classes": K, "known_cases": checked, "recipes": memory,
                "images": MANY_IMAGES, "maps": [list(m) for m in MAPS], "feature": DIM, "whole_objectives": whole,
            },
        }  # fmt: skip
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
