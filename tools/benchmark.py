"""Time models against each other, in turns, in one process.

    python tools/benchmark.py model vmamba_tiny_s1l8 timm:convnext_tiny
    python tools/benchmark.py model vmamba_tiny_s1l8 timm:convnext_tiny --device cuda --batch 128 --amp bf16 --train
    python tools/benchmark.py model vmamba_micro timm:resnet18 --size 96 160 --json figures.json

A model of ours is compared with its reference operators first, and not timed if it differs. The last column is the
time over that of the last model named.
"""

import argparse
import json
import sys

import torch
from rich.console import Console
from rich.table import Table

from vision_ssm.analysis import BenchmarkError, benchmark_models, describe_machine

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="whole models", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    model.add_argument("names", nargs="+", help="models of ours, or timm:NAME")
    model.add_argument("--size", type=int, nargs="+", default=[224], help="side, or height and width, in pixels")
    model.add_argument("--batch", type=int, default=1, help="images per step")
    model.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    model.add_argument("--amp", choices=AMP, default="none", help="autocast type")
    model.add_argument("--train", action="store_true", help="time training steps instead of inference")
    model.add_argument("--repeats", type=int, default=20, help="timed steps per model")
    model.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
    model.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args(argv)
    if len(arguments.size) > 2:
        parser.error("--size takes one side, or height and width")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse(argv)
    machine = describe_machine(torch.device(arguments.device))
    try:
        rows = benchmark_models(
            arguments.names,
            size=(arguments.size[0], arguments.size[-1]),
            batch=arguments.batch,
            device=arguments.device,
            train=arguments.train,
            amp=AMP[arguments.amp],
            repeats=arguments.repeats,
            channels_last=arguments.channels_last,
        )
    except (BenchmarkError, KeyError) as error:
        print(error.args[0], file=sys.stderr)
        return 1
    setting = (
        f"{'training step' if arguments.train else 'inference'}, batch {arguments.batch}, "
        f"{arguments.size[0]} x {arguments.size[-1]}, amp {arguments.amp}, "
        f"{'channels_last' if arguments.channels_last else 'contiguous'}, {arguments.repeats} repeats"
    )
    table = Table(title=setting, caption=", ".join(f"{key} {value}" for key, value in machine.items()))
    for heading in (
        "model",
        "scan backend",
        "parameters",
        "median ms",
        "quartiles ms",
        "images/s",
        "peak MiB",
        "ratio",
    ):
        table.add_column(heading, justify="left" if heading in ("model", "scan backend") else "right")
    for row in rows:
        table.add_row(
            row.name,
            row.backend,
            f"{row.parameters / 1e6:.1f} M",
            f"{1000 * row.median:.2f}",
            f"{1000 * row.lower:.2f} - {1000 * row.upper:.2f}",
            f"{row.images_per_second:.1f}",
            "-" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}",
            f"{row.median / rows[-1].median:.2f}",
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": machine, "setting": setting, "rows": [row.as_dict() for row in rows]}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
