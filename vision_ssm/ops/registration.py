"""Registers operators with `torch.library`: one opaque node for autograd, `torch.compile` and `torch.export`.

An implementation of an operator (the chunked path, a kernel module) is anything with two functions:

- ``forward(*inputs)`` returns the tensors that the schema names;
- ``backward(*gradients of the outputs, *inputs)`` returns the gradients of the floating-point inputs that are given,
  as a dict from the names in the schema, in any floating dtype.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

import vision_ssm.kernels as kernels

from .backend import select_backend


class Implementation(Protocol):
    """What can run an operator."""

    forward: Callable[..., Any]
    backward: Callable[..., dict[str, Tensor]]


def _takes_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def register_operator(
    name: str,
    arguments: str,
    returns: Sequence[str],
    chunked: Implementation,
    fake: Callable[..., Any],
    flops: Callable[..., int],
) -> Callable[..., Any]:
    """Define the operators ``vision_ssm::{name}`` and ``vision_ssm::{name}_backward``.

    Args:
        name: name of the operator, known to `select_backend`.
        arguments: the schema's arguments; the first is a tensor, whose device and dtype choose the implementation.
        returns: names of the output tensors.
        chunked: the implementation for every device without a kernel.
        fake: gives empty outputs for inputs without data.
        flops: gives the FLOPs of the forward operator for its inputs, tensors replaced by shapes.

    Returns:
        The forward operator.
    """

    def implementation(tensor: Tensor) -> Implementation:
        return kernels.find(name) if select_backend(tensor, name).name == "triton" else chunked

    def run(*inputs: Any) -> Any:
        with torch.autocast(inputs[0].device.type, enabled=False):
            outputs = implementation(inputs[0]).forward(*inputs)
        if isinstance(outputs, Tensor):
            return outputs.contiguous()
        return tuple(output.contiguous() for output in outputs)

    def run_backward(*gradients_and_inputs: Any) -> list[Tensor]:
        inputs = gradients_and_inputs[len(returns) :]
        with torch.autocast(inputs[0].device.type, enabled=False):
            gradients = implementation(inputs[0]).backward(*gradients_and_inputs)
        return [
            gradients[argument].to(value.dtype).contiguous()
            for argument, value in zip(names, inputs)
            if _takes_gradient(value)
        ]

    outgoing = ", ".join(f"Tensor {output}" for output in returns)
    incoming = ", ".join(f"Tensor grad_{output}" for output in returns)
    forward = torch.library.custom_op(
        f"vision_ssm::{name}", run, mutates_args=(), schema=f"({arguments}) -> ({outgoing})"
    )
    backward = torch.library.custom_op(
        f"vision_ssm::{name}_backward", run_backward, mutates_args=(), schema=f"({incoming}, {arguments}) -> Tensor[]"
    )
    names = [argument.name for argument in forward._opoverload._schema.arguments]
    forward.register_fake(fake)

    @backward.register_fake
    def fake_backward(*gradients_and_inputs: Any) -> list[Tensor]:
        inputs = gradients_and_inputs[len(returns) :]
        return [value.new_empty(value.shape) for value in inputs if _takes_gradient(value)]

    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
        ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]

    def differentiate(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if kept is None else kept[0] for kept in ctx.inputs]
        results = iter(backward(*gradients, *inputs))
        return tuple(next(results) if _takes_gradient(value) else None for value in inputs)

    forward.register_autograd(differentiate, setup_context=setup_context)

    @register_flop_formula(getattr(torch.ops.vision_ssm, name))
    def forward_flops(*shapes: Any, **_: Any) -> int:
        return flops(*shapes)

    @register_flop_formula(getattr(torch.ops.vision_ssm, f"{name}_backward"))
    def backward_flops(*shapes: Any, **_: Any) -> int:
        return 2 * flops(*shapes[len(returns) :])

    return forward
