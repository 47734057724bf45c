"""Writes docs/methods.md from the registry of recipes and the docstrings of losses, rectifiers and samplers.

    python docs/generate_methods.py            write the page
    python docs/generate_methods.py --check    exit with 1 if the page on disk is not the one that would be written

What no docstring can know stands in the tables below: which functions make up a method, and how sure we are of it. A
method without an entry there is an error, so that the page names all of them.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, get_args

import krdistill
from krdistill.config import HEAD_OF, SMOOTHABLE, Classification, SecondStage, TrainConfig
from krdistill.recipes import Recipe, list_recipes

PACKAGE = Path(krdistill.__file__).parent
PAGE = Path(__file__).parent / "methods.md"

OURS = "our formulation"
CODE = "as in the authors' code"
PAPER = "re-implemented from the paper"
SECONDARY = "inferred from secondary sources"
STATUSES = {
    OURS: "there was no public equation to follow, or the idea is ours",
    CODE: "formula and constants follow code that the authors published; written anew",
    PAPER: "formula as the paper has it; the authors' code was not followed, or there is none",
    SECONDARY: "formula or constants as others describe or re-implement the paper; the authors' own form may differ",
}


@dataclass(frozen=True)
class Entry:
    """How sure we are of a method, the functions and classes it is made of (``file:name``), and what else to say."""

    status: str
    parts: tuple[str, ...]
    note: str = ""


_BALANCED = "losses/balanced_softmax.py:balanced_softmax"
_WEIGHTS = "losses/tail_weighting.py:tail_weights"
_LRD = (
    "losses/krdistill.py:rectify_logits",
    "losses/krdistill.py:lrd_loss",
)
_RRD = (
    "losses/krdistill.py:rrd_loss",
    "rectify/anchor_rectification.py:rarity",
    "losses/prototype_contrast.py:prototype_contrast_loss",
    "losses/rectified_classifier.py:rectified_classifier_loss",
)
_OFF = "What is not in the defaults is an option, to be compared: see `benchmarks/studies`."

METHODS = {
    "krdistill": Entry(
        OURS,
        (*_LRD, *_RRD, _WEIGHTS, "anchors.py:balanced_anchors", "anchors.py:align_anchors"),
        "The paper names two losses and says what they are for. Its equations are not public: every formula here is "
        "ours. What `correct` does is written under [`correct_errors`](#correct_errors). " + _OFF,
    ),
    "krdistill-lrd": Entry(OURS, (*_LRD, _WEIGHTS), "The logit part of [`krdistill`](#krdistill) alone."),
    "krdistill-rrd": Entry(OURS, (*_RRD, _WEIGHTS), "The representation part of [`krdistill`](#krdistill) alone."),
    "kd": Entry(PAPER, ("losses/kd.py:kd_divergence",)),
    "kd-balanced": Entry(PAPER, ("losses/kd.py:kd_divergence", _BALANCED), "Putting the two together is ours."),
    "bkd": Entry(CODE, ("losses/bkd.py:bkd_loss",)),
    "ltkd": Entry(
        SECONDARY,
        (
            "losses/ltkd.py:ltkd_loss",
            "losses/ltkd.py:group_log_probabilities",
            "losses/ltkd.py:cross_group_divergence",
            "losses/ltkd.py:within_group_divergence",
        ),
        "The paper's alpha, beta and T are unknown to us; those given here are ours.",
    ),
    "cckd": Entry(SECONDARY, ("losses/cckd.py:cckd_loss", _BALANCED)),
    "dive": Entry(
        SECONDARY,
        ("losses/dive.py:dive_loss", "losses/dive.py:VirtualExamples", _BALANCED),
        "The formula is that of a third party's re-implementation, the constants are the paper's for CIFAR.",
    ),
    "cbd": Entry(
        SECONDARY,
        ("losses/feature_matching.py:cosine_distance", "losses/feature_matching.py:Projector"),
        "One teacher, where the paper has several. The formula and its constants are those of a third party's "
        "re-implementation.",
    ),
    "ssd": Entry(
        CODE,
        (
            "losses/ssd.py:ScaledTeacherDistillation",
            "losses/ssd.py:AuxiliaryHead",
            "rectify/second_stage.py:lws",
        ),
        "The paper's self-supervised first stage is left out.",
    ),
    "lfme": Entry(CODE, ("losses/lfme.py:ExpertDistillation",)),
    "dkd": Entry(
        CODE,
        (
            "losses/dkd.py:dkd_loss",
            "losses/dkd.py:target_class_divergence",
            "losses/dkd.py:non_target_class_divergence",
        ),
        "The growth of the weight is the option `warmup`.",
    ),
    "rkd": Entry(PAPER, ("losses/rkd.py:rkd_loss", "losses/rkd.py:rkd_distance_loss", "losses/rkd.py:rkd_angle_loss")),
    "sp": Entry(
        PAPER,
        ("losses/similarity_preserving.py:similarity_preserving_loss",),
        "On pooled features, where the paper takes the last maps.",
    ),
    "logit-matching": Entry(PAPER, ("losses/logit_matching.py:logit_mse",)),
    "reviewkd": Entry(
        CODE,
        ("losses/reviewkd.py:ReviewKD", "losses/reviewkd.py:hierarchical_context_loss"),
        "The growth of the weight is the option `warmup`.",
    ),
    "crd": Entry(CODE, ("losses/crd.py:ContrastiveRepresentationDistillation", "losses/crd.py:nce_loss")),
    "simkd": Entry(CODE, ("losses/simkd.py:simkd_loss", "losses/simkd.py:ReusedClassifier")),
    "none": Entry(
        PAPER,
        (),
        "Only the classification loss. The paper named here is that of balanced softmax, the usual one to compare "
        "with; by default the loss is cross-entropy.",
    ),
}

CLASSIFICATION = {
    "cross-entropy": Entry(PAPER, ("losses/cross_entropy.py:cross_entropy",), "The field's common form."),
    "balanced-softmax": Entry(PAPER, (_BALANCED,)),
    "logit-adjusted": Entry(PAPER, ("losses/logit_adjustment.py:logit_adjusted_loss",)),
    "focal": Entry(PAPER, ("losses/focal.py:focal_loss",)),
    "class-balanced": Entry(
        PAPER,
        (
            "losses/class_balanced.py:class_balanced_loss",
            "losses/class_balanced.py:ClassBalancedCrossEntropy",
            "priors.py:effective_number_weights",
        ),
    ),
    "class-balanced-focal": Entry(PAPER, ("losses/class_balanced.py:ClassBalancedFocal", "losses/focal.py:focal_loss")),
    "label-aware-smoothing": Entry(
        CODE,
        (
            "losses/label_aware_smoothing.py:label_aware_smoothing",
            "losses/label_aware_smoothing.py:smoothing_factors",
        ),
    ),
    "ldam": Entry(
        PAPER,
        ("losses/ldam.py:ldam_loss", "losses/ldam.py:ldam_margins", "losses/ldam.py:NormedLinear"),
        "The head gives logits of scale 30, so the margin of 0.5 on cosines is 15 on them.",
    ),
    "ldam-drw": Entry(
        PAPER, ("losses/ldam.py:LDAM", "losses/ldam.py:ldam_loss"), "As [`ldam`](#ldam), with deferred re-weighting."
    ),
    "dot-regression": Entry(CODE, ("losses/etf_classifier.py:dot_regression_loss", "losses/etf_classifier.py:ETFHead")),
}

RECTIFIERS = {
    "remove_prior": Entry(PAPER, ("rectify/prior_removal.py:remove_prior",)),
    "auto_tau": Entry(SECONDARY, ("rectify/prior_removal.py:auto_tau",)),
    "per_class_tau": Entry(OURS, ("rectify/tau_calibration.py:per_class_tau",)),
    "refit_classifier": Entry(
        OURS, ("rectify/classifier_refit.py:refit_classifier",), "The idea of cRT, fitted as a convex problem."
    ),
    "mean_prediction": Entry(SECONDARY, ("rectify/prior_removal.py:mean_prediction",)),
    "correct_errors": Entry(
        OURS, ("rectify/error_correction.py:correct_errors",), "`swap` is from the paper named, `lift` is ours."
    ),
    "errors": Entry(OURS, ("rectify/error_correction.py:errors",), "Used by `correct_errors` and for the log."),
    "reweight_classes": Entry(CODE, ("rectify/class_reweighting.py:reweight_classes",)),
    "power_normalise": Entry(SECONDARY, ("rectify/power_normalisation.py:power_normalise",)),
    "class_means": Entry(OURS, ("rectify/anchor_rectification.py:class_means",)),
    "recentre_features": Entry(OURS, ("rectify/anchor_rectification.py:recentre_features",)),
    "blend_features": Entry(OURS, ("rectify/anchor_rectification.py:blend_features",)),
    "rarity": Entry(OURS, ("rectify/anchor_rectification.py:rarity",)),
    "within_class_variation": Entry(OURS, ("rectify/variance_transfer.py:within_class_variation",)),
    "transfer_variance": Entry(OURS, ("rectify/variance_transfer.py:transfer_variance",)),
}

SECOND_STAGES = {
    "none": Entry("", (), "The last layer stays as it was trained."),
    "balanced-softmax": Entry(OURS, ("rectify/classifier_refit.py:refit_classifier",)),
    "crt": Entry(CODE, ("rectify/second_stage.py:crt",)),
    "lws": Entry(CODE, ("rectify/second_stage.py:lws",)),
    "tau-norm": Entry(PAPER, ("rectify/second_stage.py:tau_norm", "rectify/second_stage.py:choose_tau")),
    "ncm": Entry(PAPER, ("rectify/second_stage.py:ncm",)),
}

SAMPLERS = {
    "recipe": Entry("", (), "Not a sampler: whichever the recipe asks for, which is `instance` unless it says so."),
    "instance": Entry(PAPER, ("sampling.py:instance_order",)),
    "class-balanced": Entry(CODE, ("sampling.py:class_balanced_order",)),
    "square-root": Entry(PAPER, ("sampling.py:square_root_order",)),
    "progressively-balanced": Entry(PAPER, ("sampling.py:progressively_balanced_order",)),
}

INTRO = r"""<!-- Written by docs/generate_methods.py. Edit the docstrings or that file, then run it. -->
# Methods

Every method of krdistill: its formula, its source, where we deviate, its defaults, and how sure we are of it. The page
is written by `python docs/generate_methods.py` from the registry of recipes and the docstrings, and a test holds that
it is current.

Two things to know first.

- **KRDistill's equations are not public.** We know the names and the purposes of its two losses from the abstract. The
  formulas of the recipes `krdistill`, `krdistill-lrd` and `krdistill-rrd` are our formulation.
- **LTKD's alpha, beta and T are unknown to us**, and the exact form of its terms is inferred from descriptions. The
  defaults of `ltkd` are ours.

## Notation

K classes with n_k training images each, N in all, prior $\pi_k = n_k / N$. Labels y, one-hot $e_y$. Logits $z_t$ of the
teacher and $z_s$ of the student, `(B, K)` for a batch of B images; features $f_t$ and $f_s$, `(B, D_t)` and `(B, D_s)`.
Temperature T. Balanced anchors $c_k$. norm scales a vector to length 1, CE is the cross-entropy, KL the
Kullback-Leibler divergence. Every loss gives one value per image; the mean over the batch comes last.

A recipe trains the student with

$$
L = \lambda_c \, L_{\text{classification}}(z_s, y) + \sum_i \lambda_i \, L_i
$$

where $\lambda_c$ is `classification_weight` and the other weights are `logit_weight` and `feature_weight`, or named in
the recipe. No gradient flows to the teacher.

## Status
"""

NEEDS = {
    "teacher": "a teacher",
    "counts": "class counts",
    "features": "features of both networks",
    "maps": "the stages of both networks (krdistill's own networks only)",
    "memory": "a memory of every training image",
    "experts": "one expert network per group of classes",
    "two stages": "a stage of its own before the student",
}


# Docstrings ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Doc:
    """A docstring taken apart."""

    name: str
    summary: str
    body: str
    args: Mapping[str, str] = field(default_factory=dict)
    source: str = ""
    deviation: str = ""


@cache
def _tree(file: str) -> ast.Module:
    return ast.parse((PACKAGE / file).read_text(encoding="utf-8"))


@cache
def read_doc(part: str) -> Doc:
    """The docstring of ``file:name``."""
    file, name = part.split(":")
    for node in _tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return _parse(name, ast.get_docstring(node) or "")
    raise SystemExit(f"{part}: no such function or class; correct the tables of docs/generate_methods.py")


@cache
def read_module(file: str) -> Doc:
    """The docstring of a file."""
    return _parse(file, ast.get_docstring(_tree(file)) or "")


def _parse(name: str, text: str) -> Doc:
    blocks: dict[str, list[str]] = {"body": []}
    current = "body"
    for line in text.splitlines():
        start = re.match(r"(Args|Returns|Raises|Source|Deviation|Cost|Example):(?: |$)", line)
        other = re.match(r"(Args|Arguments|Returns|Source),? [a-z, ]*(as|and)\b|Source, deviation:", line)
        if start or other:
            current = start.group(1) if start else "other"
            blocks.setdefault(current, []).append(line[start.end() :] if start else line)
        elif not line.strip() and current not in ("body", "Args"):
            current = "rest"
        else:
            blocks.setdefault(current, []).append(line)
    summary, _, body = "\n".join([*blocks["body"], *(["", *blocks["rest"]] if "rest" in blocks else [])]).partition(
        "\n"
    )
    args: dict[str, str] = {}
    for match in re.finditer(
        r"^([a-z_, ]+): (.*(?:\n +.*)*)", textwrap.dedent("\n".join(blocks.get("Args", []))), re.M
    ):
        args[match.group(1)] = _flow(match.group(2))
    return Doc(
        name,
        to_markdown(summary),
        to_markdown(body.strip("\n")),
        {k: to_markdown(v) for k, v in args.items()},
        to_markdown(_flow("\n".join(blocks.get("Source", [])))),
        to_markdown(_flow("\n".join(blocks.get("Deviation", [])))),
    )


def _flow(text: str) -> str:
    return " ".join(text.split())


def to_markdown(text: str) -> str:
    """Sphinx markup to Markdown: formulas between dollars, names in backticks, arXiv numbers as links."""

    text = re.sub(r"^\.\. math::(?: *(.*))?((?:\n(?: +.*)?)*)(?=\n\S|\Z)", _math, text, flags=re.M)
    text = re.sub(r":math:`([^`]*)`", lambda m: f"${_names(_flow(m.group(1)))}$", text)
    text = re.sub(r":mod:`([\w.]+)`", r"`\1`", text)
    text = re.sub(r":[a-z]+:`~?(?:[\w.]*?\.)??((?:[A-Z]\w*\.)?\w+)`", r"`\1`", text)
    text = re.sub(r"``([^`]*)``", r"`\1`", text)
    return re.sub(r"arXiv\s+(\d{4}\.\d{4,5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _math(match: re.Match[str]) -> str:
    lines = [(match.group(1) or "").strip(), *(line.strip() for line in match.group(2).splitlines())]
    return "$$\n" + _names("\n".join(line for line in lines if line)) + "\n$$\n"


def _names(formula: str) -> str:
    """Upright names by a macro that every renderer allows; ``\\operatorname`` is refused by some."""
    return re.sub(r"\\operatorname\{([^}]*)\}", r"\\mathrm{\1}", formula)


# The page ------------------------------------------------------------------------------------------------------------


def page() -> str:
    """The whole page."""
    recipes = {r.name: r for r in list_recipes()}
    classification = list(get_args(Classification))
    rectifiers = _all_of("rectify/__init__.py")
    stages = list(get_args(SecondStage))
    samplers = list(get_args(TrainConfig.model_fields["sampler"].annotation))
    for what, names, table in (
        ("METHODS", recipes, METHODS),
        ("CLASSIFICATION", classification, CLASSIFICATION),
        ("RECTIFIERS", rectifiers, RECTIFIERS),
        ("SECOND_STAGES", stages, SECOND_STAGES),
        ("SAMPLERS", samplers, SAMPLERS),
    ):
        _complete(what, names, table)

    out = [INTRO]
    out += [f"- *{status}*: {words}." for status, words in STATUSES.items()]
    out += ["", "## Recipes", "", "Chosen with `--recipe NAME`; an option is set with `--recipe.OPTION VALUE`.", ""]
    out += ["| recipe | what it does | status | arXiv |", "|---|---|---|---|"]
    out += [
        f"| [`{r.name}`](#{r.name}) | {r.summary} | {METHODS[r.name].status} | {_link(r.source.arxiv) or '-'} |"
        for r in recipes.values()
    ]
    for r in recipes.values():
        out += ["", *_recipe(r, METHODS[r.name])]
    out += [
        "",
        "## Classification losses",
        "",
        "The student's own loss on the labels, chosen with `--recipe.classification NAME`, and the teacher's, with "
        "`--teacher.classification NAME`.",
    ]
    made = _built_losses()
    for name in classification:
        out += ["", *_classification(name, CLASSIFICATION[name], *made[name])]
    out += [
        "",
        "## Rectifiers",
        "",
        "Pure functions of `krdistill.rectify` that change what the teacher says. Recipes use them by their options; "
        "they can be called alone.",
    ]
    for name in sorted(rectifiers, key=list(RECTIFIERS).index):
        entry = RECTIFIERS[name]
        out += ["", *_plain(name, entry, ("Defaults", _signature(entry.parts[0])))]
    second = read_module("rectify/second_stage.py")
    out += [
        "",
        "## Second stages",
        "",
        "How the last linear layer is balanced after training: `--teacher.second_stage NAME`, "
        "`--student.second_stage NAME`. All but `none` need a head of the kind `linear`; `tau-norm` needs held-out "
        "images (`--data.val_fraction`). `lws` is also the stage that recipe `ssd` gives the teacher.",
        "",
        f"Deviation: {second.deviation}",
    ]
    for name in stages:
        entry = SECOND_STAGES[name]
        defaults = _signature(entry.parts[0]) if entry.parts else ""
        out += ["", *_plain(name, entry, ("Defaults", defaults), title=f"Second stage {name}")]
    drawn = read_module("sampling.py")
    out += [
        "",
        "## Samplers",
        "",
        "How an epoch's images are drawn: `--train.sampler NAME`. They need class counts, all but `instance`. Balanced "
        "softmax and logit adjustment hold the class prior of the draws, so that it is not made up for twice.",
        "",
        drawn.body,
        "",
        f"Source: {drawn.source}",
        "",
        f"Deviation: {drawn.deviation}",
    ]
    for name in samplers:
        out += ["", *_plain(name, SAMPLERS[name], title=f"Sampler {name}")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip() + "\n"


def _complete(what: str, names: Iterable[str], table: Mapping[str, Entry]) -> None:
    missing, gone = [n for n in names if n not in table], [n for n in table if n not in names]
    if missing or gone:
        raise SystemExit(f"docs/generate_methods.py: {what} has no entry for {missing} and one too many for {gone}.")


def _recipe(r: Recipe, entry: Entry) -> list[str]:
    options = r.resolve({}).model_dump(mode="json")
    source = f"{r.source.title}, {r.source.year}" + (f", {_link(r.source.arxiv)}" if r.source.arxiv else "")
    needs = ", ".join(words for key, words in NEEDS.items() if key in r.needs) or "nothing but images and labels"
    facts = [
        ("Source", source),
        ("Status", entry.status),
        ("Needs", needs),
        ("Defaults", _options(options)),
        ("Images drawn", "" if r.sampler == "instance" else f"[`{r.sampler}`](#sampler-{r.sampler})"),
        ("Defaults from", r.defaults_from),
    ]
    return [f"### {r.name}", "", f"{_sentence(r.summary)}", "", *_facts(facts), *_parts(entry)]


def _classification(name: str, entry: Entry, made: str, given: Mapping[str, str]) -> list[str]:
    parameters = {**_parameters(made), **given}
    needs = ["class counts"] if "counts" in parameters else []
    needs += [f"head `{HEAD_OF[name]}`"] if name in HEAD_OF else []
    defaults = {k: v for k, v in parameters.items() if v and k not in ("counts", "label_smoothing", "class_weights")}
    facts = [
        ("Source", _source(entry)),
        ("Status", entry.status),
        ("Needs", ", ".join(needs) or "nothing but labels"),
        ("Defaults", " ".join(f"`{k}={v}`" for k, v in defaults.items())),
        ("Label smoothing", "yes" if name in SMOOTHABLE else "no"),
    ]
    return [f"### {name}", "", *_facts(facts), *_parts(entry)]


def _plain(name: str, entry: Entry, *facts: tuple[str, str], title: str = "") -> list[str]:
    about = [("Source", _source(entry)), ("Status", entry.status), *facts]
    return [f"### {title or name}", "", *_facts(about), *_parts(entry)]


def _facts(facts: Iterable[tuple[str, str]]) -> list[str]:
    return [f"- {key}: {value}" for key, value in facts if value]


def _parts(entry: Entry) -> list[str]:
    """Formula and words of every part, then the deviations."""
    out = ["", entry.note] if entry.note else []
    deviations = []
    for part in entry.parts:
        doc = read_doc(part)
        file = part.split(":")[0]
        out += ["", f"`{doc.name}` ([{file}](../src/krdistill/{file})): {doc.summary}"]
        if doc.body:
            out += ["", doc.body]
        symbols = {k: v for k, v in doc.args.items() if k not in _COMMON} if "$$" in doc.body else {}
        if symbols:
            out += ["", "With", "", *(f"- `{k}`: {v}" for k, v in symbols.items())]
        if doc.deviation:
            deviations.append(f"- `{doc.name}`: {doc.deviation}")
    if deviations:
        out += ["", "Deviations:", "", *deviations]
    return out


_COMMON = frozenset({"student_logits", "teacher_logits", "labels", "logits", "seed"})


def _source(entry: Entry) -> str:
    """The papers of a method's parts, each once and with its title where its file names it."""
    found: dict[str, str] = {}
    for part in entry.parts:
        if source := read_doc(part).source:
            key = _number(source)
            titled = [s for s in (source, *_sources(part.split(":")[0])) if '"' in s and _number(s) == key]
            found.setdefault(key, (titled or [source])[0])
    return " ".join(found.values())


@cache
def _sources(file: str) -> list[str]:
    names = [n.name for n in _tree(file).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return [read_module(file).source, *(read_doc(f"{file}:{name}").source for name in names)]


def _number(source: str) -> str:
    """What tells a paper from another: its arXiv number, or else the words."""
    found = re.search(r"\d{4}\.\d{4,5}", source)
    return found.group() if found else source


def _options(options: Mapping[str, Any]) -> str:
    def show(value: Any) -> str:
        return (
            f"{value:.4g}" if isinstance(value, float) else str(value).lower() if value in (True, False) else str(value)
        )

    return " ".join(f"`{k}={show(v)}`" for k, v in options.items())


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _link(arxiv: str) -> str:
    return f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})" if arxiv else ""


# What the source says ------------------------------------------------------------------------------------------------


def _all_of(file: str) -> list[str]:
    for node in _tree(file).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise SystemExit(f"{file} has no __all__")


def _built_losses() -> dict[str, tuple[str, dict[str, str]]]:
    """What ``classification_term`` makes of each name: the class, and the values it is given."""
    for node in ast.walk(_tree("objective.py")):
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "made" and isinstance(node.value, ast.Dict):
            found = {}
            for key, value in zip(node.value.keys, node.value.values, strict=True):
                call = value.body if isinstance(value, ast.Lambda) else value
                given = (
                    {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg} if isinstance(call, ast.Call) else {}
                )
                made = call.func if isinstance(call, ast.Call) else call
                found[ast.literal_eval(key)] = (ast.unparse(made), given)  # type: ignore[arg-type]
            return found
    raise SystemExit("objective.py: classification_term has no table 'made' any more")


def _parameters(class_name: str) -> dict[str, str]:
    """The constructor's parameters and their defaults, empty where there is none."""
    for path in sorted((PACKAGE / "losses").glob("*.py")):
        for node in _tree(f"losses/{path.name}").body:
            if isinstance(node, ast.ClassDef) and node.name == class_name:
                init = [n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
                return _defaults(init[0].args) if init else {}
    raise SystemExit(f"no class {class_name} in losses/")


def _defaults(a: ast.arguments) -> dict[str, str]:
    positional = [x.arg for x in a.args if x.arg != "self"]
    values = [""] * (len(positional) - len(a.defaults)) + [ast.unparse(d) for d in a.defaults]
    keywords = {x.arg: ast.unparse(d) if d else "" for x, d in zip(a.kwonlyargs, a.kw_defaults, strict=True)}
    return {**dict(zip(positional, values, strict=True)), **keywords}


def _signature(part: str) -> str:
    """The default arguments of a function."""
    file, name = part.split(":")
    node = next(n for n in _tree(file).body if isinstance(n, ast.FunctionDef) and n.name == name)
    return " ".join(f"`{k}={v}`" for k, v in _defaults(node.args).items() if v)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write docs/methods.md, or check that it is current.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is not current")
    check, text = parser.parse_args().check, page()
    if not check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit("docs/methods.md is not current; run: python docs/generate_methods.py")


if __name__ == "__main__":
    main()
