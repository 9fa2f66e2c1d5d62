r"""The ``torch.autograd.Function`` subclasses, with hand-written backward passes.

Each Function stands *outside* its operator: ``forward`` calls one registered operator, ``backward`` another. They are
in the ``setup_context`` style, which is the one that ``torch.func`` understands. Tensors come first among the
arguments, then the options as the operator takes them. Call them through :mod:`lenet_ext.functional`.

Derivatives of any order by ``backward`` and ``torch.func.grad`` are right; forward-mode AD raises
:class:`NotImplementedError` (no ``jvp`` is defined here: ``torch.compile`` refuses Functions that have one).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from lenet_ext import ops

__all__ = ["ConvReLUMaxPool2dFunction", "LeNetFunction", "LinearFunction", "LinearReLUFunction"]


def _wanted(gradients: tuple[Tensor, Tensor, Tensor], mask: list[bool]) -> list[Tensor | None]:
    """The operators return empty tensors for gradients that were not asked for; autograd wants None."""
    return [gradient if wanted else None for gradient, wanted in zip(gradients, mask, strict=True)]


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


# --- vmap: the mapped axis joins the batch or, where parameters are mapped too, the channels and groups ---


def _to_channels(tensor: Tensor | None, dim: int | None, size: int, channel_dim: int) -> Tensor | None:
    """Moves the mapped axis (or a new, expanded one) in front of the channels and merges the two."""
    if tensor is None:
        return None
    tensor = tensor.unsqueeze(channel_dim) if dim is None else tensor.movedim(dim, channel_dim)
    shape = list(tensor.shape)
    shape[channel_dim] = size
    return tensor.expand(shape).flatten(channel_dim, channel_dim + 1)


def _from_channels(tensor: Tensor, size: int, channel_dim: int) -> Tensor:
    return tensor.unflatten(channel_dim, (size, -1))


# The place of `groups` among the options of every operator of the convolution.
_GROUPS = 3


def _more_groups(options: tuple, size: int) -> tuple:
    return (*options[:_GROUPS], options[_GROUPS] * size, *options[_GROUPS + 1 :])


class ConvReLUMaxPool2dFunction(Function):
    r"""Fused convolution, ReLU and max pooling.

    With the convolution :math:`z[n,o,q] = b[o] + \sum_{c,t} W[o,c,t]\, x[n,c,q \cdot s + t]` (:math:`q` a position of
    its output, :math:`t` a tap of the kernel, stride, padding and dilation implied), the output at pooled position
    :math:`p` with window :math:`\mathcal{W}(p)` is

    .. math:: y[n,o,p] = \max(0, \max_{q \in \mathcal{W}(p)} z[n,o,q]).

    Let :math:`q^*(n,o,p)` be the winner: the first maximum in row-major order, or the last NaN. It exists where
    :math:`y > 0` or is NaN. With :math:`g = \partial L / \partial y`, sums over the places that have a winner,

    .. math::
        \partial L/\partial b[o] &= \sum_{n,p} g[n,o,p] \\
        \partial L/\partial W[o,c,t] &= \sum_{n,p} g[n,o,p]\; x[n,c,q^* \cdot s + t] \\
        \partial L/\partial x[n,c,i] &= \sum_{o,p,t:\; q^* \cdot s + t = i} g[n,o,p]\; W[o,c,t]

    Saved: input, weight and one byte per output (the winner's place in its window, 255 where there is none); neither
    the convolution's output nor this one's, which may therefore be modified in place. ReLU passes no gradient at 0.
    Where input, weight or gradient hold an infinity or NaN, places without a winner contribute :math:`0 \cdot \infty`
    = NaN to the gradients, as in the stock composition (on the CPU).

    Source: chain rule for ``torch.nn.functional.conv2d``, ``relu`` and ``max_pool2d`` as the PyTorch documentation
    defines them.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return ops.conv_relu_max_pool2d_with_indices(input, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], indices)
        ctx.options = inputs[3:-1]  # ceil_mode has done its work: the shape of indices tells

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple:
        options = ctx.options
        if grad_output is None:
            return (None,) * (len(options) + 4)
        input, weight, indices = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        gradients = _conv_backward(grad_output, indices, input, weight, options, mask)
        return (*_wanted(gradients, mask), *((None,) * (len(options) + 1)))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple:
        size = info.batch_size
        if in_dims[1] is None and in_dims[2] is None:
            output, indices = apply(
                ConvReLUMaxPool2dFunction, input.movedim(in_dims[0], 0).flatten(0, 1), weight, bias, *options
            )
            return (output.unflatten(0, (size, -1)), indices.unflatten(0, (size, -1))), (0, 0)
        output, indices = apply(
            ConvReLUMaxPool2dFunction,
            _to_channels(input, in_dims[0], size, 1),
            _to_channels(weight, in_dims[1], size, 0),
            _to_channels(bias, in_dims[2], size, 0),
            *_more_groups(options, size),
        )
        return (_from_channels(output, size, 1), _from_channels(indices, size, 1)), (1, 1)


def _conv_backward(
    grad_output: Tensor, indices: Tensor, input: Tensor, weight: Tensor, options: tuple, mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    # Grad mode is on in a backward pass when a graph of it is wanted (create_graph, torch.func).
    if torch.is_grad_enabled():
        return apply(_ConvBackwardFunction, grad_output, indices, input, weight, *options, mask)
    return ops.conv_relu_max_pool2d_backward(grad_output, indices, input, weight, *options, mask)


class _ConvBackwardFunction(Function):
    r"""The backward pass of the convolution as a function of its own, so that it can be differentiated.

    :math:`(g, x, W) \mapsto (G_x(g, W), G_W(g, x), G_b(g))` is linear in each argument (the winners are fixed). With
    the incoming gradients :math:`u_x, u_W, u_b` of the three and :math:`C(x, W)` the convolution at the winners,

    .. math::
        \partial/\partial g = C(u_x, W) + C(x, u_W) + u_b, \qquad
        \partial/\partial x = G_x(g, u_W), \qquad
        \partial/\partial W = G_W(g, u_x).
    """

    @staticmethod
    def forward(grad_output: Tensor, indices: Tensor, input: Tensor, weight: Tensor, *options: Any) -> tuple:
        return ops.conv_relu_max_pool2d_backward(grad_output, indices, input, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4])
        ctx.options, ctx.mask = inputs[4:-1], inputs[-1]

    @staticmethod
    def backward(ctx: Any, grad_grad_input: Any, grad_grad_weight: Any, grad_grad_bias: Any) -> tuple:
        grad_output, indices, input, weight = ctx.saved_tensors
        options = ctx.options
        from_input, from_weight, from_bias = (
            grad if wanted else None
            for grad, wanted in zip((grad_grad_input, grad_grad_weight, grad_grad_bias), ctx.mask, strict=True)
        )
        to_grad = to_input = to_weight = None
        if ctx.needs_input_grad[0]:
            if from_input is not None:
                to_grad = apply(_ConvAtIndicesFunction, from_input, weight, from_bias, indices, *options)
                from_bias = None
            if from_weight is not None:
                second = apply(_ConvAtIndicesFunction, input, from_weight, from_bias, indices, *options)
                to_grad, from_bias = _add(to_grad, second), None
            if from_bias is not None:
                to_grad = torch.where(indices == 255, 0, from_bias.reshape(-1, 1, 1))
        if ctx.needs_input_grad[2] and from_weight is not None:
            to_input = _conv_backward(grad_output, indices, input, from_weight, options, [True, False, False])[0]
        if ctx.needs_input_grad[3] and from_input is not None:
            to_weight = _conv_backward(grad_output, indices, from_input, weight, options, [False, True, False])[1]
        return (to_grad, None, to_input, to_weight, *((None,) * (len(options) + 1)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, grad_output: Tensor, indices: Tensor, input: Tensor, weight: Tensor, *rest: Any
    ):
        size, (*options, mask) = info.batch_size, rest
        # Parameter gradients are wanted per mapped sample: each becomes a group of its own.
        grad_input, grad_weight, grad_bias = apply(
            _ConvBackwardFunction,
            _to_channels(grad_output, in_dims[0], size, 1),
            _to_channels(indices, in_dims[1], size, 1),
            _to_channels(input, in_dims[2], size, 1),
            _to_channels(weight, in_dims[3], size, 0),
            *_more_groups(tuple(options), size),
            mask,
        )
        gradients = tuple(
            _from_channels(gradient, size, channel_dim) if wanted else gradient
            for gradient, channel_dim, wanted in zip((grad_input, grad_weight, grad_bias), (1, 0, 0), mask, strict=True)
        )
        return gradients, tuple(
            channel_dim if wanted else None for channel_dim, wanted in zip((1, 0, 0), mask, strict=True)
        )


class _ConvAtIndicesFunction(Function):
    r"""The convolution at the winning positions, :math:`C(x, W) + b`, 0 where there is none. Its gradients are those of
    :class:`ConvReLUMaxPool2dFunction`, whose winners it is given."""

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, *options: Any) -> Tensor:
        return ops.conv_at_indices(input, weight, bias, indices, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], inputs[3])
        ctx.options = inputs[4:]

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        options = ctx.options
        if grad_output is None:
            return (None,) * (len(options) + 4)
        input, weight, indices = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        gradients = _conv_backward(grad_output, indices, input, weight, options, mask)
        return (*_wanted(gradients, mask), *((None,) * (len(options) + 1)))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple, input: Tensor, weight: Tensor, bias: Any, indices: Tensor, *options: Any
    ) -> tuple:
        size = info.batch_size
        output = apply(
            _ConvAtIndicesFunction,
            _to_channels(input, in_dims[0], size, 1),
            _to_channels(weight, in_dims[1], size, 0),
            _to_channels(bias, in_dims[2], size, 0),
            _to_channels(indices, in_dims[3], size, 1),
            *_more_groups(options, size),
        )
        return _from_channels(output, size, 1), 1


def _linear_gradients(
    grad_output: Tensor, input: Tensor, weight: Tensor, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The linear layer's gradients in stock operations, which can be differentiated (and mapped) in turn."""
    rows = grad_output.reshape(-1, weight.shape[0])
    return (
        grad_output.matmul(weight) if mask[0] else None,
        rows.t().mm(input.reshape(-1, weight.shape[1])) if mask[1] else None,
        rows.sum(0) if mask[2] else None,
    )


class LinearFunction(Function):
    r""":math:`y = x W^T + b`. With :math:`g = \partial L / \partial y` and rows flattened over the leading dimensions,

    .. math::
        \partial L/\partial x = g W, \qquad \partial L/\partial W = g^T x, \qquad
        \partial L/\partial b = \textstyle\sum_m g_m.

    Saved: input and weight. Source: PyTorch documentation of ``torch.nn.functional.linear``.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return None, None, None
        input, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _linear_gradients(grad_output, input, weight, mask)
        return tuple(_wanted(ops.linear_backward(grad_output, input, weight, mask), mask))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        return _vmap_linear(LinearFunction, info, in_dims, input, weight, bias), 0


class LinearReLUFunction(Function):
    r""":math:`y = \max(0, x W^T + b)`. With :math:`g = \partial L / \partial y` and
    :math:`\delta = g` where :math:`y > 0` or is NaN, else 0,

    .. math::
        \partial L/\partial x = \delta W, \qquad \partial L/\partial W = \delta^T x, \qquad
        \partial L/\partial b = \textstyle\sum_m \delta_m.

    Saved: input, weight and output, which must therefore not be modified in place (nor may stock ReLU's). Source:
    PyTorch documentation of ``torch.nn.functional.linear`` and ``relu``.
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_relu(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], inputs[1], output)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return None, None, None
        input, weight, output = ctx.saved_tensors
        mask = list(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            return _linear_gradients(torch.where(output <= 0, 0, grad_output), input, weight, mask)
        return tuple(_wanted(ops.linear_relu_backward(grad_output, output, input, weight, mask), mask))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, int]:
        return _vmap_linear(LinearReLUFunction, info, in_dims, input, weight, bias), 0


def _vmap_linear(
    function: type[Function], info: Any, in_dims: tuple, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    if in_dims[1] is None and in_dims[2] is None:
        return apply(function, input.movedim(in_dims[0], 0), weight, bias)
    # Parameters of their own for every mapped sample: a batched product is the vendor's job.
    size = info.batch_size
    samples = input.expand(size, *input.shape) if in_dims[0] is None else input.movedim(in_dims[0], 0)
    weights = weight.expand(size, *weight.shape) if in_dims[1] is None else weight.movedim(in_dims[1], 0)
    rows = samples.reshape(size, -1, samples.shape[-1])
    output = rows.bmm(weights.transpose(1, 2))
    if bias is not None:
        output = output + (bias if in_dims[2] is None else bias.movedim(in_dims[2], 0).unsqueeze(1))
    output = output.reshape(*samples.shape[:-1], weights.shape[1])
    return output.relu() if function is LinearReLUFunction else output


class LeNetFunction(Function):
    r"""The whole of LeNet, forward and backward in one operator each.

    The derivative is the chain of those of the layers' Functions, :class:`ConvReLUMaxPool2dFunction` twice,
    :class:`LinearReLUFunction` twice and :class:`LinearFunction`, whose kernels it runs and whose tensors it saves. The
    ten parameters come first, then the input. A derivative of the backward pass goes through the layers' Functions.
    """

    @staticmethod
    def forward(*tensors: Tensor) -> tuple[Tensor, ...]:
        *parameters, input = tensors
        return ops.lenet_with_activations(input, parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, *_: None) -> tuple:
        if grad_output is None:
            return (None,) * 11
        *tensors, pooled1, indices1, pooled2, indices2, hidden1, hidden2 = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _differentiable_lenet_backward(grad_output, tensors, wanted)
        *parameters, input = tensors
        grad_input, grad_parameters = ops.lenet_backward(
            grad_output, input, parameters, pooled1, indices1, pooled2, indices2, hidden1, hidden2, wanted[10]
        )
        return tuple(
            gradient if is_wanted else None
            for gradient, is_wanted in zip((*grad_parameters, grad_input), wanted, strict=True)
        )


# What the first two layers of LeNet give their operators: convolution 5x5, pooling 2x2.
LENET_OPTIONS = ((1, 1), (0, 0, 0, 0), (1, 1), 1, (2, 2), (2, 2), (0, 0), (1, 1), False)


def _lenet_by_layers(tensors: list[Tensor]) -> Tensor:
    *p, input = tensors
    features = apply(ConvReLUMaxPool2dFunction, input, p[0], p[1], *LENET_OPTIONS)[0]
    features = apply(ConvReLUMaxPool2dFunction, features, p[2], p[3], *LENET_OPTIONS)[0]
    hidden = apply(LinearReLUFunction, features.flatten(1), p[4], p[5])
    hidden = apply(LinearReLUFunction, hidden, p[6], p[7])
    return apply(LinearFunction, hidden, p[8], p[9])


def _differentiable_lenet_backward(grad_output: Tensor, tensors: list[Tensor], wanted: tuple[bool, ...]) -> tuple:
    with torch.enable_grad():
        # Aliases, so that the gradient is taken with respect to this call's arguments alone.
        aliases = [tensor.view_as(tensor) for tensor in tensors]
        inputs = [alias for alias, is_wanted in zip(aliases, wanted, strict=True) if is_wanted]
        gradients = iter(torch.autograd.grad(_lenet_by_layers(aliases), inputs, grad_output, create_graph=True))
    return tuple(next(gradients) if is_wanted else None for is_wanted in wanted)


# `Function.apply` binds the arguments through `inspect.signature` on each call of a setup_context Function, three times
# the cost of everything else in it. The implementation beneath does not, and serves all calls outside torch.func.
_DIRECT_APPLY: dict[type[Function], Any] = {
    function: super(Function, function).apply  # type: ignore[misc]
    for function in (
        ConvReLUMaxPool2dFunction,
        LinearFunction,
        LinearReLUFunction,
        LeNetFunction,
        _ConvBackwardFunction,
        _ConvAtIndicesFunction,
    )
}


def direct_apply(function: type[Function]) -> Any:
    """``function.apply`` for calls of which is known that neither torch.compile nor torch.func sees them."""
    return _DIRECT_APPLY[function]


def apply(function: type[Function], *args: Any) -> Any:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    return _DIRECT_APPLY[function](*args)
