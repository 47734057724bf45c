"""What dividing the label space (DLSA) is worth on frozen features, beside other heads on the same features.

    python benchmarks/dlsa.py [--preset NAME] [--set key value ...] [--seeds N] [--json PATH]
    python benchmarks/dlsa.py --run FOLDER [FOLDER ...] [--taught FOLDER] [--json PATH]

A ResNet-20 learns CIFAR-100-LT (imbalance factor 100, 16x16 pixels, 20 epochs) from labels alone, a fifth of every
class put aside for validation. On its features stand: its own linear head, cRT, LWS, tau-normalisation, a balanced
softmax head, and DLSA of depth 1 and 2. What a head leaves open (tau, weight decay, clusters, depth) is chosen by
balanced accuracy on the validation part; the test part is only reported. ``dlsa`` is what is chosen of all depths;
depth 0 is the balanced softmax head.

Cluster balance is that of the first level's flow, before it is fitted and after, on training and on test rows: the
entropy of the clusters' sizes over its largest value; the mean over the rows of their cluster's purity, the share of
its commonest class; and how many rows of the first group's classes share a cluster with one of the last group's
(``undivided``: in the whole set). ``divided`` is which share of the rows stays at the first level, and how many rows of
the first group come upon one of the last among those that stay and among those that are left.

``--run`` takes trained networks, one per seed, from the ``teacher`` (or ``student``) part of run folders. Where such a
run has no validation part, a fifth of every class's training rows is kept from the heads; the network has seen them, so
what is chosen on them is too sure of the features.

``--taught`` trains a student of every run by stored answers of three heads on its teacher's features (its own, balanced
softmax, DLSA of depth 1) and keeps the runs there: krdistill-lrd, which removes the class prior from its own head's
answers; in the others' there is none. Answers are to the images as they are, so all three stand behind a teacher that
is asked about every view. The file is written from a clean source tree alone.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from krdistill.answering import fit_head
from krdistill.config import RunConfig, load_config
from krdistill.data import DataBundle
from krdistill.dlsa import DLSAHead, fit_dlsa
from krdistill.dlsa.clusters import cluster_counts, head_tail_ratio, purity, size_entropy
from krdistill.dlsa.flow import MixtureFlow, assign
from krdistill.dlsa.head import balanced_accuracy
from krdistill.evaluation import evaluate_predictions
from krdistill.models.network import Network, load_network
from krdistill.pipeline import prepare, run
from krdistill.priors import ClassGroups
from krdistill.rng import derive_seed
from krdistill.runfolder import environment
from krdistill.stages import load_configured_data, measure, train_teacher
from krdistill.training.loop import collect_outputs

CONFIG = [
    ("data.image_size", "16"),
    ("data.val_fraction", "0.2"),
    ("teacher.model", "resnet20"),
    ("train.epochs", "20"),
    ("train.evaluate_every", "20"),
]
WEIGHT_DECAYS = (1e-3, 1e-4, 1e-5, 1e-6)  # of the balanced softmax head, and so of DLSA's classifiers
CLUSTERS = (50, 100)
DEPTHS = (1, 2)
FLOW: dict[str, Any] = {"epochs": 30, "hidden": 128}
STEPS = 100
CPU = torch.device("cpu")


def part_rows(data: DataBundle, network: Network) -> tuple[dict[str, tuple[Tensor, Tensor]], str]:
    """Features and labels of the parts ``fit``, ``val`` and ``test``, and where ``val`` comes from."""
    found = {}
    for name, part in (("fit", data.train), ("val", data.val), ("test", data.test)):
        if part is not None and len(part):
            found[name] = (collect_outputs(network, part, device=CPU)[1], part.labels)
    if "val" in found:
        return found, "never seen by the network"
    features, labels = found["fit"]
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for k in range(data.train.num_classes):
        aside[(labels == k).nonzero().flatten()[1::5]] = True
    found["fit"], found["val"] = (features[~aside], labels[~aside]), (features[aside], labels[aside])
    return found, "a fifth of the training part, which the network has seen"


def ends(groups: ClassGroups) -> tuple[Tensor, Tensor]:
    """Which classes are of the first and of the last group that has any, bool ``(K,)`` each."""
    present = [g for g in range(len(groups.names)) if bool((groups.index == g).any())]
    return groups.index == present[0], groups.index == present[-1]


def division(flow: MixtureFlow, rows: tuple[Tensor, Tensor], groups: ClassGroups, K: int) -> dict[str, float]:
    """Cluster balance on some rows."""
    counts = cluster_counts(assign(flow, rows[0])[1], rows[1], flow.clusters, K)
    sizes, (head, tail) = counts.sum(1), ends(groups)
    return {
        "size_entropy": size_entropy(sizes),
        "empty": int((sizes == 0).sum()),
        "purity": float((purity(counts) * sizes).sum() / sizes.sum()),
        "head_tail_ratio": head_tail_ratio(counts, head, tail),
        "undivided": head_tail_ratio(counts.sum(0, keepdim=True), head, tail),
    }


def measure_heads(
    own: nn.Linear, rows: Mapping[str, tuple[Tensor, Tensor]], groups: ClassGroups, names: tuple[str, ...], seed: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Every head on one network's features, and the heads that teach."""
    (f, y), val, test = rows["fit"], rows["val"], rows["test"]
    K = len(names)
    made: dict[str, Any] = {}

    def judge(head: Any, **chosen: Any) -> dict[str, Any]:
        with torch.no_grad():
            score, logits = balanced_accuracy(head(val[0]), val[1]), head(test[0])
        found = evaluate_predictions(logits, test[1], groups, class_names=names)
        accuracies = {n: None if g is None else g["accuracy"] for n, g in found["groups"].items()}
        kept = {k: found[k] for k in ("top1", "balanced_accuracy", "ece", "nll")}
        return {"val": score, "chosen": chosen, "test": {**kept, "groups": accuracies}}

    for name in ("own", "crt", "lws", "tau-norm"):
        head, found = fit_head(name, own, f, y, K, held_out=val, seed=seed)
        made[name] = judge(head, **{k: v for k, v in found.items() if k != "head"})

    def best(candidates: list[dict[str, Any]]) -> dict[str, Any]:
        return max(candidates, key=lambda c: c["val"])

    candidates, heads = [], {}
    for decay in WEIGHT_DECAYS:
        heads[decay], _ = fit_head("balanced-softmax", own, f, y, K, weight_decay=decay, max_steps=STEPS)
        candidates.append(judge(heads[decay], weight_decay=decay))
    made["balanced-softmax"] = best(candidates)
    decay = made["balanced-softmax"]["chosen"]["weight_decay"]
    fitted: dict[tuple[int, int], DLSAHead] = {}
    tried: tuple[int, ...] = CLUSTERS  # at greater depth what depth 1 chose
    for depth in DEPTHS:
        candidates = []
        for M in tried:
            head, found = fit_dlsa(
                f, y, K, depth=depth, clusters=M, weight_decay=decay, max_steps=STEPS, seed=seed, **FLOW
            )
            fitted[depth, M] = head
            there = torch.bincount(head.route(test[0]), minlength=head.depth + 1) / len(test[1])
            candidates.append(judge(head, clusters=M, depth=head.depth, test_shares=there.tolist()))
            candidates[-1]["flows"] = [
                {**{k: v for k, v in level.items() if k != "losses"}, "losses": level["losses"][-1]}
                for level in found["levels"]
            ]
        made[f"dlsa, depth {depth}"] = best(candidates)
        tried = (made[f"dlsa, depth {depth}"]["chosen"]["clusters"],)
    made["dlsa"] = best([made["balanced-softmax"], *(made[f"dlsa, depth {d}"] for d in DEPTHS)])
    M = made["dlsa, depth 1"]["chosen"]["clusters"]
    start = MixtureFlow(f.shape[1], M, hidden=FLOW["hidden"], seed=derive_seed(seed, "dlsa-level", 0))
    start.standardise(f)
    after = fitted[1, M].levels[0].flow
    assert isinstance(after, MixtureFlow)
    balance: dict[str, dict[str, dict[str, float]]] = {}
    first, last = ends(groups)
    for part in ("fit", "test"):
        stays = fitted[1, M].route(rows[part][0]) == 0
        counts = cluster_counts((~stays).long(), rows[part][1], 2, K)
        ratios = (counts[:, first].sum(1) / counts[:, last].sum(1).clamp_min(1)).tolist()
        balance[part] = {
            "before": division(start, rows[part], groups, K),
            "after": division(after, rows[part], groups, K),
            "divided": {"stays": float(stays.double().mean()), "ratio_staying": ratios[0], "ratio_left": ratios[1]},
        }
    teaching = {"own": own, "balanced-softmax": heads[decay], "dlsa, depth 1": fitted[1, M]}
    return {"heads": made, "balance": balance, "rows": {n: len(r[1]) for n, r in rows.items()}}, teaching


def teach(
    source: Path, teaching: Mapping[str, Any], data: DataBundle, network: Network, place: Path
) -> dict[str, dict[str, float]]:
    """Accuracies of students of a run's data that learn from the answers of heads: head to group."""
    parts = [part for part in (data.train, data.val, data.test) if part is not None and len(part)]
    features = torch.cat([collect_outputs(network, part, device=CPU)[1] for part in parts])
    ids = [i for part in parts for i in part.ids]
    taught = {}
    for name, head in teaching.items():
        where = place / source.name / name.replace(", ", "-").replace(" ", "-")
        where.mkdir(parents=True, exist_ok=True)
        with torch.no_grad():
            logits = head(features)
        stored = {"ids": np.array(ids), "logits": logits.numpy(), "features": features.numpy()}
        np.savez(where / "answers.npz", class_names=np.array(data.train.class_names), **stored)
        given = [
            ("teacher.answers", str(where / "answers.npz")), ("bank.views", "0"), ("baselines", "[]"),
            ("recipe", "krdistill-lrd"), ("recipe.prior", "label" if name == "own" else "none"),
            ("student.train.sampler", "instance"), ("export.onnx", "false"),
        ]  # fmt: skip
        config = load_config(str(source / "config.yaml"), given)
        student = run(prepare(config), where / "run", report=False)["student"]
        groups = {n: g["accuracy"] for n, g in student["groups"].items() if g is not None and g["classes"]}
        taught[name] = {"all": student["top1"], **groups}
    return taught


def trained(folder: Path) -> tuple[RunConfig, Network]:
    """A run's configuration and its network."""
    config = load_config(str(folder / "config.yaml"))
    part = next((p for p in ("teacher", "student") if (folder / p / "network.json").is_file()), "teacher")
    return config, load_network(folder / part)


def summarise(seeds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, of every head and of the cluster balance."""

    def spread(values: list[Any]) -> dict[str, float] | None:
        if any(v is None for v in values):
            return None
        return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}

    found = list(seeds.values())
    heads: dict[str, Any] = {}
    for name in found[0]["heads"]:
        tests = [s["heads"][name]["test"] for s in found]
        heads[name] = {k: spread([t[k] for t in tests]) for k in ("top1", "balanced_accuracy", "ece", "nll")}
        heads[name]["groups"] = {g: spread([t["groups"][g] for t in tests]) for g in tests[0]["groups"]}
    balance = {
        part: {
            when: {k: spread([s["balance"][part][when][k] for s in found]) for k in found[0]["balance"][part][when]}
            for when in ("before", "after", "divided")
        }
        for part in ("fit", "test")
    }
    if "taught" not in found[0]:
        return {"heads": heads, "balance": balance}
    taught = {
        name: {k: spread([s["taught"][name][k] for s in found]) for k in row}
        for name, row in found[0]["taught"].items()
    }
    return {"heads": heads, "balance": balance, "taught": taught}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="cifar100-lt", help="or a configuration file")
    parser.add_argument("--set", nargs=2, action="append", default=[], metavar=("KEY", "VALUE"), help="override")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--run", nargs="+", type=Path, default=[], metavar="FOLDER", help="networks that are trained")
    parser.add_argument("--taught", type=Path, metavar="FOLDER", help="train a student by heads of every run, there")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    if arguments.taught is not None and not arguments.run:
        parser.error("--taught needs the runs whose data its students learn: --run FOLDER [FOLDER ...]")
    provenance = environment(CPU)
    if arguments.json and str(provenance["git"] or "").endswith("-dirty"):
        parser.error("the source has changes that no commit holds; commit them first, or leave --json out")
    overrides = [*CONFIG, *(tuple(pair) for pair in arguments.set)]
    seeds: dict[str, Any] = {}
    for seed in range(len(arguments.run) or arguments.seeds):
        if arguments.run:
            config, network = trained(arguments.run[seed])
        else:
            config = load_config(arguments.preset, [*overrides, ("seed", str(seed))])
        data = load_configured_data(config.data)
        prior, groups = measure(data, config.data.groups)
        if not arguments.run:
            network = train_teacher(
                data, prior, groups, model=config.teacher.model, train=config.teacher.train, seed=seed, device=CPU
            ).network
        own = network.backbone.get_submodule(network.head_name)
        if type(own) is not nn.Linear:
            parser.error(f"expected a network with a plain linear head, got {type(own).__name__}")
        rows, val = part_rows(data, network)
        measured, teaching = measure_heads(own, rows, groups, data.train.class_names, seed)
        seeds[str(seed)] = {"val": val, **measured}
        if arguments.taught is not None:
            seeds[str(seed)]["taught"] = teach(arguments.run[seed], teaching, data, network, arguments.taught)
            print({n: {k: round(100 * v, 2) for k, v in row.items()} for n, row in seeds[str(seed)]["taught"].items()})
        line = {n: round(100 * h["test"]["top1"], 2) for n, h in seeds[str(seed)]["heads"].items()}
        print(f"seed {seed} ({val}): {line}", flush=True)
    found = summarise(seeds)
    print(f"\n{'head':<20}{'top-1':>14}" + "".join(f"{g:>14}" for g in next(iter(found["heads"].values()))["groups"]))
    for name, row in found["heads"].items():
        cells = [row["top1"], *row["groups"].values()]
        words = ["n/a" if c is None else f"{100 * c['mean']:.2f} ±{100 * c['std']:5.2f}" for c in cells]
        print(f"{name:<20}" + "".join(f"{w:>14}" for w in words))
    for part, both in found["balance"].items():
        for when, row in both.items():
            print(f"{part} {when}: " + ", ".join(f"{k} {v['mean']:.3f}" for k, v in row.items()))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        config_words = (
            {"runs": len(arguments.run)} if arguments.run else {"preset": arguments.preset, **dict(overrides)}
        )
        asked = {
            "config": config_words, "weight_decays": WEIGHT_DECAYS, "clusters": CLUSTERS, "depths": DEPTHS,
            "flow": FLOW, "steps": STEPS,
        }  # fmt: skip
        kept = {"provenance": provenance, **asked, "summary": found, "seeds": seeds}
        arguments.json.write_text(json.dumps(kept, indent=1, allow_nan=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
