"""Training a module through CUDA graphs: recorded once, then replayed, so that the host launches two graphs a step."""

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from vision_ssm.ops.autocast import autocast_dtype

from .checkpoint import preserved_rng

WARM_UP = 3
"""Iterations before a recording, in which kernels are compiled and tuned and lazily made tables appear."""


class GraphedCall:
    """Calls a module; in training through CUDA graphs of its forward and backward pass.

    The first call in training mode with gradients records, every further call like it (shape, dtype and device of the
    image, autocast) replays. All others run the module as it is, so that there is never more than one recording:
    evaluation, calls without gradients, a smaller last batch, another image size. So do calls after parameters were
    frozen or moved, and calls while hooks watch the module, which a replay would not call.

    Random numbers go on in a replay as they would in the module itself, and recording leaves no trace: the random
    generators and the buffers of the module (statistics of batch norms) are afterwards what they were before. The
    module is neither patched nor registered anywhere; a copy or a pickle of this object has no recording.

    What a replay returns lies in memory that the next replay overwrites, and so do the gradients that it leaves in the
    parameters: every forward pass must be followed by its backward pass and the optimizer step before the next one.
    The recording keeps the memory of one forward and backward pass to itself. Python code of the module does not run
    in a replay: what it decides, such as rates of dropout, stays as recorded. In a distributed run every process has
    its own recording, which holds no communication: gradients leave it as from a backward pass without graphs.

    Args:
        module: takes an image and returns a tensor, or a tuple or dict of tensors.
        batch_size: images of the call to record; None takes the first one. A resumed run may begin with the smaller
            last batch of an epoch, which is not the one to record.
    """

    def __init__(self, module: nn.Module, batch_size: int | None = None) -> None:
        self.module = module
        self.batch_size = batch_size
        self._recording: _Recording | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_recording": None}

    def __call__(self, image: Tensor) -> Any:
        """The module's output for `image` (B, C, H, W).

        Raises:
            ValueError: the module has hooks when it is to be recorded.
            RuntimeError: the module cannot be recorded, or memory does not suffice for it.
        """
        if not (self.module.training and torch.is_grad_enabled()) or image.requires_grad:
            return self.module(image)
        if self._recording is None and self.batch_size in (None, len(image)):
            self._recording = _record(self.module, image)
        if self._recording is None or not self._recording.fits(image):
            return self.module(image)
        return self._recording.replay(image)


@dataclass
class _Recording:
    """CUDA graphs of a module, and what they hold for."""

    graphed: Callable[..., Any]
    signature: tuple
    modules: list[nn.Module]
    parameters: list[nn.Parameter]
    buffers: list[Tensor]
    places: list[tuple[int, bool]]

    def fits(self, image: Tensor) -> bool:
        """Whether a replay computes what the module would."""
        return (
            _signature(image) == self.signature
            and _places([*self.parameters, *self.buffers]) == self.places
            and not any(map(_has_hooks, self.modules))
        )

    def replay(self, image: Tensor) -> Any:
        return self.graphed(image, *self.parameters)


def _capture_options() -> dict[str, str]:
    """The thread that pins the loader's memory goes on during a capture, which torch allows from some release on."""
    known = inspect.signature(torch.cuda.make_graphed_callables).parameters
    return {"capture_error_mode": "thread_local"} if "capture_error_mode" in known else {}


def _record(module: nn.Module, image: Tensor) -> _Recording:
    _check_hooks(module)
    names, parameters = zip(*module.named_parameters(), strict=True)
    buffers = list(module.buffers())
    device, dtype = image.device.type, autocast_dtype(image)

    # Autocast begins inside of what is recorded, so that it covers the forward pass alone, as in training without
    # graphs. Weights cast in one call must not be kept for another: its memory is no part of the recording.
    def forward(image: Tensor, *parameters: Tensor) -> Any:
        with torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False):
            return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (image,))

    # Recorded are aliases of the parameters. The nodes that accumulate the gradients of what is recorded live on with
    # the recording, bound to its stream; the parameters themselves keep theirs on the stream of training.
    aliases = [parameter.detach().requires_grad_(parameter.requires_grad) for parameter in parameters]
    try:
        with torch.cuda.device_of(image), _unchanged(buffers), torch.autocast(device, enabled=False):
            graphed = torch.cuda.make_graphed_callables(
                forward,
                (image.detach().clone(), *aliases),
                num_warmup_iters=WARM_UP,
                allow_unused_input=True,  # as in a backward pass without graphs, where their gradient is None
                **_capture_options(),
            )
    except RuntimeError as error:
        error.add_note(
            "This happened while the module was recorded as CUDA graphs (cuda_graphs=True, --cuda-graphs). A recording "
            "needs a CUDA device and memory for a forward and backward pass of its own, and nothing in it may wait for "
            "the GPU or checkpoint activations. Train without it, or, if memory ran out, with a smaller batch."
        )
        raise
    torch.cuda.empty_cache()  # the warm-up's memory belongs to a stream that is not used again
    print_log(
        f"Recorded {type(module).__name__} as CUDA graphs for images {tuple(image.shape)} of {image.dtype}, "
        f"{'no autocast' if dtype is None else f'autocast to {dtype}'}; others run without",
        logger="current",
        level=logging.INFO,
    )
    return _Recording(
        graphed=graphed,
        signature=_signature(image),
        modules=list(module.modules()),
        parameters=list(parameters),
        buffers=buffers,
        places=_places([*parameters, *buffers]),
    )


def check_graphs(
    module: nn.Module, *, accumulative_counts: int = 1, distributed: bool = False, compiled: bool = False
) -> None:
    """Check that `module` can be trained through a `GraphedCall` in a run of this kind.

    Args:
        module: the module, on the device of training.
        accumulative_counts: iterations per optimizer step.
        distributed: whether the run has a process group.
        compiled: whether torch.compile is applied to the training step.

    Raises:
        ValueError: it cannot; every obstacle is named with what to do about it.
    """
    problems = []
    device = next(module.parameters()).device.type
    if device != "cuda":
        problems.append(f"the model is on the {device}, CUDA graphs need a CUDA device: train on a GPU")
    synchronised = [name for name, part in module.named_modules() if isinstance(part, nn.SyncBatchNorm)]
    if distributed and synchronised:
        problems.append(
            f"{synchronised[0]} is a SyncBatchNorm, which communicates in the forward pass: a recording cannot; use "
            "BatchNorm2d, or train in one process"
        )
    if compiled:
        problems.append("the config sets compile, which replaces what would be recorded: use one of the two")
    if accumulative_counts != 1:
        problems.append(
            f"optim_wrapper.accumulative_counts is {accumulative_counts}, expected 1: a replay overwrites the "
            "gradients of the one before, so that they cannot be summed; set it to 1 and use a larger batch"
        )
    try:
        _check_hooks(module)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"cuda_graphs=True (--cuda-graphs) cannot be used here, switch it off or:\n  {listed}")


def _check_hooks(module: nn.Module) -> None:
    hooked = [name or "the whole module" for name, part in module.named_modules() if _has_hooks(part)]
    if hooked:
        more = f" and {len(hooked) - 3} more" if len(hooked) > 3 else ""
        raise ValueError(
            f"{type(module).__name__} has hooks (on {', '.join(hooked[:3])}{more}), which CUDA graphs would not call: "
            "remove them before training"
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _signature(image: Tensor) -> tuple:
    return image.shape, image.dtype, image.device, autocast_dtype(image)


def _places(tensors: Iterable[Tensor]) -> list[tuple[int, bool]]:
    """A recording reads and writes memory by address, and has gradients for what required them."""
    return [(tensor.data_ptr(), tensor.requires_grad) for tensor in tensors]


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    """Whatever happens inside leaves the random generators and `buffers` as they were."""
    saved = [buffer.clone() for buffer in buffers]
    try:
        with preserved_rng():
            yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, saved, strict=True):
                buffer.copy_(value)
