"""Random cases for the operators (hypothesis). Every case is one that stock accepts, backward included.

Pool windows entirely in the padding (possible with a dilated pool) are left out: there stock's backward writes to an
element outside of the window's row. test_odd_cases.py tests them apart.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from reference import LAYOUTS, pooled_size


@dataclasses.dataclass(frozen=True)
class ConvCase:
    input: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool
    options: dict[str, Any]
    dtype: torch.dtype
    layouts: tuple[str, str, str]  # of input, weight and grad_output
    seed: int

    def operands(self, make, device="cpu"):
        """`make(*shape, dtype=, device=)` gives the values, `layouts` the strides."""
        torch.manual_seed(self.seed)
        x = LAYOUTS[self.layouts[0]](make(*self.input, dtype=self.dtype, device=device))
        w = LAYOUTS[self.layouts[1]](make(*self.weight, dtype=self.dtype, device=device))
        b = make(self.weight[0], dtype=self.dtype, device=device) if self.bias else None
        return [x, w, b]

    def grad_output(self, output: torch.Tensor, make):
        """A gradient for an output of this shape; "expanded" is what `output.sum().backward()` sends, stride 0."""
        if self.layouts[2] == "expanded":
            return make(*output.shape[:1], *[1] * (output.dim() - 1), dtype=self.dtype).expand(output.shape)
        return LAYOUTS[self.layouts[2]](make(*output.shape, dtype=self.dtype))


def _pairs(values):
    """One int for both directions, or a pair."""
    return st.one_of(values, st.tuples(values, values))


def _at(value, i: int) -> int:
    return value if isinstance(value, int) else value[i]


@st.composite
def conv_cases(draw, dtypes=(torch.float32, torch.float64)) -> ConvCase:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    # Output channels around the vector widths, so that full vectors and remainders both occur.
    out_channels = groups * draw(st.one_of(st.integers(1, 6), st.sampled_from([8, 15, 16, 17, 33])))
    in_channels = draw(st.integers(1, 5))
    kernel = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    dilation = draw(_pairs(st.sampled_from([1, 1, 1, 2, 3])))
    stride = draw(_pairs(st.sampled_from([1, 1, 1, 2, 3])))
    padding = draw(st.one_of(_pairs(st.integers(0, 3)), st.just("valid"), st.just("same")))
    if padding == "same":
        stride = 1
    pool_kernel = draw(st.one_of(st.just(2), _pairs(st.integers(1, 4))))
    pool_stride = draw(st.one_of(st.none(), st.none(), _pairs(st.integers(1, 3))))
    pool_dilation = draw(_pairs(st.sampled_from([1, 1, 1, 2])))
    ceil_mode = draw(st.booleans())

    batch = draw(st.sampled_from([(), (0,), (1,), (2,), (3,), (17,)]))
    margins = st.integers(0, 7) if batch == (17,) else st.one_of(st.integers(0, 7), st.sampled_from([15, 16, 29]))

    size, pool_padding = [], []
    for i in (0, 1):
        reach = _at(dilation, i) * (kernel[i] - 1) + 1
        around = reach - 1 if padding == "same" else 0 if padding == "valid" else 2 * _at(padding, i)
        pool_reach = _at(pool_dilation, i) * (_at(pool_kernel, i) - 1) + 1
        step = _at(pool_kernel if pool_stride is None else pool_stride, i)
        margin = draw(margins)
        # Without padding the pool always finds a value in each window, so the second round always ends the loop.
        for pad in (draw(st.integers(0, _at(pool_kernel, i) // 2)), 0):
            # The smallest convolution whose pool has an output, then the margin: some rows wider than a vector.
            smallest = max(1, pool_reach - 2 * pad)
            in_size = max(1, (smallest - 1) * _at(stride, i) + reach - around) + margin
            conv_size = (in_size + around - reach) // _at(stride, i) + 1
            count = pooled_size(conv_size, _at(pool_kernel, i), step, pad, _at(pool_dilation, i), ceil_mode)
            starts = [o * step - pad for o in range(count)]
            if all(any(0 <= at < conv_size for at in range(s, s + pool_reach, _at(pool_dilation, i))) for s in starts):
                break
        size.append(in_size)
        pool_padding.append(pad)
    names = list(LAYOUTS)
    return ConvCase(
        input=(*batch, groups * in_channels, *size),
        weight=(out_channels, in_channels, *kernel),
        bias=draw(st.booleans()),
        options={
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": groups,
            "pool_kernel_size": pool_kernel,
            "pool_stride": pool_stride,
            "pool_padding": tuple(pool_padding),
            "pool_dilation": pool_dilation,
            "ceil_mode": ceil_mode,
        },
        dtype=draw(st.sampled_from(dtypes)),
        layouts=(
            draw(st.sampled_from(names)),
            draw(st.sampled_from(names)),
            draw(st.sampled_from([*names, "expanded"])),
        ),
        seed=draw(st.integers(0, 2**16)),
    )
