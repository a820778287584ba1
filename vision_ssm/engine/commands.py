"""The commands train, test, predict and list_models; the scripts in tools/ and the console scripts call them."""

import argparse
import contextlib
import csv
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from vision_ssm.factory import create_model, find_family, list_models
from vision_ssm.registry import SCANS, suggest
from vision_ssm.weights import CheckpointError, load_weights

from . import figures
from .classifier import ImageClassifier
from .config import (
    UsageError,
    add_common_flags,
    load_config,
    precisions,
    prepare,
    prepare_training,
    use_test_time_augmentation,
)
from .dense import DensePredictor, SampleDrawer, dense_task, picture_of, save_pictures, summarise
from .dense_checks import check_dense
from .hooks import NonFiniteError
from .logs import ignore_harmless_warnings
from .metrics import Evaluation, find_evaluation, format_metric
from .pose import PosePredictor, TopDownPose, load_pose_weights
from .predict import Predictor, image_files
from .runner import Runner

MOST_DRAWN = 24
PIPE_WIDTH = 240
TRACEBACK = "VISION_SSM_TRACEBACK"
EXPECTED = (UsageError, CheckpointError, NonFiniteError, FileNotFoundError)


def _parser(description: str, examples: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        description=description, epilog=f"examples:\n{examples}", formatter_class=argparse.RawDescriptionHelpFormatter
    )


def _console() -> Console:
    """Console that never cuts a table short where its output goes to a file or a pipe."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


@contextlib.contextmanager
def _clear_errors(kinds: tuple[type[Exception], ...] = EXPECTED) -> Iterator[None]:
    """Errors of these kinds end the program with their message alone; all others keep their traceback."""
    try:
        yield
    except kinds as error:
        if os.environ.get(TRACEBACK):
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        print(f"error: {message}\n(set {TRACEBACK}=1 for the traceback)", file=sys.stderr)
        raise SystemExit(1) from None


def _leave_process_group() -> None:
    """Part from the other processes: one that ends with its group open may be aborted on its way out."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


# What is wrong with a config shows when it is built, as one of these.
_BUILDING = (*EXPECTED, ValueError, TypeError, KeyError, OSError)


def train(argv: Sequence[str] | None = None) -> int:
    """Train a model from a config."""
    parser = _parser(
        "Train a model from a config. Everything is written to the work dir: checkpoints, log, TensorBoard events, "
        "curves.png, confusion_matrix.png, predictions.png, config, environment.",
        """  train.py configs/classification/quickstart_digits.py
  train.py configs/classification/vmamba_tiny_s1l8_8xb128_in1k.py --data-root /data/imagenet --amp bf16
  train.py CONFIG --resume                              continue after an interruption, exactly
  train.py CONFIG --cfg-options train_cfg.max_epochs=5 optim_wrapper.optimizer.lr=2e-3
  torchrun --nproc_per_node=8 train.py CONFIG --launcher pytorch""",
    )
    parser.add_argument("config", help="config file, for example configs/classification/quickstart_digits.py")
    add_common_flags(parser)
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT",
        help="continue from the newest good checkpoint of the work dir, or from CHECKPOINT",
    )  # fmt: skip
    parser.add_argument(
        "--resume-anyway", action="store_true", help="resume although the config differs from the checkpoint's"
    )
    parser.add_argument(
        "--amp",
        nargs="?",
        const="bf16",
        choices=precisions(),
        help="mixed precision: bf16 (default, also on a CPU) or fp16",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="train the backbone through CUDA graphs, so that the host does not limit it: one GPU, no accumulation",
    )
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic algorithms, also on a GPU")
    args = parser.parse_args(argv)
    ignore_harmless_warnings()
    with _clear_errors(_BUILDING):
        cfg = prepare_training(args)
        check_dense(cfg, ("train_dataloader", "val_dataloader"), training=True)
        runner = Runner.from_cfg(cfg)
        if not cfg.get("resume") and (Path(cfg.work_dir) / "last_checkpoint").exists():
            runner.logger.warning(
                f"{cfg.work_dir} holds an earlier run, whose files will be replaced (--resume continues it)"
            )
        runner.build_training()
    with _clear_errors():
        runner.train()
    _leave_process_group()
    return 0


def test(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint on the test data of a config."""
    parser = _parser(
        "Evaluate weights on the test data of a config: metrics, accuracy per class, confusion matrix, pictures.",
        """  test.py configs/classification/quickstart_digits.py work_dirs/quickstart_digits/best_top1.pth
  test.py CONFIG official_weights.pth --data-root /data/imagenet --out predictions.csv
  test.py configs/segmentation/CONFIG.py iter_160000.pth --tta                       several scales and flips
  test.py SEGMENTATION CHECKPOINT --cfg-options model.test_cfg.mode=slide model.test_cfg.crop_size=512,512 \\
      model.test_cfg.stride=341,341                                                  sliding window""",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument("checkpoint", help="checkpoint of a training run, or official weights of the config's model")
    add_common_flags(parser)
    parser.add_argument(
        "--out", metavar="FILE.csv", help="classification: write one line per image: file, label, prediction"
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="segmentation and detection: average over scales and flips, as the config's tta_pipeline says",
    )
    args = parser.parse_args(argv)
    ignore_harmless_warnings()
    with _clear_errors(_BUILDING):
        if not Path(args.checkpoint).is_file():
            near = sorted(str(file) for file in Path(args.checkpoint).parent.glob("*.pth"))
            raise UsageError(f"there is no checkpoint {args.checkpoint}.{suggest(args.checkpoint, near)}")
        cfg = prepare(args, str(Path(args.checkpoint).parent / "test"))
        if cfg.get("test_dataloader") is None:
            raise UsageError(f"config {args.config} has no test_dataloader")
        check_dense(cfg, ("test_dataloader",))
        for part in ("train", "val"):
            cfg[f"{part}_dataloader"] = cfg[f"{part}_cfg"] = None
        cfg.optim_wrapper = cfg.param_scheduler = cfg.val_evaluator = None
        # Of the training hooks only the pictures concern a test; weights need no averaging, the file has done it.
        cfg.default_hooks = {key: hook for key, hook in cfg.default_hooks.items() if key in ("logger", "pictures")}
        cfg.default_hooks.update(checkpoint=None, param_scheduler=None, sampler_seed=None)
        cfg.custom_hooks = []
        if args.out and cfg.model.type != "vision_ssm.ImageClassifier":
            raise UsageError(f"--out is for image classifiers; the model of this config is {cfg.model.type}")
        if args.tta:
            use_test_time_augmentation(cfg)
        if isinstance(cfg.model.get("backbone"), dict) and "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None  # every weight comes from the checkpoint
        runner = Runner.from_cfg(cfg)
        model = runner.bare_model
        if isinstance(model, ImageClassifier):
            load_weights(model.backbone, args.checkpoint, verbose=False)
        elif isinstance(model, TopDownPose):
            load_pose_weights(model, args.checkpoint)
        else:
            runner.load_checkpoint(args.checkpoint)
        _ = runner.test_loop
    with _clear_errors():
        metrics = runner.test()
        if runner.rank == 0:
            _report_test(metrics, find_evaluation(runner.test_evaluator), cfg.work_dir, args.out)
    _leave_process_group()
    return 0


def _report_test(metrics: dict, evaluation: Evaluation | None, work_dir: str, out: str | None) -> None:
    console = _console()
    table = Table("metric", "value", title="Test")
    for name, value in metrics.items():
        if name not in ("data_time", "time"):
            table.add_row(name, f"{value:.4f}" if name.endswith("entropy") else format_metric(value))
    console.print(table)
    if evaluation is None:
        return
    rows = sorted(evaluation.per_class(), key=lambda row: (row["images"] == 0, row["accuracy"]))
    table = Table("class", "images", "accuracy, %", "most taken for", title="Classes, the worst first")
    for row in rows[:10]:
        table.add_row(row["name"], str(row["images"]), f"{row['accuracy']:.2f}", row["mistaken_for"])
    console.print(table)
    if out is not None:
        with open(out, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "predicted", "confidence", "correct"))
            for prediction in evaluation.predictions:
                names = (evaluation.classes[prediction.label], evaluation.classes[prediction.predicted])
                writer.writerow((prediction.path, *names, f"{prediction.confidence:.6f}", int(prediction.rank == 0)))
        console.print(f"One line per image: {out}", soft_wrap=True)
    console.print(f"per_class.csv, confusion_matrix.png and predictions.png: {work_dir}", soft_wrap=True)


def predict(argv: Sequence[str] | None = None) -> int:
    """Classify or segment images, or detect objects in them, as the config says."""
    parser = _parser(
        "Predict for images or all images of a folder, as the config says: the most probable classes, a semantic map, "
        "or boxes and instance masks; a table and a picture.",
        """  predict.py CONFIG CHECKPOINT image.png
  predict.py configs/classification/quickstart_digits.py work_dirs/quickstart_digits/best_top1.pth data/digits/val/3
  predict.py dog.jpg cat.jpg --model vmamba_tiny_s1l8 --weights vssm1_tiny_0230s_ckpt_epoch_264.pth
  predict.py configs/detection/CONFIG.py epoch_12.pth photos/ --score 0.5 --out drawn/     one picture per photo""",
    )
    parser.add_argument("inputs", nargs="+", metavar="[CONFIG CHECKPOINT] IMAGE_OR_FOLDER", help="what to look at")
    parser.add_argument("--model", metavar="NAME", help="name of the model, instead of a config (see list_models.py)")
    parser.add_argument("--weights", metavar="FILE", help="weight file for --model, official or of a training run")
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
        default="predictions.png",
        metavar="FILE.png",
        help="picture to write (default %(default)s); any other name is a folder, for one picture per image (not for "
        "classification)",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: a GPU if there is one)")
    args = parser.parse_args(argv)
    ignore_harmless_warnings()
    if (args.model is None) != (args.weights is None):
        parser.error("--model and --weights belong together")
    if args.top < 1:
        parser.error("--top must be at least 1")
    with _clear_errors(_BUILDING):
        if args.model is not None:
            predictor = Predictor.from_weights(args.model, args.weights, args.device)
            inputs = args.inputs
        else:
            if len(args.inputs) < 3:
                parser.error("expected CONFIG CHECKPOINT IMAGES, or --model NAME --weights FILE IMAGES")
            config, checkpoint, *inputs = args.inputs
            cfg = load_config(config)
            if cfg.model.type == "vision_ssm.TopDownPose":
                poses = PosePredictor.from_config(cfg, checkpoint, args.device)
                return _predict_poses(poses, image_files(inputs), args)
            if args.boxes:
                raise UsageError(f"--boxes is for pose estimation; the model of this config is {cfg.model.type}")
            if dense_task(cfg) is not None:
                return _predict_dense(DensePredictor(cfg, checkpoint, args.device), image_files(inputs), args)
            predictor = Predictor.from_config(cfg, checkpoint, args.device)
        files = image_files(inputs)
        results = _results(lambda: predictor(files, args.top))
        figures.draw_top(list(results.items())[:MOST_DRAWN], args.out, f"Top {args.top} classes")
    console = _console()
    if len(results) == 1:
        ((file, top),) = results.items()
        console.print(file, highlight=False, soft_wrap=True)
        table = Table("class", "probability")
        for name, value in top:
            table.add_row(name, f"{100 * value:.2f} %")
    else:
        table = Table("image", *(f"{place + 1}." for place in range(len(next(iter(results.values()))))))
        for file, top in results.items():
            table.add_row(file, *(f"{name} {100 * value:.1f} %" for name, value in top))
    console.print(table)
    drawn = f" (the first {MOST_DRAWN} of {len(results)} images)" if len(results) > MOST_DRAWN else ""
    console.print(f"Picture{drawn}: {args.out}", soft_wrap=True)
    return 0


def _results(predict: Callable[[], dict]) -> dict:
    """What `predict` returns, its warnings printed; `UsageError` if that is nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        results = predict()
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
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
    console = _console()
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
    console = _console()
    console.print(table)
    drawn = f" (the first {MOST_DRAWN} of {len(results)} images)" if len(results) > len(shown) else ""
    console.print(f"Picture{'s' * (not grid)}{drawn}: {args.out}", soft_wrap=True)
    return 0


def describe_scan(mixer: Any) -> str:
    """Name of a token mixer in the registry of scans, with its core and routes where it has them."""
    name = next((key for key, cls in SCANS.module_dict.items() if cls is type(mixer)), type(mixer).__name__)
    core: Any = getattr(mixer, "core", None)
    details = [type(core).__name__.removesuffix("Core").lower()] if core is not None else []
    details += [f"{core.routes.num_routes} routes"] if hasattr(core, "routes") else []
    details += [f"state {core.state_dim}"] if hasattr(core, "state_dim") else []
    return f"{name} ({', '.join(details)})" if details else name


def list_models_command(argv: Sequence[str] | None = None) -> int:
    """List models."""
    parser = _parser(
        "List the models of the library with family, parameters and scan.",
        """  list_models.py
  list_models.py 'vmamba_*'
  list_models.py '*tiny*' --num-classes 10""",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, for example 'vmamba_*'")
    parser.add_argument("--num-classes", type=int, default=1000, help="classes of the counted model (default 1000)")
    args = parser.parse_args(argv)
    names = list_models(args.pattern)
    if not names:
        print(f"error: no model matches {args.pattern!r}.{suggest(args.pattern, list_models())}", file=sys.stderr)
        return 1
    table = Table("model", "family", "parameters", "width", "scan", "reported top-1, %", title=f"{len(names)} models")
    for name in names:
        family = find_family(name)
        with torch.device("meta"):
            model = create_model(name, num_classes=args.num_classes)
        count = sum(parameter.numel() for parameter in model.parameters())
        mixers = [module.mixer for module in model.modules() if getattr(module, "mixer", None) is not None]
        scans = sorted({describe_scan(mixer) for mixer in mixers})
        reported = model.pretrained_cfg.get("top1_reported")
        widths = "-".join(str(stage["num_chs"]) for stage in model.feature_info)
        table.add_row(name, family.family, f"{count:,}", widths, ", ".join(scans), str(reported or "-"))
    _console().print(table)
    return 0
