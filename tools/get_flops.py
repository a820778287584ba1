"""Count parameters and multiply-accumulates of a model: ``python tools/get_flops.py --help``."""

import argparse
import ast
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vision_ssm.analysis.macs_report import report_model
from vision_ssm.engine.config import UsageError
from vision_ssm.engine.console import BUILDING, clear_errors, command_parser, wide_console
from vision_ssm.factory import list_unets


def _scan(text: str) -> str | dict[str, Any]:
    """A strategy's name, or a Python dict of options."""
    if not text.startswith("{"):
        return text
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        raise argparse.ArgumentTypeError(f"must be a name or a dict of plain values, got {text!r}") from None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(
        "Count parameters and multiply-accumulates of a backbone or U-Net for one image, module by module. Nothing is"
        " computed and no memory is taken. Operators without a formula are listed.",
        """  get_flops.py vmamba_tiny_s1l8
  get_flops.py vmunet_isic --scan-formula paper         count as the paper says that it counts
  get_flops.py vssd_tiny --size 512 2048 --features-only --depth 3
  get_flops.py vmamba_micro --scan plstm --in-chans 4 --json vmamba_micro.json
  get_flops.py vmamba_micro --scan "{'state_dim': 16}"  some options of the model's own scan""",
    )
    parser.add_argument("model", help="a name of list_models.py, or of vision_ssm.list_unets()")
    parser.add_argument(
        "--size", nargs="+", type=int, metavar="N",
        help="side of the image, or height and width; by default what the model is published for",
    )  # fmt: skip
    parser.add_argument("--in-chans", type=int, help="channels of the image")
    parser.add_argument("--num-classes", type=int, help="classes of the head")
    parser.add_argument("--features-only", action="store_true", help="the dense backbone, without a classifier")
    parser.add_argument("--scan", type=_scan, help="another scan strategy, or a dict of options of the model's own")
    parser.add_argument(
        "--scan-formula", choices=("default", "paper"), default="default",
        help="default: 9 operations per step, channel and state; paper: as the model's paper or repository counts",
    )  # fmt: skip
    parser.add_argument("--depth", type=int, default=2, help="levels of modules to show (default 2)")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE as well; - for the terminal alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    with clear_errors((*BUILDING, RuntimeError)):
        if args.size is not None and (len(args.size) > 2 or min(args.size) < 1):
            raise UsageError(f"--size takes a side, or height and width, each at least 1, got {args.size}")
        if args.depth < 0:
            raise UsageError(f"--depth must be 0 or more, got {args.depth}")
        chosen = dict(in_chans=args.in_chans, num_classes=args.num_classes, scan=args.scan)
        overrides = {key: value for key, value in chosen.items() if value is not None}
        if args.features_only:
            if args.model in list_unets():
                raise UsageError(
                    f"{args.model} is a U-Net: it has no dense backbone of its own, leave --features-only out"
                )
            overrides["features_only"] = True
        size = None if args.size is None else (args.size[0], args.size[-1])
        report = report_model(args.model, size, scan_formula=args.scan_formula, **overrides)
    if args.json is not None:
        text = json.dumps(report.as_dict(args.depth), indent=2)
        if args.json == "-":
            print(text)
            return 0
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text(text + "\n")
    console = wide_console()
    for table in (report.module_table(args.depth), report.operator_table(), report.uncounted_table()):
        console.print(table)
    for sentence in report.sentences():
        console.print(sentence, highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
