"""The command export: a model as ONNX file, exported program, TorchScript file, or folder of timm."""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from vision_ssm.factory import create_model, list_unets
from vision_ssm.integrations import export as doors

from .config import UsageError, checked_device
from .console import BUILDING, clear_errors, command_parser, wide_console
from .logs import ignore_harmless_warnings
from .predict import model_from_file, stored_class_names

DOORS = {
    "onnx": "ONNX file of standard operators, for onnxruntime and others",
    "torch-export": "program of torch.export (.pt2), for PyTorch and what is built on it",
    "torchscript": "traced TorchScript file (.pt), for programs that read no other format",
    "timm": "folder that timm.create_model('local-dir:FOLDER', pretrained=True) reads, or a hub",
}
_EXAMPLES = {
    "onnx": """  export.py onnx vmamba_tiny_s1l8 --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth --output vmamba.onnx
  export.py onnx vmamba_micro --checkpoint work_dirs/quickstart_digits/best_top1.pth --image-size 32 32
  export.py onnx vssd_tiny --features-only --image-size 512 512           four maps, for a dense head
  export.py onnx vmunet_micro --num-classes 6 --in-chans 1 --image-size 96 96""",
    "torch-export": """  export.py torch-export vmamba_tiny_s1l8 --checkpoint FILE.pth      runs with vision_ssm
  export.py torch-export vmamba_tiny_s1l8 --checkpoint FILE.pth --standalone""",
    "torchscript": "  export.py torchscript vim_tiny --checkpoint FILE.pth --output vim.pt",
    "timm": "  export.py timm vmamba_tiny_s1l8 --checkpoint FILE.pth --output folder/",
}
_ENDINGS = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "timm": ""}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser(
        "Write a model for other programs. Every file is for one image size and any number of images, and is compared "
        "with the model before it is kept.",
        "\n".join(_EXAMPLES.values()),
    )
    commands = parser.add_subparsers(dest="door", required=True, metavar="{" + ",".join(DOORS) + "}")
    for door, purpose in DOORS.items():
        sub = commands.add_parser(
            door,
            help=purpose,
            description=f"Write a model as {purpose}.",
            epilog=f"examples:\n{_EXAMPLES[door]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.add_argument("model", help="name of a backbone (see list_models.py) or a U-Net")
        sub.add_argument("--checkpoint", metavar="FILE", help="weights, official or of a training run (else random)")
        sub.add_argument("--num-classes", type=int, help="classes (default: those of the checkpoint or the model)")
        sub.add_argument("--in-chans", type=int, help="channels of the images (default: those of the checkpoint, or 3)")
        sub.add_argument(
            "--features-only", action="store_true", help="maps of all stages, not scores; of a U-Net, its encoder's"
        )
        named = "a folder named after the model" if door == "timm" else f"the model's name with {_ENDINGS[door]}"
        sub.add_argument("--output", metavar="PATH", help=f"what to write (default: {named})")
        sub.add_argument("--overwrite", action="store_true", help="replace what is there")
        if door == "timm":
            continue
        sub.add_argument(
            "--image-size",
            nargs=2,
            type=int,
            metavar=("H", "W"),
            help="height and width of the images (default: what the model was published for)",
        )
        sub.add_argument("--device", default="cpu", help="where to make and compare it: cpu, cuda, ... (default cpu)")
        sub.add_argument("--no-check", action="store_true", help="keep the file without comparing it with the model")
        if door == "onnx":
            sub.add_argument(
                "--opset",
                type=int,
                default=doors.DEFAULT_OPSET,
                help="version of ONNX's operators (default %(default)s, which most programs read)",
            )
            sub.add_argument("--external-data", action="store_true", help="weights in a file of their own, always")
        if door == "torch-export":
            sub.add_argument(
                "--standalone", action="store_true", help="no operators of this library, so that it runs without it"
            )
    return parser


def _build(args: argparse.Namespace) -> tuple[Any, tuple[str, ...] | None]:
    """The model with its weights, and the names of its classes where the checkpoint has them."""
    settings = dict(num_classes=args.num_classes, in_chans=args.in_chans)
    settings = {name: value for name, value in settings.items() if value is not None}
    if args.features_only and args.model not in list_unets():
        settings["features_only"] = True
    if args.checkpoint is None:
        print("warning: no --checkpoint, so the weights are random", file=sys.stderr)
        return create_model(args.model, **settings), None
    model, checkpoint = model_from_file(args.model, args.checkpoint, verbose=True, **settings)
    return model, stored_class_names(checkpoint, model.num_classes)


def export(argv: Sequence[str] | None = None) -> int:
    """Write a model for other programs."""
    parser = _parser()
    args = parser.parse_args(argv)
    for flag, least in (("num_classes", 0), ("in_chans", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            parser.error(f"--{flag.replace('_', '-')} must be at least {least}, got {value}")
    ignore_harmless_warnings()
    output = Path(args.output or args.model + _ENDINGS[args.door])
    with clear_errors(BUILDING):
        if args.door == "onnx":
            doors.needs_packages("onnx", "onnxscript")
        if args.door != "timm" and output.exists() and not args.overwrite:
            raise UsageError(f"{output} exists already; --overwrite replaces it")
        model, label_names = _build(args)
        if args.door == "timm":
            from vision_ssm.integrations.timm_folder import save_timm_folder

            save_timm_folder(model, output, label_names=label_names, overwrite=args.overwrite)
            print(f"timm.create_model('local-dir:{output}', pretrained=True) builds it, after import vision_ssm")
            return 0
        options: dict[str, Any] = dict(
            size=args.image_size,
            features=args.features_only and not model.features_only,
            label_names=None if args.features_only else label_names,
            check=not args.no_check,
            overwrite=args.overwrite,
        )
        if args.door == "onnx":
            options |= dict(opset=args.opset, external_data=args.external_data)
        if args.door == "torch-export":
            options |= dict(standalone=args.standalone)
        writers: dict[str, Callable[..., dict[str, Any]]] = {
            "onnx": doors.export_onnx,
            "torch-export": doors.export_program,
            "torchscript": doors.export_torchscript,
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            about = writers[args.door](model.to(checked_device(args.device)), output, **options)
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    _report(about, output)
    return 0


def _report(about: dict[str, Any], output: Path) -> None:
    table = Table("what", "value", title=str(output))
    channels, height, width = about["input_size"]
    table.add_row("input", f"{about['input_name']}: (batch, {channels}, {height}, {width})")
    table.add_row("outputs", ", ".join(about["output_names"]))
    for key, name in (("num_classes", "classes"), ("opset", "opset"), ("nodes", "nodes of the graph")):
        if key in about:
            table.add_row(name, str(about[key]))
    size = sum(path.stat().st_size for path in (output, Path(f"{output}.data")) if path.exists())
    table.add_row("size", f"{size / 2**20:.1f} MiB")
    error = f"{about['error']:.1e} of the outputs' standard deviation" if "error" in about else "not compared"
    table.add_row("difference from the model", error)
    wide_console().print(table)
