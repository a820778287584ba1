"""The command visualize: routes of scans, receptive fields, Grad-CAM, feature maps, implicit attention, filters."""

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
from mmengine.config import DictAction
from torch import Tensor

from vision_ssm.analysis.class_activation import check_classifier, grad_cam
from vision_ssm.analysis.feature_pictures import REDUCTIONS, draw_kernels, find_kernels, reduce_map
from vision_ssm.analysis.pictures import check_output, enlarge, new_figure, overlay, panel_size, save, show
from vision_ssm.analysis.receptive_field import (
    MEASURES,
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
from .console import BUILDING, clear_errors, command_parser
from .logs import ignore_harmless_warnings
from .predict import image_files
from .subjects import Subject, load_subject
from .visualize_routes import MOST_PANELS, animate, collect_walks, draw_still

FOLDER = Path("visualizations")
MOST_IMAGES = 12
MOST_COLUMNS = 6
EXAMPLES = {
    "scan": """  visualize.py scan cross                                        a route family
  visualize.py scan windowed --options 'directions=[raster,window2]' --grid 7 9
  visualize.py scan plstm --out plstm.gif                        animated, as is svg with --animate
  visualize.py scan localvmamba_micro --block stages.0.blocks.1  of a block of a model""",
    "erf": """  visualize.py erf vmamba_tiny_s1l8 --random 20
  visualize.py erf vmamba_tiny_s1l8 photos/ --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth --count 50
  visualize.py erf configs/classification/quickstart_digits.py data/digits/val --checkpoint best_top1.pth""",
    "cam": """  visualize.py cam vmamba_tiny_s1l8 dog.jpg --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth
  visualize.py cam vmamba_tiny_s1l8 dog.jpg --checkpoint FILE --class 'tabby' 207 --whole
  visualize.py cam configs/classification/quickstart_digits.py data/digits/val/3 --checkpoint best_top1.pth""",
    "activation": """  visualize.py activation vim_tiny dog.jpg --checkpoint FILE --stages 5 11 23
  visualize.py activation vmunet scan.png --checkpoint FILE --reduce norm""",
    "attn": """  visualize.py attn vmamba_tiny_s1l8 dog.jpg --checkpoint FILE --block stages.2.blocks.3 --query 0.4 0.6
  visualize.py attn noncausal_ssd --grid 14 14 --query 0.5 0.25  a strategy alone, with random weights and tokens""",
    "filters": """  visualize.py filters vmamba_tiny_s1l8 --checkpoint FILE
  visualize.py filters vcmamba_micro --layers 'stages.0.*' --most 100""",
}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Draw what scans and models do. Pictures are png; their paths are printed.",
        "\n".join(text.splitlines()[0] for text in EXAMPLES.values())
        + "\n  visualize.py COMMAND --help                                    all options of one",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, help: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + ".", epilog=f"examples:\n{EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip
        sub.add_argument("--out", metavar="FILE", help=f"picture to write (default: {FOLDER}/NAME_{name}.png)")
        sub.add_argument("--dpi", type=_positive, default=110, help="resolution of a png (default: %(default)s)")
        sub.add_argument("--options", nargs="+", action=DictAction, metavar="KEY=VALUE", default={},
                         help="keywords of the model, such as scan=plstm, or of the scan or routes")  # fmt: skip
        return sub

    def add_model(sub: argparse.ArgumentParser, images: str | None, name: str = "MODEL") -> None:
        sub.add_argument("model", metavar=name, help="name of a model (see list_models.py) or a config"
                         + (", or a scan strategy" if name != "MODEL" else ""))  # fmt: skip
        if images:
            sub.add_argument("images", nargs=images, metavar="IMAGE_OR_FOLDER", help="jpg, png (8 or 16 bit), ...")
            sub.add_argument("--size", type=_positive, nargs="+", metavar="PIXELS",
                             help="side, or height and width, of images (default: as published)")  # fmt: skip
            sub.add_argument("--whole", action="store_true", help="whole images at their own ratio, not a crop")
        sub.add_argument("--checkpoint", metavar="FILE", help="weights, official, ours or of a training run")
        sub.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")

    scan = add("scan", "routes of a route family, of a scan strategy or of a model, still or animated")
    scan.add_argument("name", metavar="NAME", help="route family, scan strategy or model")
    scan.add_argument("--kind", choices=("routes", "scan", "model"), help="of NAME, where several have that name")
    scan.add_argument("--grid", type=_positive, nargs=2, default=[6, 8], metavar=("ROWS", "COLUMNS"),
                      help="cells (default: %(default)s)")  # fmt: skip
    scan.add_argument("--block", help="block of a model, such as stages.1.blocks.0 (default: all that differ)")
    scan.add_argument("--animate", action="store_true", help="animated svg; a gif always is")
    scan.add_argument("--seconds", type=float, default=0.12, help="per step of an animation (default: %(default)s)")
    scan.add_argument("--frames", type=_positive, default=200, help="of a gif, at most (default: %(default)s)")

    erf = add("erf", "effective receptive field: gradient of the central feature with respect to every pixel")
    add_model(erf, "*")
    erf.add_argument("--random", type=_positive, metavar="N", help="N images of noise (default, without images: 10)")
    erf.add_argument("--count", type=_positive, default=50, help="images used, at most (default: %(default)s)")
    erf.add_argument("--stage", type=int, help="number of the map (default: the last; of a U-Net: its scores)")
    erf.add_argument("--measure", choices=MEASURES, default="abs", help="of the gradients (default: %(default)s)")

    cam = add("cam", "Grad-CAM: where a classifier finds a class")
    add_model(cam, "+")
    cam.add_argument("--class", dest="labels", nargs="+", metavar="CLASS", help="names or numbers (default: predicted)")
    cam.add_argument("--stage", type=int, help="number of the stage (default: the last that the classifier reads)")

    activation = add("activation", "feature maps of stages beside the image")
    add_model(activation, "+")
    activation.add_argument("--stages", type=int, nargs="+", help="numbers (default: those the model returns)")
    activation.add_argument("--reduce", choices=REDUCTIONS, default="pca", help="of channels (default: %(default)s)")

    attn = add("attn", "implicit attention: how strongly the output of one cell depends on every input of its mixer")
    add_model(attn, "*", "MODEL_OR_SCAN")
    attn.add_argument("--block", help="block of a model, such as stages.1.blocks.0 (default: the middle one)")
    attn.add_argument("--query", type=float, nargs=2, action="append", metavar=("Y", "X"),
                      help="place as fractions of height and width, repeatable (default: 0.5 0.5)")  # fmt: skip
    attn.add_argument("--grid", type=_positive, nargs=2, default=[14, 14], metavar=("ROWS", "COLUMNS"),
                      help="cells for a strategy alone (default: %(default)s)")  # fmt: skip
    attn.add_argument("--dim", type=_positive, default=32, help="channels for a strategy alone (default: %(default)s)")

    filters = add("filters", "filters of the first layer and depthwise kernels")
    add_model(filters, None)
    filters.add_argument("--layers", nargs="+", default=(), metavar="PATTERN", help="names (default: one per stage)")
    filters.add_argument("--most", type=_positive, default=64, help="kernels of a layer (default: %(default)s)")
    return parser


def visualize(argv: Sequence[str] | None = None) -> int:
    """Draw scans and models."""
    parser = _parser()
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
            cam, logits = grad_cam(subject.model, image, label, args.stage)
            label = int(logits.argmax()) if label is None else label
            share = float(logits.softmax(0)[label])
            text = f"{subject.classes[label]}  {100 * share:.1f} %"
            if not cam.any():
                text += "\nno cell speaks for it"
            if cam.numel() == 1:
                print(f"{name}: the map of this stage has one cell; --stage chooses a finer one", file=sys.stderr)
            heat = enlarge(cam / cam.max().clamp_min(1e-30), (image.shape[1], image.shape[2]))
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
            axis.plot([x_], [y], marker="s", markersize=6, markerfacecolor="none", markeredgecolor="white")
    save(figure, out, args.dpi)
    return [out]


def _filters(args: argparse.Namespace) -> list[Path]:
    out = _output(args)
    subject = _subject(args)
    layers = list(islice(find_kernels(subject.model, args.layers), 12))
    title = f"Kernels of {subject.name}, {_weights(subject)}; red above 0, blue below, each scaled by itself"
    draw_kernels(layers, out, title, args.most, args.dpi)
    return [out]


COMMANDS: dict[str, Any] = {
    "scan": _scan,
    "erf": _erf,
    "cam": _cam,
    "activation": _activation,
    "attn": _attn,
    "filters": _filters,
}
