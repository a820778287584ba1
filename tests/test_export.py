"""Models as files for other programs: each is loaded and compared with the model, for other numbers of images."""

import importlib.util
import json
import subprocess
import sys

import golden_cases
import numpy as np
import pytest
import torch
from ops_support import OPERATORS, cast, check, is_float, scan_2d_inputs, selective_scan_inputs, ssd_inputs
from plstm_support import plstm_inputs
from test_dcnv4 import inputs_of as dcnv4_inputs
from test_local_selective_scan import inputs_of as local_inputs

import vision_ssm
from vision_ssm.engine.export_command import export
from vision_ssm.integrations import export as doors
from vision_ssm.integrations import export_checks
from vision_ssm.integrations.export_checks import ExportError
from vision_ssm.ops import backend, local_selective_scan, plain, plstm2d
from vision_ssm.ops.reference import local_selective_scan_reference
from vision_ssm.ops.registration import replaced_operators
from vision_ssm.ops.torch_plstm import plstm2d_reference

MODELS = [*vision_ssm.list_models("*_micro"), *vision_ssm.list_unets("*_micro")]
# ONNX takes 10 s of a core for most models, TorchScript 2 s: it is what most families are tried with each time
QUICK = ("plain_unet_micro",)
LONG = ("hrvmamba_micro", "msvmamba_micro", "msvmunet_micro", "encoder_unet_micro", "mhsvm_micro")
SIZE = (32, 48)
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs the extra export",
)


def slow_if(condition):
    return [pytest.mark.slow] if condition else []


def lively(name, **options):
    """A model whose states matter: in one that is freshly made, steps are small and skips are all there is."""
    model = vision_ssm.create_model(name, **{"num_classes": 3, **options})
    own = {key for key, _ in model.named_parameters()}
    tensors = {
        key: golden_cases.tensor_for(key, list(value.shape))
        for key, value in model.state_dict().items()
        if key in own or "running_" in key
    }
    model.load_state_dict(tensors, strict=False)
    return model


def images(count, channels=3, size=SIZE):
    return torch.from_numpy(np.random.RandomState(1).standard_normal((count, channels, *size)).astype(np.float32))


def agrees(outputs, wanted):
    """As the exports' own check, here with other images and another number of them."""
    wanted = [wanted] if isinstance(wanted, torch.Tensor) else wanted
    for output, reference in zip(outputs, wanted, strict=True):
        assert output.shape == reference.shape
        error = (torch.as_tensor(output) - reference).abs().max() / reference.std(correction=0)
        assert error <= export_checks.TOLERANCE, float(error)


def run_onnx(file, x):
    import onnxruntime

    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"]).run(None, {"images": x.numpy()})


# Operators


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        *(("selective_scan", dict(length=length)) for length in (1, 8, 9, 65, 200)),
        ("selective_scan", dict(groups=2, softplus=False, skip=False, gate=False, bias=False)),
        ("selective_scan", dict(constant="BC")),
        *(("ssd", dict(length=length)) for length in (1, 8, 65, 100)),
        ("ssd", dict(initial=False, bias=False, softplus=False, gate=False, skip=None)),
        ("scan_2d", {}),
        ("scan_2d", dict(size=(9, 10), norm=True)),
        ("scan_2d", dict(routes="3")),
        ("scan_2d", dict(routes="3", merge=False)),
        ("scan_2d", dict(write=True, steps=10)),
        ("scan_2d", dict(segment=10, size=(10, 10), norm=True)),
        ("scan_2d", dict(rank=None, softplus=False, skip=False, bias=False)),
        ("scan_2d", dict(per_route=True, merge=False)),
    ],
)
def test_plain_scans_equal_their_twins(op, inputs):
    make = {"selective_scan": selective_scan_inputs, "ssd": ssd_inputs, "scan_2d": scan_2d_inputs}[op]
    given = cast(make(**inputs), torch.float64)
    compare_plain(*OPERATORS[op], given)


def compare_plain(operator, twin, inputs):
    calls = []

    def counted(function):
        return lambda *arguments: calls.append(function) or function(*arguments)

    with replaced_operators({name: counted(function) for name, function in plain.OPERATORS.items()}):
        got = operator(**inputs)
    assert len(calls) == 1
    want = twin(**inputs)
    for output, reference in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        check("plain", output, reference, 1e-10)


@pytest.mark.parametrize("window", [1, 3, 8])
@pytest.mark.parametrize("length", [8, 19])
def test_plain_local_scan_equals_its_twin(window, length):
    inputs = cast(local_inputs(length=length) | {"window": window}, torch.float64)
    compare_plain(local_selective_scan, local_selective_scan_reference, inputs)


@pytest.mark.parametrize("turns", ["propagation", "L", "R", "none"])
@pytest.mark.parametrize("states", [1, 2])
@pytest.mark.parametrize("size", [(3, 4), (1, 5), (5, 1)])
def test_plain_plstm_equals_its_twin(turns, states, size):
    inputs = plstm_inputs(turns=turns, states=states, size=size, direct=states == 1)
    inputs = {name: value.double() if is_float(value) else value for name, value in inputs.items()}
    compare_plain(plstm2d, plstm2d_reference, inputs)


@pytest.mark.parametrize("options", [{}, dict(kernel_size=5, padding=2, stride=2), dict(remove_center=True)])
def test_plain_dcnv4_equals_its_twin(options):
    tensors, operator, twin = dcnv4_inputs((2, 6, 7, 8), 2, options)
    compare_plain(operator, twin, {name: value.double() for name, value in tensors.items()})


def test_every_operator_can_be_replaced():
    assert plain.OPERATORS.keys() == set(backend.OPERATORS)


def test_replacement_ends_with_its_block():
    inputs = selective_scan_inputs()
    with pytest.raises(ZeroDivisionError), replaced_operators({"selective_scan": lambda *_: 1 / 0}):
        OPERATORS["selective_scan"][0](**inputs)
    OPERATORS["selective_scan"][0](**inputs)


# Files


@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name in LONG)) for name in MODELS])
def test_torchscript(name, tmp_path):
    model = lively(name)
    about = doors.export_torchscript(model, tmp_path / "model.pt", size=SIZE)
    assert about["error"] <= export_checks.TOLERANCE and model.training
    extra = {doors.METADATA_FILE: ""}
    loaded = torch.jit.load(tmp_path / "model.pt", _extra_files=extra)
    assert json.loads(extra[doors.METADATA_FILE])["input_size"] == [3, *SIZE]
    with torch.no_grad():
        agrees(loaded(images(5)), model.eval()(images(5)))


@needs_onnx
@pytest.mark.parametrize("name", [pytest.param(name, marks=slow_if(name not in QUICK)) for name in MODELS])
def test_onnx(name, tmp_path):
    import onnx

    model = lively(name)
    file = tmp_path / "model.onnx"
    about = doors.export_onnx(model, file, size=SIZE)
    assert about["error"] <= export_checks.TOLERANCE
    with torch.no_grad():
        agrees(run_onnx(file, images(5)), model.eval()(images(5)))
    stored = onnx.load(file)
    onnx.checker.check_model(stored, full_check=True)
    assert {entry.domain for entry in stored.opset_import} == {""}  # no operators but the standard's
    assert not any(node.metadata_props for node in stored.graph.node)  # which would hold paths of this machine
    assert [dim.dim_param or dim.dim_value for dim in stored.graph.input[0].type.tensor_type.shape.dim] == ["batch", 3, *SIZE]
    assert len(stored.graph.node) == about["nodes"] < 3000


@pytest.mark.slow
@pytest.mark.parametrize("scan", vision_ssm.list_scans())
def test_any_scan(scan, tmp_path):
    for name in ("vmamba_micro", "vim_micro"):
        model = lively(name, scan=scan)
        doors.export_torchscript(model, tmp_path / "model.pt", size=(40, 72), overwrite=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("standalone", [True, False], ids=["standalone", "with nodes"])
def test_program(name, standalone, tmp_path):
    model = lively(name)
    doors.export_program(model, tmp_path / "model.pt2", size=SIZE, standalone=standalone)
    with torch.no_grad():
        agrees(torch.export.load(tmp_path / "model.pt2").module()(images(5)), model.eval()(images(5)))


def test_programs_with_and_without_the_library(tmp_path):
    model = lively("lbvim_micro", depth=1)
    doors.export_program(model, tmp_path / "nodes.pt2", size=SIZE, check=False)
    doors.export_program(model, tmp_path / "alone.pt2", size=SIZE, standalone=True)
    nodes = [str(node.target) for node in torch.export.load(tmp_path / "nodes.pt2").graph.nodes]
    assert "vision_ssm.local_selective_scan.default" in nodes
    with torch.no_grad():
        np.savez(tmp_path / "data.npz", x=images(5), y=model.eval()(images(5)))
    code = (
        "import sys, numpy, torch; data = numpy.load('data.npz'); "
        "program = torch.export.load('alone.pt2'); assert 'vision_ssm' not in sys.modules; "
        "y, = program.module()(torch.from_numpy(data['x'])); print(abs(y.detach().numpy() - data['y']).max(), flush=True); "
        "torch.export.load('nodes.pt2')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert float(done.stdout) < 1e-4, done.stderr
    assert done.returncode != 0 and "vision_ssm" in done.stderr


@needs_onnx
def test_onnx_maps_with_weights_beside(tmp_path):
    model = lively("plain_unet_micro")
    file = tmp_path / "maps.onnx"
    about = doors.export_onnx(model, file, size=(32, 32), features=True, external_data=True, opset=20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["maps.onnx", "maps.onnx.data"]
    x = images(2, size=(32, 32))
    with torch.no_grad():
        agrees(run_onnx(file, x), model.eval().forward_intermediates(x))
    assert about["output_names"] == [f"map_{i}" for i in range(len(about["strides"]))] and about["opset"] == 20


def test_weights_beside_a_file_are_replaced_with_it(tmp_path):
    """FILE.data belongs to FILE: no other program's is overwritten, and no earlier one is left behind."""

    def write(overwrite: bool, beside: bool) -> None:
        with export_checks.published(tmp_path / "m.onnx", ".onnx", overwrite) as file:
            file.write_text("new")
            if beside:
                file.with_name("m.onnx.data").write_text("new weights")

    weights = tmp_path / "m.onnx.data"
    weights.write_text("somebody's")
    with pytest.raises(FileExistsError, match=r"m.onnx.data exists already; --overwrite"):
        write(overwrite=False, beside=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx.data"] and weights.read_text() == "somebody's"
    write(overwrite=False, beside=False)
    assert weights.read_text() == "somebody's"
    write(overwrite=True, beside=True)
    assert weights.read_text() == "new weights"
    write(overwrite=True, beside=False)
    assert [path.name for path in tmp_path.iterdir()] == ["m.onnx"]


def compare_module(module, inputs, file):
    """Write a module to an ONNX file as models are, and compare the two for one image; returns nodes before ONNX."""
    import onnxruntime

    with torch.no_grad(), replaced_operators(plain.OPERATORS):
        shapes = ({0: torch.export.Dim("batch")},) * len(inputs)
        program = torch.export.export(module, inputs, dynamic_shapes=shapes)
    torch.onnx.export(program, f=file, opset_version=doors.DEFAULT_OPSET, verbose=False)
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    few = [part[:1] for part in inputs]
    got = session.run(None, {put.name: part.numpy() for put, part in zip(session.get_inputs(), few)})
    with torch.no_grad():
        agrees(got, module(*few))
    return len(program.graph.nodes)


@needs_onnx
def test_onnx_dcnv4_and_long_scans(tmp_path):
    """One operator each, with what graphs of models have at their usual sizes."""
    tensors, operator, _ = dcnv4_inputs((2, 6, 7, 8), 2, {})
    scan = scan_2d_inputs(size=(56, 56), dim=4, states=1, norm=True)

    class Both(torch.nn.Module):
        def forward(self, value, offset_mask, x):
            given = {name: scan[name][:1].expand(x.shape[0], *scan[name].shape[1:]) for name in ("delta", "B", "C")}
            return operator(value=value, offset_mask=offset_mask), OPERATORS["scan_2d"][0](**scan | given | {"x": x})

    nodes = compare_module(Both(), (tensors["value"], tensors["offset_mask"], scan["x"]), tmp_path / "both.onnx")
    assert nodes < 400  # 3136 steps


@needs_onnx
def test_onnx_of_mamba_2_in_a_cascade(tmp_path):
    """Its routes in the order of the cells must be added, not assigned."""
    mixer = vision_ssm.build_scan("multi_direction", 8, core="ssd", routes="cascade", state_dim=2)
    for parameter in mixer.core.parameters():
        torch.nn.init.normal_(parameter)
    compare_module(mixer.eval().requires_grad_(False), (torch.randn(2, 4, 5, 8),), tmp_path / "mixer.onnx")


# Command and messages


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        export([str(argument) for argument in arguments])
    assert stop.value.code != 0
    return capsys.readouterr().err


@needs_onnx
def test_command_reads_checkpoints_of_training(tmp_path, capsys):
    model = lively("plain_unet_micro", num_classes=4, in_chans=1)
    state = {f"model.{key}": value for key, value in model.state_dict().items()}
    meta = dict(dataset_meta=dict(classes=["a", "b", "c", "d"]))
    torch.save(dict(state_dict=state, meta=meta), tmp_path / "epoch_1.pth")
    file = tmp_path / "model.onnx"
    arguments = ["onnx", "plain_unet_micro", "--checkpoint", tmp_path / "epoch_1.pth", "--image-size", 32, 32]
    assert export([str(argument) for argument in (*arguments, "--output", file)]) == 0
    assert "images: (batch, 1, 32, 32)" in capsys.readouterr().out
    with torch.no_grad():
        x = images(2, 1, (32, 32))
        agrees(run_onnx(file, x), model.eval()(x))
    about = doors.read_onnx_metadata(file)
    assert about["input_size"] == [1, 32, 32] and about["classes"] == ["a", "b", "c", "d"] and about["num_classes"] == 4
    with pytest.raises(Exception, match="Expected: 32"):  # onnxruntime's own; the metadata says what it takes
        run_onnx(file, images(1, 1, (64, 64)))
    assert "exists already; --overwrite" in fails(capsys, *arguments, "--output", file)


@pytest.mark.parametrize("door", ["torch-export", "torchscript"])
def test_command_writes_maps_of_a_backbone(door, tmp_path, capsys):
    file = tmp_path / ("maps.pt2" if door == "torch-export" else "maps.pt")
    arguments = [door, "efficientvim_micro", "--features-only", "--image-size", "64", "32", "--output", str(file)]
    assert export(arguments) == 0
    said = capsys.readouterr()
    assert "map_0, map_1, map_2" in said.out and "the weights are random" in said.err
    assert file.stat().st_size > 100_000 and list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vmamba_mico"], "Did you mean 'vmamba_micro'"),
        (["vmamba_micro", "--image-size", "31", "64"], "images must be at least 32 x 32 pixels, got 31 x 64"),
        (["vmamba_micro", "--checkpoint", "no.pth"], "no checkpoint file no.pth"),
        (["vmamba_micro", "--output", "model.onnx"], "the file's name should end with .pt, got 'model.onnx'"),
        (["vmamba_micro", "--in-chans", "0"], "--in-chans must be at least 1, got 0"),
    ],
)
def test_command_explains_bad_input(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, "torchscript", *arguments)
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxscript" else real(name, *rest))
    assert "onnxscript is not installed; pip install 'vision_ssm[export]'" in fails(capsys, "onnx", "vmamba_micro")


@needs_onnx
def test_without_onnxruntime_a_file_is_not_compared(monkeypatch, tmp_path):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else real(name, *rest))
    with pytest.warns(UserWarning, match="is not compared with the model: onnxruntime is not installed"):
        about = doors.export_onnx(lively("plain_unet_micro"), tmp_path / "model.onnx", size=(32, 32))
    assert "error" not in about and (tmp_path / "model.onnx").exists()


def test_opsets_that_cannot_be_written(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match="opset must be between 18, the lowest that PyTorch writes, and"):
        doors.export_onnx(lively("plain_unet_micro"), tmp_path / "model.onnx", size=(32, 32), opset=17)


@needs_onnx
def test_metadata_of_other_files(tmp_path):
    import onnx

    with pytest.raises(FileNotFoundError, match="there is no file"):
        doors.read_onnx_metadata(tmp_path / "none.onnx")
    graph = onnx.helper.make_graph([], "other", [], [])
    onnx.save(onnx.helper.make_model(graph), tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="no ONNX file of vision_ssm: its metadata does not say"):
        doors.read_onnx_metadata(tmp_path / "other.onnx")


def test_a_file_that_differs_is_not_kept(monkeypatch, tmp_path):
    wrong = {**plain.OPERATORS, "layer_norm": lambda *inputs: [y * 1.001 for y in plain.OPERATORS["layer_norm"](*inputs)]}
    monkeypatch.setattr(doors, "OPERATORS", wrong)
    options = dict(size=(32, 32))
    with pytest.raises(ExportError, match=r"is not kept: it differs from the model by .* In float32 the model itself is"):
        doors.export_torchscript(lively("vssd_micro"), tmp_path / "model.pt", **options)
    assert not list(tmp_path.iterdir())
    assert "error" not in doors.export_torchscript(lively("vssd_micro"), tmp_path / "model.pt", check=False, **options)
    before = (tmp_path / "model.pt").read_bytes()
    with pytest.raises(ExportError):
        doors.export_torchscript(lively("vssd_micro"), tmp_path / "model.pt", overwrite=True, **options)
    assert (tmp_path / "model.pt").read_bytes() == before


def test_places_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file/model.pt cannot be written: .*(exists|directory)"):
        doors.export_torchscript(lively("plain_unet_micro"), tmp_path / "file" / "model.pt", size=(32, 32))

    def refuse(prefix, dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(export_checks.tempfile, "mkdtemp", refuse)
    with pytest.raises(OSError, match=r"model.pt cannot be written: Permission denied"):
        doors.export_torchscript(lively("plain_unet_micro"), tmp_path / "model.pt", size=(32, 32))


def test_models_that_are_not_exported(tmp_path):
    model = lively("plain_unet_micro")
    with pytest.raises(ExportError, match=r"exported in float32, this one is in torch.bfloat16: call model.float\(\)"):
        doors.export_torchscript(model.bfloat16(), tmp_path / "model.pt", size=(32, 32))
    with pytest.raises(ValueError, match="2 label names are given for 3 classes"):
        doors.export_torchscript(model.float(), tmp_path / "model.pt", size=(32, 32), label_names=["a", "b"])
    with pytest.raises(ValueError, match="size is a height and a width in pixels, got 32"):
        doors.export_torchscript(model, tmp_path / "model.pt", size=32)


def test_a_model_is_as_it_was(tmp_path):
    model = lively("plain_unet_micro")
    model.encoder.eval()
    model.head.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    learning = [parameter.requires_grad for parameter in model.parameters()]
    doors.export_torchscript(model, tmp_path / "model.pt", size=(32, 32))
    assert modes == [module.training for module in model.modules()]
    assert learning == [parameter.requires_grad for parameter in model.parameters()]


def test_command_writes_folders_of_timm(tmp_path, capsys):
    import timm

    model = lively("vssd_micro", num_classes=3)
    meta = dict(dataset_meta=dict(classes=["a", "b", "c"]))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / "epoch_1.pth")
    arguments = ["timm", "vssd_micro", "--checkpoint", str(tmp_path / "epoch_1.pth"), "--output", str(tmp_path / "folder")]
    assert export(arguments) == 0
    assert "local-dir:" in capsys.readouterr().out
    built = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(built(x), model.eval()(x))
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["label_names"] == ["a", "b", "c"]
    assert "already" in fails(capsys, *arguments)
    assert export([*arguments, "--overwrite"]) == 0
    assert "backbones" in fails(capsys, "timm", "plain_unet_micro", "--output", tmp_path / "unet")
