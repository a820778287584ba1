"""Labels of whole volumes from 2-D networks: slice by slice or by sliding windows, test-time flips, clean-up.

The papers' way (VM-UNet, arXiv:2402.02491; MSVM-UNet, arXiv:2408.13735): each slice is resized to the network's size by
cubic splines, and the labels are resized back to the slice by nearest neighbour. Sliding windows are MONAI's.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from vision_ssm.data.progress import tracked_map
from vision_ssm.registry import suggest

from .optim import PRECISIONS

FLIPS = {"horizontal": (3,), "vertical": (2,), "both": (2, 3)}
"""Test-time flips and the axes of (B, C, H, W) that they turn round."""
MAX_CLASSES = 256
MAX_THREADS = 16
BATCHES_OF_WINDOWS = 8  # that slices make together, where they are small: few batches are then less than full

Predictor = Callable[[Tensor], Tensor]


def resize_slice(image: np.ndarray, size: tuple[int, int], order: int) -> np.ndarray:
    """`scipy.ndimage.zoom` of the last two axes to `size` (H, W), each leading one on its own.

    With the default mode of zoom, the last row or column is 0 at some sizes (115 to 224, for one), where rounding puts
    it outside of the image. Mode ``mirror`` gives equal values everywhere else.

    Args:
        image: (..., H, W).
        size: H and W of the result.
        order: of the spline: 0 for labels, 3 for images.
    """
    from scipy.ndimage import zoom

    if image.shape[-2:] == size:
        return image
    factors = (size[0] / image.shape[-2], size[1] / image.shape[-1])
    flat = image.reshape(-1, *image.shape[-2:])  # (N, H, W)
    resized = [zoom(part, factors, order=order, mode="mirror") for part in flat]
    return np.stack(resized).reshape(*image.shape[:-2], *size)


def predict_volume(
    model: nn.Module | Predictor,
    image: np.ndarray,
    *,
    size: tuple[int, int] | int | None = (224, 224),
    window: tuple[int, int] | int | None = None,
    overlap: float = 0.5,
    flips: Sequence[str] = (),
    batch: int = 8,
    device: torch.device | str | None = None,
    amp: str | None = None,
) -> np.ndarray:
    """Labels of a volume, predicted slice by slice.

    Only a few slices are on the device at a time, so that memory does not grow with the depth. A model is in evaluation
    mode meanwhile. Where it returns a tuple, its first entry counts.

    Args:
        model: (B, C, H, W) float32 to raw scores (B, K, H, W). K = 1 is binary: label 1 where the sigmoid is at least
            0.5; else the label is the class of the highest softmax.
        image: (D, C, H, W) float, normalised as the model needs it; D = 1 for an image.
        size: slices are resized to this size (cubic spline), and their labels back (nearest neighbour). None: they keep
            their own.
        window: predict windows of this size and blend their probabilities by a Gaussian weight; slices keep their size
            and `size` is not used. Slices smaller than the window are continued beyond their border.
        overlap: share of a window that the next one covers again, 0 up to 1 (not included).
        flips: also predict the slices flipped, any of ``"horizontal"``, ``"vertical"``, ``"both"``, and average the
            probabilities.
        batch: slices or windows at a time.
        device: the model is moved there; by default it stays where it is.
        amp: ``"bf16"`` or ``"fp16"`` for autocast; None or ``"fp32"`` for none.

    Returns:
        (D, H, W) uint8.

    Raises:
        ValueError: an image of another shape or with values that are not finite, window, overlap, flips or batch out of
            range, or a model whose scores are not of the size of its input.
        ImportError: a window without MONAI installed.
    """
    _check_image(image)
    size, window = _pair(size, "size"), _pair(window, "window")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is the share of a window that the next one covers, from 0 to below 1; got {overlap}")
    if batch < 1:
        raise ValueError(f"batch is the number of slices at a time, at least 1; got {batch}")
    for flip in flips:
        if flip not in FLIPS:
            raise ValueError(f"unknown flip {flip!r}.{suggest(str(flip), FLIPS)}")
    if amp is not None and amp not in PRECISIONS:
        raise ValueError(f"unknown precision {amp!r}.{suggest(str(amp), PRECISIONS)}")
    place = _place(model, device)
    predict: Predictor = _Probabilities(model, flips, None if amp is None else PRECISIONS[amp])
    own = image.shape[2:]
    shape = own if window is not None or size is None else size
    step = batch
    if window is not None:
        predict = _windowed(predict, window, overlap, batch)
        step = min(batch, math.ceil(BATCHES_OF_WINDOWS * batch / _window_count(own, window, overlap)))
    labels = np.empty((len(image), *own), dtype=np.uint8)
    threads = min(MAX_THREADS, os.cpu_count() or 1)
    with torch.no_grad(), _evaluating(model):
        for start in range(0, len(image), step):
            slices = image[start : start + step]  # (B, C, H, W)
            resized = list(tracked_map(lambda part: resize_slice(part, shape, order=3), slices, threads))
            inputs = torch.from_numpy(np.stack(resized).astype(np.float32, copy=False)).to(place)
            found = _decide(predict(inputs)).cpu().numpy()  # (B, h, w)
            back = tracked_map(lambda part: resize_slice(part, own, order=0), found, threads)
            labels[start : start + step] = list(back)
    return labels


def keep_largest(labels: np.ndarray, classes: Sequence[int] | None = None) -> np.ndarray:
    """Only the largest connected component of each class; the rest becomes background.

    Voxels that touch at a face, an edge or a corner are connected, as in MONAI's ``KeepLargestConnectedComponent``. Of
    components of one size the first one in memory order stays.

    Args:
        labels: integers (D, H, W) or (H, W), 0 for background; not changed.
        classes: the classes to clean; None for all but the background.

    Returns:
        Like `labels`.

    Raises:
        ValueError: labels that are no integers or negative, or a class that is no positive number.
    """
    from scipy.ndimage import find_objects, generate_binary_structure, label

    if labels.dtype.kind not in "iu" or (labels.size and labels.min() < 0):
        raise ValueError(f"labels are integers from 0 on, got {labels.dtype}")
    wrong = [number for number in classes or () if number < 1]
    if wrong:
        raise ValueError(f"classes are numbers from 1 on, 0 is the background; got {wrong[0]}")
    cleaned = labels.copy()
    structure = generate_binary_structure(labels.ndim, labels.ndim)
    for number, box in enumerate(find_objects(labels), start=1):
        if box is None or (classes is not None and number not in classes):
            continue
        components, count = label(labels[box] == number, structure)
        if count > 1:
            sizes = np.bincount(components.ravel())
            sizes[0] = 0  # what is not of this class
            cleaned[box][(components > 0) & (components != sizes.argmax())] = 0
    return cleaned


class _Probabilities:
    """Scores of a model to float32 probabilities (B, K, H, W), averaged over flips."""

    def __init__(self, model: nn.Module | Predictor, flips: Sequence[str], dtype: torch.dtype | None) -> None:
        self.model = model
        self.axes = [FLIPS[flip] for flip in flips]
        self.dtype = dtype

    def __call__(self, inputs: Tensor) -> Tensor:
        total = self._once(inputs)
        for axes in self.axes:
            total += self._once(inputs.flip(axes)).flip(axes)
        return total / (len(self.axes) + 1) if self.axes else total

    def _once(self, inputs: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            scores = self.model(inputs)
        scores = scores if isinstance(scores, Tensor) else scores[0]
        if scores.ndim != 4 or scores.shape[2:] != inputs.shape[2:] or scores.shape[1] > MAX_CLASSES:
            raise ValueError(
                f"the model gives {tuple(scores.shape)} for an input of {tuple(inputs.shape)}: scores are (B, K, H, W) "
                f"of the input's size, with at most {MAX_CLASSES} classes"
            )
        scores = scores.float()
        return scores.sigmoid() if scores.shape[1] == 1 else scores.softmax(1)


def _decide(probabilities: Tensor) -> Tensor:
    """(B, K, H, W) to labels (B, H, W) uint8."""
    if probabilities.shape[1] == 1:
        return (probabilities[:, 0] >= 0.5).to(torch.uint8)
    return probabilities.max(1).indices.to(torch.uint8)  # on a CPU four times as fast as argmax


def _windowed(predict: Predictor, window: tuple[int, int], overlap: float, batch: int) -> Predictor:
    try:
        from monai.inferers import SlidingWindowInferer
    except ImportError as error:
        raise ImportError("sliding windows need MONAI: pip install vision_ssm[medical]") from error
    # zeros beyond the border would be a value like any other in normalised images
    inferer = SlidingWindowInferer(window, batch, overlap, mode="gaussian", padding_mode="replicate")
    return lambda inputs: inferer(inputs, predict)


def _window_count(size: Sequence[int], window: Sequence[int], overlap: float) -> int:
    """Windows that cover an image of this size."""
    counts = [
        math.ceil(max(side - part, 0) / max(int(part * (1 - overlap)), 1)) + 1
        for side, part in zip(size, window, strict=True)
    ]
    return math.prod(counts)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 4 or not image.size or image.dtype.kind != "f":
        raise ValueError(f"image is float (D, C, H, W), got {image.dtype} {image.shape}; a 2-D image has D = 1")
    for number, part in enumerate(image):
        if not np.isfinite(part).all():
            raise ValueError(f"slice {number} of the image has values that are not finite: clean or clip the image")


def _pair(size: tuple[int, int] | int | None, name: str) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is a positive height and width in pixels, or one number for both; got {size!r}")
    return pair


def _place(model: nn.Module | Predictor, device: torch.device | str | None) -> torch.device:
    """The device of the inputs; a model is moved there if it is given."""
    if isinstance(model, nn.Module):
        if device is not None:
            model.to(device)
        first = next(model.parameters(), None)
        if first is not None:
            return first.device
    return torch.device("cpu" if device is None else device)


@contextmanager
def _evaluating(model: nn.Module | Predictor) -> Iterator[None]:
    """A module is in evaluation mode within the block; each part returns to its own mode afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
