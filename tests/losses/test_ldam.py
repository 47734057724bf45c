from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from krdistill.errors import ArgumentError, DataError
from krdistill.losses.cross_entropy import cross_entropy
from krdistill.losses.ldam import LDAM, NormedLinear, ldam_loss, ldam_margins
from krdistill.priors import effective_number_weights

COUNTS = [500, 120, 40, 9, 2]


def _case(B: int = 9, K: int = 5, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    cosines = 2 * torch.rand(B, K, generator=gen, dtype=torch.float64) - 1
    margins = 0.5 * torch.rand(K, generator=gen, dtype=torch.float64)
    return cosines, torch.randint(0, K, (B,), generator=gen), margins


def _reference(z: Tensor, y: Tensor, margins: Tensor, scale: float, weights: np.ndarray | None = None) -> np.ndarray:
    out = []
    for row, label in zip(z.double().numpy().copy(), y.tolist(), strict=True):
        row[label] -= float(margins[label])
        row *= scale
        loss = row.max() + math.log(np.exp(row - row.max()).sum()) - row[label]
        out.append(loss if weights is None else loss * weights[label])
    return np.array(out)


def test_margins() -> None:
    """16 times fewer images, twice the margin."""
    margins = ldam_margins([160, 10, 10], max_margin=0.5)
    torch.testing.assert_close(margins, torch.tensor([0.25, 0.5, 0.5], dtype=torch.float64))
    n = np.array(COUNTS, dtype=float)
    raw = 1 / np.sqrt(np.sqrt(n))
    np.testing.assert_allclose(ldam_margins(COUNTS, max_margin=0.3).numpy(), raw * 0.3 / raw.max(), rtol=1e-14)


@pytest.mark.parametrize(("B", "K"), [(9, 5), (1, 2), (3, 8142)])
@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_value(B: int, K: int, scale: float) -> None:
    z, y, margins = _case(B, K)
    loss = ldam_loss(z, y, margins, scale=scale)
    assert loss.shape == (B,) and loss.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), _reference(z, y, margins, scale), rtol=1e-10, atol=1e-12)
    w = torch.rand(K, generator=torch.Generator().manual_seed(1))
    weighted = ldam_loss(z, y, margins, scale=scale, class_weights=w)
    np.testing.assert_allclose(
        weighted.numpy(), _reference(z, y, margins, scale, w.double().numpy()), rtol=1e-10, atol=1e-12
    )


def test_by_hand() -> None:
    """Equal cosines, margin (log 3) / s: the true class has probability 1/4."""
    loss = ldam_loss(torch.zeros(1, 2).double(), torch.tensor([1]), torch.tensor([0.0, math.log(3) / 10]), scale=10)
    assert float(loss) == pytest.approx(math.log(4), rel=1e-6)


def test_no_margin_is_scaled_cross_entropy_and_equal_counts_give_one_margin() -> None:
    z, y, _ = _case()
    torch.testing.assert_close(LDAM([7] * 5, max_margin=0)(z, y), cross_entropy(30 * z, y))
    margins = LDAM([7] * 5).margins
    torch.testing.assert_close(margins, torch.full((5,), 0.5))
    torch.testing.assert_close(LDAM([7] * 5)(z, y, progress=1.0), LDAM([7] * 5)(z, y))


def test_re_weighting_is_deferred_to_a_share_of_the_run() -> None:
    z, y, _ = _case()
    module = LDAM(COUNTS)
    early, late = module(z, y), module(z, y, progress=0.8)
    n = np.array(COUNTS, dtype=float)
    weights = effective_number_weights(COUNTS).numpy()
    weights = weights * n.sum() / (weights * n).sum()
    margins = ldam_margins(COUNTS)
    np.testing.assert_allclose(early.numpy(), _reference(z, y, margins, 30.0), rtol=1e-5)
    np.testing.assert_allclose(late.numpy(), _reference(z, y, margins, 30.0, weights), rtol=1e-5)
    assert torch.equal(module(z, y, progress=0.7999), early) and torch.equal(module(z, y, progress=1.0), late)
    for epochs in (5, 30, 200, 400):  # the switch is exact at any length, beyond twice the paper's too
        switched = [not torch.equal(module(z, y, progress=e / epochs), early) for e in range(epochs)]
        assert switched.index(True) == epochs * 4 // 5
    assert torch.equal(LDAM(COUNTS, drw_from=None)(z, y, progress=1.0), early)
    assert torch.equal(LDAM(COUNTS, drw_from=0.0)(z, y), late)


def test_weights_have_mean_one_over_the_training_images() -> None:
    """So that the mean over the training set is the authors' weighted mean."""
    y = torch.repeat_interleave(torch.tensor(COUNTS))
    z, _, _ = _case(len(y))
    module = LDAM(COUNTS, drw_from=0.0, beta=0.999)
    assert float(module.class_weights[y].double().mean()) == pytest.approx(1, rel=1e-6)
    shifted = 30 * (z - nn.functional.one_hot(y, 5) * ldam_margins(COUNTS))
    authors = nn.functional.cross_entropy(shifted, y, weight=effective_number_weights(COUNTS, 0.999))
    torch.testing.assert_close(module(z, y).mean(), authors, rtol=1e-5, atol=0)


def test_every_parameter_changes_the_loss() -> None:
    z, y, _ = _case()
    for progress in (0.0, 0.9):
        base = LDAM(COUNTS)(z, y, progress)
        changed = [LDAM(COUNTS, max_margin=0.4), LDAM(COUNTS, scale=20), LDAM(COUNTS[::-1])]
        if progress:
            changed += [LDAM(COUNTS, drw_from=0.95), LDAM(COUNTS, beta=0.9)]
        for other in changed:
            assert not torch.allclose(other(z, y, progress), base)


def test_invariant_to_shifts_and_gradients() -> None:
    z, y, margins = _case(4)
    torch.testing.assert_close(ldam_loss(z + 9, y, margins, scale=1), ldam_loss(z, y, margins, scale=1))
    assert torch.autograd.gradcheck(lambda x: ldam_loss(x, y, margins), (0.9 * z).requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    z, y, margins = _case()
    loss = ldam_loss(z.to(dtype), y, margins)
    assert loss.dtype == torch.float32
    np.testing.assert_allclose(loss.numpy(), _reference(z.to(dtype), y, margins, 30.0), rtol=1e-4, atol=1e-5)


def test_logits_of_an_ordinary_head_take_scale_one() -> None:
    z = torch.tensor([[1e4, -1e4]], requires_grad=True)
    with pytest.raises(ArgumentError, match="NormedLinear head, or use scale=1"):
        LDAM([9, 1])(z, torch.tensor([1]))
    loss = LDAM([9, 1], scale=1)(z, torch.tensor([1]))
    assert loss.item() == pytest.approx(2e4 + 0.5)
    loss.sum().backward()
    torch.testing.assert_close(z.grad, torch.tensor([[1.0, -1.0]]))
    ldam_loss(torch.tensor([[1.004, -1.0]], dtype=torch.bfloat16), torch.tensor([0]), torch.zeros(2))  # rounding


def test_normed_linear_gives_cosines() -> None:
    torch.manual_seed(0)
    head = NormedLinear(6, 4).double()
    torch.testing.assert_close(head.weight.norm(dim=1), torch.ones(4).double(), rtol=1e-6, atol=0)
    f = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():
        head.weight.mul_(torch.tensor([[0.1], [1.0], [3.0], [9.0]]))
    expected = nn.functional.cosine_similarity(f.unsqueeze(1), head.weight.unsqueeze(0), dim=2)
    torch.testing.assert_close(head(f), expected)
    torch.testing.assert_close(head(5 * f), expected)
    assert torch.autograd.gradcheck(head, f.clone().requires_grad_())
    assert isinstance(head, nn.Linear) and head.bias is None and "scale=1.0" in repr(head)
    assert head(f.half()).dtype == torch.float64 and bool((head(torch.zeros(2, 6).double()) == 0).all())


def test_a_scaled_head_with_scale_one_is_the_same_loss() -> None:
    torch.manual_seed(0)
    head, scaled = NormedLinear(6, 5), NormedLinear(6, 5, scale=30)
    scaled.load_state_dict(head.state_dict())
    f, y = torch.randn(7, 6), torch.arange(7) % 5
    torch.testing.assert_close(
        LDAM(COUNTS, scale=1, max_margin=15)(scaled(f), y), LDAM(COUNTS)(head(f), y), rtol=1e-5, atol=1e-5
    )


def test_head_and_loss_learn_together() -> None:
    torch.manual_seed(0)
    centres = torch.randn(3, 8)
    y = torch.repeat_interleave(torch.tensor([60, 20, 5]))
    f = centres[y] + 0.3 * torch.randn(len(y), 8)
    head, loss = NormedLinear(8, 3), LDAM([60, 20, 5])
    optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
    for step in range(60):
        optimizer.zero_grad()
        loss(head(f), y, step / 60).mean().backward()
        optimizer.step()
    assert bool((head(f).argmax(1) == y).all())


def test_module_keeps_its_constants_in_the_state_and_moves_them() -> None:
    module = LDAM(COUNTS)
    assert set(module.state_dict()) == {"margins", "class_weights"}
    assert module.margins.dtype == module.class_weights.dtype == torch.float32
    assert "drw_from=0.8" in repr(module)
    module.to("meta")
    assert module.margins.device.type == module.class_weights.device.type == "meta"


def test_bad_input() -> None:
    z, y, margins = _case()
    for arguments, match in (
        ((z[0], y, margins), "cosines"),
        ((z, y + 5, margins), "labels"),
        ((z, y, margins[:2]), "margins"),
        ((z, y, -margins), "margins"),
    ):
        with pytest.raises(ArgumentError, match=match):
            ldam_loss(*arguments)
    with pytest.raises(ArgumentError, match="class_weights"):
        ldam_loss(z, y, margins, class_weights=-margins)
    for options, match in (
        ({"max_margin": -1}, "max_margin"),
        ({"scale": 0}, "scale"),
        ({"drw_from": 160}, "drw_from"),
        ({"beta": 1.0}, "beta"),
    ):
        with pytest.raises(ArgumentError, match=match):
            LDAM(COUNTS, **options)
    with pytest.raises(ArgumentError, match="progress"):
        LDAM(COUNTS)(z, y, progress=161)
    with pytest.raises(DataError, match="no training image"):
        LDAM([4, 0])
    with pytest.raises(ArgumentError, match="out_features"):
        NormedLinear(4, 1)
    with pytest.raises(ArgumentError, match="features"):
        NormedLinear(4, 3)(torch.zeros(2, 5))
