"""How answers are written: what comes back, how exactly, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from krdistill.bank.coding import Coding
from krdistill.errors import ArgumentError, ModelError
from krdistill.outputs import Outputs


def _answers(B: int = 64, K: int = 20, D: int = 7, scale: float = 6.0, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    return Outputs(
        torch.randn(B, K, generator=generator) * scale + 100.0, torch.randn(B, D, generator=generator).relu()
    )


@pytest.mark.parametrize("dim", [0, 7])
def test_float32_comes_back_to_rounding(dim: int) -> None:
    given = _answers(D=dim)
    back = Coding(20, dim, "float32").decode(Coding(20, dim, "float32").encode(given))
    assert torch.allclose(back.logits, given.logits, atol=1e-4, rtol=0)
    assert torch.equal(back.feature, given.feature)


def test_float16_is_off_by_a_part_in_2048_of_the_distance_to_the_peak() -> None:
    given = _answers()
    back = Coding(20, 7).decode(Coding(20, 7).encode(given))
    distance = given.logits.amax(1, keepdim=True) - given.logits
    assert ((back.logits - given.logits).abs() <= distance / 2048 + 1e-4).all()
    assert torch.equal(back.logits.argmax(1), given.logits.argmax(1))
    assert torch.allclose(back.feature, given.feature, rtol=1 / 2048, atol=1e-7)
    p, q = given.logits.softmax(1), back.logits.softmax(1)
    assert (p - q).abs().max() < 2e-3


def test_top_k_keeps_the_kept_probabilities_and_shares_the_rest_evenly() -> None:
    given = _answers(K=20)
    coding = Coding(20, 0, "float32", top_k=5)
    back = coding.decode(coding.encode(given)).logits.double().softmax(1).numpy()
    z = given.logits.double().numpy()
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for row in range(len(z)):
        top = np.argsort(-z[row])[:5]
        rest = np.setdiff1d(np.arange(20), top)
        assert np.allclose(back[row, top], p[row, top], atol=1e-6)
        assert np.allclose(back[row, rest], p[row, rest].sum() / 15, atol=1e-6)


def test_bytes_of_a_row_by_hand() -> None:
    assert Coding(100, 64).row_bytes == 4 + 2 * 100 + 2 * 64
    assert Coding(100, 64, "float32").row_bytes == 4 + 4 * 100 + 4 * 64
    assert Coding(8142, 0, top_k=32).row_bytes == 4 + 2 * 32 + 4 * 32 + 4
    for coding in (Coding(100, 64), Coding(30, 0, top_k=3)):
        arrays = coding.encode(_answers(B=5, K=coding.num_classes, D=coding.feature_dim))
        assert sum(a.nbytes for a in arrays.values()) == 5 * coding.row_bytes
        assert list(arrays) == list(coding.fields)


def test_huge_logits_and_sharp_answers_survive() -> None:
    logits = torch.tensor([[1e4, 0.0, -1e4], [3e38, 3e38, 0.0]])[:1]
    back = Coding(3, 0).decode(Coding(3, 0).encode(Outputs(logits, torch.zeros(1, 0))))
    assert torch.allclose(back.logits, logits, rtol=1e-3)


@pytest.mark.parametrize("k", [0, 20, 25])
def test_top_k_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ArgumentError, match=rf"from 1 to 19 for 20 classes, got {k}"):
        Coding(20, 0, top_k=k)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o._replace(feature=o.feature + 1e5), r"features reach 1e\+05, too large for float16"),
        (lambda o: o._replace(logits=o.logits * torch.nan), "not finite numbers"),
        (lambda o: o._replace(feature=o.feature / 0), "not finite numbers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ModelError, match=message):
        Coding(20, 7).encode(change(_answers()))
