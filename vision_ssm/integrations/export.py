"""Models as files for other programs: ONNX, `torch.export` and TorchScript.

The operators of this library are nodes of their own in a graph of PyTorch. In ONNX, TorchScript and a standalone
program they are taken apart into plain ones (`vision_ssm.ops.plain`). Every file is for one image size and any number
of images. Before it gets its name it is loaded and compared with the model, for one image and for three, while the
graph was made for two.
"""

import contextlib
import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..backbones.family import ModelFamily
from ..ops.plain import OPERATORS
from ..ops.registration import replaced_operators
from ..unets.base import UNet
from ..version import __version__
from .export_checks import (
    BATCHES,
    TOLERANCE,
    ExportError,
    check_opset,
    checked_size,
    compare,
    missing_package,
    needs_packages,
    published,
)

INPUT = "images"
DEFAULT_OPSET = 18  # the lowest that PyTorch's exporter writes without conversion, so what most programs can read
METADATA_FILE = "vision_ssm.json"  # inside of programs of PyTorch
_TRACED_IMAGES = 2


class _Outputs(nn.Module):
    """A model whose result is always a tuple: what it returns, or its maps."""

    def __init__(self, model: nn.Module, features: bool):
        super().__init__()
        self.model = model
        self.features = features

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model.forward_intermediates(images) if self.features else self.model(images)  # type: ignore[operator]
        return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode and without gradients, as it was afterwards."""
    training = {module: module.training for module in model.modules()}
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the exporters, about themselves
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


def describe(
    model: ModelFamily, size: Sequence[int], features: bool = False, label_names: Sequence[str] | None = None
) -> dict[str, Any]:
    """What a user of an exported file has to know: its input, how images are normalised, its outputs.

    Args:
        model: a backbone or a U-Net.
        size: height and width of the images.
        features: whether maps are returned instead of scores.
        label_names: name of every class, in order.

    Returns:
        dict with library, model, input_name, input_size (channels, height, width; the number of images is free),
        output_names and, where they are known, num_classes, mean, std, interpolation, crop_pct and classes.

    Raises:
        ValueError: another number of label names than classes.
    """
    maps = features or model.features_only
    about: dict[str, Any] = dict(library=f"vision_ssm {__version__}", model=model.variant or type(model).__name__)
    about |= dict(input_name=INPUT, input_size=[model.in_chans, *size])
    if maps:
        info = model.encoder.out_info if isinstance(model, UNet) else model.out_info
        about["output_names"] = [f"map_{i}" for i in range(len(info))]
        about["strides"] = [stage["reduction"] for stage in info]
        about["channels"] = [stage["num_chs"] for stage in info]
    else:
        name = "scores" if isinstance(model, UNet) else "logits" if model.num_classes else "features"
        about |= dict(output_names=[name], num_classes=model.num_classes)
    for key in ("mean", "std", "interpolation", "crop_pct"):
        if key in model.pretrained_cfg:
            about[key] = model.pretrained_cfg[key]
    if label_names is not None and not maps:
        if len(label_names) != model.num_classes:
            raise ValueError(f"{len(label_names)} label names are given for {model.num_classes} classes")
        about["classes"] = list(label_names)
    return about


def _trace_program(module: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    shapes = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(module, (images[:_TRACED_IMAGES],), dynamic_shapes=shapes, strict=False)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with paths of this machine
    return program


def _export(
    model: ModelFamily,
    file: str | os.PathLike,
    write: Callable[[nn.Module, Tensor, dict[str, Any], Path], None],
    load: Callable[[Path], Callable[[Tensor], Sequence[Any]]],
    suffix: str,
    size: Sequence[int] | None,
    features: bool,
    label_names: Sequence[str] | None,
    check: bool,
    overwrite: bool,
) -> dict[str, Any]:
    """Write a file with `write`, compare what `load` makes of it with the model, and give the file its name."""
    height, width = checked_size(model, size)
    about = describe(model, (height, width), features, label_names)
    example = next(model.parameters())
    if example.dtype != torch.float32:
        raise ExportError(f"models are exported in float32, this one is in {example.dtype}: call model.float() first")
    with published(file, suffix, overwrite) as temporary, _inference(model):
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(max(BATCHES), model.in_chans, height, width, generator=generator).to(example.device)
        module = _Outputs(model, features)
        wanted = [module(images[:count]) for count in BATCHES]  # before anything else: a size may not fit
        write(module, images, about, temporary)
        if check:
            names = about["output_names"]
            about["error"] = compare(load(temporary), images, wanted, names, str(file))
            if about["error"] > TOLERANCE:
                exact = copy.deepcopy(module).double()
                rounding = compare(lambda few: exact(few.double()), images, wanted, names, str(file))
                raise ExportError(
                    f"{file} is not kept: it differs from the model by {about['error']:.1e} of the standard deviation "
                    f"of an output, more than {TOLERANCE:.0e}. In float32 the model itself is {rounding:.1e} from what "
                    "it is in float64: where that is no less, these weights amplify rounding, and check=False "
                    "(--no-check) keeps the file"
                )
    return about


def export_onnx(
    model: ModelFamily,
    file: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    opset: int = DEFAULT_OPSET,
    features: bool = False,
    label_names: Sequence[str] | None = None,
    external_data: bool = False,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write an ONNX file of standard operators, with a free number of images and one image size.

    The input ``images`` is (batch, C, H, W), float32 and normalised. What `describe` returns is stored in the file's
    metadata, see `read_onnx_metadata`. Weights above 1.5 GB lie beside the file in ``FILE.data``: an ONNX file itself
    holds 2 GB at most.

    Args:
        model: a backbone, classifier or `features_only`, or a U-Net, in float32; traced where its parameters are.
        file: name of the file, ``*.onnx``.
        size: height and width of the images, 32 or more; None: what the variant was published for.
        opset: version of ONNX's operators, 18 or higher.
        features: return the maps of `forward_intermediates` instead of the scores.
        label_names: name of every class, in order, for the metadata.
        external_data: put the weights beside the file, whatever their size.
        check: compare the file with the model in onnxruntime, if that is installed.
        overwrite: replace a file of this name.

    Returns:
        What `describe` returns, with ``nodes`` and, where the file was compared, ``error``: the largest difference
        between an output of the file and of the model, over the standard deviation of that output.

    Raises:
        ExportError: a package is missing; the model is not in float32; PyTorch cannot write this opset; the file and
            the model differ by more than 1e-4, then no file is left behind.
        FileExistsError: there is such a file. OSError: it cannot be written. ValueError: `size`, `opset` or
            `label_names` do not fit.
    """
    needs_packages("onnx", "onnxscript")
    check_opset(opset)
    nodes = 0

    def write(module: nn.Module, images: Tensor, about: dict[str, Any], temporary: Path) -> None:
        nonlocal nodes
        with replaced_operators(OPERATORS):
            program = _trace_program(module, images)
        written = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=[INPUT],
            output_names=about["output_names"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
        assert written is not None
        if written.model.opset_imports[""] != opset:
            raise ExportError(f"PyTorch could not convert the graph to opset {opset}; use opset={DEFAULT_OPSET}")
        for part in (written.model.graph, *written.model.functions.values()):
            for node in part:
                node.metadata_props.clear()  # stack traces, with paths of this machine
        written.model.metadata_props.update({key: json.dumps(value) for key, value in about.items()})
        nodes = len(written.model.graph)
        written.save(temporary, external_data=external_data)

    absent = missing_package("onnxruntime") if check else ""
    about = _export(
        model, file, write, _load_onnx, ".onnx", size, features, label_names, check and not absent, overwrite
    )
    if absent:
        warnings.warn(f"{file} is not compared with the model: {absent}", stacklevel=2)
    return about | dict(opset=opset, nodes=nodes)


def _load_onnx(file: Path) -> Callable[[Tensor], Sequence[Any]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return lambda images: [torch.from_numpy(out) for out in session.run(None, {INPUT: images.cpu().numpy()})]


def read_onnx_metadata(file: str | os.PathLike) -> dict[str, Any]:
    """What `export_onnx` stored in a file: its input size, normalisation, classes and outputs, see `describe`.

    Raises:
        ExportError: onnx is not installed, or the file is none of `export_onnx`. FileNotFoundError: no such file.
    """
    needs_packages("onnx")
    import onnx

    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        stored = onnx.load(str(file), load_external_data=False).metadata_props
        about = {entry.key: json.loads(entry.value) for entry in stored}
    except Exception as error:  # protobuf and json have many
        raise ExportError(f"{file} is no ONNX file of vision_ssm: {error}") from None
    if "input_size" not in about:
        raise ExportError(f"{file} is no ONNX file of vision_ssm: its metadata does not say what it takes")
    return about


def export_program(
    model: ModelFamily,
    file: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    standalone: bool = False,
    features: bool = False,
    label_names: Sequence[str] | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a program of `torch.export`, with a free number of images and one image size.

    ``torch.export.load(file).module()(images)`` returns a tuple of outputs. The program belongs to the device that the
    model is on. ``vision_ssm.json`` of its extra files holds what `describe` returns.

    Args:
        model: a backbone or a U-Net, in float32.
        file: name of the file, ``*.pt2``.
        size: height and width of the images; None: what the variant was published for.
        standalone: take the operators of this library apart into PyTorch's, so that the program runs where
            ``vision_ssm`` is not installed; without this it needs ``import vision_ssm``, and has its kernels.
        features, label_names, check, overwrite: see `export_onnx`.

    Returns:
        What `describe` returns, with ``nodes`` and, where the file was compared, ``error``; see `export_onnx`.

    Raises:
        ExportError, FileExistsError, OSError, ValueError: see `export_onnx`.
    """
    nodes = 0

    def write(module: nn.Module, images: Tensor, about: dict[str, Any], temporary: Path) -> None:
        nonlocal nodes
        with replaced_operators(OPERATORS if standalone else {}):
            program = _trace_program(module, images)
        nodes = len(program.graph.nodes)
        torch.export.save(program, temporary, extra_files={METADATA_FILE: json.dumps(about)})

    def load(temporary: Path) -> Any:
        return torch.export.load(temporary).module()

    about = _export(model, file, write, load, ".pt2", size, features, label_names, check, overwrite)
    return about | dict(nodes=nodes)


def export_torchscript(
    model: ModelFamily,
    file: str | os.PathLike,
    *,
    size: Sequence[int] | None = None,
    features: bool = False,
    label_names: Sequence[str] | None = None,
    check: bool = True,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a TorchScript file by tracing, with a free number of images and one image size; needs no ``vision_ssm``.

    ``torch.jit.load(file)(images)`` returns a tuple of outputs. PyTorch no longer develops this format: it is for
    programs that read no other.

    Args:
        model: a backbone or a U-Net, in float32.
        file: name of the file, ``*.pt``.
        size, features, label_names, check, overwrite: see `export_onnx`.

    Returns:
        What `describe` returns and, where the file was compared, ``error``; see `export_onnx`.

    Raises:
        ExportError, FileExistsError, OSError, ValueError: see `export_onnx`.
    """

    def write(module: nn.Module, images: Tensor, about: dict[str, Any], temporary: Path) -> None:
        with replaced_operators(OPERATORS):
            traced = torch.jit.trace(module, images[:_TRACED_IMAGES], check_trace=False)
        torch.jit.save(traced, str(temporary), _extra_files={METADATA_FILE: json.dumps(about)})

    def load(temporary: Path) -> Any:
        return torch.jit.load(str(temporary))

    return _export(model, file, write, load, ".pt", size, features, label_names, check, overwrite)
