"""The command predict: classes, semantic maps, boxes and masks, poses, or labels of volumes, as the config says."""

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from vision_ssm.analysis.pictures import check_place

from . import figures
from .config import UsageError, load_config
from .console import BUILDING, clear_errors, command_parser, wide_console
from .dense import DensePredictor, SampleDrawer, dense_task, picture_of, save_pictures, summarise
from .logs import ignore_harmless_warnings
from .medical_predict import add_medical_flags, check_medical_flags, predict_medical
from .official import find_checkpoint
from .pose import PosePredictor
from .predict import Predictor, image_files

MOST_DRAWN = 24


def predict(argv: Sequence[str] | None = None) -> int:
    """Classify or segment images, or detect objects in them, as the config says."""
    parser = command_parser(
        "Predict for images or all images of a folder, as the config says: the most probable classes, a semantic map, "
        "or boxes and instance masks; a table and a picture.",
        """  predict.py CONFIG CHECKPOINT image.png
  predict.py configs/classification/quickstart_digits.py work_dirs/quickstart_digits/best_top1.pth data/digits/val/3
  predict.py dog.jpg cat.jpg --model vmamba_tiny_s1l8 --weights vssm1_tiny_0230s_ckpt_epoch_264.pth
  predict.py configs/detection/CONFIG.py official photos/ --score 0.5 --out drawn/         published weights, one
                                                                                           picture per photo
  predict.py configs/medical/CONFIG.py best_dice.pth --volume scan.nii.gz --out masks/ --montage""",
    )
    parser.add_argument("inputs", nargs="+", metavar="[CONFIG CHECKPOINT] IMAGE_OR_FOLDER", help="what to look at")
    parser.add_argument("--model", metavar="NAME", help="name of the model, instead of a config (see list_models.py)")
    parser.add_argument("--weights", metavar="FILE", help="weight file for --model, official or of a training run")
    parser.add_argument(
        "--size", type=int, nargs="+", metavar="PIXELS",
        help="classification: side, or height and width, of the images for the model (default: as evaluated)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=5, help="classes per image (default 5)")
    parser.add_argument("--score", type=float, default=0.3, help="detection: least score shown (default %(default)s)")
    parser.add_argument(
        "--boxes",
        metavar="FILE.json",
        help="pose estimation: the persons of each image, {file: [[x, y, width, height], ...]} (default: one, of its "
        "size)",
    )
    parser.add_argument(
        "--out",
        metavar="FILE.png",
        help="picture to write (default predictions.png); any other name is a folder, for one picture per image (not "
        "for classification), and the folder of the masks of medical images (default predictions)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    add_medical_flags(parser)
    args = parser.parse_args(argv)
    folder = args.out or "predictions"
    args.out = args.out or "predictions.png"
    ignore_harmless_warnings()
    if (args.model is None) != (args.weights is None):
        parser.error("--model and --weights belong together")
    if args.top < 1:
        parser.error("--top must be at least 1")
    if args.size is not None and (len(args.size) > 2 or min(args.size) < 1):
        parser.error("--size takes one or two numbers of pixels, at least 1")
    size = args.size and (args.size[0], args.size[-1])
    with clear_errors(BUILDING):
        if args.model is not None:
            check_medical_flags(args, args.model)
            predictor = _warned(lambda: Predictor.from_weights(args.model, args.weights, args.device, size))
            inputs = args.inputs
        else:
            if len(args.inputs) < (2 if args.volume else 3):
                parser.error("expected CONFIG CHECKPOINT IMAGES, or --model NAME --weights FILE IMAGES")
            config, checkpoint, *inputs = args.inputs
            cfg = load_config(config)
            if size is not None and cfg.model.type != "vision_ssm.ImageClassifier":
                raise UsageError(f"--size is for classification; the model of this config is {cfg.model.type}")
            checkpoint = find_checkpoint(checkpoint, cfg, config)
            if cfg.model.type == "vision_ssm.MedicalSegmentor":
                pictures = image_files(inputs) if inputs else []
                return predict_medical(cfg, checkpoint, pictures, args, folder)
            check_medical_flags(args, cfg.model.type)
            if cfg.model.type == "vision_ssm.TopDownPose":
                poses = PosePredictor.from_config(cfg, checkpoint, args.device)
                return _predict_poses(poses, image_files(inputs), args)
            if args.boxes:
                raise UsageError(f"--boxes is for pose estimation; the model of this config is {cfg.model.type}")
            if dense_task(cfg) is not None:
                return _predict_dense(DensePredictor(cfg, checkpoint, args.device), image_files(inputs), args)
            predictor = Predictor.from_config(cfg, checkpoint, args.device, size)
        files = image_files(inputs)
        check_place(args.out)
        results = _results(lambda: predictor(files, args.top))
        title = f"Top {min(args.top, len(predictor.classes))} classes"
        figures.draw_top(list(results.items())[:MOST_DRAWN], args.out, title)
    console = wide_console()
    if len(results) == 1:
        ((file, top),) = results.items()
        console.print(file, highlight=False, soft_wrap=True)
        table = Table("class", "probability")
        for name, value in top:
            table.add_row(escape(name), f"{100 * value:.2f} %")
    else:
        table = Table("image", *(f"{place + 1}." for place in range(len(next(iter(results.values()))))))
        for file, top in results.items():
            table.add_row(escape(file), *(f"{escape(name)} {100 * value:.1f} %" for name, value in top))
    console.print(table)
    drawn = f" (the first {MOST_DRAWN} of {len(results)} images)" if len(results) > MOST_DRAWN else ""
    console.print(f"Picture{drawn}: {args.out}", soft_wrap=True)
    return 0


def _warned(call: Callable[[], Any]) -> Any:
    """What `call` returns, its warnings printed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        result = call()
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    return result


def _results(predict: Callable[[], dict]) -> dict:
    """What `predict` returns, its warnings printed; `UsageError` if that is nothing."""
    results = _warned(predict)
    if not results:
        raise UsageError("none of the images could be read")
    return results


def _read_boxes(file: str, images: Sequence[Path]) -> dict[str, list]:
    """Boxes by image from a JSON file, whose names may be paths as given or bare file names."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--boxes {file} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UsageError(f"--boxes {file} should hold {{file: [[x, y, width, height], ...]}}, not a list")
    bare = {image.name: str(image) for image in images}
    return {bare.get(str(name), str(name)): rows for name, rows in content.items()}


def _predict_poses(predictor: PosePredictor, files: Sequence[Path], args: argparse.Namespace) -> int:
    boxes = _read_boxes(args.boxes, files) if args.boxes else None
    results = _results(lambda: predictor(files, boxes))
    shown = dict(list(results.items())[:MOST_DRAWN])
    predictor.draw(shown, args.out)
    table = Table("image", "person", "mean score", "best keypoints")
    names = predictor.keypoints.names
    for file, persons in results.items():
        for number, person in enumerate(persons, 1):
            scores = person["scores"].tolist()
            order = sorted(range(len(names)), key=lambda index: -scores[index])[: args.top]
            best = ", ".join(f"{names[index]} {scores[index]:.2f}" for index in order)
            table.add_row(file, str(number), f"{sum(scores) / len(scores):.3f}", best)
    console = wide_console()
    console.print(table)
    console.print(f"Picture: {args.out}", soft_wrap=True)
    return 0


def _predict_dense(predictor: DensePredictor, files: Sequence[Path], args: argparse.Namespace) -> int:
    results = _results(lambda: predictor(files))
    drawer = SampleDrawer(predictor.task, predictor.dataset_meta, args.score)
    grid = Path(args.out).suffix.lower() == ".png"
    shown = list(results.items())[: MOST_DRAWN if grid else None]
    pictures = [(Path(file).name, drawer(picture_of(file), sample)) for file, sample in shown]
    if grid:
        figures.draw_pictures(pictures, args.out, f"Prediction: {predictor.task}")
    else:
        save_pictures(pictures, args.out)
    table = Table("image", *(f"{place + 1}." for place in range(args.top)))
    for file, sample in results.items():
        found = summarise(predictor.task, sample, predictor.classes, args.score)[: args.top]
        table.add_row(file, *(f"{name} {text}" for name, text in found))
    console = wide_console()
    console.print(table)
    drawn = f" (the first {MOST_DRAWN} of {len(results)} images)" if len(results) > len(shown) else ""
    console.print(f"Picture{'s' * (not grid)}{drawn}: {args.out}", soft_wrap=True)
    return 0
