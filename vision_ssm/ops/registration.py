"""Registers operators with `torch.library`: one opaque node for autograd, `torch.compile` and `torch.export`.

An implementation of an operator (the chunked path, a kernel module) is anything with two functions:

- ``forward(*inputs)`` returns the tensors that the schema names;
- ``backward(*gradients of the outputs, *inputs)`` returns the gradients of the floating-point inputs that are given,
  as a dict from the names in the schema, in any floating dtype. They may be parts of one tensor that do not overlap.
  The gradient of an output that nothing depends on is an empty tensor, (0,).

An operator may also keep tensors from its forward pass for its backward pass. Then its last argument is ``bool save``,
and an implementation that keeps something has a third function, ``empty_saved(*inputs)``, which allocates those
tensors; its ``forward`` returns them behind the outputs, and its ``backward`` takes them between the gradients and the
inputs. They are empty, (0,), where `save` is false or the implementation keeps nothing.

Under `torch.func` and forward-mode differentiation operators run the functions of `plain` instead, which are slow and
made of PyTorch's own operators alone.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

import vision_ssm.kernels as kernels

from .autocast import without_autocast
from .backend import COMPOSED, select_backend, warn_of_slow_path

_LIBRARY = torch.library.Library("vision_ssm", "FRAGMENT")
_replaced: dict[str, Callable[..., Any]] = {}


@contextlib.contextmanager
def replaced_operators(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within this block, in all threads, operators run these functions instead, and leave no nodes of their own.

    Args:
        functions: for the name of an operator, what takes the arguments of its schema and returns its outputs. Autograd
            sees what they do.
    """
    before = dict(_replaced)
    _replaced.update(functions)
    try:
        yield
    finally:
        _replaced.clear()
        _replaced.update(before)


def are_replaced() -> bool:
    """Whether some operators run other functions now."""
    return bool(_replaced)


class Implementation(Protocol):
    """What can run an operator."""

    forward: Callable[..., Any]
    backward: Callable[..., dict[str, Tensor]]


def _takes_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def wants_gradient(*values: Any) -> bool:
    """Whether a backward pass may follow: gradients are on and some tensor of `values` asks for them."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def is_transformed() -> bool:
    """Whether `torch.func` or forward-mode differentiation follows what is computed, as a `torch.autograd.Function`
    with a backward pass alone does not let them.

    Raises:
        RuntimeError: forward-mode differentiation is compiled, where tangents would be lost; a compiler that may leave
            the graph computes it outside then.
    """
    if torch.compiler.is_compiling():
        if forward_ad._current_level >= 0:
            raise RuntimeError(
                "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad) does not go through compiled "
                "models of vision_ssm: leave it out of the compiled function, or compile without fullgraph=True"
            )
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _runs_directly(x: Tensor) -> bool:
    """Whether `x` has values, and nobody looks for operators: no compiler, export, tracing or counter of FLOPs."""
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack()
    return not (watched or x.is_meta)


def register_operator(
    name: str,
    arguments: str,
    returns: Sequence[str],
    chunked: Implementation,
    fake: Callable[..., Any],
    flops: Callable[..., int],
    saved: Sequence[str] = (),
) -> Callable[..., Any]:
    """Define the operators ``vision_ssm::{name}`` and ``vision_ssm::{name}_backward``.

    Args:
        name: name of the operator, known to `select_backend`.
        arguments: the schema's arguments; the first is a tensor, whose device and dtype choose the implementation.
        returns: names of the output tensors.
        chunked: the implementation for every device without a kernel; for every device, of a composed operator.
        fake: gives empty outputs for inputs without data.
        flops: gives the FLOPs of the forward operator for its inputs, tensors replaced by shapes.
        saved: names of the tensors that are kept for the backward pass; not to be used by callers.

    Returns:
        A function that calls the operator, or what it runs; its result is a tuple if there is more than one tensor in
        `returns` and `saved`.
    """

    def implementation(tensor: Tensor) -> Implementation:
        if name in COMPOSED:
            return chunked
        return kernels.find(name) if select_backend(tensor, name).name == "triton" else chunked

    def complete(outputs: Any, inputs: Sequence[Any]) -> Any:
        results = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        if len(results) == len(returns):
            results += [inputs[0].new_empty(0) for _ in saved]
        results = [result.contiguous() for result in results]
        return results[0] if len(results) == 1 else tuple(results)

    def run_in_pytorch(function: Callable[..., Any], *inputs: Any) -> Any:
        with without_autocast(inputs[0]):
            return complete(function(*inputs), inputs)

    def run(*inputs: Any) -> Any:
        if name in _replaced:
            return run_in_pytorch(_replaced[name], *inputs)
        chosen = implementation(inputs[0])
        if chosen is chunked:
            return run_in_pytorch(chunked.forward, *inputs)
        return complete(chosen.forward(*inputs), inputs)

    def run_backward(*everything: Any) -> list[Tensor]:
        inputs = everything[len(returns) + len(saved) :]
        chosen = implementation(inputs[0])
        if not hasattr(chosen, "empty_saved"):
            everything = (*everything[: len(returns)], *inputs)
        if chosen is chunked:
            with without_autocast(inputs[0]):
                gradients = chosen.backward(*everything)
        else:
            gradients = chosen.backward(*everything)
        return [
            gradients[argument].to(value.dtype) for argument, value in zip(names, inputs) if _takes_gradient(value)
        ]

    def run_backward_apart(*everything: Any) -> list[Tensor]:
        return [gradient.contiguous() for gradient in run_backward(*everything)]

    outgoing = ", ".join(f"Tensor {output}" for output in (*returns, *saved))
    incoming = ", ".join([f"Tensor grad_{output}" for output in returns] + [f"Tensor saved_{kept}" for kept in saved])
    # defined on the library itself: `torch.library.custom_op` checks every call for aliases, which costs more time
    # than a small kernel takes
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
    for qualified, schema, function in (
        (name, f"({arguments}) -> ({outgoing})", run),
        (f"{name}_backward", f"({incoming}, {arguments}) -> Tensor[]", run_backward_apart),
    ):
        _LIBRARY.define(qualified + schema, tags=tags)
        _LIBRARY.impl(qualified, function, "CompositeExplicitAutograd")
    forward = getattr(torch.ops.vision_ssm, name).default
    backward = getattr(torch.ops.vision_ssm, f"{name}_backward").default
    names = [argument.name for argument in forward._schema.arguments]

    @torch.library.register_fake(f"vision_ssm::{name}", lib=_LIBRARY)
    def fake_forward(*inputs: Any) -> Any:
        outputs = fake(*inputs)
        if not saved:
            return outputs
        allocate = getattr(implementation(inputs[0]), "empty_saved", None)
        kept = allocate(*inputs) if allocate and inputs[-1] else [inputs[0].new_empty(0) for _ in saved]
        return (*([outputs] if isinstance(outputs, Tensor) else outputs), *kept)

    @torch.library.register_fake(f"vision_ssm::{name}_backward", lib=_LIBRARY)
    def fake_backward(*everything: Any) -> list[Tensor]:
        inputs = everything[len(returns) + len(saved) :]
        return [value.new_empty(value.shape) for value in inputs if _takes_gradient(value)]

    def keep_for_backward(ctx: Any, inputs: tuple, output: Any) -> None:
        kept = output[len(returns) :] if saved else ()
        ctx.dtypes = [value.dtype for value in ([output] if isinstance(output, Tensor) else output[: len(returns)])]
        ctx.save_for_backward(*kept, *(value for value in inputs if isinstance(value, Tensor)))
        ctx.inputs = [None if isinstance(value, Tensor) else (value,) for value in inputs]
        ctx.set_materialize_grads(False)  # the kept tensors have none

    def differentiate(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        if all(gradient is None for gradient in gradients[: len(returns)]):
            return tuple(None for _ in ctx.inputs)
        unpacked = ctx.saved_tensors
        kept, tensors = unpacked[: len(saved)], iter(unpacked[len(saved) :])
        inputs = [next(tensors) if value is None else value[0] for value in ctx.inputs]
        given = [
            inputs[0].new_empty(0, dtype=dtype) if gradient is None else gradient
            for gradient, dtype in zip(gradients, ctx.dtypes)
        ]
        direct = _runs_directly(inputs[0]) and not torch.is_grad_enabled()  # else a second derivative is asked for
        results = iter((run_backward if direct else backward)(*given, *kept, *inputs))
        return tuple(next(results) if _takes_gradient(value) else None for value in inputs)

    class Direct(torch.autograd.Function):
        """The operator without the dispatcher, which takes longer on the host than a small kernel on the GPU."""

        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = run(*inputs)
            keep_for_backward(ctx, inputs, output)
            return output

        backward = staticmethod(differentiate)

    def call(*inputs: Any) -> Any:
        if name in _replaced:
            return run(*inputs)
        if is_transformed():
            from .plain import OPERATORS  # not earlier, as those modules need this one

            reason = "torch.func and forward-mode differentiation see through PyTorch's own operators alone"
            warn_of_slow_path(inputs[0], name, "plain PyTorch path", reason)
            return run_in_pytorch(OPERATORS[name], *inputs)
        if not _runs_directly(inputs[0]):
            return forward(*inputs)
        return Direct.apply(*inputs) if wants_gradient(*inputs) else run(*inputs)

    torch.library.register_autograd(f"vision_ssm::{name}", differentiate, setup_context=keep_for_backward, lib=_LIBRARY)

    def refuse(ctx: Any, *gradients: Any) -> None:
        raise RuntimeError(f"vision_ssm::{name}_backward has no derivative: gradients of gradients are not supported")

    torch.library.register_autograd(f"vision_ssm::{name}_backward", refuse, lib=_LIBRARY)

    @register_flop_formula(getattr(torch.ops.vision_ssm, name))
    def forward_flops(*shapes: Any, **_: Any) -> int:
        return flops(*shapes)

    @register_flop_formula(getattr(torch.ops.vision_ssm, f"{name}_backward"))
    def backward_flops(*shapes: Any, **_: Any) -> int:
        return 2 * flops(*shapes[len(returns) + len(saved) :])

    return call
