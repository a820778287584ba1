"""The implicit attention of a scan: how strongly one cell of a mixer's output depends on every cell of its input.

Exact for any mixer, because it is the Jacobian itself: entry j of the map of query q is the Frobenius norm of
``d y[q] / d x[j]``, a matrix over output and input channels. VMamba (arXiv 2401.10166) draws the activation of query
patches; with softmax attention the corresponding picture would be a row of the attention matrix.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import suggest
from ..scans.hidden_state import HiddenStateMixer
from ..scans.sequence import SequenceScan, TokenLayout
from .pictures import VisualizeError

_MOST_DECADES = 8
_MOST_ELEMENTS = 2**22  # of the copies of the input for which one backward pass is made


def named_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Token mixers by the names of their blocks, in order."""
    # modules of their own only: a pair of blocks answers with the mixer of its first
    owned = ((name, module._modules.get("mixer")) for name, module in model.named_modules())
    return {name: mixer for name, mixer in owned if mixer is not None}


def find_mixer(model: nn.Module, block: str | None) -> tuple[str, nn.Module]:
    """Name and mixer of a block; by default the block in the middle of the network.

    Raises:
        VisualizeError: no block has a mixer, or not this one.
    """
    mixers = named_mixers(model)
    if not mixers:
        raise VisualizeError(f"{getattr(model, 'variant', None) or type(model).__name__} has no token mixer")
    name = list(mixers)[len(mixers) // 2] if block is None else block
    if name not in mixers:
        hint = suggest(name, mixers, 5) or f" They go from {next(iter(mixers))} to {list(mixers)[-1]}."
        raise VisualizeError(f"no block {name!r} with a token mixer.{hint}")
    return name, mixers[name]


@contextlib.contextmanager
def _calls_of(mixer: nn.Module) -> Iterator[dict[str, Any]]:
    """What a mixer is given, under ``tokens`` and ``layout``, whichever of its methods a block calls."""
    seen: dict[str, Any] = {}
    forms = ((SequenceScan, "scan_tokens"), (HiddenStateMixer, "mix"))
    method = next((name for cls, name in forms if isinstance(mixer, cls)), "forward")
    original: Callable = getattr(mixer, method)

    def watched(x: Tensor, *arguments: Any) -> Any:
        seen.setdefault("tokens", x.detach())
        seen.setdefault("layout", arguments[0] if arguments else None)
        return original(x, *arguments)

    setattr(mixer, method, watched)
    try:
        yield seen
    finally:
        delattr(mixer, method)


def mixer_input(model: nn.Module, mixer: nn.Module, image: Tensor) -> tuple[Tensor, TokenLayout | None]:
    """What a mixer of a model is given for an image (C, H, W): a map (1, H', W', C'), or tokens (1, T, C') and their
    layout."""
    with _calls_of(mixer) as seen, torch.no_grad():
        model(image[None].to(next(model.parameters()).device))
    if not seen:
        raise VisualizeError("the model did not run that mixer")
    return seen["tokens"], seen["layout"]


def query_weights(
    mixer: nn.Module, x: Tensor, query: tuple[int, int], layout: TokenLayout | None = None
) -> tuple[Tensor, Tensor]:
    """How strongly the output of one cell depends on every input.

    Args:
        mixer: a token mixer in eval mode.
        x: its input, a map (1, H, W, C), or tokens (1, T, C) with their `layout`.
        query: row and column of the cell.
        layout: where class tokens stand.

    Returns:
        (H, W) float64, Frobenius norms of the Jacobian for every cell; and those of the class tokens, (n,).

    Raises:
        VisualizeError: the query lies outside of the map.
    """
    height, width = (layout.height, layout.width) if layout is not None else x.shape[1:3]
    row, column = query
    if not (0 <= row < height and 0 <= column < width):
        raise VisualizeError(f"the query {row}, {column} lies outside of the map of {height} x {width} cells")
    sequence = layout if layout is not None else TokenLayout(height, width)
    place = torch.arange(height * width).view(1, -1, 1)
    outside = torch.full((1, len(sequence.positions), 1), -1)
    index = int((sequence.join(place, outside).flatten() == row * width + column).nonzero())
    channels = x.shape[-1]
    rows = max(1, min(channels, _MOST_ELEMENTS // x.numel()))
    squares = torch.zeros(x[0].numel() // channels, dtype=torch.float64, device=x.device)
    for start in range(0, channels, rows):
        wanted = torch.arange(start, min(start + rows, channels), device=x.device)
        copies = x.expand(len(wanted), *x.shape[1:]).clone().requires_grad_()
        out = mixer(copies) if layout is None else mixer.scan_tokens(copies, layout)  # type: ignore[operator]
        out = out.reshape(len(wanted), -1, channels)[:, index]  # (rows, C)
        (gradient,) = torch.autograd.grad(out.gather(1, wanted[:, None]).sum(), copies)
        squares += gradient.reshape(len(wanted), -1, channels).double().square().sum(dim=(0, 2))
    cells, class_tokens = sequence.split(squares.sqrt().cpu()[None, :, None])
    return cells.view(height, width), class_tokens.flatten()


def on_decades(weights: Tensor) -> tuple[Tensor, int]:
    """Weights on a logarithmic scale: the largest is 1, and 0 is so many powers of ten below it or less.

    Returns the values and these powers: as few as hold 19 of 20 weights that are not 0, at most `_MOST_DECADES`.
    """
    share = weights / weights.max().clamp_min(1e-30)
    low = share[share > 0].quantile(0.05) if share.any() else torch.ones(())
    decades = min(max(math.ceil(-float(low.log10())), 1), _MOST_DECADES)
    return 1 + share.clamp_min(10.0**-decades).log10() / decades, decades


def cell_of(query: tuple[float, float], height: int, width: int) -> tuple[int, int]:
    """Row and column of the cell at a place given by fractions of height and width, 0 to 1."""
    y, x = query
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise VisualizeError(f"--query gives fractions of height and width between 0 and 1, got {y:g} {x:g}")
    return min(int(y * height), height - 1), min(int(x * width), width - 1)
