from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krdistill.rng import derive_seed, generator, uniform


def _splitmix_reference(base: int, counter: int) -> float:
    """SplitMix64's finaliser twice over, in Python integers."""
    mask = (1 << 64) - 1
    x = (counter * 0x9E3779B97F4A7C15 + base) & mask
    for _ in range(2):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return (x >> 40) / 2**24


def test_uniform_equals_integer_reference() -> None:
    index = torch.tensor([0, 1, 7, 49_999])
    got = uniform(3, "crop", 5, index, 3)
    base = (derive_seed(3, "crop", 5) << 1) & ((1 << 64) - 1)
    for row, i in enumerate(index.tolist()):
        for d in range(3):
            assert got[row, d].item() == pytest.approx(_splitmix_reference(base, i * 3 + d), abs=0)


def test_uniform_depends_on_nothing_but_its_arguments() -> None:
    whole = uniform(0, "flip", 2, torch.arange(100), 2)
    assert torch.equal(whole[37:40], uniform(0, "flip", 2, torch.arange(37, 40), 2))
    for other in (
        uniform(1, "flip", 2, torch.arange(100), 2),
        uniform(0, "crop", 2, torch.arange(100), 2),
        uniform(0, "flip", 3, torch.arange(100), 2),
    ):
        assert not torch.equal(whole, other)
        assert abs(torch.corrcoef(torch.stack([whole.flatten(), other.flatten()]))[0, 1]) < 0.25


def test_uniform_is_uniform() -> None:
    values = uniform(0, "a", 0, torch.arange(20_000), 2)
    assert values.min() >= 0 and values.max() < 1
    counts = torch.histc(values, bins=20, min=0, max=1).double()
    chi2 = ((counts - 2000) ** 2 / 2000).sum()
    assert chi2 < 50  # 19 degrees of freedom: p about 1e-4
    assert abs(torch.corrcoef(values.T)[0, 1]) < 0.03


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.text(max_size=8), st.integers(0, 10_000))
def test_derived_seeds_are_valid_for_torch(seed: int, name: str, number: int) -> None:
    value = derive_seed(seed, name, number)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, name, number)
    generator(seed, name, number)


def test_generator_leaves_the_global_one_alone() -> None:
    before = torch.random.get_rng_state()
    torch.randperm(10, generator=generator(0, "order", 1))
    assert torch.equal(before, torch.random.get_rng_state())
