"""Options of the command visualize."""

import argparse
from pathlib import Path

from vision_ssm.analysis.feature_pictures import REDUCTIONS
from vision_ssm.analysis.receptive_field import MEASURES

from .config import KeyValues
from .console import command_parser

FOLDER = Path("visualizations")
EXAMPLES = {
    "scan": """  visualize.py scan cross                                        a route family
  visualize.py scan windowed --options 'directions=[raster,window2]' --grid 7 9
  visualize.py scan plstm --out plstm.gif                        animated, as is svg with --animate
  visualize.py scan localvmamba_micro --block stages.1.blocks.0  of a block of a model""",
    "erf": """  visualize.py erf vmamba_tiny_s1l8 --random 20
  visualize.py erf vmamba_tiny_s1l8 photos/ --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth --count 50
  visualize.py erf configs/classification/quickstart_digits.py data/digits/val --checkpoint best_top1.pth""",
    "cam": """  visualize.py cam vmamba_tiny_s1l8 dog.jpg --checkpoint vssm1_tiny_0230s_ckpt_epoch_264.pth
  visualize.py cam vmamba_tiny_s1l8 dog.jpg --checkpoint FILE --class 'tabby' 207 --whole
  visualize.py cam configs/classification/quickstart_digits.py data/digits/val/3 --checkpoint best_top1.pth
  visualize.py cam configs/medical/msvmunet_synapse.py slice.png --checkpoint best_dice.pth --class liver""",
    "activation": """  visualize.py activation vim_tiny dog.jpg --checkpoint FILE --stages 5 11 23
  visualize.py activation vmunet_isic scan.png --checkpoint FILE --reduce norm""",
    "attn": """  visualize.py attn vmamba_tiny_s1l8 dog.jpg --checkpoint FILE --block stages.2.blocks.3 --query 0.4 0.6
  visualize.py attn noncausal_ssd --grid 14 14 --query 0.5 0.25  a strategy alone, with random weights and tokens""",
    "filters": """  visualize.py filters vmamba_tiny_s1l8 --checkpoint FILE
  visualize.py filters vcmamba_micro --layers 'stages.0.*' --most 100""",
    "runs": """  visualize.py runs work_dirs/vim_tiny_arrows work_dirs/vssd_tiny_arrows
  visualize.py runs work_dirs/a work_dirs/b --names 'rate 1e-3' 'rate 1e-4' --metrics top1 cross_entropy""",
}


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command and of its subcommands."""
    parser = command_parser(
        "Draw what scans and models do, and how runs went. Pictures are png; their paths are printed.",
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
        return sub

    def add_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--options", nargs="+", action=KeyValues, metavar="KEY=VALUE", default={},
                         help="keywords of the model, such as scan=plstm, or of the scan or routes")  # fmt: skip

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
        add_options(sub)

    scan = add("scan", "routes of a route family, of a scan strategy or of a model, still or animated")
    scan.add_argument("name", metavar="NAME", help="route family, scan strategy or model")
    add_options(scan)
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

    cam = add("cam", "Grad-CAM: where a classifier or a U-Net finds a class")
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

    runs = add("runs", "training loss and metrics of several training runs, side by side")
    runs.add_argument("runs", nargs="+", metavar="WORK_DIR", help="work dir of a run, or its history.json")
    runs.add_argument("--names", nargs="+", help="of the runs, in their order (default: names of the folders)")
    runs.add_argument("--metrics", nargs="+", help="of validations (default: the main one, on every set it has)")
    runs.add_argument("--title", default="", help="above the picture (default: none)")
    return parser
