from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from krdistill.errors import ArgumentError, DataError
from krdistill.losses import crd as crd_module
from krdistill.losses.crd import ContrastiveRepresentationDistillation, nce_loss

N, D_S, D_T = 30, 5, 7
LABELS = torch.arange(N) % 4 * 3 // 2  # classes 0, 1, 3, 4: class 2 has no image


def _randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _module(**changes: Any) -> ContrastiveRepresentationDistillation:
    settings: dict[str, Any] = {"embed_dim": 6, "negatives": 11, "seed": 3} | changes
    return ContrastiveRepresentationDistillation(D_S, D_T, N, LABELS, **settings)


def _batch(B: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:B]
    return _randn(B, D_S, seed=seed), _randn(B, D_T, seed=seed + 1), LABELS[index], index


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).sum(-1, keepdims=True))


def _embed(layer: torch.nn.Linear, x: Tensor) -> np.ndarray:
    weight, bias = layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()
    return _unit(x.detach().double().numpy() @ weight.T + bias)


def test_nce_by_hand() -> None:
    # P = 0.2, 0.1, 0.3 and m P_n = 2 / 10: h = 1/2, 1/3, 3/5
    scores = torch.tensor([[0.2, 0.1, 0.3]], dtype=torch.float64).log()
    expected = -math.log(1 / 2) - math.log(2 / 3) - math.log(2 / 5)
    assert float(nce_loss(scores, 10)) == pytest.approx(expected)
    huge = torch.tensor([[1e4, -1e4, 1e4], [-1e4, 1e4, -1e4]]).requires_grad_()
    loss = nce_loss(huge, 10)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all()) and huge.grad is not None and bool(torch.isfinite(huge.grad).all())


@pytest.mark.parametrize(("B", "piece"), [(4, 1 << 20), (1, 1 << 20), (4, 1), (5, 2 * (N * 8 + 12 * 64))])
def test_three_steps_follow_the_paper(B: int, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores, Z, loss and memory, from the definitions, with the module's own draws of negatives.

    The batch at once, a row at a time, and two rows at a time.
    """
    monkeypatch.setattr(crd_module, "_PIECE", piece)
    crd = _module(temperature=0.3, momentum=0.6)
    tau, rho, m = 0.3, 0.6, 11
    banks = {k: getattr(crd, f"{k}_memory").double().numpy().copy() for k in ("student", "teacher")}
    Z: dict[str, float] = {}
    for step in range(3):
        f_s, f_t, labels, index = _batch(B, seed=step)
        negatives = crd.draw_negatives(labels, index).numpy()
        e = {"student": _embed(crd.embed_student, f_s), "teacher": _embed(crd.embed_teacher, f_t)}
        expected = np.zeros(B)
        for own, other in (("student", "teacher"), ("teacher", "student")):
            chosen = np.concatenate([index.numpy()[:, None], negatives], axis=1)
            out = np.array([[math.exp(e[own][b] @ banks[other][i] / tau) for i in chosen[b]] for b in range(B)])
            Z.setdefault(own, out.mean() * N)
            p = out / Z[own]
            h = p / (p + m / N)
            expected -= np.log(h[:, 0]) + np.log(1 - h[:, 1:]).sum(1)
        loss = crd(f_s, f_t, labels, index)
        np.testing.assert_allclose(loss.detach(), expected, rtol=1e-4)
        for k in banks:
            banks[k][index] = _unit(rho * banks[k][index] + (1 - rho) * e[k])
            np.testing.assert_allclose(getattr(crd, f"{k}_memory"), banks[k], atol=1e-6)
        np.testing.assert_allclose(crd.log_z, [math.log(Z["student"]), math.log(Z["teacher"])], rtol=1e-5)
        assert int(crd.step) == step + 1


def test_negatives_are_of_other_classes_and_equally_likely() -> None:
    crd = _module(negatives=6000)
    for image in (0, 1, 17):
        label = LABELS[image]
        drawn = crd.draw_negatives(label[None], torch.tensor([image]))[0]
        counts = torch.bincount(drawn, minlength=N)
        others = label != LABELS
        assert int(counts[~others].sum()) == 0
        expected = 6000 / int(others.sum())
        chi_squared = float(((counts[others] - expected) ** 2 / expected).sum())
        assert chi_squared < 60  # 22 others: mean 21, standard deviation 6.5
    # m beyond the number of images is a draw with replacement
    assert crd.draw_negatives(LABELS[:2], torch.arange(2)).shape == (2, 6000)


def test_negatives_depend_on_seed_batch_number_and_image_alone() -> None:
    crd = _module()
    f_s, f_t, labels, index = _batch()
    first = crd.draw_negatives(labels, index)
    assert torch.equal(crd.draw_negatives(labels.flip(0), index.flip(0)), first.flip(0))
    assert torch.equal(_module().draw_negatives(labels, index), first)
    assert not torch.equal(_module(seed=4).draw_negatives(labels, index), first)
    assert len({tuple(row) for row in first.tolist()}) == len(first)
    crd(f_s, f_t, labels, index)
    assert not torch.equal(crd.draw_negatives(labels, index), first)
    state = torch.random.get_rng_state()
    crd(f_s, f_t, labels, index)
    _module()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_same_seed_same_run_and_a_state_resumes_it() -> None:
    a, b = _module(), _module()
    for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True):
        assert torch.equal(x, y) or bool((x.isnan() & y.isnan()).all())
    assert not torch.equal(a.student_memory, a.teacher_memory)
    a(*_batch(seed=0))
    b = _module(seed=99)
    b.seed = a.seed
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for step in (1, 2):
        assert torch.equal(a(*_batch(seed=step)), b(*_batch(seed=step)))
    assert set(a.state_dict()) == {
        "student_memory", "teacher_memory", "log_z", "step",
        "embed_student.weight", "embed_student.bias", "embed_teacher.weight", "embed_teacher.bias",
    }  # fmt: skip


def test_only_training_moves_the_memory() -> None:
    crd = _module().eval()
    before = {k: v.clone() for k, v in crd.named_buffers()}
    batch = _batch()
    loss = crd(*batch)
    loss.sum().backward()
    assert torch.equal(crd(*batch), loss)
    for name, x in crd.named_buffers():
        assert torch.equal(x, before[name]) or (name == "log_z" and bool(x.isnan().all())), name
    crd.train()(*batch)
    others = torch.ones(N, dtype=torch.bool).index_fill(0, batch[3], False)
    for name in ("student_memory", "teacher_memory"):
        now = getattr(crd, name)
        assert torch.equal(now[others], before[name][others]) and not torch.equal(now, before[name])
        torch.testing.assert_close(now.norm(dim=1), torch.ones(N))


def test_gradients() -> None:
    crd = _module().double()
    f_s, f_t, labels, index = _batch()
    f_s, f_t = f_s.double().requires_grad_(), f_t.double().requires_grad_()
    # in training mode too, where the banks are written to before backward
    crd(f_s, f_t, labels, index).sum().backward()
    assert f_t.grad is None and f_s.grad is not None and float(f_s.grad.abs().max()) > 0
    assert crd.embed_student.weight.grad is not None and crd.embed_teacher.weight.grad is not None
    crd.eval()
    assert torch.autograd.gradcheck(lambda x: crd(x, f_t, labels, index), f_s)


def test_gradients_are_those_of_the_nce_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """By autograd through the scores against bank rows that are gathered one by one; a row and two at a time."""
    for piece in (1, 2 * (N * 8 + 12 * 64), 1 << 20):
        monkeypatch.setattr(crd_module, "_PIECE", piece)
        found = []
        for own in (True, False):
            crd = _module(temperature=0.3).double()
            f_s, f_t, labels, index = _batch(5)
            f_s, f_t = f_s.double().requires_grad_(), f_t.double()
            if own:
                loss = crd(f_s, f_t, labels, index)
            else:
                chosen = torch.cat([index[:, None], crd.draw_negatives(labels, index)], dim=1)
                loss = f_s.new_zeros(5)
                for embed, f, bank in (
                    (crd.embed_student, f_s, crd.teacher_memory),
                    (crd.embed_teacher, f_t, crd.student_memory),
                ):
                    e = torch.nn.functional.normalize(embed(f), dim=1)
                    scores = torch.einsum("bd,bmd->bm", e, bank[chosen]) / 0.3
                    log_z = (scores.detach().exp().mean() * N).log()
                    loss = loss + nce_loss(scores - log_z, N)
            (loss * torch.arange(1.0, 6, dtype=torch.float64)).sum().backward()
            found.append([loss.detach(), f_s.grad, *(p.grad for p in crd.parameters())])
        for ours, expected in zip(*found, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_a_batch_takes_no_more_than_a_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor made in forward, and what backward keeps: the banks and the batch's scores are far larger."""
    monkeypatch.setattr(crd_module, "_PIECE", 1 << 20)
    many, B, m, d = 20_000, 128, 2000, 32
    labels = torch.arange(many) % 10
    crd = ContrastiveRepresentationDistillation(D_S, D_T, many, labels, embed_dim=d, negatives=m)
    index = torch.arange(B)
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record,
    ):
        crd(_randn(B, D_S).requires_grad_(), _randn(B, D_T), labels[index], index).sum()
    assert sum(x.nbytes for x in {id(x): x for x in kept}.values()) < B * d * 64
    largest = max(event.cpu_memory_usage for event in record.events())
    assert 0 < largest <= 1 << 20
    more = [crd.estimate_bytes(many, d, rows, m) - crd.estimate_bytes(many, d, 0, m) for rows in (B, 100 * B)]
    assert more[1] - more[0] == 99 * B * d * 32


def test_training_backward_uses_the_banks_of_forward() -> None:
    training, still = _module(momentum=0.0), _module(momentum=0.0).eval()
    gradients = []
    for crd in (training, still):
        f_s, f_t, labels, index = _batch()
        f_s.requires_grad_()
        crd(f_s, f_t, labels, index).sum().backward()
        gradients.append(f_s.grad)
    torch.testing.assert_close(gradients[0], gradients[1])


def test_an_image_twice_in_a_batch_leaves_its_mean() -> None:
    crd = _module(momentum=0.5)
    index = torch.tensor([8, 3, 8])
    f_s, f_t = _randn(3, D_S), _randn(3, D_T, seed=1)
    old = crd.student_memory[8].double().numpy()
    crd(f_s, f_t, LABELS[index], index)
    e = _embed(crd.embed_student, f_s)
    np.testing.assert_allclose(crd.student_memory[8], _unit(0.5 * old + 0.5 * (e[0] + e[2]) / 2), atol=1e-6)


def test_training_lowers_the_loss_and_finds_the_pairs() -> None:
    crd = _module(embed_dim=16, negatives=64, temperature=0.2)
    f_t = _randn(N, D_T)
    f_s = f_t @ _randn(D_T, D_S, seed=1)  # the student sees the teacher's features through a map
    optimizer = torch.optim.Adam(crd.parameters(), 0.02)
    losses = []
    for step in range(60):
        index = torch.randperm(N, generator=torch.Generator().manual_seed(step))[:15]
        loss = crd(f_s[index], f_t[index], LABELS[index], index).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    e_s, e_t = _embed(crd.embed_student, f_s), _embed(crd.embed_teacher, f_t)
    scores = e_s @ e_t.T
    own, others = np.diag(scores).mean(), scores[LABELS.numpy()[:, None] != LABELS.numpy()].mean()
    assert own > others + 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast(dtype: torch.dtype) -> None:
    f_s, f_t, labels, index = _batch()
    f_s, f_t = f_s.to(dtype), f_t.to(dtype)
    exact = _module()(f_s.float(), f_t.float(), labels, index)
    assert torch.equal(_module()(f_s, f_t, labels, index), exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = _module()(f_s, f_t, labels, index)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.1, atol=0.1)
    lowered = _module().to(dtype)
    loss = lowered(f_s, f_t, labels, index)
    assert loss.dtype == torch.float32 and bool(torch.isfinite(loss).all())
    loss.sum().backward()
    assert lowered.student_memory.dtype == dtype and lowered.step.dtype == torch.int64


def test_huge_features_stay_finite() -> None:
    crd = _module(temperature=0.07)
    f_s, f_t, labels, index = _batch()
    f_s = (1e4 * f_s).requires_grad_()
    loss = crd(f_s, 1e4 * f_t, labels, index)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all()) and f_s.grad is not None and bool(torch.isfinite(f_s.grad).all())


def test_nan_is_shown_and_kept_out_of_the_memory() -> None:
    crd = _module()
    f_s, f_t, labels, index = _batch()
    f_t[2, 0] = math.nan
    old = crd.teacher_memory[index[2]].clone()
    assert bool(crd(f_s, f_t, labels, index)[2].isnan())
    assert bool(torch.isfinite(crd.student_memory).all() and torch.isfinite(crd.teacher_memory).all())
    assert torch.equal(crd.teacher_memory[index[2]], old)
    assert bool(torch.isfinite(crd(*_batch(seed=1))).all()) and bool(torch.isfinite(crd.log_z).all())


def test_every_setting_reaches_the_loss() -> None:
    batch = _batch()

    def losses(**changes: Any) -> Tensor:
        crd = _module(**changes)
        return torch.stack([crd(*batch), crd(*batch)]).detach()

    base = losses()
    for setting in ({"temperature": 0.5}, {"negatives": 12}, {"embed_dim": 5}, {"seed": 5}):
        assert float((losses(**setting)[0] - base[0]).abs().min()) > 1e-4, setting
    changed = losses(momentum=0.9)
    assert torch.equal(changed[0], base[0]) and float((changed[1] - base[1]).abs().min()) > 1e-4
    assert repr(_module()).startswith("ContrastiveRepresentationDistillation(\n  num_samples=30, embed_dim=6")


def test_two_classes_with_one_image_in_one() -> None:
    labels = torch.tensor([0, 1, 1, 1])
    crd = ContrastiveRepresentationDistillation(D_S, D_T, 4, labels, embed_dim=3, negatives=50)
    drawn = crd.draw_negatives(labels, torch.arange(4))
    assert set(drawn[0].tolist()) == {1, 2, 3} and set(drawn[1:].flatten().tolist()) == {0}
    assert bool(torch.isfinite(crd(_randn(4, D_S), _randn(4, D_T), labels, torch.arange(4))).all())


def test_memory_is_estimated_and_refused_before_it_is_taken() -> None:
    estimate = ContrastiveRepresentationDistillation.estimate_bytes
    crd = _module()
    held = sum(
        x.numel() * x.element_size() for k, x in crd.named_buffers() if k.endswith("memory") or k in ("order", "labels")
    )
    assert estimate(N, 6, 0, 11) == held
    # two banks of 1.28 million images in 128 dimensions
    assert estimate(1_281_167, 128, 0, 16384) == pytest.approx(1.33e9, rel=0.01)
    sizes = [estimate(1000, 128, B, 16384) for B in (0, 1, 64)]
    assert sizes == sorted(set(sizes))
    many = 10**12  # would be petabytes: the labels are not even looked at
    with pytest.raises(ArgumentError, match=r"memory banks for 1000000000000 images .* GiB, more than the 4\.00 GiB"):
        ContrastiveRepresentationDistillation(D_S, D_T, many, LABELS)
    with pytest.raises(ArgumentError, match=r"Lower embed_dim, or raise max_bytes"):
        _module(max_bytes=held - 1)
    tight = _module(max_bytes=estimate(N, 6, 4, 11))
    tight(*_batch(4))
    with pytest.raises(ArgumentError, match=r"a batch of 5 with 11 negatives .* negatives or the batch size"):
        tight(*_batch(5))


def test_bad_settings_are_refused() -> None:
    settings: list[dict[str, Any]] = [
        {"embed_dim": 0}, {"negatives": 0}, {"temperature": 0}, {"momentum": 1}, {"momentum": -0.1}, {"seed": 0.5},
        {"max_bytes": 0},
    ]  # fmt: skip
    for setting in settings:
        with pytest.raises(ArgumentError, match=f"{next(iter(setting))}: expected"):
            _module(**setting)
    for labels in (LABELS[:5], LABELS.double(), LABELS - 1, LABELS.tolist()):
        with pytest.raises(ArgumentError, match=r"labels: expected"):
            ContrastiveRepresentationDistillation(D_S, D_T, N, labels)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="at least 2 classes"):
        ContrastiveRepresentationDistillation(D_S, D_T, N, torch.full((N,), 3))
    with pytest.raises(ArgumentError, match="student_dim"):
        ContrastiveRepresentationDistillation(0, D_T, N, LABELS)


def test_bad_batches_are_refused() -> None:
    crd = _module()
    f_s, f_t, labels, index = _batch()
    for bad in (
        (f_s[:, :3], f_t, labels, index),
        (f_s, f_t[:2], labels, index),
        (f_s, f_t, labels[:2], index),
        (f_s, f_t, labels + 50, index),
        (f_s, f_t, labels, index[:2]),
        (f_s, f_t, labels, index.double()),
        (f_s, f_t, labels, index + N),
        (f_s, f_t, labels, index - N),
        (f_s, f_t, labels, None),
        (f_s[:0], f_t[:0], labels[:0], index[:0]),
    ):
        with pytest.raises(ArgumentError, match=r"expected .*but got"):
            crd(*bad)
    wrong = (index + 1) % N  # another image's number
    with pytest.raises(ArgumentError, match=r"index: image \d+ has label \d, but row 0 came with label \d"):
        crd(f_s, f_t, labels, wrong)
    for scores in (torch.zeros(3, 1), torch.zeros(3)):
        with pytest.raises(ArgumentError, match="scores: expected"):
            nce_loss(scores, 5)
