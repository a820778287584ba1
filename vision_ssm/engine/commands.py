"""The commands train, test and list_models; the scripts in tools/ call them."""

import csv
import gc
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch.distributed.device_mesh import DeviceMesh

from vision_ssm.analysis.pictures import check_place
from vision_ssm.backbones.family import points_to_file
from vision_ssm.factory import create_model, find_any, list_models, list_unets
from vision_ssm.registry import SCANS, suggest
from vision_ssm.unets.base import UNet
from vision_ssm.weights import load_weights, read_checkpoint

from .checkpoint import continues
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
from .console import BUILDING, clear_errors, command_parser, wide_console
from .dense_checks import check_dense
from .logs import ignore_harmless_warnings
from .medical import MedicalSegmentor
from .medical_hooks import find_volumes
from .medical_metrics import VolumeEvaluation
from .metrics import Evaluation, find_evaluation, format_metric
from .official import WORD, find_checkpoint
from .pose import TopDownPose, load_pose_weights
from .predict import stored_class_names
from .runner import Runner
from .timm_models import load_classifier


def leave_process_group() -> None:
    """Part from the other processes: one that ends with its group open may be aborted on its way out.

    Threads of a group live as long as anything refers to it. A distributed model does, and is in cycles with its
    runner: callers let go of both, and the cycles are broken here, while the interpreter is still whole. Device meshes,
    which FSDP makes, refer to their groups as well, and caches of PyTorch keep them to the end.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        gc.collect()
        for mesh in gc.get_objects():
            if type(mesh) is DeviceMesh:
                vars(mesh).get("_pg_registry", {}).clear()
        torch.distributed.destroy_process_group()


def train(argv: Sequence[str] | None = None) -> int:
    """Train a model from a config."""
    parser = command_parser(
        "Train a model from a config. Everything is written to the work dir: checkpoints, log, TensorBoard events, "
        "curves.png, confusion_matrix.png, predictions.png, tables, config, environment.",
        """  train.py configs/classification/quickstart_digits.py
  train.py configs/classification/vmamba_tiny_s1l8_8xb128_in1k.py --data-root /data/imagenet --amp bf16
  train.py CONFIG --resume                              continue after an interruption, exactly
  train.py CONFIG --cfg-options train_cfg.max_epochs=5 optim_wrapper.optimizer.lr=2e-3
  torchrun --nproc_per_node=8 train.py CONFIG --launcher pytorch
  torchrun --nproc_per_node=8 train.py CONFIG --launcher pytorch --fsdp                memory for larger models""",
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
        help="train the backbone through CUDA graphs, so that the host does not limit it; without accumulation",
    )
    parser.add_argument(
        "--fsdp",
        action="store_true",
        help="let the processes of a distributed run share parameters, gradients and optimizer states",
    )
    parser.add_argument("--seed", type=int, help="seed of all random numbers")
    parser.add_argument("--deterministic", action="store_true", help="only deterministic algorithms, also on a GPU")
    args = parser.parse_args(argv)
    ignore_harmless_warnings()
    with clear_errors(BUILDING):
        cfg = prepare_training(args)
        check_dense(cfg, ("train_dataloader", "val_dataloader"), training=not continues(cfg))
        runner = Runner.from_cfg(cfg)
        if not cfg.get("resume") and (Path(cfg.work_dir) / "last_checkpoint").exists():
            runner.logger.warning(
                f"{cfg.work_dir} holds an earlier run, whose files will be replaced (--resume continues it)"
            )
        runner.build_training()
    with clear_errors():
        runner.train()
    del runner
    leave_process_group()
    return 0


def test(argv: Sequence[str] | None = None) -> int:
    """Evaluate a checkpoint on the test data of a config."""
    parser = command_parser(
        "Evaluate weights on the test data of a config: metrics, accuracy per class, confusion matrix, pictures.",
        """  test.py configs/classification/quickstart_digits.py work_dirs/quickstart_digits/best_top1.pth
  test.py CONFIG official --data-root /data/imagenet --out predictions.csv           published weights
  test.py configs/segmentation/CONFIG.py iter_160000.pth --tta                       several scales and flips
  test.py configs/medical/CONFIG.py best_dice.pth --cfg-options model.inference.flips=horizontal,vertical,both
  test.py SEGMENTATION CHECKPOINT --cfg-options model.test_cfg.mode=slide model.test_cfg.crop_size=512,512 \\
      model.test_cfg.stride=341,341                                                  sliding window""",
    )
    parser.add_argument("config", help="config file")
    parser.add_argument(
        "checkpoint",
        help="checkpoint of a training run, file of official weights of the config's model, or official: the published "
        "ones, from the cache or the net",
    )
    add_common_flags(parser)
    parser.add_argument(
        "--out", metavar="FILE.csv",
        help="classification: one line per image (file, label, prediction); medical images: one per case and class",
    )  # fmt: skip
    parser.add_argument(
        "--tta",
        action="store_true",
        help="segmentation and detection: average over scales and flips, as the config's tta_pipeline says",
    )
    args = parser.parse_args(argv)
    ignore_harmless_warnings()
    with clear_errors(BUILDING):
        folder = Path("work_dirs") / Path(args.config).stem if args.checkpoint == WORD else Path(args.checkpoint).parent
        cfg = load_config(args.config)
        args.checkpoint = find_checkpoint(args.checkpoint, cfg, args.config)
        if not Path(args.checkpoint).is_file():
            near = sorted(str(file) for file in Path(args.checkpoint).parent.glob("*.pth"))
            raise UsageError(f"there is no checkpoint {args.checkpoint}.{suggest(args.checkpoint, near)}")
        cfg = prepare(args, str(folder / "test"))
        if cfg.get("test_dataloader") is None:
            raise UsageError(f"config {args.config} has no test_dataloader")
        check_dense(cfg, ("test_dataloader",))
        for part in ("train", "val"):
            cfg[f"{part}_dataloader"] = cfg[f"{part}_cfg"] = None
        cfg.optim_wrapper = cfg.param_scheduler = cfg.val_evaluator = None
        cfg.fsdp = False  # a model that only predicts is whole in every process
        # Of the training hooks only the pictures concern a test; weights need no averaging, the file has done it.
        cfg.default_hooks = {key: hook for key, hook in cfg.default_hooks.items() if key in ("logger", "pictures")}
        cfg.default_hooks.update(checkpoint=None, param_scheduler=None, sampler_seed=None)
        cfg.custom_hooks = []
        if args.out and cfg.model.type not in ("vision_ssm.ImageClassifier", "vision_ssm.MedicalSegmentor"):
            raise UsageError(f"--out is for image classifiers and medical images; this model is {cfg.model.type}")
        if args.tta:
            use_test_time_augmentation(cfg)
        if isinstance(cfg.model.get("backbone"), dict) and "init_cfg" in cfg.model.backbone:
            cfg.model.backbone.init_cfg = None  # every weight comes from the checkpoint
        if cfg.model.type in ("vision_ssm.MedicalSegmentor", "vision_ssm.ImageClassifier"):
            cfg.model.update(pretrained=None)
            cfg.model.pop("reset_head", None)
        if args.out:
            check_place(args.out)
        runner = Runner.from_cfg(cfg)
        model = runner.bare_model
        if isinstance(model, ImageClassifier):
            load_classifier(model.backbone, args.checkpoint)
            check_tested_classes(args.checkpoint, model.num_classes, runner.test_dataloader.dataset)
        elif isinstance(model, TopDownPose):
            load_pose_weights(model, args.checkpoint)
        elif isinstance(model, MedicalSegmentor):
            model.check_classes(runner.test_dataloader.dataset.metainfo["classes"])
            load_weights(model.unet, args.checkpoint, verbose=False)
        else:
            runner.load_checkpoint(args.checkpoint)
        _ = runner.test_loop
    with clear_errors():
        metrics = runner.test()
        if runner.rank == 0:
            further = getattr(runner.test_loop, "others", {}).items()
            evaluators = {"": runner.test_evaluator, **{f"_{name}": evaluator for name, (_, evaluator) in further}}
            found = {ending: find_evaluation(evaluator) for ending, evaluator in evaluators.items()}
            _report_test(metrics, found, cfg.work_dir, args.out)
            volumes = find_volumes(runner.test_evaluator)
            if volumes is not None:
                _report_volumes(volumes, cfg.work_dir, args.out)
    del runner, model, _
    leave_process_group()
    return 0


def check_tested_classes(checkpoint: str, num_classes: int, dataset: Any) -> None:
    """Labels of the test data must be those of training, as far as the checkpoint says which these were."""
    if hasattr(dataset, "check_num_classes"):
        dataset.check_num_classes(num_classes)
    known = stored_class_names(read_checkpoint(checkpoint), num_classes)
    found = tuple((getattr(dataset, "metainfo", None) or {}).get("classes", ()))
    if known is None or not found or known == found:
        return
    differing = [f"{ours} instead of {theirs}" for ours, theirs in zip(found, known) if ours != theirs]
    raise UsageError(
        f"the test data has {len(found)} classes and {checkpoint} was trained on {len(known)}, or in another order"
        f" ({', '.join(differing[:3]) or 'some are missing'}), so that labels would not agree: give the test data"
        " classes=[...] of training (with allow_empty_classes=True where it lacks images)"
    )


def _report_test(metrics: dict, evaluations: dict[str, Evaluation | None], work_dir: str, out: str | None) -> None:
    """Print the metrics of all sets and the classes of the first; the file `out` gets the images of all.

    Names of `evaluations` are the endings of the files that were drawn of them.
    """
    console = wide_console()
    table = Table("metric", "value", title="Test")
    for name, value in metrics.items():
        if name not in ("data_time", "time"):
            table.add_row(name, f"{value:.4f}" if name.endswith("entropy") else format_metric(value))
    console.print(table)
    found = {ending: evaluation for ending, evaluation in evaluations.items() if evaluation is not None}
    if not found:
        return
    evaluation = next(iter(found.values()))
    rows = sorted(evaluation.per_class(), key=lambda row: (row["images"] == 0, row["accuracy"]))
    which = " of the first set" if len(found) > 1 else ""
    table = Table("class", "images", "accuracy, %", "most taken for", title=f"Classes{which}, the worst first")
    for row in rows[:10]:
        names = escape(row["name"]), escape(row["mistaken_for"])
        table.add_row(names[0], str(row["images"]), f"{row['accuracy']:.2f}", names[1])
    console.print(table)
    if out is not None:
        with open(out, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file)
            writer.writerow(("path", "label", "predicted", "confidence", "correct"))
            for prediction in (prediction for each in found.values() for prediction in each.predictions):
                names = (evaluation.classes[prediction.label], evaluation.classes[prediction.predicted])
                writer.writerow((prediction.path, *names, f"{prediction.confidence:.6f}", int(prediction.rank == 0)))
        console.print(f"One line per image: {out}", soft_wrap=True)
    for ending in found:
        written = f"per_class{ending}.csv, confusion_matrix{ending}.png and predictions{ending}.png"
        console.print(f"{written}: {work_dir}", soft_wrap=True)


def _report_volumes(evaluation: VolumeEvaluation, work_dir: str, out: str | None) -> None:
    console = wide_console()
    console.print(evaluation.table("Test"))
    if out is not None:
        evaluation.write_csv(out)
        console.print(f"One line per case and class: {out}", soft_wrap=True)
    console.print(f"per_class.json, per_case.csv and predictions.png: {work_dir}", soft_wrap=True)


def describe_scan(mixer: Any) -> str:
    """Name of a token mixer in the registry of scans, with its core and routes where it has them."""
    name = next((key for key, cls in SCANS.module_dict.items() if cls is type(mixer)), type(mixer).__name__)
    core: Any = getattr(mixer, "core", None)
    details = [type(core).__name__.removesuffix("Core").lower()] if core is not None else []
    details += [f"{core.routes.num_routes} routes"] if hasattr(core, "routes") else []
    details += [f"state {core.state_dim}"] if hasattr(core, "state_dim") else []
    return f"{name} ({', '.join(details)})" if details else name


def describe_weights(name: str) -> str:
    """In a word or two, what official weights of a backbone or U-Net there are; ``"-"`` if none."""
    family = find_any(name)
    if "encoder_weights" in family.published.get(name, {}):
        return "encoder"
    found = family.weights_of(name)
    kinds = {tag: "download" if points_to_file(entry["url"]) else "page" for tag, entry in found.items()}
    return ", ".join(f"{kind} (.{tag})" if tag else kind for tag, kind in kinds.items()) or "-"


def list_models_command(argv: Sequence[str] | None = None) -> int:
    """List models."""
    parser = command_parser(
        "List the backbones and U-Nets of the library with family, parameters, scan and official weights: 'download' "
        "is what create_model(NAME, pretrained=True) fetches, 'page' what is to be downloaded with a browser, "
        "'encoder' what encoder_weights=True fetches.",
        """  list_models.py
  list_models.py 'vmamba_*'
  list_models.py '*unet*'
  list_models.py '*tiny*' --num-classes 10
  list_models.py --pretrained                           with official weights only""",
    )
    parser.add_argument("pattern", nargs="?", default="*", help="shell-style pattern, for example 'vmamba_*'")
    parser.add_argument(
        "--num-classes", type=int,
        help="classes of the counted models, 0: no classifier (default 1000; a U-Net, also for 0, as published)",
    )  # fmt: skip
    parser.add_argument("--pretrained", action="store_true", help="only models with official weights")
    args = parser.parse_args(argv)
    names = [*list_models(args.pattern), *list_unets(args.pattern)]
    if not names:
        known = [*list_models(), *list_unets()]
        print(f"error: no model matches {args.pattern!r}.{suggest(args.pattern, known)}", file=sys.stderr)
        return 1
    weights = {name: describe_weights(name) for name in names}
    if args.pretrained:
        names = [name for name in names if weights[name] != "-"]
        if not names:
            print(f"error: of no model that matches {args.pattern!r} weights are published", file=sys.stderr)
            return 1
    columns = ("model", "family", "parameters", "width", "scan", "reported top-1, %", "official weights")
    table = Table(*columns, title=f"{len(names)} models")
    for name in names:
        family = find_any(name)
        # 0 leaves the classifier of a backbone out; a U-Net has nothing else
        classes = (args.num_classes or None) if issubclass(family, UNet) else args.num_classes
        with torch.device("meta"), clear_errors((ValueError,)):
            model = create_model(name, num_classes=classes)
        count = sum(parameter.numel() for parameter in model.parameters())
        mixers = [module.mixer for module in model.modules() if getattr(module, "mixer", None) is not None]
        scans = sorted({describe_scan(mixer) for mixer in mixers})
        reported = family.published.get(name, {}).get("top1_reported")
        channels = [str(stage["num_chs"]) for stage in model.feature_info]
        widths = "-".join(channels) if len(set(channels)) > 1 else f"{channels[0]} x {len(channels)}"
        table.add_row(name, family.family, f"{count:,}", widths, ", ".join(scans), str(reported or "-"), weights[name])
    wide_console().print(table)
    return 0
