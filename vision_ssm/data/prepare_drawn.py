"""The commands of ``tools/prepare_data.py`` for drawn data sets: shapes and arrows."""

import argparse
import os

from rich.console import Console

from vision_ssm.data.arrow_files import write_arrows
from vision_ssm.data.arrows import SPLITS
from vision_ssm.data.shapes import LAYOUTS, SHAPES_SIZE, SHAPES_TRAIN, SHAPES_VAL, write_shapes


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _shapes_command(options: argparse.Namespace, console: Console) -> int:
    written = write_shapes(
        options.out, options.layout, train=options.train, val=options.val, size=options.size, seed=options.seed,
        coco_names=options.coco_names,
    )  # fmt: skip
    state = "written to" if written else "already complete in"
    counts = f"{options.train} train, {options.val} val images"
    console.print(f"shapes {state} {options.out} ({options.layout}): {counts}", soft_wrap=True, highlight=False)
    return 0


def _arrows_command(options: argparse.Namespace, console: Console) -> int:
    written = write_arrows(options.out, options.images, options.count, options.workers)
    if written is None:
        text = f"arrows already complete in {options.out}"
    else:
        counts = ", ".join(f"{count} {split}" for split, count in written.items())
        text = f"arrows written to {options.out}: contact sheets" + (f", and pictures: {counts}" if counts else "")
    console.print(text, soft_wrap=True, highlight=False)
    return 0


def add_drawn_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add ``shapes`` and ``arrows`` to the commands of ``tools/prepare_data.py``."""
    _add_shapes(commands)
    _add_arrows(commands)


def _add_shapes(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    shapes = commands.add_parser(
        "shapes",
        help="draw a small data set for segmentation, detection or pose estimation",
        description="Draw textured shapes (or jointed figures) on textured ground, with exact masks, and write them\n"
        "in the layout on disk of a real data set. OUT/README.txt says what the classes are.\n"
        "Equal seeds give equal bytes.",
        epilog="examples:\n"
        "  python tools/prepare_data.py shapes data/shapes_ade20k --layout ade20k\n"
        "  python tools/prepare_data.py shapes data/shapes_coco --layout coco --train 1000 --size 256\n"
        "  python tools/prepare_data.py shapes data/coco_like --layout coco --coco-names   # for COCO's configs",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shapes.add_argument("out", metavar="OUT", help="folder to create; one that holds something else is never touched")
    shapes.add_argument("--layout", required=True, choices=LAYOUTS, help="what the data is to look like on disk")
    shapes.add_argument(
        "--train", type=positive, default=SHAPES_TRAIN, help="training pictures (default %(default)s)"
    )
    shapes.add_argument("--val", type=positive, default=SHAPES_VAL, help="validation pictures (default %(default)s)")
    sizes = ", ".join(f"{size} for {layout}" for layout, size in SHAPES_SIZE.items())
    shapes.add_argument(
        "--size", type=positive, help=f"long side in pixels (cityscapes: short side); default: {sizes}"
    )
    shapes.add_argument("--seed", type=int, default=0, help="of everything random (default %(default)s)")
    shapes.add_argument(
        "--coco-names", action="store_true", help="layout coco: COCO's names of the categories, all 80 listed"
    )
    shapes.set_defaults(run=_shapes_command)


def _add_arrows(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    arrows = commands.add_parser(
        "arrows",
        help="show the arrow-pointing task, or write its pictures",
        description="Write contact sheets of the arrow-pointing task of pLSTM (arXiv 2506.11997) with the labels.\n"
        "The configs in configs/arrows draw their pictures themselves. With --images the pictures of some splits are\n"
        "written as well, OUT/SPLIT/{misses,points}/NUMBER.png, for other programs or for --data-root OUT.",
        epilog="examples:\n"
        "  python tools/prepare_data.py arrows data/arrows\n"
        "  python tools/prepare_data.py arrows data/arrows --images val val_384\n"
        "  python tools/prepare_data.py arrows data/arrows_small --images train val --count 1000",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arrows.add_argument("out", metavar="OUT", help="folder to create; one that holds something else is never touched")
    sizes = ", ".join(f"{name} {own.pictures:,}" for name, own in SPLITS.items())
    arrows.add_argument(
        "--images", nargs="+", choices=SPLITS, default=(), metavar="SPLIT", help=f"pictures to write ({sizes})"
    )
    arrows.add_argument("--count", type=positive, metavar="N", help="only the first N pictures of each split")
    arrows.add_argument(
        "--workers", type=positive, default=min(8, os.cpu_count() or 1), help="threads (default %(default)s)"
    )
    arrows.set_defaults(run=_arrows_command)
