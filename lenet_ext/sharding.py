"""What the operators do with DTensors (``torch.distributed.tensor``): tensor parallelism of the fused layers.

Each operator has a few layouts in which every process computes its share of the outputs from its shares of the
arguments. The one that moves the least data is taken, for each dimension of the mesh. No layout splits what ReLU or
pooling are applied to into a sum: ReLU of a sum is not the sum of ReLUs.

(``torch.distributed.tensor.experimental.register_sharding`` would do for most of this, but what it caches does not
depend on an operator's lists of integers and flags: another stride or mask then gets the shapes of the one before.)

Imported when ``torch.distributed.tensor`` is, by :mod:`lenet_ext.on_import`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from lenet_ext import ops

__all__: list[str] = []


class Layout(NamedTuple):
    """Placements on one dimension of the mesh: of an operator's tensor arguments, and what its outputs then have."""

    inputs: tuple[Placement, ...]
    outputs: tuple[Placement, ...]


_WHOLE, _SUM = Replicate(), Partial()


# --- the layouts of each operator ---


def _linear_layouts(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Layout]:
    return [
        *_linear_relu_layouts(input, weight, bias),
        Layout((Shard(input.dim() - 1), Shard(1), _SUM), (_SUM,)),  # by the columns of weight
    ]


def _linear_relu_layouts(input: Tensor, weight: Tensor, bias: Tensor | None) -> list[Layout]:
    last = input.dim() - 1
    return [
        Layout((_WHOLE,) * 3, (_WHOLE,)),
        *(Layout((Shard(dim), _WHOLE, _WHOLE), (Shard(dim),)) for dim in range(last)),
        Layout((_WHOLE, Shard(0), Shard(0)), (Shard(last),)),  # by the rows of weight
    ]


def _linear_backward_layouts(grad_output: Tensor, *_: Any) -> list[Layout]:
    last = grad_output.dim() - 1
    return [
        Layout((_WHOLE,) * 3, (_WHOLE,) * 3),
        *(Layout((Shard(dim), Shard(dim), _WHOLE), (Shard(dim), _SUM, _SUM)) for dim in range(last)),
        Layout((Shard(last), _WHOLE, Shard(0)), (_SUM, Shard(0), Shard(0))),
        Layout((_WHOLE, Shard(last), Shard(1)), (Shard(last), Shard(1), _WHOLE)),
    ]


def _linear_relu_backward_layouts(grad_output: Tensor, *_: Any) -> list[Layout]:
    """Those of linear; output, which says where ReLU was open, lies as grad_output does."""
    return [
        Layout((grad, grad, *operands), outputs) for (grad, *operands), outputs in _linear_backward_layouts(grad_output)
    ]


def _of_channels(groups: int, *layouts: Layout) -> tuple[Layout, ...]:
    return layouts if groups == 1 else ()


def _conv_layouts(input: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> list[Layout]:
    return [
        Layout((_WHOLE,) * 3, (_WHOLE,) * 2),
        Layout((Shard(0), _WHOLE, _WHOLE), (Shard(0),) * 2),
        *_of_channels(options[3], Layout((_WHOLE, Shard(0), Shard(0)), (Shard(1),) * 2)),
    ]


def _conv_at_indices_layouts(
    input: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor, *options: Any
) -> list[Layout]:
    return [
        Layout((*inputs, output), (output,)) for inputs, (output, _) in _conv_layouts(input, weight, bias, *options)
    ]


def _conv_backward_layouts(
    grad_output: Tensor,
    indices: Tensor,
    input: Tensor | None,
    weight: Tensor | None,
    input_size: Sequence[int],
    weight_size: Sequence[int],
    *options: Any,
) -> list[Layout]:
    return [
        Layout((_WHOLE,) * 4, (_WHOLE,) * 3),
        Layout((Shard(0), Shard(0), Shard(0), _WHOLE), (Shard(0), _SUM, _SUM)),
        *_of_channels(options[3], Layout((Shard(1), Shard(1), _WHOLE, Shard(0)), (_SUM, Shard(0), Shard(0)))),
    ]


def _by_images_or_channels(tensors: int) -> list[Layout]:
    """Of operators that do the same to each plane; all of their tensors lie alike."""
    return [Layout((placement,) * tensors, (placement,)) for placement in (_WHOLE, Shard(0), Shard(1))]


def _relu_avg_pool_layouts(*_: Any) -> list[Layout]:
    return _by_images_or_channels(1)


def _relu_avg_pool_backward_layouts(*_: Any) -> list[Layout]:
    return _by_images_or_channels(2)


# --- the choice among them ---


def _cost(tensor: DTensor, before: Placement, after: Placement) -> float:
    """Of the data that has to move, in elements of the tensor."""
    if before == after or before.is_replicate():
        return 0
    if before.is_partial():
        return tensor.numel() * (1 if after.is_shard() else 2)
    return tensor.numel() * (0.5 if after.is_shard() else 1)


def _can_be_cut(tensor: DTensor, placements: Sequence[Placement]) -> bool:
    """Into pieces of which none is empty."""
    pieces = [1] * tensor.dim()
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            pieces[placement.dim] *= tensor.device_mesh.size(dim)
    return all(count <= size for count, size in zip(pieces, tensor.shape, strict=True) if count > 1)


def _cheapest(tensors: Sequence[DTensor | None], layouts: Sequence[Layout], mesh: DeviceMesh) -> tuple[Layout, ...]:
    """A layout for each dimension of the mesh; of equals the first."""
    present = [(number, tensor) for number, tensor in enumerate(tensors) if tensor is not None]

    def possible(choice: tuple[Layout, ...]) -> bool:
        return all(_can_be_cut(tensor, [layout.inputs[number] for layout in choice]) for number, tensor in present)

    def cost(choice: tuple[Layout, ...]) -> float:
        return sum(
            _cost(tensor, before, layout.inputs[number])
            for number, tensor in present
            for before, layout in zip(tensor.placements, choice, strict=True)
        )

    return min(filter(possible, product(layouts, repeat=mesh.ndim)), key=cost)


# --- the call ---


def _common_mesh(operator: OpOverload, tensors: Sequence[Tensor | None]) -> DeviceMesh:
    meshes = [tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)]
    if len(meshes) < sum(tensor is not None for tensor in tensors):
        raise RuntimeError(f"{operator}: got DTensors and other tensors mixed; distribute all of them")
    if any(mesh != meshes[0] for mesh in meshes):
        raise RuntimeError(f"{operator}: all tensors must be on one device mesh, got {meshes}")
    return meshes[0]


def _share(tensor: DTensor, wanted: Sequence[Placement]) -> Tensor:
    """This process's part. Where a sum is asked for, the first process has all and the others have zeros."""
    placements, first = [], True
    coordinate = tensor.device_mesh.get_coordinate()
    for dim, (before, after) in enumerate(zip(tensor.placements, wanted, strict=True)):
        split = after.is_partial() and before != after
        placements.append(_WHOLE if split else after)
        first = first and not (split and coordinate and coordinate[dim] > 0)
    # Detached: the derivative is the operator's, and torch 2.11 cannot make a tensor with one into another here.
    local = tensor.detach().redistribute(placements=placements).to_local()  # type: ignore[attr-defined]
    return local if first else torch.zeros_like(local)


def _without_data(value: Any) -> Any:
    if not isinstance(value, DTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _on_shares(operator: OpOverload, layouts: list[Layout], args: Sequence[Any]) -> Any:
    count = len(layouts[0].inputs)
    tensors, options = args[:count], args[count:]
    mesh = _common_mesh(operator, tensors)
    expected = operator(*map(_without_data, args))  # sizes and strides, or what is wrong with the arguments
    choice = _cheapest(tensors, layouts, mesh)
    shares = [
        None if tensor is None else _share(tensor, [layout.inputs[number] for layout in choice])
        for number, tensor in enumerate(tensors)
    ]
    if operator is ops.conv_relu_max_pool2d_backward:
        assert shares[0] is not None
        (batch, channels, *_), (input_size, weight_size, *options) = shares[0].shape, options
        options = ((batch, *input_size[1:]), (channels, *weight_size[1:]), *options)
    outputs = operator(*shares, *options)

    def distributed(output: Tensor, like: Tensor, placements: Sequence[Placement]) -> DTensor:
        return DTensor.from_local(output, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())

    if isinstance(outputs, Tensor):
        return distributed(outputs, expected, [layout.outputs[0] for layout in choice])
    # A gradient that is not wanted is an empty tensor, everywhere the same.
    wanted = options[-1] if len(outputs) == 3 else (True,) * len(outputs)
    return tuple(
        distributed(output, like, [layout.outputs[number] if wanted[number] else _WHOLE for layout in choice])
        for number, (output, like) in enumerate(zip(outputs, expected, strict=True))
    )


_LAYOUTS: dict[OpOverload, Callable[..., list[Layout]]] = {
    ops.conv_relu_max_pool2d: _conv_layouts,
    ops.conv_relu_max_pool2d_with_indices: _conv_layouts,
    ops.conv_relu_max_pool2d_backward: _conv_backward_layouts,
    ops.conv_at_indices: _conv_at_indices_layouts,
    ops.linear: _linear_layouts,
    ops.linear_relu: _linear_relu_layouts,
    ops.linear_backward: _linear_backward_layouts,
    ops.linear_relu_backward: _linear_relu_backward_layouts,
    ops.relu_avg_pool2d: _relu_avg_pool_layouts,
    ops.relu_avg_pool2d_backward: _relu_avg_pool_backward_layouts,
}


def _rule(cls: type[DTensor], operator: OpOverload, types: Any, args: Sequence[Any], kwargs: Any) -> Any:
    weight = args[1]
    if operator is ops.linear_relu and isinstance(weight, DTensor) and Shard(1) in weight.placements:
        # By the columns of weight, as stock would: the sum of the products moves, and ReLU comes after.
        products = ops.linear(*args)
        return products.redistribute(placements=[_WHOLE if p.is_partial() else p for p in products.placements]).relu()
    return _on_shares(operator, _LAYOUTS[operator](*args), args)


for _operator in _LAYOUTS:
    torch.library.register_torch_dispatch(_operator, DTensor, _rule)
