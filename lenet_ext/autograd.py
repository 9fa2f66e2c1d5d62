r"""The derivatives, written down: ``torch.autograd.Function`` subclasses with hand-written backward passes.

The operators themselves have these derivatives (``csrc/<op>/autograd.cpp``, a node of autograd's graph in C++), so that
``torch.compile``, ``torch.export``, tracers and ``torch.func`` find them, too. The Functions here are the same in the
language that people read: they call the same operators, and give bit by bit what the nodes give. Tensors come first
among the arguments, then the options as the operator takes them. :mod:`lenet_ext.functional` is the stable way in.

Derivatives of any order by ``backward``, ``torch.func.grad`` and ``vmap`` are right; forward-mode AD is the operators'.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from lenet_ext import ops

__all__ = ["ConvReLUMaxPool2dFunction", "LinearFunction", "LinearReLUFunction", "ReLUAvgPool2dFunction"]


def _wanted(gradients: tuple[Tensor, Tensor, Tensor], mask: list[bool]) -> tuple[Tensor | None, ...]:
    """The operators return empty tensors for gradients that were not asked for; autograd wants None."""
    return tuple(gradient if wanted else None for gradient, wanted in zip(gradients, mask, strict=True))


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

    Saved: one byte per output (the winner's place in its window, 255 where there is none), input where the gradient of
    weight is wanted, and weight where that of input is; neither the convolution's output nor this one's, which may
    therefore be modified in place. ReLU passes no gradient at 0.
    Where input, weight or gradient hold an infinity or NaN, places without a winner contribute :math:`0 \cdot \infty`
    = NaN to the gradients, as in the stock composition (on the CPU).

    Source: chain rule for ``torch.nn.functional.conv2d``, ``relu`` and ``max_pool2d`` as the PyTorch documentation
    defines them.

    The backward pass :math:`(g, x, W) \mapsto (G_x(g, W), G_W(g, x), G_b(g))` is linear in each argument, for given
    winners, and so is the convolution at the winners, :math:`C(x, W) + b` (0 where there is none). With the incoming
    gradients :math:`u_x, u_W, u_b` of the three, its own derivatives are

    .. math::
        \partial/\partial g = C(u_x, W) + C(x, u_W) + u_b, \qquad
        \partial/\partial x = G_x(g, u_W), \qquad
        \partial/\partial W = G_W(g, u_x),

    those of :math:`C` are :math:`G_x, G_W, G_b` again, and the tangent of the output is
    :math:`C(\dot x, W) + C(x, \dot W) + \dot b`.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:
        return ops.conv_relu_max_pool2d_with_indices(input, weight, bias, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        input, weight, _, *options, _ = inputs  # ceil_mode has done its work: the shape of indices tells
        indices = output[1]
        ctx.mark_non_differentiable(indices)
        ctx.set_materialize_grads(False)
        of_input, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(indices, input if of_weight else None, weight if of_input else None)
        ctx.options = (input.shape, weight.shape, *options)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None, _: None) -> tuple:
        others = (None,) * (len(ctx.options) - 1)
        if grad_output is None:
            return (None, None, None, *others)
        indices, input, weight = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        gradients = ops.conv_relu_max_pool2d_backward(grad_output, indices, input, weight, *ctx.options, mask)
        return (*_wanted(gradients, mask), *others)


class LinearFunction(Function):
    r""":math:`y = x W^T + b`. With :math:`g = \partial L / \partial y` and rows flattened over the leading dimensions,

    .. math::
        \partial L/\partial x = g W, \qquad \partial L/\partial W = g^T x, \qquad
        \partial L/\partial b = \textstyle\sum_m g_m.

    Saved: input where the gradient of weight is wanted, weight where that of input is. All three are bilinear; the
    tangent is :math:`\dot x W^T + x \dot W^T + \dot b`.

    Source: PyTorch documentation of ``torch.nn.functional.linear``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _ = inputs
        ctx.set_materialize_grads(False)
        of_input, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(input if of_weight else None, weight if of_input else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return None, None, None
        mask = list(ctx.needs_input_grad)
        return _wanted(ops.linear_backward(grad_output, *ctx.saved_tensors, mask), mask)


class LinearReLUFunction(Function):
    r""":math:`y = \max(0, x W^T + b)`. With :math:`g = \partial L / \partial y` and
    :math:`\delta = g` where :math:`y > 0` or is NaN, else 0,

    .. math::
        \partial L/\partial x = \delta W, \qquad \partial L/\partial W = \delta^T x, \qquad
        \partial L/\partial b = \textstyle\sum_m \delta_m.

    Saved: output, which must therefore not be modified in place (nor may stock ReLU's), input where the gradient of
    weight is wanted, and weight where that of input is. Source:
    PyTorch documentation of ``torch.nn.functional.linear`` and ``relu``.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return ops.linear_relu(input, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, weight, _ = inputs
        ctx.set_materialize_grads(False)
        of_input, of_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(output, input if of_weight else None, weight if of_input else None)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        if grad_output is None:
            return None, None, None
        mask = list(ctx.needs_input_grad)
        return _wanted(ops.linear_relu_backward(grad_output, *ctx.saved_tensors, mask), mask)


class ReLUAvgPool2dFunction(Function):
    r"""ReLU and average pooling. With :math:`\mathcal{W}(p)` the window of the output's position :math:`p` and
    :math:`d(p)` its divisor (the positions of the window, those in the padding among them or not, or
    ``divisor_override``),

    .. math:: y[n,c,p] = \frac{1}{d(p)} \sum_{q \in \mathcal{W}(p)} \max(0, x[n,c,q]).

    With :math:`g = \partial L / \partial y`, and where :math:`x > 0` or is NaN (elsewhere the gradient is 0),

    .. math:: \partial L/\partial x[n,c,q] = \sum_{p:\; q \in \mathcal{W}(p)} \frac{g[n,c,p]}{d(p)}.

    Saved: input, which must therefore not be modified in place; what ReLU makes of it is stored nowhere. The backward
    pass is linear in :math:`g`: its own derivative is the average of what ReLU lets pass, and so is the tangent of the
    output. Source: chain rule for ``torch.nn.functional.relu`` and ``avg_pool2d`` as the PyTorch documentation defines
    them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, *options: Any) -> Tensor:
        return ops.relu_avg_pool2d(input, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        input, *ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(input)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor | None) -> tuple:
        others = (None,) * len(ctx.options)
        if grad_output is None:
            return None, *others
        return ops.relu_avg_pool2d_backward(grad_output, *ctx.saved_tensors, *ctx.options), *others
