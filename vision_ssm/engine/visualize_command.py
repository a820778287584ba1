"""The command visualize: routes of scans, receptive fields, Grad-CAM, feature maps, attention, filters, runs."""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vision_ssm.analysis.class_activation import check_classifier, grad_cam
from vision_ssm.analysis.feature_pictures import draw_kernels, find_kernels, reduce_map
from vision_ssm.analysis.pictures import check_output, enlarge, new_figure, overlay, panel_size, save, show
from vision_ssm.analysis.receptive_field import (
    choose_stage,
    describe_areas,
    draw_fields,
    feature_map,
    field_record,
    receptive_field,
)
from vision_ssm.analysis.scan_attention import cell_of, find_mixer, mixer_input, on_decades, query_weights
from vision_ssm.data import UnreadableImageError
from vision_ssm.scans import build_scan, list_scans
from vision_ssm.unets.base import UNet

from .config import UsageError
from .console import BUILDING, clear_errors, wide_console
from .logs import ignore_harmless_warnings
from .predict import image_files
from .run_curves import choose_metrics, draw_runs, read_runs, runs_table
from .subjects import Subject, load_subject
from .visualize_options import FOLDER, build_parser
from .visualize_routes import MOST_PANELS, animate, collect_walks, draw_still

MOST_IMAGES = 12
MOST_COLUMNS = 6


def visualize(argv: Sequence[str] | None = None) -> int:
    """Draw scans and models."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if len(getattr(args, "size", None) or ()) > 2:
        parser.error("--size takes one side, or height and width")
    if getattr(args, "images", None) and getattr(args, "random", None):
        parser.error("--random takes the place of images: give one of the two")
    ignore_harmless_warnings()
    torch.manual_seed(0)  # random weights are the same ones every time
    with clear_errors((*BUILDING, UnreadableImageError)):
        written = COMMANDS[args.command](args)
    for path in written:
        print(path)
    return 0


def _output(args: argparse.Namespace, endings: Sequence[str] = (".png",)) -> Path:
    name = Path(getattr(args, "model", None) or args.name).stem
    return check_output(args.out or FOLDER / f"{name}_{args.command}.png", endings)


def _subject(args: argparse.Namespace, weights: bool = True) -> Subject:
    size = getattr(args, "size", None)
    return load_subject(args.model, args.checkpoint if weights else None, args.options, size, args.device)


def _images(subject: Subject, args: argparse.Namespace) -> list[tuple[str, Tensor]]:
    """Names of the images and what the model sees of them; damaged ones of several are left out with a warning."""
    files, images = image_files(args.images), []
    for file in _spread(files, MOST_IMAGES):
        try:
            images.append((file.name, subject.read(file, args.whole)))
        except UnreadableImageError as error:
            if len(files) == 1:
                raise
            print(f"warning: {error}; left out", file=sys.stderr)
    if not images:
        raise UsageError("none of the images could be read")
    if len(files) > MOST_IMAGES:
        print(f"drawn: {MOST_IMAGES} of {len(files)} images, evenly spread", file=sys.stderr)
    return images


def _spread(files: Sequence[Path], most: int) -> list[Path]:
    """At most so many of the files, evenly spread over them."""
    count = min(most, len(files))
    return [files[number * len(files) // count] for number in range(count)]


def _groups(axes: np.ndarray, count: int, panels: int) -> Iterator[np.ndarray]:
    """The axes of each of `count` images, `panels` of them side by side."""
    return islice((row[start : start + panels] for row in axes for start in range(0, len(row), panels)), count)


def _grid(count: int, panels: int) -> tuple[int, int]:
    """Rows and columns of a picture with `count` images of so many panels."""
    beside = min(count, max(1, MOST_COLUMNS // panels))
    return math.ceil(count / beside), beside * panels


def _weights(subject: Subject) -> str:
    return "random weights" if subject.checkpoint is None else Path(subject.checkpoint).name


def _scan(args: argparse.Namespace) -> list[Path]:
    out = _output(args, (".png", ".svg", ".gif"))
    found = collect_walks(args.name, tuple(args.grid), args.kind, args.options, args.block)
    if found.left_out:
        print(f"drawn: the first {MOST_PANELS} of {found.left_out} walks; --block chooses others", file=sys.stderr)
    for remark in found.remarks:
        print(remark, file=sys.stderr)
    if out.suffix.lower() == ".gif" or args.animate:
        if out.suffix.lower() == ".png":
            raise UsageError(f"an animation is a .gif or .svg, not {out.name}; add --out FILE.svg")
        animate(found, out, args.seconds, args.frames)
    else:
        draw_still(found, out, args.dpi)
    return [out]


def _erf(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    subject = _subject(args)
    scores = isinstance(subject.model, UNet) and args.stage is None
    stage = None if scores else choose_stage(subject.model, args.stage)
    if args.images:
        if args.whole:
            raise UsageError("--whole is not for erf: an average needs images of one size; --size sets it")
        files = _spread(image_files(args.images), args.count)
        images, source = [subject.read(file) for file in files], _images_of(len(files))
    else:
        count, shape = args.random or min(10, args.count), (subject.model.in_chans, *subject.size)
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(shape, generator=generator) for _ in range(count)]
        source = f"{_images_of(count)} of noise"
    fields = []
    if subject.checkpoint is not None:
        before = _subject(args, weights=False) if args.model.endswith(".py") else _untrained(args, subject)
        fields.append(("before training", receptive_field(before.model, images, stage, args.measure, scores)))
    name = "random weights" if subject.checkpoint is None else "trained"
    fields.append((name, receptive_field(subject.model, images, stage, args.measure, scores)))
    where = "the scores" if stage is None else f"map {stage}"
    title = f"Effective receptive field of {subject.name}, {where}, {source}, {subject.size[0]} x {subject.size[1]}"
    draw_fields(fields, out, title, args.dpi)
    record = dict(
        model=subject.name, checkpoint=subject.checkpoint, stage=stage, measure=args.measure, images=source,
        fields={name: field_record(field) for name, field in fields},
    )  # fmt: skip
    numbers = out.with_suffix(".json")
    numbers.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, field in fields:
        print(f"{name}, shares of the gradient in shares of the image: {describe_areas(field)}")
    return [out, numbers]


def _images_of(count: int) -> str:
    return f"{count} image{'s' * (count > 1)}"


def _untrained(args: argparse.Namespace, subject: Subject) -> Subject:
    """The same model without its weights, with the channels and classes that the file has."""
    model = subject.model
    fitting = dict(in_chans=model.in_chans)
    if model.features_only:
        fitting.update(features_only=True)
    return load_subject(args.model, None, {**fitting, **args.options}, args.size, args.device)


def _cam(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    subject = _subject(args)
    check_classifier(subject.model)
    chosen = [None] if args.labels is None else [subject.label(text) for text in args.labels]
    images = _images(subject, args)
    height, width = images[0][1].shape[1:]
    title = f"Grad-CAM of {subject.name}, {_weights(subject)}"
    grid = _grid(len(images), 1 + len(chosen))
    figure, axes = new_figure(*grid, *panel_size(height, width, 2.0), title)
    for row, (name, image) in zip(_groups(axes, len(images), 1 + len(chosen)), images, strict=True):
        picture = subject.picture(image)
        show(row[0], picture, name)
        for axis, label in zip(row[1:], chosen, strict=True):
            cam, label, share = grad_cam(subject.model, image, label, args.stage)
            of_pixels = " of the pixels" * isinstance(subject.model, UNet)
            text = f"{subject.classes[label]}  {100 * share:.1f} %{of_pixels}"
            if not cam.any():
                text += "\nno cell speaks for it"
            if cam.numel() == 1:
                print(f"{name}: the map of this stage has one cell; --stage chooses a finer one", file=sys.stderr)
            step = subject.model.size_divisor if isinstance(subject.model, UNet) else 1
            padded = tuple(math.ceil(side / step) * step for side in image.shape[1:])
            heat = enlarge(cam / cam.max().clamp_min(1e-30), (padded[0], padded[1]))
            heat = heat[: image.shape[1], : image.shape[2]]
            show(axis, overlay(picture, heat), text)
    save(figure, out, args.dpi)
    return [out]


def _activation(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    subject = _subject(args)
    model = subject.model
    default = range(len(model.feature_info)) if isinstance(model, UNet) else model.out_indices
    stages = [choose_stage(model, stage) for stage in (default if args.stages is None else args.stages)]
    images = _images(subject, args)
    height, width = images[0][1].shape[1:]
    title = f"Feature maps of {subject.name} ({args.reduce}), {_weights(subject)}"
    figure, axes = new_figure(*_grid(len(images), 1 + len(stages)), *panel_size(height, width, 2.0), title)
    device = next(model.parameters()).device
    for row, (name, image) in zip(_groups(axes, len(images), 1 + len(stages)), images, strict=True):
        show(row[0], subject.picture(image), name)
        for axis, stage in zip(row[1:], stages, strict=True):
            with torch.no_grad():
                features = feature_map(model, image[None].to(device), stage)[0].cpu()
            picture = reduce_map(features, args.reduce).numpy()
            channels, rows, columns = features.shape
            show(axis, picture, f"stage {stage}: {channels} x {rows} x {columns}", cmap="viridis", vmin=0, vmax=1)
    save(figure, out, args.dpi)
    return [out]


def _attn(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    queries = [tuple(query) for query in args.query or [(0.5, 0.5)]]
    if args.model in list_scans():
        if args.images or args.checkpoint:
            raise UsageError(f"{args.model} alone has no images and no checkpoint; name a model for them")
        mixer = build_scan({"type": args.model, **args.options}, args.dim).eval()
        x, layout, picture = torch.randn(1, *args.grid, args.dim), None, None
        name = f"{args.model}, random weights and tokens"
    else:
        subject = _subject(args)
        block, mixer = find_mixer(subject.model, args.block)
        if len(args.images) != 1:
            raise UsageError(f"give one image, got {len(args.images)}")
        (_, image), *_ = _images(subject, args)
        x, layout = mixer_input(subject.model, mixer, image)
        picture = subject.picture(image)
        name = f"{subject.name}, {block}, {_weights(subject)}"
    rows, columns = (layout.height, layout.width) if layout is not None else x.shape[1:3]
    size = picture.shape[:2] if picture is not None else (rows, columns)
    title = f"What a cell reads: {name}"
    figure, axes = new_figure(len(queries), 2 if picture is not None else 1, *panel_size(*size), title)
    for row, query in zip(axes, queries, strict=True):
        cell = cell_of(query, rows, columns)  # type: ignore[arg-type]
        weights, of_tokens = query_weights(mixer, x, cell, layout)
        share = float(weights[cell] / weights.sum())
        text = f"reads itself {100 * share:.1f} %"
        if len(of_tokens):
            text += f", class tokens {100 * float(of_tokens.sum() / (weights.sum() + of_tokens.sum())):.1f} %"
        strength, decades = on_decades(weights)
        text += f"\ncolour: logarithm of the weight, {decades} decade{'s' * (decades > 1)}"
        y, x_ = ((cell[0] + 0.5) * size[0] / rows - 0.5, (cell[1] + 0.5) * size[1] / columns - 0.5)
        if picture is not None:
            show(row[0], picture, f"query {query[0]:g} {query[1]:g}: cell {cell[0]}, {cell[1]}")
            show(row[1], overlay(picture, enlarge(strength, size, "nearest"), 0.75), text)
        else:
            show(row[0], strength.numpy(), f"cell {cell[0]}, {cell[1]}: {text}", cmap="turbo", vmin=0, vmax=1)
        for axis in row:
            for width, color in ((3, "black"), (1, "white")):  # seen on any picture
                axis.plot([x_], [y], "s", markersize=6, markerfacecolor="none", markeredgecolor=color,
                          markeredgewidth=width)  # fmt: skip
    save(figure, out, args.dpi)
    return [out]


def _filters(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    subject = _subject(args)
    layers = list(islice(find_kernels(subject.model, args.layers), 12))
    grey = any(kernels.shape[1] == 1 for _, kernels in layers)
    signs = "red above 0, blue below, " if grey else ""
    title = f"Kernels of {subject.name}, {_weights(subject)}; {signs}each scaled by itself"
    draw_kernels(layers, out, title, args.most, args.dpi)
    return [out]


def _runs(args: argparse.Namespace) -> list[Path]:
    runs = read_runs(args.runs, args.names)
    metrics = choose_metrics(runs, args.metrics)
    out = check_output(args.out or FOLDER / f"{Path(runs[0].name).name}_runs.png")
    draw_runs(runs, metrics, out, args.title, args.dpi)
    wide_console().print(runs_table(runs, metrics))
    return [out]


COMMANDS: dict[str, Any] = {
    "scan": _scan,
    "erf": _erf,
    "cam": _cam,
    "activation": _activation,
    "attn": _attn,
    "filters": _filters,
    "runs": _runs,
}
