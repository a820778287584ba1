"""Prediction of whole volumes and images with a trained U-Net: NIfTI in and NIfTI out, on the same voxels."""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from PIL import Image
from rich.table import Table

from vision_ssm.data import EXTENSIONS, UnreadableImageError
from vision_ssm.data.medical_base import CLASS_SETS, class_palette
from vision_ssm.data.medical_cases import Case, Reading
from vision_ssm.data.medical_files import read_arrays, stem_of, write_nifti
from vision_ssm.data.medical_intensity import ABDOMEN_WINDOW, stretched
from vision_ssm.data.medical_pictures import read_picture
from vision_ssm.data.medical_volume import MedicalDataError, Volume
from vision_ssm.registry import MODELS
from vision_ssm.weights import load_weights, read_checkpoint

from .config import UsageError, checked_device
from .console import wide_console
from .medical import MedicalSegmentor
from .medical_figures import draw_montage, save_overlays
from .medical_inference import FLIPS

ARRAYS = (".h5", ".hdf5", ".npz")
FLAGS = (
    "volume", "flips", "sliding_window", "overlap", "keep_largest", "intensities", "montage", "overlays",
)  # fmt: skip
"""What `add_medical_flags` adds."""


class MedicalPredictor:
    """A segmentation model in eval mode, and how files become its input.

    Args:
        model: a `MedicalSegmentor`.
        reading: orientation and intensities of NIfTI files and DICOM series.
        meta: ``metainfo`` of the data set: ``classes``, background first, and ``palette``.
        channels: of image files, 1 or 3.
        stretch: image files are stretched to 0 .. 255, as the ISIC data sets are; else they are in [0, 1].
        device: where to compute; a GPU if there is one by default.
    """

    def __init__(
        self,
        model: MedicalSegmentor,
        reading: Reading,
        meta: Mapping[str, Any] | None = None,
        channels: int = 3,
        stretch: bool = False,
        device: str | None = None,
    ) -> None:
        self.model = model.eval().to(checked_device(device))
        self.reading = reading
        self.channels = channels
        self.stretch = stretch
        self.meta = dict(meta or {})
        count = max(model.num_classes, 2)
        if len(self.meta.get("classes") or ()) != count:
            self.meta["classes"] = ("background", *(f"class {label}" for label in range(1, count)))
        self.classes: tuple[str, ...] = tuple(self.meta["classes"])

    @classmethod
    def from_config(
        cls,
        cfg: Config,
        checkpoint: str | Path,
        device: str | None = None,
        span: tuple[float, float] | None = None,
    ) -> "MedicalPredictor":
        """The model of a config with the weights of a checkpoint, of a training run or official.

        Volumes are read as the config's test data are: orientation, window and rescaling of the intensities. A data
        set of slices that are scaled already does not say how they were: what Synapse's were is taken, Hounsfield units
        of -125 to 275, and percentiles for any other; `span` says otherwise.

        Args:
            cfg: the config. checkpoint: the file. device: see the class.
            span: intensities of NIfTI files and DICOM series that become 0 and 1.

        Raises:
            UsageError: the config is of another kind of model. FileNotFoundError, CheckpointError: the file cannot be
            read, or belongs to another model.
        """
        options = cfg.get("model", {})
        if options.get("type") != "vision_ssm.MedicalSegmentor":
            raise UsageError(
                f"this prediction needs a config of a MedicalSegmentor, this one is of {options.get('type')!r}"
            )
        model = MODELS.build({**options, "pretrained": None})
        load_weights(model.unet, checkpoint, verbose=False)
        dataset = (cfg.get("test_dataloader") or cfg.val_dataloader).dataset
        kept = {key: dataset[key] for key in ("orientation", "window", "rescale", "check_units") if key in dataset}
        if "window" not in kept and "Synapse" in str(dataset.type):
            kept["window"] = ABDOMEN_WINDOW
        if span is not None:
            kept["window"] = span
        for key in ("window", "rescale"):
            if kept.get(key) is not None:
                kept[key] = tuple(kept[key])
        meta, channels = _meta(checkpoint, dataset), dataset.get("channels", 3)
        return cls(model, Reading(**kept), meta, channels, "Isic" in str(dataset.type), device)

    def read(self, path: str | Path) -> Volume:
        """A volume or image as the model takes it.

        Args:
            path: NIfTI file, folder with a DICOM series, HDF5 or npz file with an array ``image`` (D, H, W) scaled as
                in training, or image file; or several NIfTI files, one for each channel, with commas between.

        Raises:
            MedicalDataError, UnreadableImageError: no such file, or one that cannot be used.
        """
        text = str(path)
        if text.lower().endswith(EXTENSIONS):
            image = read_picture(text, self.channels)
            image = stretched(image) if self.stretch else image
            return Volume(image[None], None, (1.0, 1.0, 1.0), None, Path(text).stem)  # (1, C, H, W)
        if text.lower().endswith(ARRAYS):
            return _array_volume(text)
        parts = (Path(text),) if Path(text).exists() else tuple(map(Path, text.split(",")))
        name = parts[0].name if parts[0].is_dir() else stem_of(parts[0].name)
        return self.reading.volume(Case(name, parts, None))

    def __call__(self, volume: Volume, **inference: Any) -> np.ndarray:
        """Labels (D, H, W) uint8 of a volume; `inference` as in `MedicalSegmentor.predict_labels`."""
        return self.model.predict_labels(volume.image, **inference)

    def save(self, volume: Volume, labels: np.ndarray, folder: str | Path) -> Path:
        """Write the labels of a volume: an image's as png, all others as NIfTI on the voxels of the file that was read.

        With two classes, the foreground of a png is 255.

        Args:
            volume: as `read` has returned it. labels: (D, H, W). folder: made where needed.

        Returns:
            The file, ``CASE_mask.nii.gz`` or ``CASE_mask.png``.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if is_picture(volume):
            file = folder / f"{volume.case}_mask.png"
            Image.fromarray(labels[0] * np.uint8(255 if len(self.classes) == 2 else 1)).save(file)
        else:
            file = folder / f"{volume.case}_mask.nii.gz"
            write_nifti(file, labels, volume)
        return file


def _meta(checkpoint: str | Path, dataset: Mapping[str, Any]) -> dict[str, Any]:
    """Classes and palette that training stored in a checkpoint, else the classes of the data set's config."""
    content = read_checkpoint(checkpoint)
    stored = content.get("meta") if isinstance(content, dict) else None
    found = (stored.get("dataset_meta") if isinstance(stored, dict) else None) or {}
    if found.get("classes"):
        return dict(found)
    named = dataset.get("classes")
    named = CLASS_SETS.get(named, ()) if isinstance(named, str) else tuple(named or ())
    return dict(classes=named, palette=class_palette(len(named)))


def is_picture(volume: Volume) -> bool:
    """Whether a volume comes from an image file."""
    return len(volume.image) == 1 and volume.affine is None and volume.grid is None


def _array_volume(path: str) -> Volume:
    found = read_arrays(path, ("image",))
    image = np.asarray(found["image"], dtype=np.float32)
    if image.ndim == 2:
        image = image[None]  # (H, W) -> (1, H, W)
    if image.ndim != 3 or not image.size:
        raise MedicalDataError(f"'image' of {path!r} has the shape {found['image'].shape}; (D, H, W) is expected")
    depth, height, width = found.get("spacing", np.ones(3)).tolist()
    spacing = (depth, height, width)
    affine = np.diag([width, height, depth, 1.0])
    return Volume(image[:, None], None, spacing, affine, stem_of(Path(path).name))  # (D, 1, H, W)


def add_medical_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of ``predict.py`` for segmentation models of medical images."""
    group = parser.add_argument_group("medical images", "for configs under configs/medical")
    group.add_argument(
        "--volume", nargs="+", default=[], metavar="SCAN",
        help="NIfTI files, folders with a DICOM series each, or h5 or npz files with an array 'image' (D, H, W); "
        "channels of one volume with commas between",
    )  # fmt: skip
    group.add_argument("--flips", action="store_true", help="average over the mirrored slices")
    group.add_argument(
        "--sliding-window", nargs=2, type=int, metavar=("HEIGHT", "WIDTH"),
        help="predict slices at their own size in windows of this one, instead of resizing them",
    )  # fmt: skip
    group.add_argument("--overlap", type=float, help="share of a window that the next one sees again (default 0.5)")
    group.add_argument(
        "--keep-largest", nargs="*", type=int, metavar="LABEL",
        help="keep the largest connected part of each of these labels alone; of all without any",
    )  # fmt: skip
    group.add_argument(
        "--intensities", nargs=2, type=float, metavar=("LOW", "HIGH"),
        help="intensities that become 0 and 1 (default: as the config's data)",
    )  # fmt: skip
    group.add_argument("--montage", action="store_true", help="also draw slices of each volume with their labels, png")
    group.add_argument("--overlays", action="store_true", help="also draw every slice with labels, one png each")


def given_inference(args: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `MedicalSegmentor.predict_labels` from the flags that were given."""
    found: dict[str, Any] = {}
    if args.flips:
        found["flips"] = tuple(FLIPS)
    if args.sliding_window is not None:
        found.update(window=tuple(args.sliding_window), size=None)
    if args.overlap is not None:
        found["overlap"] = args.overlap
    if args.keep_largest is not None:
        found["keep_largest"] = tuple(args.keep_largest) or True
    return found


def check_medical_flags(args: argparse.Namespace, model: str) -> None:
    """`UsageError` if a flag of medical images was given for another `model`."""
    given = [name for name in FLAGS if getattr(args, name) not in (None, [], False)]
    if given:
        raise UsageError(f"--{given[0].replace('_', '-')} is for medical images; the model is {model}")


def predict_medical(
    cfg: Config, checkpoint: str, pictures: Sequence[Path], args: argparse.Namespace, folder: str
) -> int:
    """Predict the volumes and pictures of a command line: masks, what was asked for beside them, and a table."""
    out = Path(folder)
    if out.suffix:
        raise UsageError(f"--out {folder} should be a folder: every volume and image gets a mask of its own")
    span = tuple(args.intensities) if args.intensities else None
    predictor = MedicalPredictor.from_config(cfg, checkpoint, args.device, span)
    names = predictor.classes[1:]
    unit = "ml" if args.volume else "%"
    table = Table("case", "D x H x W", *(f"{name}, {unit}" for name in names), "mask")
    files: list[str | Path] = [*args.volume, *pictures]
    done: dict[str, str] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        for path in files:
            try:
                volume = predictor.read(path)
            except (MedicalDataError, UnreadableImageError) as error:
                if len(files) == 1:
                    raise
                warnings.warn(f"{error}; left out", stacklevel=2)
                continue
            if volume.case in done:
                raise UsageError(f"{done[volume.case]} and {path} would be written to one file: predict one at a time")
            done[volume.case] = str(path)
            labels = predictor(volume, **given_inference(args))
            mask = predictor.save(volume, labels, out)
            if args.montage or is_picture(volume):
                place = out / f"{volume.case}_montage.png"
                draw_montage(volume.image, labels, place, volume.case, predictor.meta, volume.spacing)
            if args.overlays:
                save_overlays(volume.image, labels, out / f"{volume.case}_overlays", predictor.meta, volume.spacing)
            counts = np.bincount(labels.ravel(), minlength=len(predictor.classes))[1:]
            scale = float(np.prod(volume.spacing)) / 1000 if args.volume else 100 / labels.size
            size = " x ".join(map(str, labels.shape))
            table.add_row(volume.case, size, *(f"{count * scale:.2f}" for count in counts), str(mask))
    for warning in caught:
        print(f"warning: {warning.message}", file=sys.stderr)
    if not done:
        raise UsageError("none of the volumes and images could be read")
    wide_console().print(table)
    return 0
