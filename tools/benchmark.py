"""Time models and operators against each other, in turns, in one process.

    python tools/benchmark.py model vmamba_tiny_s1l8 timm:convnext_tiny
    python tools/benchmark.py model vmamba_tiny_s1l8 timm:convnext_tiny --device cuda --batch 128 --amp bf16 --train
    python tools/benchmark.py op 'core_stage?' selective_scan_2 --dtype bf16 --backward --peers chunked mamba_ssm
    python tools/benchmark.py config configs/segmentation/CONFIG.py --peers swin_tiny convnext_tiny --batch 16 --train
    python tools/benchmark.py sweep vmamba_tiny_s1l8 timm:swin_tiny_patch4_window7_224 --sizes 224 448 896 --plot s.png

What is ours is compared with its reference operators first, and nothing is timed if it differs (exit code 1). Times are
medians with quartiles, on a GPU between events; `op` times a forward pass without gradients, with --backward also both
passes together and the backward pass of a kept forward pass. --json writes every figure, --markdown appends the table
to a page.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vision_ssm.analysis import (
    CASES,
    BenchmarkError,
    ModelSettings,
    OperatorSettings,
    benchmark_models,
    benchmark_operator,
    copy_bandwidth,
    find_cases,
    sweep_models,
    sweep_operators,
)
from vision_ssm.analysis.benchmark_dense import PEERS as DENSE_PEERS
from vision_ssm.analysis.benchmark_dense import benchmark_config
from vision_ssm.analysis.benchmark_ops import PEERS, find_peers
from vision_ssm.analysis.benchmark_report import (
    Run,
    Table,
    append_markdown,
    model_table,
    operator_table,
    plot_sweep,
    sweep_table,
    write_json,
)
from vision_ssm.engine.config import UsageError, load_config

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = [224, 448, 672, 896, 1248, 1536, 2048]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:NUMBER, got {text!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("this PyTorch finds no CUDA device")
    return device


def parse(argv: Sequence[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")
    common.add_argument("--repeats", type=_positive, default=20, help="timed samples of each contender")
    common.add_argument("--warmup", type=_positive, default=3, help="steps of each contender before")
    common.add_argument("--graph", action="store_true", help="replay CUDA graphs: launches from Python do not count")
    common.add_argument("--json", metavar="FILE", help="write every figure to this file")
    common.add_argument("--markdown", metavar="FILE", help="append the table to this page")
    network = argparse.ArgumentParser(add_help=False)
    network.add_argument("--amp", choices=AMP, default="none", help="autocast type")
    network.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
    network.add_argument("--compile", action="store_true", help="run models through torch.compile")
    peers = argparse.ArgumentParser(add_help=False)
    peers.add_argument("--peers", nargs="*", choices=PEERS, default=["mamba_ssm"],
                       help="other implementations of operators (default: mamba_ssm, where installed)")  # fmt: skip

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model", help="whole models", parents=[common, network])
    model.add_argument("names", nargs="+", help="models of ours, or timm:NAME")
    model.add_argument("--size", type=_positive, nargs="+", default=[224], help="side, or height and width, in pixels")
    model.add_argument("--batch", type=_positive, default=1, help="images per step")
    model.add_argument("--train", action="store_true", help="time training steps instead of inference")
    model.add_argument("--apart", action="store_true",
                       help="one model after the other, where they do not fit into memory together")  # fmt: skip
    model.add_argument("--profile", action="store_true", help="name the slowest kernel of each model")
    op = commands.add_parser("op", help="operators", parents=[common, peers])
    op.add_argument("names", nargs="+", metavar="CASE", help=f"pattern or one of {', '.join(CASES)}")
    op.add_argument("--dtype", choices=TYPES, default="bf16", help="type of the activations")
    op.add_argument("--batch", type=_positive, help="batch instead of the case's own")
    op.add_argument("--backward", action="store_true", help="also forward+backward, and backward alone")
    config = commands.add_parser("config", help="whole segmentation and detection configs", parents=[common, network])
    config.add_argument("config", help="config of mmseg or mmdet")
    config.add_argument("--peers", nargs="*", choices=DENSE_PEERS, default=[], help="backbones under the same heads")
    config.add_argument("--size", type=_positive, nargs="+", default=[512], help="side, or height and width, in pixels")
    config.add_argument("--batch", type=_positive, default=1, help="images per step")
    config.add_argument("--train", action="store_true", help="time training steps instead of inference")
    config.add_argument("--profile", action="store_true", help="name the slowest kernel of each model")
    sweep = commands.add_parser("sweep", help="models or operators over image size", parents=[common, network, peers])
    sweep.add_argument("names", nargs="+", help="models of ours and timm:NAME, or operator cases of a stage")
    sweep.add_argument("--sizes", type=_positive, nargs="+", default=SIZES, help="sides of the square images in pixels")
    sweep.add_argument("--pixels", type=_positive, help="per batch (default: one image of the largest size)")
    sweep.add_argument("--train", action="store_true",
                       help="time training steps of models, forward and backward of operators")  # fmt: skip
    sweep.add_argument("--plot", metavar="FILE", help="draw the times over the sizes, as .png")

    arguments = parser.parse_args(argv)
    if arguments.command in ("model", "config") and len(arguments.size) > 2:
        parser.error("--size takes one side, or height and width")
    if arguments.graph and arguments.device.type != "cuda":
        parser.error("--graph needs a CUDA device; add --device cuda")
    if arguments.command == "sweep" and not _are_cases(arguments.names) and set(arguments.names) & set(CASES):
        parser.error("operators and models do not share a sweep: their times mean different things")
    return arguments


def _are_cases(names: Sequence[str]) -> bool:
    return all(name in CASES or "*" in name or "?" in name for name in names)


def _model_settings(arguments: argparse.Namespace) -> ModelSettings:
    return ModelSettings(
        device=arguments.device,
        train=arguments.train,
        amp=AMP[arguments.amp],
        repeats=arguments.repeats,
        warmup=arguments.warmup,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
        graph=arguments.graph,
    )


def _describe_model(arguments: argparse.Namespace, what: str) -> str:
    parts = [
        "training step (cross-entropy, AdamW)" if arguments.train else "inference",
        what,
        f"amp {arguments.amp}",
        "channels_last" if arguments.channels_last else "contiguous",
        *(["torch.compile"] if arguments.compile else []),
        *(["CUDA graph"] if arguments.graph else []),
        f"{arguments.warmup} warm-up steps",
        f"{arguments.repeats} repeats{'' if getattr(arguments, 'apart', False) else ' in turns'}",
    ]
    return ", ".join(parts)


def run_model(arguments: argparse.Namespace, run: Run) -> tuple[list[Any], Table]:
    size = (arguments.size[0], arguments.size[-1])
    run.setting = _describe_model(arguments, f"batch {arguments.batch}, {size[0]} x {size[1]}")
    settings = replace(_model_settings(arguments), size=size, batch=arguments.batch, profile=arguments.profile)
    groups = [[name] for name in arguments.names] if arguments.apart else [arguments.names]
    rows = [row for names in groups for row in benchmark_models(names, settings)]
    run.remarks += _reasons((row.name, row.backend, row.reason) for row in rows)
    return rows, model_table(rows)


def run_config(arguments: argparse.Namespace, run: Run) -> tuple[list[Any], Table]:
    size = (arguments.size[0], arguments.size[-1])
    what = "training step (its losses, AdamW)" if arguments.train else "inference"
    run.setting = (
        f"{what} of {arguments.config}, batch {arguments.batch}, {size[0]} x {size[1]}, amp {arguments.amp}, "
        f"{arguments.warmup} warm-up steps, {arguments.repeats} repeats in turns"
    )
    settings = replace(_model_settings(arguments), size=size, batch=arguments.batch, profile=arguments.profile)
    rows = benchmark_config(load_config(arguments.config), settings, arguments.peers)
    run.remarks += _reasons((row.name, row.backend, row.reason) for row in rows)
    return rows, model_table(rows)


def run_op(arguments: argparse.Namespace, run: Run) -> tuple[list[Any], Table]:
    names = find_cases(arguments.names)
    settings = OperatorSettings(
        dtype=TYPES[arguments.dtype],
        device=arguments.device,
        backward=arguments.backward,
        repeats=arguments.repeats,
        warmup=arguments.warmup,
        graph=arguments.graph,
        peers=arguments.peers,
    )
    run.setting = (
        f"operators, activations {arguments.dtype}, {'CUDA graph, ' if arguments.graph else ''}"
        f"{arguments.warmup} warm-up passes, {arguments.repeats} repeats in turns"
    )
    run.copy_bandwidth = copy_bandwidth(arguments.device)
    rows = []
    for name in names:
        case = CASES[name] if arguments.batch is None else replace(CASES[name], batch=arguments.batch)
        rows += benchmark_operator(name, case, settings, copy=run.copy_bandwidth)
    run.remarks += _missing_peers(names, arguments.peers)
    run.remarks += _reasons((row.case, row.backend, row.reason) for row in rows if row.implementation == "vision_ssm")
    return rows, operator_table(rows)


def run_sweep(arguments: argparse.Namespace, run: Run) -> tuple[list[Any], Table]:
    sizes = sorted(set(arguments.sizes))
    pixels = arguments.pixels or sizes[-1] ** 2
    what = f"about {pixels / 1e6:.3g} Mpixel per batch"

    def progress(text: str) -> None:
        print(text, file=sys.stderr)

    if _are_cases(arguments.names):
        names = find_cases(arguments.names)
        dtype = AMP[arguments.amp] or torch.float32
        settings = OperatorSettings(
            dtype, arguments.device, arguments.train, arguments.repeats, arguments.warmup, arguments.graph,
            arguments.peers,
        )  # fmt: skip
        passes = "forward and backward" if arguments.train else "forward"
        run.setting = (
            f"operators, {passes}, {what}, activations {str(dtype).removeprefix('torch.')}, "
            f"{'CUDA graph, ' if arguments.graph else ''}{arguments.repeats} repeats in turns"
        )
        run.copy_bandwidth = copy_bandwidth(arguments.device)
        points = sweep_operators(names, settings, sizes, pixels, run.copy_bandwidth, progress)
        run.remarks += _missing_peers(names, arguments.peers)
    else:
        run.setting = _describe_model(arguments, what)
        points = sweep_models(arguments.names, _model_settings(arguments), sizes, pixels, progress)
    backends = dict.fromkeys((point.label, point.backend) for point in points if point.backend != "-")
    run.remarks += [f"Scan backend of {label}: {backend}." for label, backend in backends]
    if arguments.plot:
        kind = run.setting[0].upper() + run.setting[1:]
        plot_sweep(arguments.plot, points, kind, f"{run.machine['device'].split(': ', 1)[1]}, {run.date}")
    return points, sweep_table(points)


def _missing_peers(names: Sequence[str], peers: Sequence[str]) -> list[str]:
    missing = dict.fromkeys(text for name in names for text in find_peers(CASES[name], peers)[1])
    return [f"{text}." for text in missing]


def _reasons(rows: Any) -> list[str]:
    """A remark for each reason why something slower than possible ran, naming who it concerns."""
    concerned: dict[tuple[str, str], list[str]] = {}
    for name, backend, reason in rows:
        if reason:
            concerned.setdefault((backend, reason), []).append(name)
    return [f"Backend {backend} of {', '.join(names)}: {reason}." for (backend, reason), names in concerned.items()]


COMMANDS = {"model": run_model, "config": run_config, "op": run_op, "sweep": run_sweep}


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 if something is unknown or wrong and was not timed, with a message."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse(argv)
    run = Run.of("tools/benchmark.py", argv, "", arguments.device)
    try:
        for path in (arguments.json, arguments.markdown, getattr(arguments, "plot", None)):
            if path:
                Path(path).parent.mkdir(parents=True, exist_ok=True)  # before the work, not behind it
        rows, table = COMMANDS[arguments.command](arguments, run)
    except (BenchmarkError, UsageError, KeyError, ValueError, OSError) as error:
        print(error if isinstance(error, OSError) else error.args[0], file=sys.stderr)
        return 1
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table.rich(run.setting))
    for sentence in run.sentences()[1:]:
        console.print(sentence, style="dim", markup=False)
    if arguments.json:
        write_json(arguments.json, run, rows)
    if arguments.markdown:
        append_markdown(arguments.markdown, run, table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
