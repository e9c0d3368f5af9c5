from __future__ import annotations

import pytest
import torch

from tests.compare import (
    TOLERANCE,
    assert_close_to_float64,
    assert_same_bits,
    difference,
    error_ratio,
    gradients,
    to_float64,
)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_tolerance_scales_with_the_value(dtype):
    oracle = torch.linspace(-1, 1, 101, dtype=torch.float64) * 1e4
    near, far = oracle * (1 + 0.9 * TOLERANCE[dtype]), oracle * (1 + 5 * TOLERANCE[dtype])
    assert difference(near, oracle, dtype) is None
    assert "differ" in difference(far, oracle, dtype)


def test_names_what_differs():
    oracle = {"h": torch.zeros(2, 3, dtype=torch.float64), "c": torch.ones(3, dtype=torch.float64)}
    wrong = {"h": torch.zeros(2, 3), "c": torch.ones(3)}
    wrong["c"][1] = 1.5
    with pytest.raises(AssertionError, match=r"'c'.*1 of 3 elements differ; worst at \[1\]: expected 1, got 1.5"):
        assert_close_to_float64(wrong, oracle)


def test_nan_and_infinity_must_match():
    oracle = torch.tensor([float("nan"), float("inf"), 1.0], dtype=torch.float64)
    assert difference(oracle.float(), oracle) is None
    for place, value in ((0, 1.0), (1, float("-inf")), (2, float("nan")), (2, float("inf"))):
        wrong = oracle.float()
        wrong[place] = value
        assert "1 of 3" in difference(wrong, oracle)


def test_overflow_of_the_dtype_is_expected():
    oracle = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert difference(oracle.float(), oracle) is None


def test_shapes_and_counts():
    assert "expected shape [2]" in difference(torch.zeros(3), torch.zeros(2).double())
    with pytest.raises(AssertionError, match="expected 2 tensors, got 1"):
        assert_close_to_float64([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)])


def test_same_bits():
    a = torch.tensor([1.0, float("nan")])
    assert_same_bits([a], [a.clone()])
    with pytest.raises(AssertionError, match="1 of 2"):
        assert_same_bits(a, a + torch.tensor([1e-7, 0.0]))


def test_error_ratio():
    oracle = torch.randn(1000, dtype=torch.float64)
    stock = (oracle + 1e-5 * torch.randn(1000).double()).float()
    ours = (oracle + 3 * (stock.double() - oracle)).float()
    ratio = error_ratio(ours, stock, oracle)
    assert 2.9 < ratio.largest < 3.1
    assert 2.9 < ratio.mean < 3.1
    assert not ratio.within_bars
    assert error_ratio(oracle.float(), oracle.float(), oracle).within_bars


def test_an_exact_stock_result_does_not_make_rounding_a_failure():
    oracle = torch.full((8,), 1 / 3, dtype=torch.float64)
    assert error_ratio(oracle.float(), oracle.float(), oracle).largest == 1.0


def test_gradients_share_their_direction_across_dtypes():
    x = torch.randn(5, requires_grad=True)
    assert_close_to_float64(gradients(x.sin(), [x]), gradients((y := to_float64(x)).sin(), [y]))


def test_memory_is_poisoned():
    assert torch.empty(4).isnan().all()
    assert torch.randn(3).new_empty(7, dtype=torch.bfloat16).isnan().all()
