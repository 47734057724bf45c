from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krdistill.errors import ArgumentError
from krdistill.rectify import correct_errors, errors

LOGITS = torch.tensor(
    [
        [3.0, 1.0, 2.0],  # label 0: right
        [3.0, 1.0, 2.0],  # label 1: wrong
        [2.0, 2.0, 0.0],  # label 1: ties with the largest, so right
        [0.0, 5.0, 5.0],  # label 0: wrong, two winners
    ]
)
LABELS = torch.tensor([0, 1, 1, 0])


def _loop(logits: list[float], label: int, mode: str) -> list[float]:
    row = list(logits)
    top = max(row)
    if row[label] == top or mode == "none":
        return row
    if mode == "swap":
        row[row.index(top)] = row[label]
    row[label] = top
    return row


def test_hand_computed() -> None:
    assert errors(LOGITS, LABELS).tolist() == [False, True, False, True]
    assert correct_errors(LOGITS, LABELS).tolist()[1] == [3.0, 3.0, 2.0]
    assert correct_errors(LOGITS, LABELS, "swap").tolist()[1] == [1.0, 3.0, 2.0]
    assert correct_errors(LOGITS, LABELS, "none") is LOGITS
    lifted, swapped = correct_errors(LOGITS, LABELS, "lift")[3], correct_errors(LOGITS, LABELS, "swap")[3]
    assert lifted.tolist() == [5.0, 5.0, 5.0]
    assert swapped[0] == 5 and sorted(swapped.tolist()) == [0.0, 5.0, 5.0]


@given(st.integers(2, 6), st.integers(0, 2**31), st.sampled_from(["lift", "swap", "none"]))
@settings(max_examples=60, deadline=None)
def test_against_a_loop(K: int, seed: int, mode: str) -> None:
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(9, K, generator=g), torch.randint(0, K, (9,), generator=g)
    got = correct_errors(z, y, mode)  # type: ignore[arg-type]
    assert got.tolist() == [_loop(row, int(label), mode) for row, label in zip(z.tolist(), y, strict=True)]
    if mode != "none":
        assert not errors(got, y).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["lift", "swap"])
def test_right_rows_stay_bit_for_bit_and_the_input_is_untouched(dtype: torch.dtype, mode: str) -> None:
    g = torch.Generator().manual_seed(0)
    z = torch.randn(200, 4, generator=g).to(dtype)
    z[0] = torch.tensor([-0.0, 0.0, -1.0, -2.0])
    y = torch.randint(0, 4, (200,), generator=g)
    y[0] = 0
    copy = z.clone()
    got = correct_errors(z, y, mode)  # type: ignore[arg-type]
    assert got.dtype == dtype and torch.equal(z, copy)
    right = ~errors(z, y)
    assert 0 < int(right.sum()) < 200
    assert torch.equal(got[right], z[right])
    assert torch.equal(torch.signbit(got[right]), torch.signbit(z[right]))
    if mode == "swap":
        assert torch.equal(got.sort(1).values, z.sort(1).values)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_any_integer_labels(dtype: torch.dtype) -> None:
    assert errors(LOGITS, LABELS.to(dtype)).tolist() == [False, True, False, True]


def test_bad_input_is_refused() -> None:
    with pytest.raises(ArgumentError, match="mode: expected one of 'lift', 'swap', 'none', but got 'raise'"):
        correct_errors(LOGITS, LABELS, "raise")  # type: ignore[arg-type]
    for function in (errors, correct_errors):
        with pytest.raises(ArgumentError, match=r"class indices in 0\.\.2, but got 3"):
            function(LOGITS, LABELS + 2)
        with pytest.raises(ArgumentError, match=r"but got -1"):
            function(LOGITS, LABELS - 1)
        with pytest.raises(ArgumentError, match="labels: expected an integer tensor of shape"):
            function(LOGITS, LABELS[:2])
        with pytest.raises(ArgumentError, match="dtype bool"):
            function(LOGITS, LABELS.bool())
        with pytest.raises(ArgumentError, match="at least 2 classes"):
            function(LOGITS[:, :1], LABELS)
