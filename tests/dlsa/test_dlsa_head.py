"""The head of DLSA: how rows are divided and answered, how its depth is chosen, what it is worth on a made-up tail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from krdistill.dlsa import DLSAHead, fit_dlsa
from krdistill.dlsa.clusters import class_distributions, cluster_counts
from krdistill.dlsa.flow import MixtureFlow, assign
from krdistill.dlsa.head import Level, balanced_accuracy
from krdistill.errors import ArgumentError, DataError
from krdistill.rectify.classifier_refit import refit_classifier

pytest.importorskip("zuko")

SMALL = {"clusters": 4, "epochs": 5, "batch_size": 64, "hidden": 16, "max_steps": 60}
COUNTS = [120, 40, 12, 4, 1]


def mixture(
    counts: list[int], *, seed: int = 0, dim: int = 8, parts: int = 1, apart: float = 1.5
) -> tuple[Tensor, Tensor]:
    """Rows of classes that consist of ``parts`` Gaussians each, and their labels."""
    means = apart * torch.randn(len(counts), parts, dim, generator=torch.Generator().manual_seed(100))
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    g = torch.Generator().manual_seed(seed)
    part = torch.randint(parts, (len(labels),), generator=g)
    return means[labels, part] + torch.randn(len(labels), dim, generator=g), labels


def by_hand(head: DLSAHead, x: Tensor) -> tuple[Tensor, list[int]]:
    """The head's answer, row by row, in plain words."""
    answers, places = [], []
    for row in x:
        f = row.unsqueeze(0)
        for i, level in enumerate(head.levels):
            u, joint = level.flow.place(f)
            if joint.logsumexp(1) >= level.threshold:
                P = level.distributions[int(joint.argmax())]
                answers.append(level.classifier(torch.cat([f[0], u[0], P])))
                places.append(i)
                break
        else:
            answers.append(head.rest(row))
            places.append(head.depth)
    return torch.stack(answers), places


def test_every_row_is_answered_by_the_first_level_that_keeps_it() -> None:
    x, y = mixture(COUNTS)
    head, found = fit_dlsa(x, y, 5, depth=3, **SMALL)
    assert found["depth"] == head.depth == 3 and isinstance(head, nn.Module)
    new, _ = mixture([20] * 5, seed=9)
    logits, places = by_hand(head, new)
    torch.testing.assert_close(head(new), logits, rtol=1e-4, atol=1e-4)
    assert head.route(new).tolist() == places and len(set(places)) > 1
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(new[order]), head(new)[order], rtol=1e-4, atol=1e-4)


def test_the_likeliest_share_of_what_is_left_stays_at_each_level() -> None:
    x, y = mixture(COUNTS)
    head, found = fit_dlsa(x, y, 5, depth=2, share=0.3, **SMALL)
    first, second = found["levels"]
    assert first["rows"] == 177 and second["rows"] == 177 - first["passed"]
    for level in (first, second):
        assert abs(level["passed"] - 0.3 * level["rows"]) <= 1
        assert 0 < level["size_entropy"] <= 1
    assert torch.bincount(head.route(x), minlength=3).tolist()[:2] == [first["passed"], second["passed"]]


def test_the_distributions_are_those_of_the_training_rows_clusters() -> None:
    x, y = mixture(COUNTS)
    head, _ = fit_dlsa(x, y, 5, depth=1, **SMALL)
    counts = cluster_counts(assign(head.levels[0].flow, x)[1], y, 4, 5)
    torch.testing.assert_close(head.levels[0].distributions, class_distributions(counts).float())


def test_depth_zero_is_balanced_softmax_on_the_features() -> None:
    x, y = mixture(COUNTS)
    head, _ = fit_dlsa(x, y, 5, depth=0, max_steps=60)
    weight, bias = refit_classifier(x, y, 5, max_steps=60)
    torch.testing.assert_close(head(x), x @ weight.T + bias, rtol=1e-3, atol=1e-3)
    assert head.depth == 0 and head.route(x).tolist() == [0] * len(x)


def test_the_depth_is_chosen_on_held_out_rows_and_of_equals_the_smallest() -> None:
    x, y = mixture(COUNTS)
    val = mixture([10] * 5, seed=4)
    head, found = fit_dlsa(x, y, 5, depth=2, held_out=val, **SMALL)
    assert len(found["held_out"]) == 3
    best = max(found["held_out"])
    assert found["depth"] == found["held_out"].index(best)
    assert balanced_accuracy(head(val[0]), val[1]) == pytest.approx(best)
    plain, _ = fit_dlsa(x, y, 5, depth=0, max_steps=60)
    assert found["held_out"][0] == pytest.approx(balanced_accuracy(plain(val[0]), val[1]))


def test_the_same_seed_gives_the_same_head_and_the_global_generator_stays() -> None:
    x, y = mixture(COUNTS)
    before = torch.random.get_rng_state()
    one, _ = fit_dlsa(x, y, 5, seed=3, **SMALL)
    two, _ = fit_dlsa(x, y, 5, seed=3, **SMALL)
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one(x), two(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dtypes_and_a_scale_of_the_features(dtype: torch.dtype) -> None:
    x, y = mixture(COUNTS)
    head, _ = fit_dlsa(x.to(dtype), y, 5, depth=1, **SMALL)
    wide = torch.promote_types(dtype, torch.float32)
    assert head(x).dtype == wide and bool(head(x).isfinite().all())
    if dtype == torch.float64:
        scaled, _ = fit_dlsa(x.double() * 64, y, 5, depth=1, **SMALL)
        assert (scaled(x.double() * 64).argmax(1) == head(x).argmax(1)).float().mean() > 0.97


def test_clusters_that_are_empty_and_a_level_that_loses_classes_answer_all_the_same() -> None:
    """Twenty clusters for 40 rows, and outside=0: some classes have no row in a level's classifier."""
    x, y = mixture([30, 6, 2, 1, 1])
    head, found = fit_dlsa(x, y, 5, depth=3, outside=0.0, **{**SMALL, "clusters": 20})
    assert head.depth < 3 and len(found["levels"]) == head.depth  # fewer rows than clusters are left
    new, _ = mixture([30] * 5, seed=2)
    assert bool(head(new * 10).isfinite().all())


def test_an_empty_cluster_says_what_all_rows_say() -> None:
    counts = torch.tensor([[3, 1], [0, 0]])
    flow = MixtureFlow(3, 2, hidden=4)
    classifier = nn.Linear(3 + 3 + 2, 2)
    level = Level(flow, torch.tensor(-1e9), class_distributions(counts).float(), classifier)
    far = flow.inverse(flow.centres[1:])
    known = torch.cat([far, flow(far)[0], torch.tensor([[0.75, 0.25]])], 1)
    torch.testing.assert_close(level(far)[0], classifier(known))


def test_a_head_survives_a_state_dict() -> None:
    x, y = mixture(COUNTS)
    head, _ = fit_dlsa(x, y, 5, depth=1, seed=0, **SMALL)
    other, _ = fit_dlsa(x.flip(1), y, 5, depth=1, seed=1, **SMALL)
    other.load_state_dict(head.state_dict())
    assert torch.equal(head(x), other(x))


def test_on_classes_of_several_parts_it_sees_what_a_linear_head_cannot() -> None:
    """Classes of four Gaussians each, five head and five tail: clusters tell the parts apart, one plane does not."""
    counts = [200] * 5 + [20] * 5
    x, y = mixture(counts, parts=4, dim=6, apart=3.0)
    new, labels = mixture([60] * 10, parts=4, dim=6, apart=3.0, seed=5)
    plain, _ = fit_dlsa(x, y, 10, depth=0)
    head, _ = fit_dlsa(
        x, y, 10, depth=1, share=0.9, clusters=40, epochs=20, batch_size=128, hidden=32, lr=5e-3, max_steps=80
    )
    tail = labels >= 5
    before, after = (balanced_accuracy(h(new[tail]), labels[tail]) for h in (plain, head))
    assert after > before + 0.02
    assert balanced_accuracy(head(new), labels) > balanced_accuracy(plain(new), labels) + 0.1


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"depth": -1}, ArgumentError, "depth: expected"),
        ({"share": 1.0}, ArgumentError, "share: expected"),
        ({"outside": 2}, ArgumentError, "outside: expected"),
        ({"clusters": 178}, DataError, "178 clusters for 177 rows"),
        ({"weight_decay": 0.0}, ArgumentError, "weight_decay"),
        ({"held_out": 3}, ArgumentError, "held_out: expected"),
        ({"held_out": (torch.zeros(3, 7), torch.zeros(3, dtype=torch.long))}, ArgumentError, "held_out features"),
    ],
)
def test_bad_arguments_are_refused_in_words(change: dict[str, object], error: type[Exception], words: str) -> None:
    x, y = mixture(COUNTS)
    with pytest.raises(error, match=words):
        fit_dlsa(x, y, 5, **{**SMALL, **change})  # type: ignore[arg-type]


def test_a_class_without_a_row_and_features_of_another_width_are_refused() -> None:
    x, y = mixture(COUNTS)
    with pytest.raises(DataError, match="1 of 6 classes have no row"):
        fit_dlsa(x, y, 6, **SMALL)
    head, _ = fit_dlsa(x, y, 5, depth=0)
    with pytest.raises(ArgumentError, match="features: expected shape"):
        head(x[:, :4])
    with pytest.raises(TypeError):
        fit_dlsa(x, y, 5, **SMALL, sepochs=3)


def test_rows_of_no_weight_leave_the_refitted_classifier_as_it_is() -> None:
    """Every row once more, mirrored: neither the prior nor the features' length changes."""
    x, y = mixture([30, 10, 5])
    twice, labels = torch.cat([x, -x]), torch.cat([y, y])
    weights = torch.cat([torch.ones(len(y)), torch.zeros(len(y))])
    for one, other in zip(
        refit_classifier(x, y, 3, weight_decay=1e-3),
        refit_classifier(twice, labels, 3, weight_decay=1e-3, row_weights=3 * weights),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3)
    plain = refit_classifier(twice, labels, 3, weight_decay=1e-3)[0]
    assert not torch.allclose(plain, refit_classifier(x, y, 3, weight_decay=1e-3)[0], atol=0.05)
    with pytest.raises(DataError, match="row_weights: expected a row that counts"):
        refit_classifier(x, y, 3, row_weights=torch.zeros(len(y)))
    with pytest.raises(ArgumentError, match="row_weights: expected"):
        refit_classifier(x, y, 3, row_weights=-torch.ones(len(y)))


def test_many_classes_have_a_smaller_penalty() -> None:
    K = 250
    labels = torch.arange(2 * K) % K
    x = torch.randn(2 * K, 3, generator=torch.Generator().manual_seed(0))
    by_default, as_said, fixed = (
        fit_dlsa(x, labels, K, depth=0, max_steps=30, clusters=2, **o)[0](x)
        for o in ({}, {"weight_decay": 1e-3 / K}, {"weight_decay": 1e-5})
    )
    assert torch.equal(by_default, as_said) and not torch.allclose(by_default, fixed, atol=1e-3)
