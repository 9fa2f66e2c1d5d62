"""The fused operations as functions, in the style of ``torch.nn.functional``."""

from __future__ import annotations

from functools import lru_cache
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from lenet_ext import ops
from lenet_ext._build import require_cuda
from lenet_ext._C import call_conv_relu_max_pool2d, call_linear, call_linear_relu, call_relu_avg_pool2d

__all__ = ["conv_relu_max_pool2d", "linear", "linear_relu", "relu_avg_pool2d"]

_CPU_DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16})
_CUDA_DTYPES = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})
_AUTOCAST_DEVICES = frozenset({"cpu", "cuda"})  # elsewhere the stock composition does it
_KERNEL_DTYPES = {"cpu": _CPU_DTYPES, "cuda": _CUDA_DTYPES, "meta": _CUDA_DTYPES}

_INTEGER_DTYPES = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})

# --- arguments -------------------------------------------------------------------------------------------------------


def _integer(
    name: str, value: Any, op: str = "conv_relu_max_pool2d", expected: str = "an int or a pair of ints"
) -> int:
    if isinstance(value, Tensor) and value.numel() == 1 and value.dtype in _INTEGER_DTYPES:
        value = int(value)  # as stock does; a bool among them, though not one of Python's
    if isinstance(value, (bool, float, str, Tensor)) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be {expected}, got {value!r}")
    number = index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name} must fit into 64 bits, got {value!r}")
    return number


def _pair(name: str, value: Any, op: str = "conv_relu_max_pool2d") -> tuple[int, int]:
    if isinstance(value, (tuple, list)):
        if len(value) == 1:
            value = value[0]
        elif len(value) == 2:
            return _integer(name, value[0], op), _integer(name, value[1], op)
        else:
            for element in value:
                _integer(name, element, op)
            raise RuntimeError(f"{op}: {name} must be an int or a pair of ints, got {value!r}")
    number = _integer(name, value, op)
    return number, number


def _padding(
    padding: Any, stride: tuple[int, int], dilation: tuple[int, int], kernel: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right). "same" puts the odd one at the bottom and at the right, as stock does."""
    if isinstance(padding, str):
        if padding == "valid":
            return 0, 0, 0, 0
        if padding != "same":
            raise RuntimeError(f"conv_relu_max_pool2d: padding must be 'valid', 'same' or ints, got {padding!r}")
        if stride != (1, 1):
            raise RuntimeError(f"conv_relu_max_pool2d: padding='same' needs stride=1, got stride={stride}")
        height, width = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
        return height // 2, height - height // 2, width // 2, width - width // 2
    vertical, horizontal = _pair("padding", padding)
    return vertical, vertical, horizontal, horizontal


def kernel_size_of(weight: Any) -> tuple[int, int]:
    """What padding="same" depends on. As numbers, where a tracer has symbols: padding is one of the operator's."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"conv_relu_max_pool2d: weight must be a Tensor, got {type(weight).__name__}")
    if weight.dim() != 4:
        raise RuntimeError(f"conv_relu_max_pool2d: weight must be 4-D, got shape {tuple(weight.shape)}")
    return int(weight.shape[2]), int(weight.shape[3])


def normalize_options(
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: Any,
    pool_kernel_size: Any,
    pool_stride: Any,
    pool_padding: Any,
    pool_dilation: Any,
    ceil_mode: Any,
    kernel_size: tuple[int, int],
) -> tuple:
    """The options as the operators take them. Raises TypeError, ValueError, RuntimeError where stock would."""
    stride, dilation = _pair("stride", stride), _pair("dilation", dilation)
    # Stock calls the convolution first, and looks at types before it looks at values: of two faults it tells that one.
    groups = _integer("groups", groups)
    convolution = stride, _padding(padding, stride, dilation, kernel_size), dilation, groups
    if not isinstance(ceil_mode, bool):
        raise TypeError(f"conv_relu_max_pool2d: ceil_mode must be a bool, got {ceil_mode!r}")
    pool_kernel_size = _pair("pool_kernel_size", pool_kernel_size)
    if pool_stride is None or (isinstance(pool_stride, (tuple, list)) and not pool_stride):
        pool_stride = pool_kernel_size
    return (
        *convolution,
        pool_kernel_size,
        _pair("pool_stride", pool_stride),
        _pair("pool_padding", pool_padding),
        _pair("pool_dilation", pool_dilation),
        ceil_mode,
    )


def _average_options(
    kernel_size: Any, stride: Any, padding: Any, ceil_mode: Any, count_include_pad: Any, divisor_override: Any
) -> tuple:
    """The options of relu_avg_pool2d as the operator takes them."""
    op = "relu_avg_pool2d"
    kernel_size = _pair("kernel_size", kernel_size, op)
    no_stride = stride is None or (isinstance(stride, (tuple, list)) and not stride)
    for name, value in (("ceil_mode", ceil_mode), ("count_include_pad", count_include_pad)):
        if not isinstance(value, bool):
            raise TypeError(f"{op}: {name} must be a bool, got {value!r}")
    if divisor_override is not None:
        divisor_override = _integer("divisor_override", divisor_override, op, "an int or None")
    return (
        kernel_size,
        kernel_size if no_stride else _pair("stride", stride, op),
        _pair("padding", padding, op),
        ceil_mode,
        count_include_pad,
        divisor_override,
    )


# `typed` tells True and 1.0 from 1, but only at the top level: calls with pairs are not cached.
_cached_options = lru_cache(maxsize=1024, typed=True)(normalize_options)
_cached_average_options = lru_cache(maxsize=1024, typed=True)(_average_options)
_SCALARS = frozenset({int, str, bool, float, type(None)})


def _check_tensors(op: str, input: Any, weight: Any, bias: Any) -> None:
    for name, value in (("input", input), ("weight", weight), ("bias", bias)):
        if not isinstance(value, Tensor) and not (name == "bias" and value is None):
            raise TypeError(f"{op}: {name} must be a Tensor, got {type(value).__name__}")


def _is_autocasting(device_type: str) -> bool:
    # Of some devices without autocast torch refuses to say.
    return device_type in _AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def _has_kernel(input: Tensor, *others: Tensor | None, casts: bool = True) -> bool:
    """Do the operators take these tensors? (If they do not fit together, the operators say so.)

    `casts`: whether autocast casts the operator's arguments.
    """
    device_type = input.device.type
    dtype = input.dtype
    if casts and _is_autocasting(device_type) and input.is_floating_point() and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)  # the operators cast, as stock's do
    if dtype not in _KERNEL_DTYPES.get(device_type, ()):
        return False
    for tensor in (input, *others):
        if tensor is not None and (tensor.layout is not torch.strided or tensor.is_nested):
            return False
    # A tensor without data (torch.compile, torch.export) needs no kernel.
    if device_type == "cuda" and not torch.compiler.is_compiling() and type(input) in (Tensor, torch.nn.Parameter):
        require_cuda()
    return True


# --- the operations --------------------------------------------------------------------------------------------------


def conv_relu_max_pool2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    *,
    pool_kernel_size: Any = 2,
    pool_stride: Any = None,
    pool_padding: Any = 0,
    pool_dilation: Any = 1,
    ceil_mode: bool = False,
) -> Tensor:
    r"""2-D convolution, ReLU and 2-D max pooling in one kernel.

    Equivalent to ``F.max_pool2d(F.relu(F.conv2d(input, weight, bias, stride, padding, dilation, groups)),
    pool_kernel_size, pool_stride, pool_padding, pool_dilation, ceil_mode)``, but the convolution's output is never
    stored on the direct path.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, any strides; float32, float64, bfloat16 (and float16 on CUDA) have
            kernels, whatever else stock accepts goes through the stock composition.
        weight: ``(O, C / groups, kH, kW)``, of input's dtype and device.
        bias: ``(O,)`` or ``None``.
        stride, dilation: int or pair, of the convolution.
        padding: int, pair, ``"valid"`` or ``"same"``, of the convolution.
        groups: blocks of channels that are convolved apart.
        pool_kernel_size, pool_stride, pool_padding, pool_dilation: int or pair, of the pooling; ``pool_stride=None``
            means ``pool_kernel_size``.
        ceil_mode: whether a last pooling window may overhang.

    Returns:
        ``(N, O, H', W')`` or ``(O, H', W')``, contiguous for a contiguous input, channels_last for a channels_last
        one. It never aliases an argument.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, or an option is out of range.
        TypeError: an argument is of the wrong type.
        ValueError: an integer does not fit into 64 bits.

    Ties go to the first value in row-major order, NaN wins over numbers and passes ReLU, ReLU's gradient at 0 is 0.

    Example:
        >>> import torch, lenet_ext
        >>> output = lenet_ext.functional.conv_relu_max_pool2d(torch.randn(8, 1, 32, 32), torch.randn(6, 1, 5, 5))
        >>> output.shape
        torch.Size([8, 6, 14, 14])
    """
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(
            conv_relu_max_pool2d,
            (input, weight, bias),
            input,
            weight,
            bias,
            stride,
            padding,
            dilation,
            groups,
            pool_kernel_size=pool_kernel_size,
            pool_stride=pool_stride,
            pool_padding=pool_padding,
            pool_dilation=pool_dilation,
            ceil_mode=ceil_mode,
        )
    _check_tensors("conv_relu_max_pool2d", input, weight, bias)
    if weight.dim() != 4:
        raise RuntimeError(f"conv_relu_max_pool2d: weight must be 4-D, got shape {tuple(weight.shape)}")
    arguments = (
        stride,
        padding,
        dilation,
        groups,
        pool_kernel_size,
        pool_stride,
        pool_padding,
        pool_dilation,
        ceil_mode,
    )
    kernel = kernel_size_of(weight) if isinstance(padding, str) else (0, 0)
    cacheable = not torch.compiler.is_compiling() and _SCALARS.issuperset(map(type, arguments))
    options = (_cached_options if cacheable else normalize_options)(*arguments, kernel)
    return conv_relu_max_pool2d_normalized(input, weight, bias, options)


def conv_relu_max_pool2d_normalized(input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
    """:func:`conv_relu_max_pool2d` with options from :func:`normalize_options`, which a module computes once."""
    small_window = options[4][0] * options[4][1] <= ops.MAX_WINDOW
    if small_window and not torch.compiler.is_compiling():
        output = call_conv_relu_max_pool2d(input, weight, bias, options)
        if output is not None:
            return output
    _check_tensors("conv_relu_max_pool2d", input, weight, bias)
    if not small_window or not _has_kernel(input, weight, bias):
        return _stock_conv_relu_max_pool2d(input, weight, bias, options)
    dim = input.dim()
    if dim == 3:
        input = input.unsqueeze(0)
    elif dim != 4:
        raise RuntimeError(
            f"conv_relu_max_pool2d: input must be 3-D (unbatched) or 4-D (batched), got shape {tuple(input.shape)}"
        )
    output = ops.conv_relu_max_pool2d(input, weight, bias, *options)
    return output.squeeze(0) if dim == 3 else output


def _stock_conv_relu_max_pool2d(input: Tensor, weight: Tensor, bias: Tensor | None, options: tuple) -> Tensor:
    """The composition that the kernels replace, for what has no kernel."""
    batched = input.unsqueeze(0) if input.dim() == 3 else input
    # Our messages name our arguments. Under autocast conv2d casts them.
    dtypes = not _is_autocasting(input.device.type)
    ops.pooled_shape("conv_relu_max_pool2d", batched, weight, bias, *options, dtypes=dtypes)
    return stock_composition(input, weight, bias, *options)


def stock_composition(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """What conv_relu_max_pool2d computes, with options from :func:`normalize_options`, in PyTorch's own operators."""
    stride, (top, bottom, left, right), dilation, groups, *pool = options
    if (top, left) != (bottom, right):
        input, top, left = F.pad(input, (left, right, top, bottom)), 0, 0
    return F.max_pool2d(F.relu(F.conv2d(input, weight, bias, stride, (top, left), dilation, groups)), *pool)


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``F.linear(input, weight, bias)``, :math:`y = x W^T + b`, with a kernel for small layers.

    Args:
        input: ``(*, in_features)``, any leading dimensions and strides, float32, float64 or bfloat16 (and float16 on
            CUDA); other dtypes go to stock.
        weight: ``(out_features, in_features)``, of input's dtype and device.
        bias: ``(out_features,)`` or ``None``.

    Returns:
        ``(*, out_features)``, contiguous.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together.
        TypeError: an argument is not a tensor.
    """
    if torch.jit.is_scripting():
        return _scripted_linear(input, weight, bias)
    if not torch.compiler.is_compiling():
        output = call_linear(input, weight, bias)
        if output is not None:
            return output
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear, (input, weight, bias), input, weight, bias)
    _check_tensors("linear", input, weight, bias)
    if not _has_kernel(input, weight, bias) or weight.dim() != 2 or _broadcasts(bias, weight):
        return _stock_linear("linear", input, weight, bias)
    return ops.linear(input, weight, bias)


# --8<-- [start:linear-relu]
def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``F.relu(F.linear(input, weight, bias))`` in one kernel, :math:`y = \max(0, x W^T + b)`.

    Arguments, result and errors are those of :func:`linear`. NaN passes ReLU, whose gradient at 0 is 0.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.functional.linear_relu(torch.ones(2, 3), -torch.ones(1, 3))
        tensor([[0.],
                [0.]])
    """
    if torch.jit.is_scripting():
        return _scripted_linear_relu(input, weight, bias)
    if not torch.compiler.is_compiling():
        output = call_linear_relu(input, weight, bias)
        if output is not None:
            return output
    if has_torch_function_variadic(input, weight, bias):
        return handle_torch_function(linear_relu, (input, weight, bias), input, weight, bias)
    _check_tensors("linear_relu", input, weight, bias)
    if not _has_kernel(input, weight, bias) or weight.dim() != 2 or _broadcasts(bias, weight):
        return F.relu(_stock_linear("linear_relu", input, weight, bias))
    return ops.linear_relu(input, weight, bias)


# --8<-- [end:linear-relu]


def _broadcasts(bias: Tensor | None, weight: Tensor) -> bool:
    return bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0])


def _stock_linear(op: str, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, for what has no kernel: it also takes a vector as weight, and a bias that broadcasts."""
    if bias is not None and weight.dim() == 2 and not input.is_nested:
        output_shape = (*input.shape[:-1], weight.shape[0])
        fits = bias.dim() <= len(output_shape) and all(
            have in (1, want) for have, want in zip(reversed(bias.shape), reversed(output_shape), strict=False)
        )
        if not fits:
            raise RuntimeError(f"{op}: bias must have shape [{weight.shape[0]}], got {tuple(bias.shape)}")
    return F.linear(input, weight, bias)


def relu_avg_pool2d(
    input: Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    r"""ReLU and 2-D average pooling in one pass, behind any layer.

    Equivalent to ``F.avg_pool2d(F.relu(input), kernel_size, stride, padding, ceil_mode, count_include_pad,
    divisor_override)``, in float32 and float64 on the CPU to the last bit, but the output of ReLU is stored nowhere.

    Args:
        input: ``(N, C, H, W)`` or ``(C, H, W)``, any strides; float32, float64, bfloat16 (and float16 on CUDA) have
            kernels, whatever else stock accepts goes through the stock composition.
        kernel_size, stride, padding: int or pair; ``stride=None`` means ``kernel_size``.
        ceil_mode: whether a last window may overhang.
        count_include_pad: whether the padding counts among the positions that are averaged.
        divisor_override: by what to divide each window's sum, in place of the number of its positions.

    Returns:
        ``(N, C, H', W')`` or ``(C, H', W')``, contiguous for a contiguous input, channels_last for a channels_last one.
        It never aliases `input`.

    Raises:
        RuntimeError: an option is out of range, or does not fit input's shape.
        TypeError: an argument is of the wrong type.
        ValueError: an integer does not fit into 64 bits.

    NaN passes ReLU, whose gradient at 0 is 0. For the backward pass, input is saved: it must not be modified in place.

    Example:
        >>> import torch, lenet_ext
        >>> lenet_ext.functional.relu_avg_pool2d(torch.tensor([[[1.0, -2.0], [3.0, 4.0]]]), 2)
        tensor([[[2.]]])
    """
    if has_torch_function_variadic(input):
        return handle_torch_function(
            relu_avg_pool2d,
            (input,),
            input,
            kernel_size,
            stride=stride,
            padding=padding,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
        )
    if not isinstance(input, Tensor):
        raise TypeError(f"relu_avg_pool2d: input must be a Tensor, got {type(input).__name__}")
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    cacheable = not torch.compiler.is_compiling() and _SCALARS.issuperset(map(type, arguments))
    options = (_cached_average_options if cacheable else _average_options)(*arguments)
    if cacheable:
        output = call_relu_avg_pool2d(input, options)
        if output is not None:
            return output
    dim = input.dim()
    if dim not in (3, 4):
        raise RuntimeError(
            f"relu_avg_pool2d: input must be 3-D (unbatched) or 4-D (batched), got shape {tuple(input.shape)}"
        )
    has_kernel = _has_kernel(input, casts=False)
    if has_kernel and dim == 4:
        return ops.relu_avg_pool2d(input, *options)
    if has_kernel:
        return ops.relu_avg_pool2d(input.unsqueeze(0), *options).squeeze(0)
    # Our messages name our arguments.
    ops.average_pooled_shape("relu_avg_pool2d", input.unsqueeze(0) if dim == 3 else input, *options)
    return stock_relu_avg_pool2d(input, *options)


def stock_relu_avg_pool2d(input: Tensor, *options: Any) -> Tensor:
    """What relu_avg_pool2d computes, in PyTorch's own operators."""
    return F.avg_pool2d(F.relu(input), *options)


# --- for torch.jit.script, which takes only a part of Python ---------------------------------------------------------


def scripted_has_kernel(input: Tensor) -> bool:
    if input.dtype == torch.float16:
        return input.is_cuda
    known = input.dtype == torch.float32 or input.dtype == torch.float64 or input.dtype == torch.bfloat16
    return known and (input.is_cpu or input.is_cuda)


def _scripted_linear(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if scripted_has_kernel(input):
        return torch.ops.lenet_ext.linear(input, weight, bias)
    return F.linear(input, weight, bias)


def _scripted_linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if scripted_has_kernel(input):
        return torch.ops.lenet_ext.linear_relu(input, weight, bias)
    return F.relu(F.linear(input, weight, bias))
