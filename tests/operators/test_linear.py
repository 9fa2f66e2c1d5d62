"""linear and linear_relu against stock in float64: values and gradients, any leading dimensions, any strides."""

from __future__ import annotations

import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import LAYOUTS, assert_accurate, assert_equal, assert_exact, integers, run, to64

from lenet_ext import functional

pytestmark = pytest.mark.kernels

FUNCTIONS = ["linear", "linear_relu"]
# Around vector widths and register blocks; 400, 120, 84, 10 are LeNet's.
SIZES = st.one_of(st.integers(1, 20), st.sampled_from([0, 31, 32, 33, 63, 64, 65, 84, 120, 400]))
LEADING = st.one_of(
    st.tuples(st.integers(0, 40)),
    st.just(()),
    st.tuples(st.integers(1, 3), st.integers(0, 5)),
    st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 4)),
)
LAYOUT = st.sampled_from(["contiguous", "sliced", "every_other", "batch_last", "misaligned"])


def _laid_out(layout: str, t: torch.Tensor) -> torch.Tensor:
    return LAYOUTS[layout](t) if t.dim() else t


def _signs(*shape, dtype=torch.float32, device="cpu"):
    return integers(*shape, low=-1, high=1, dtype=dtype, device=device)


@pytest.mark.parametrize("name", FUNCTIONS)
@given(
    leading=LEADING,
    k=SIZES,
    n=SIZES,
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    layouts=st.tuples(LAYOUT, LAYOUT, LAYOUT),
    expanded=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_small_integers_are_exact(device, name, leading, k, n, bias, dtype, layouts, expanded, seed):
    torch.manual_seed(seed)
    x = _laid_out(layouts[0], _signs(*leading, k, dtype=dtype, device=device))
    w = _laid_out(layouts[1], _signs(n, k, dtype=dtype, device=device))
    b = _signs(n, dtype=dtype, device=device) if bias else None
    g = _signs(1, dtype=dtype).expand(*leading, n) if expanded else _signs(*leading, n, dtype=dtype)
    g = g if expanded else _laid_out(layouts[2], g)
    if k == 0:  # stock's product over nothing is uninitialised memory in some cases: the sum of nothing is 0
        out = getattr(functional, name)(x, w, b)
        want = torch.zeros(*leading, n, dtype=dtype, device=device) + (0 if b is None else b)
        assert_equal(out, want.relu() if name == "linear_relu" else want, "output")
        return
    assert_exact(getattr(functional, name), getattr(reference, name), [x, w, b], {}, g)


def _magnitudes(name, tensors, grad_output) -> reference.Result:
    x, w, b = to64(tensors)
    if name == "linear_relu":
        grad_output = grad_output * (torch.nn.functional.linear(x, w, b) > 0)
    absolute = [None if t is None else t.abs() for t in (x, w, b)]
    return run(torch.nn.functional.linear, absolute, {}, grad_output.double().abs())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
@given(leading=LEADING, k=SIZES.filter(bool), n=SIZES, bias=st.booleans(), seed=st.integers(0, 2**16))
def test_random_values_are_accurate(device, name, dtype, leading, k, n, bias, seed):
    torch.manual_seed(seed)
    tensors = [torch.rand(s, dtype=torch.float64) * 2 - 1 for s in [(*leading, k), (n, k), (n,)]]
    tensors = [t.to(device, dtype) for t in tensors][: 3 if bias else 2] + [None] * (not bias)
    # bfloat16: the float64 reference below starts from the same rounded operands.
    before = torch.nn.functional.linear(*to64(tensors))
    grad_output = (torch.rand(before.shape) * 2 - 1) * (before.abs() > (0.3 if dtype == torch.bfloat16 else 1e-4))
    grad_output = grad_output.to(dtype)  # rounded once, so that ours and the yardstick get the same
    actual = run(getattr(functional, name), tensors, {}, grad_output)
    stock = run(getattr(reference, name), tensors, {}, grad_output)
    expected = run(getattr(reference, name), to64(tensors), {}, grad_output)
    magnitude = _magnitudes(name, tensors, grad_output)
    for (what, a), (_, s), (_, e), (_, m) in zip(
        actual.items(), stock.items(), expected.items(), magnitude.items(), strict=True
    ):
        if e is None:
            assert a is None, what
        else:
            assert a.dtype == dtype
            assert_accurate(a, e, m, what, stock=s)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 2, 7, 64, 300])
@pytest.mark.parametrize(("k", "n"), [(400, 120), (120, 84), (84, 10), (1000, 3), (3, 1000)])
def test_layers_of_real_nets_are_exact(device, name, batch, k, n, dtype):
    tensors = [_signs(*s, dtype=dtype, device=device) for s in [(batch, k), (n, k), (n,)]]
    assert_exact(getattr(functional, name), getattr(reference, name), tensors, {}, _signs(batch, n, dtype=dtype))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_transposed_weight(device, name):
    """Tied weights: nn.Linear(k, n) and its transpose share memory."""
    x, w = _signs(5, 33, device=device), _signs(33, 17, device=device).t()
    assert_exact(getattr(functional, name), getattr(reference, name), [x, w, None], {}, _signs(5, 17))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bias", [(1,), (), (2, 3), (1, 3)], ids=str)
def test_stock_broadcasts_its_bias(device, name, bias):
    """Not in the documentation of F.linear, but in its behaviour."""
    tensors = [_signs(*s, device=device) for s in [(2, 5), (3, 5), bias]]
    assert_exact(getattr(functional, name), getattr(reference, name), tensors, {}, _signs(2, 3))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("leading", [(4,), (2, 3), ()], ids=str)
def test_stock_takes_a_vector_as_weight(device, name, leading):
    tensors = [_signs(*leading, 5, device=device), _signs(5, device=device), None]
    assert_exact(getattr(functional, name), getattr(reference, name), tensors, {}, _signs(*leading))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.int64], ids=str)
def test_dtypes_without_a_kernel_go_through_stock(name, dtype):
    tensors = [integers(*s).to(dtype) for s in [(4, 5), (3, 5), (3,)]]
    assert_equal(getattr(functional, name)(*tensors), getattr(reference, name)(*tensors), "output")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_inference_and_training_agree(device, name):
    for batch in (0, 1, 3, 50):
        x, w, b = _signs(batch, 65, device=device), _signs(33, 65, device=device), _signs(33, device=device)
        with torch.inference_mode():
            inference = getattr(functional, name)(x, w, b)
        assert_equal(inference, getattr(functional, name)(x, w.requires_grad_(), b), f"output at batch {batch}")


def test_long_sums_keep_their_accuracy(device):
    """100 000 terms: naive float32 summation would lose a digit to stock."""
    x, w = (torch.rand(3, 100_000, dtype=torch.float64, device=device) for _ in range(2))
    ours = functional.linear(x.float(), w.float())
    stock = torch.nn.functional.linear(x.float(), w.float())
    expected = torch.nn.functional.linear(x.float().double(), w.float().double())
    assert_accurate(ours, expected.cpu(), expected.cpu(), "output", stock=stock)


@pytest.mark.parametrize("name", ["linear", "linear_relu"])
def test_gradients_of_a_layer_without_inputs(name):
    """With in_features == 0 the output is the bias, and its gradient is still the sum of the output's."""
    gradients = []
    for function in (getattr(functional, name), getattr(reference, name)):
        tensors = [t.requires_grad_() for t in (torch.empty(3, 0), torch.empty(4, 0), torch.ones(4))]
        function(*tensors).sum().backward()
        gradients.append([t.grad for t in tensors])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 3, 6, 40])
def test_a_sum_of_nothing_is_the_bias(device, name, bias, rows):
    """Without input features the kernels have nothing to add up, and still an output to write."""
    ones = torch.ones(4096, device=device)  # so that memory handed out again does not happen to be zero
    del ones
    b = torch.tensor([2.0, -1.0, 0.0], device=device) if bias else None
    output = getattr(functional, name)(torch.ones(rows, 0, device=device), torch.ones(3, 0, device=device), b)
    expected = getattr(reference, name)(torch.ones(rows, 0), torch.ones(3, 0), None if b is None else b.cpu())
    assert_equal(output.cpu(), expected, "output")


@pytest.mark.parametrize("rows", [64, 4096])
def test_the_gradient_of_bias_is_accurate_for_many_rows(device, rows):
    """Terms of one sign: added one after the other, 4096 of them are 10 epsilons and more away."""
    torch.manual_seed(0)
    bias, grad_output = torch.zeros(70, device=device), torch.rand(rows, 70, device=device)
    x, w = torch.ones(rows, 3, device=device), torch.ones(70, 3, device=device)
    grad_bias = run(functional.linear, [x, w, bias], {}, grad_output).grads[2].double()
    exact = grad_output.double().sum(0)
    error = ((grad_bias - exact) / exact).abs().max() / torch.finfo(torch.float32).eps
    assert error < (1.5 if rows == 64 else 4)
