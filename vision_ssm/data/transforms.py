"""Image transforms from plain config dicts, built on `timm.data` and torchvision.

``dict(train=True, input_size=224, auto_augment="rand-m9-mstd0.5-inc1", erasing_prob=0.25)`` is a complete description;
`ImageFolder` takes it as `transform`. Input: an 8-bit PIL image, ``RGB`` or ``L``. Output: a normalised float32 tensor
(C, H, W). Randomness comes from the global generators, which the dataset seeds per sample.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from timm.data import auto_augment as timm_augment
from timm.data import create_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from vision_ssm.data.keywords import strict_keywords
from vision_ssm.registry import suggest

Transform = Callable[[Any], torch.Tensor]
Size = int | Sequence[int]

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
ERASING_MODES = ("pixel", "rand", "const")
PADDING_MODES = ("constant", "edge", "reflect", "symmetric")


def _choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}.{suggest(str(value), choices)} Valid: {', '.join(choices)}.")
    return value


def _probability(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is a probability between 0 and 1, got {value!r}")
    return float(value)


def _span(name: str, value: Sequence[float] | None) -> tuple[float, float] | None:
    if value is None:
        return None
    if len(value) != 2 or not 0 < value[0] <= value[1]:
        raise ValueError(f"{name} must be a pair (low, high) with 0 < low <= high, got {value!r}")
    return float(value[0]), float(value[1])


def _size(input_size: Size) -> tuple[int, int]:
    size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
    if len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size):
        raise ValueError(f"input_size must be a positive integer or a pair (height, width) of them, got {input_size!r}")
    return size


def _statistics(
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), got {channels!r}")
    result = []
    for name, values, default in (("mean", mean, IMAGENET_DEFAULT_MEAN), ("std", std, IMAGENET_DEFAULT_STD)):
        if values is None:
            values = default if channels == 3 else (sum(default) / len(default),)
        values = (values,) if isinstance(values, (int, float)) else tuple(values)
        if len(values) == 1:
            values = values * channels
        if len(values) != channels:
            raise ValueError(f"{name} has {len(values)} values, the images have {channels} channels: {values!r}")
        result.append(tuple(float(value) for value in values))
    if min(result[1]) <= 0:
        raise ValueError(f"std must be positive, got {result[1]!r}")
    return result[0], result[1]


def _erasing(prob: float, mode: str, count: int) -> list[Transform]:
    _probability("erasing_prob", prob)
    _choice("erasing_mode", mode, ERASING_MODES)
    if count < 1:
        raise ValueError(f"erasing_count must be at least 1, got {count!r}")
    return [RandomErasing(prob, mode=mode, max_count=count, device="cpu")] if prob > 0 else []


def _posterize(image: Image.Image, bits: int, **options: Any) -> Image.Image:
    """timm's posterize; at the largest magnitude no bits are left (a black image), which newer Pillow refuses."""
    return timm_augment.posterize(image, bits, **options) if bits > 0 else Image.new(image.mode, image.size)


def _mend_posterize(steps: Sequence[Transform]) -> None:
    for step in steps:
        # AutoAugment holds a list of lists of operations, RandAugment and AugMix a list of them.
        for operation in getattr(step, "ops", None) or itertools.chain(*getattr(step, "policy", ())):
            if operation.aug_fn is timm_augment.posterize:
                operation.aug_fn = _posterize


@strict_keywords
def train_transform(
    input_size: Size = 224,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    scale: Sequence[float] | None = (0.08, 1.0),
    ratio: Sequence[float] | None = (3 / 4, 4 / 3),
    hflip: float = 0.5,
    vflip: float = 0.0,
    auto_augment: str | None = None,
    color_jitter: float | Sequence[float] | None = 0.4,
    color_jitter_prob: float | None = None,
    grayscale_prob: float = 0.0,
    gaussian_blur_prob: float = 0.0,
    erasing_prob: float = 0.0,
    erasing_mode: str = "pixel",
    erasing_count: int = 1,
) -> Transform:
    """Training transform for photographs: random resized crop and what `timm.data.create_transform` adds to it.

    Args:
        input_size: Side, or (height, width), of the output in pixels.
        channels: 3 for RGB, 1 for grey images.
        mean: Per-channel mean for pixels in [0, 1]; one value serves all channels. Default: ImageNet's (its average for
            grey images).
        std: Per-channel standard deviation, like `mean`.
        interpolation: One of `INTERPOLATIONS`, or ``random`` (bilinear or bicubic, drawn per image).
        scale: Range of the cropped area, relative to the image.
        ratio: Range of the aspect ratio of the crop.
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        auto_augment: Policy in timm's notation, such as ``rand-m9-mstd0.5-inc1``, ``original-mstd0.5``, ``augmix-m5``,
            ``3a``.
        color_jitter: Strength of brightness, contrast and saturation jitter, or one strength for each of them (a fourth
            for hue). As in timm it has no effect beside `auto_augment` (except ``3a``).
        color_jitter_prob: Probability of the jitter; None means always.
        grayscale_prob: Probability of dropping the colours.
        gaussian_blur_prob: Probability of a Gaussian blur.
        erasing_prob: Probability of random erasing, after normalisation.
        erasing_mode: Filling: ``pixel`` noise per pixel, ``rand`` one random colour, ``const`` the mean colour.
        erasing_count: Largest number of erased rectangles.

    Raises:
        ValueError: An option out of range, or a policy that timm cannot read.
        TypeError: Unknown keyword.
    """
    mean, std = _statistics(mean, std, channels)
    erasing = _erasing(erasing_prob, erasing_mode, erasing_count)
    if color_jitter is not None and not isinstance(color_jitter, (int, float)) and len(color_jitter) not in (3, 4):
        raise ValueError(
            "color_jitter must be one strength, or 3 (brightness, contrast, saturation) or 4 (and hue) of them,"
            f" got {color_jitter!r}"
        )
    for name, value in (("grayscale_prob", grayscale_prob), ("gaussian_blur_prob", gaussian_blur_prob)):
        _probability(name, value)
    try:
        transform = create_transform(
            _size(input_size),
            is_training=True,
            scale=_span("scale", scale),
            ratio=_span("ratio", ratio),
            hflip=_probability("hflip", hflip),
            vflip=_probability("vflip", vflip),
            auto_augment=auto_augment,
            color_jitter=color_jitter,  # type: ignore[arg-type]  # timm says float | tuple and takes these as well
            color_jitter_prob=color_jitter_prob,
            grayscale_prob=grayscale_prob,
            gaussian_blur_prob=gaussian_blur_prob,
            interpolation=_choice("interpolation", interpolation, (*INTERPOLATIONS, "random")),
            mean=mean,
            std=std,
        )
    except (AssertionError, KeyError) as error:  # timm asserts on the parts of a policy
        raise ValueError(
            f"timm cannot read auto_augment {auto_augment!r} ({error}). Examples: 'rand-m9-mstd0.5-inc1',"
            " 'original-mstd0.5', 'augmix-m5-w4-d2', '3a'."
        ) from error
    _mend_posterize(transform.transforms)
    return transforms.Compose([*transform.transforms, *erasing])


@strict_keywords
def small_image_transform(
    input_size: Size = 32,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    padding: int = 2,
    padding_mode: str = "constant",
    rotation: float = 10.0,
    zoom: Sequence[float] = (0.9, 1.1),
    shear: float = 0.0,
    fill: int = 0,
    hflip: float = 0.0,
    vflip: float = 0.0,
    erasing_prob: float = 0.0,
    erasing_mode: str = "const",
    erasing_count: int = 1,
) -> Transform:
    """Training transform for small, centred pictures such as digits: nothing is cut away or mirrored by default.

    Resize to `input_size`, small random rotation, zoom and shear about the centre, then a random shift (crop from the
    padded image).

    Args:
        input_size, channels, mean, std, hflip, vflip, erasing_prob, erasing_mode, erasing_count: As in
            `train_transform`.
        interpolation: Of the resize, one of `INTERPOLATIONS`; the rotation is bilinear.
        padding: Largest shift in each direction, in pixels of the output.
        padding_mode: What comes in from outside with the shift: ``constant`` is `fill`, or one of `PADDING_MODES`.
        rotation: Largest angle in degrees.
        zoom: Range of the magnification.
        shear: Largest horizontal shear in degrees.
        fill: Grey value (0 to 255) of uncovered corners.

    Raises:
        ValueError: An option out of range.
        TypeError: Unknown keyword.
    """
    mean, std = _statistics(mean, std, channels)
    size = _size(input_size)
    if not 0 <= padding < min(size):
        raise ValueError(f"padding must be at least 0 and smaller than the image ({min(size)} pixels), got {padding!r}")
    if rotation < 0 or shear < 0:
        raise ValueError(f"rotation and shear are largest angles in degrees, at least 0, got {rotation} and {shear}")
    _choice("padding_mode", padding_mode, PADDING_MODES)
    mode = str_to_interp_mode(_choice("interpolation", interpolation, INTERPOLATIONS))
    scale = _span("zoom", zoom)
    steps: list[Transform] = [transforms.Resize(size, interpolation=mode)]
    if rotation or shear or scale != (1.0, 1.0):
        steps.append(
            transforms.RandomAffine(
                rotation, scale=scale, shear=shear or None, interpolation=str_to_interp_mode("bilinear"), fill=fill
            )
        )
    if padding:
        steps.append(transforms.RandomCrop(size, padding=padding, fill=fill, padding_mode=padding_mode))
    if _probability("hflip", hflip):
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if _probability("vflip", vflip):
        steps.append(transforms.RandomVerticalFlip(vflip))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    return transforms.Compose([*steps, *_erasing(erasing_prob, erasing_mode, erasing_count)])


@strict_keywords
def eval_transform(
    input_size: Size = 224,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
    crop_pct: float = 0.875,
    crop_mode: str = "center",
) -> Transform:
    """Transform for validation and prediction: resize to ``input_size / crop_pct``, then centre crop.

    Args:
        input_size, channels, mean, std: As in `train_transform`.
        interpolation: One of `INTERPOLATIONS`.
        crop_pct: Side of the crop relative to the resized image, above 0 and at most 1; 1 keeps everything that has the
            right aspect ratio.
        crop_mode: ``center`` (aspect ratio kept, borders lost), ``squash`` (whole image, aspect ratio changed) or
            ``border`` (whole image, padded).

    Raises:
        ValueError: An option out of range.
        TypeError: Unknown keyword.
    """
    mean, std = _statistics(mean, std, channels)
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct must be above 0 and at most 1, got {crop_pct!r}")
    return create_transform(
        _size(input_size),
        interpolation=_choice("interpolation", interpolation, INTERPOLATIONS),
        mean=mean,
        std=std,
        crop_pct=crop_pct,
        crop_mode=_choice("crop_mode", crop_mode, CROP_MODES),
    )


@strict_keywords
def plain_transform(
    input_size: Size = 224,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    interpolation: str = "bicubic",
) -> Transform:
    """Training without augmentation: resize so that the shorter side fits, then centre crop. Keywords as above."""
    return eval_transform(input_size, channels=channels, mean=mean, std=std, interpolation=interpolation, crop_pct=1.0)


TRAIN_POLICIES: dict[str, Callable[..., Transform]] = {
    "imagenet": train_transform,
    "small": small_image_transform,
    "none": plain_transform,
}


def build_transform(train: bool, input_size: Size = 224, *, policy: str | None = None, **options: Any) -> Transform:
    """Build a transform from plain values.

    Args:
        train: Training or evaluation.
        input_size: Side, or (height, width), of the output in pixels.
        policy: For training only: ``imagenet`` (default, `train_transform`), ``small`` (`small_image_transform`) or
            ``none`` (`plain_transform`). Evaluation is `eval_transform`.
        options: Keywords of that function.

    Returns:
        Callable from an 8-bit PIL image to a normalised float32 tensor (C, H, W).

    Raises:
        TypeError: Unknown keyword; the message names the valid ones.
        ValueError: Unknown policy or an option out of range.
    """
    if train:
        policy = _choice("policy", policy or "imagenet", tuple(TRAIN_POLICIES))
        return TRAIN_POLICIES[policy](input_size, **options)
    if policy is not None:
        raise ValueError(f"policy {policy!r} belongs to training; a transform with train=False has none")
    return eval_transform(input_size, **options)


def transform_settings(model: Any, channels: int | None = None) -> dict[str, Any]:
    """What a model's `pretrained_cfg` says about its input, as keywords for `build_transform`.

    Args:
        model: A model with `pretrained_cfg`, or that mapping itself.
        channels: Channels of the images; by default those of ``input_size``. With 1, a mean and std for three channels
            are averaged.

    Returns:
        dict with input_size (height, width), channels, mean, std, interpolation, crop_pct and crop_mode. Give the last
        two to evaluation only.

    Raises:
        TypeError: There is no `pretrained_cfg`.
    """
    settings = model if isinstance(model, Mapping) else getattr(model, "pretrained_cfg", None)
    if not isinstance(settings, Mapping):
        raise TypeError(
            f"expected a model with a pretrained_cfg, or that mapping, got {type(model).__name__}. Pass mean, std,"
            " interpolation and crop_pct to build_transform directly."
        )
    size = tuple(settings.get("input_size", (3, 224, 224)))
    channels = size[0] if channels is None else channels
    statistics = {}
    for name, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = tuple(settings.get(name, default))
        statistics[name] = (sum(values) / len(values),) if channels == 1 else values
    return dict(
        input_size=size[1:],
        channels=channels,
        **statistics,
        interpolation=settings.get("interpolation", "bicubic"),
        crop_pct=settings.get("crop_pct", 0.875),
        crop_mode=settings.get("crop_mode", "center"),
    )
