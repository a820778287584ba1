"""Two processes train like one with twice the batch, with copies of the parameters each (DDP) and where they share them
(``--fsdp``), and leave the same files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_support import (
    BATCH,
    EXACT,
    ITERATIONS,
    ROOT,
    differences,
    plain,
    run_in_two_processes,
    run_python,
    small_config,
)
from mmengine.config import Config
from mmengine.hooks import EMAHook
from torch import nn

from vision_ssm import create_model, list_models, list_unets
from vision_ssm.engine import Runner, commands, read_training
from vision_ssm.engine.sharding import _tensors_of, check_sharding, shard

TRAIN = ROOT / "tools" / "train.py"
LAST = "epoch_2.pth"
MIDDLE = "iter_6.pth"  # of 8 iterations: in the second epoch of two processes

# What can only be asked of a process inside of a run. Every process prints one dict.
PROBE = """
import json, sys
import torch
from torch import distributed
from torch.distributed.tensor import DTensor
from vision_ssm.engine import NonFiniteError, ParameterGroups, Runner, read_training
from vision_ssm.engine.sharding import OPTIMIZERS, gathered, shard, whole_on_cpu
from mmengine.config import Config
from mmengine.registry import MODELS

config, weights = sys.argv[1:]
rank, found = distributed.get_rank(), {}


def runner(**changes):
    cfg = Config.fromfile(config)
    cfg.update(launcher="pytorch", fsdp=True, **changes)
    made = Runner.from_cfg(cfg)
    made.build_training()
    return made


loaded = runner(load_from=weights)
model = loaded.bare_model
parameters = list(model.parameters())
trained = [p for group in loaded.optim_wrapper.optimizer.param_groups for p in group["params"]]
found["sharded"] = all(isinstance(p, DTensor) for p in [*parameters, *trained])
found["numbers"] = sum(p.numel() for p in parameters), sum(p.to_local().numel() for p in parameters)
loaded.call_hook("before_run")
loaded.load_checkpoint(weights)
file, state = read_training(weights)["state_dict"], whole_on_cpu(model.state_dict())
found["loaded"] = file.keys() == state.keys() and all(torch.equal(state[key], file[key]) for key in file)

reference = MODELS.build(Config.fromfile(config).model).eval()
reference.load_state_dict(file)
image = torch.randn(2, 1, 32, 32)
with torch.no_grad(), gathered(model.eval()):  # in one process, as often as it likes
    found["alone"] = rank == 1 or all(torch.allclose(model(image), reference(image)) for _ in range(2))
loaded.call_hook("before_train")
for kind in ("val", "test"):
    loop = loaded.val_loop if kind == "val" else loaded.build_test_loop(loaded._test_loop)
    if rank == 1:  # has fewer batches than the other
        loader = loop.dataloader
        loop.dataloader = torch.utils.data.DataLoader(loader.dataset, 2, sampler=[0, 1], collate_fn=loader.collate_fn)
    model.register_buffer("seen", torch.tensor(rank + 1.0))
    found[kind] = "top1" in loop.run() and all(isinstance(p, DTensor) for p in model.parameters())
    found[f"{kind} with the buffers of the first process"] = model.seen.item() == 1


def stepped(split, clip, **optimizer):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    if split:
        shard(net)
    wrapper = ParameterGroups(dict(optimizer=dict(lr=0.05, **optimizer), clip_grad=dict(clip)))(net)
    for _ in range(3):
        wrapper.update_params((net(torch.linspace(-1, 1, 18).view(3, 6)) - 2).square().mean())
    states = [list(state.values()) for state in wrapper.optimizer.state_dict()["state"].values()]
    return whole_on_cpu([*net.state_dict().values(), *states])


def alike(first, second):
    if isinstance(first, torch.Tensor):
        return torch.allclose(first, second, atol=1e-6)
    return first == second if first is None or isinstance(first, (int, float)) else all(map(alike, first, second))


by_norm, by_value = dict(max_norm=0.1), dict(type="value", clip_value=0.01)
momentum = dict(sgd=dict(momentum=0.9))
cases = [(by_norm, dict(type=name, weight_decay=0.1, **momentum.get(name, {}))) for name in OPTIMIZERS]
cases += [(by_value, dict(type="AdamW")), (by_norm, dict(type="AdamW", fused=True)), (by_norm, dict(type="SGD", momentum=0.9))]
found["optimizers"] = [o for clip, o in cases if not alike(stepped(False, clip, **o), stepped(True, clip, **o))]


def spoil(_, inputs, output):
    if rank == 1:
        if what == "gradient":
            output.register_hook(lambda gradient: gradient * float("nan"))
            return output
        return output * float("nan")


for what in ("loss", "gradient"):
    broken = runner()
    model = broken.bare_model
    model.backbone.stages[1].blocks[0].mlp.register_forward_hook(spoil)
    before = whole_on_cpu(model.state_dict())
    try:
        broken.train()
    except NonFiniteError as error:
        found[what] = str(error)
    after = whole_on_cpu(model.state_dict())
    found[f"{what} changed nothing"] = all(torch.equal(before[key], after[key]) for key in before)
print(json.dumps(found))
"""


def noisy(data: Path, work_dir: Path) -> Config:
    """All the randomness a run can have, in bfloat16, with summed gradients, layer decay and moving averages."""
    cfg = small_config(data, work_dir)
    cfg.optim_wrapper.update(precision="bf16", accumulative_counts=2, paramwise_cfg=dict(layer_decay=0.7))
    cfg.default_hooks.checkpoint.update(every_iterations=2, keep=20)
    cfg.default_hooks.pop("pictures")  # which take longer than the training
    cfg.fsdp = True
    return cfg


def quiet(data: Path, work_dir: Path, batch: int = BATCH) -> Config:
    """No noise, and gradients that are clipped in every step."""
    cfg = plain(small_config(data, work_dir))
    cfg.train_dataloader.batch_size = batch
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.5)
    cfg.default_hooks.checkpoint.update(every_iterations=3, keep=20)
    cfg.default_hooks.pop("pictures")
    return cfg


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory) -> Path:
    """Folder of runs: one.py in one process with twice the batch, all others in two processes."""
    folder = tmp_path_factory.mktemp("fsdp")
    Runner.from_cfg(quiet(data, folder / "one", 2 * BATCH)).train()
    quiet(data, folder / "two").dump(folder / "two.py")
    noisy(data, folder / "noisy").dump(folder / "noisy.py")
    (folder / "probe.py").write_text(PROBE)

    def train(config: str, work_dir: str, *flags: str | Path) -> list[str | Path]:
        return [TRAIN, folder / f"{config}.py", "--launcher", "pytorch", "--work-dir", folder / work_dir, *flags]

    printed = run_in_two_processes(
        folder / "out",
        train("two", "ddp"),
        train("two", "fsdp", "--fsdp"),
        train("two", "fsdp_to_ddp", "--resume", folder / "fsdp" / MIDDLE),
        train("two", "ddp_to_fsdp", "--fsdp", "--resume", folder / "ddp" / MIDDLE),
        train("two", "one_to_fsdp", "--fsdp", "--resume-anyway", "--resume", folder / "one" / "epoch_1.pth"),
        train("noisy", "noisy"),
        train("noisy", "resumed", "--resume", folder / "noisy" / MIDDLE),
        [folder / "probe.py", folder / "two.py", folder / "ddp" / "best_top1.pth"],
    )
    (folder / "probe.jsonl").write_text(printed[-1])
    return folder


def assert_alike(first: dict, second: dict) -> None:
    """The same names, and numbers that differ by rounding, in two checkpoints."""
    losses = [state["history"]["iterations"][:, 1] for state in (first, second)]
    assert torch.allclose(*losses, rtol=0, atol=1e-4)
    for part in ("state_dict", "unaveraged_state_dict"):
        assert list(first[part]) == list(second[part])
        for name, value in first[part].items():
            assert type(second[part][name]) is torch.Tensor
            assert torch.allclose(value, second[part][name], rtol=0, atol=1e-4), name
    states = [state["optimizer"]["state"] for state in (first, second)]
    assert states[0].keys() == states[1].keys()
    for index, values in states[0].items():
        for name, value in values.items():
            assert type(states[1][index][name]) is torch.Tensor
            assert torch.allclose(value, states[1][index][name], rtol=0, atol=1e-4), (index, name)


def test_two_processes_train_like_one(runs):
    one, ddp, fsdp = (read_training(runs / name / LAST) for name in ("one", "ddp", "fsdp"))
    assert fsdp.keys() == ddp.keys() and fsdp["meta"].keys() == ddp["meta"].keys()
    losses = fsdp["history"]["iterations"][:, 1]
    assert len(losses) == 2 * (ITERATIONS // 2) and losses[-1] < losses[0]
    assert all(state["meta"]["world_size"] == len(state["rng"]) == 2 for state in (ddp, fsdp))
    assert_alike(one, ddp)
    assert_alike(ddp, fsdp)
    assert_alike(one, fsdp)
    assert not list(ROOT.glob(".dist_test"))
    assert fsdp["optimizer"]["param_groups"] == ddp["optimizer"]["param_groups"]
    for rows in zip(*(state["history"]["validation"] for state in (one, ddp, fsdp)), strict=True):
        assert rows[1] == pytest.approx(rows[0], abs=1e-3) and rows[2] == pytest.approx(rows[0], abs=1e-3)
    norms = [state["message_hub"]["log_scalars"]["train/grad_norm"][0] for state in (one, ddp, fsdp)]
    assert norms[0].min() > 0.5  # clipped each time
    assert torch.allclose(norms[0], norms[2], atol=1e-4) and torch.allclose(norms[1], norms[2], atol=1e-5)


def test_moving_averages(runs):
    state = read_training(runs / "fsdp" / LAST)
    trained = dict(state["unaveraged_state_dict"])
    assert int(trained.pop("steps")) == 8
    assert differences({f"module.{name}": value for name, value in state["state_dict"].items()}, trained)


def test_resume_is_exact(runs):
    unbroken, resumed = (read_training(runs / name / LAST) for name in ("noisy", "resumed"))
    assert read_training(runs / "noisy" / MIDDLE)["meta"]["batch"] == 2
    for part in EXACT:
        assert differences(resumed[part], unbroken[part], part) == []


@pytest.mark.parametrize(("crossed", "unbroken"), [("fsdp_to_ddp", "ddp"), ("ddp_to_fsdp", "ddp"), ("one_to_fsdp", "one")])
def test_checkpoints_are_resumed_by_other_kinds_of_run(crossed, unbroken, runs):
    assert_alike(*(read_training(runs / name / LAST) for name in (unbroken, crossed)))


def test_one_process_goes_on_from_shared_parameters(runs, data, tmp_path):
    cfg = quiet(data, tmp_path, 2 * BATCH)
    cfg.update(resume=True, load_from=str(runs / "fsdp" / "epoch_1.pth"), resume_anyway=True)
    Runner.from_cfg(cfg).train()
    assert_alike(read_training(runs / "one" / LAST), read_training(tmp_path / LAST))


def test_schedules_go_on_with_more_iterations(runs, data, tmp_path):
    """One process has twice the iterations of two; learning rates are at the same part of training."""
    rates = []
    for name in ("unbroken", "resumed"):
        cfg = quiet(data, tmp_path / name)
        if name == "resumed":
            cfg.update(resume=True, load_from=str(runs / "ddp" / "epoch_1.pth"), resume_anyway=True)
        Runner.from_cfg(cfg).train()
        state = read_training(tmp_path / name / LAST)
        assert state["meta"]["iter"] == 2 * ITERATIONS
        rates.append(state["history"]["iterations"][-ITERATIONS:, 2])
        schedules = state["param_schedulers"]
        assert all(schedule["_global_step"] == 2 * ITERATIONS for schedule in schedules)
    assert len(rates[1].unique()) == ITERATIONS
    assert torch.allclose(*rates, rtol=1e-5)


def test_one_process_tests_what_shared_parameters_learned(runs, tmp_path, capsys):
    commands.test([str(runs / "noisy.py"), str(runs / "noisy" / LAST), "--work-dir", str(tmp_path)])
    best = read_training(runs / "noisy" / "best_top1.pth")["meta"]["value"]
    reached = json.loads((runs / "noisy" / "history.json").read_text())[-1]["val_top1"]
    assert f"{reached:.2f}" in capsys.readouterr().out and best >= reached


def test_inside_of_the_processes(runs):
    """Parts, whole weights on loading, validation without the others, and the watch for NaN."""
    found = [json.loads(line) for line in (runs / "probe.jsonl").read_text().splitlines() if line.startswith("{")]
    assert len(found) == 2
    for process in found:
        assert process["sharded"] and process["loaded"] and process["alone"]
        for kind in ("val", "test"):
            assert process[kind] and process[f"{kind} with the buffers of the first process"]
        assert process["loss changed nothing"] and process["gradient changed nothing"]
        assert process["optimizers"] == []  # that do something else with parts
        whole, part = process["numbers"]
        assert abs(part / whole - 0.5) < 0.05
    assert sum(process["numbers"][1] for process in found) == found[0]["numbers"][0]
    watching, broken = found
    assert "the loss became nan in iteration 1" in broken["loss"] and "blocks.0.mlp" in broken["loss"]
    assert "not finite in another process" in watching["loss"] and "in another process, whose" in watching["loss"]
    assert "the gradient became nan" in broken["gradient"] and "blocks.0.mlp" in broken["gradient"]
    assert "the gradient became nan" in watching["gradient"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A process group of this process."""
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    commands.leave_process_group()


def total(output: object) -> torch.Tensor:
    """Squares of everything in the output of a model, summed."""
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    return sum(total(item) for item in (output.values() if isinstance(output, dict) else output))


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("name", [name for name in (*list_models(), *list_unets()) if name.endswith("_micro")])
def test_blocks_of_every_family_are_found_and_gather_their_weights(name, alone):
    """Also where they are recomputed in the backward pass."""
    model = create_model(name).double()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    image = torch.randn(1, model.in_chans, 32, 32, dtype=torch.float64)
    results = []
    for sharded in (False, True):
        model.load_state_dict(state)
        model.zero_grad()
        if sharded:
            model.set_grad_checkpointing()
            shard(model)
        torch.manual_seed(0)
        loss = total(model.eval()(image))
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        if sharded:
            gradients = {key: None if grad is None else grad.full_tensor() for key, grad in gradients.items()}
        results.append((loss, gradients))
    (first, gradients), (second, others) = results
    assert sum(type(module).__name__.startswith("FSDP") for module in model.modules()) > 3
    assert torch.allclose(first, second)
    for key, gradient in gradients.items():
        assert (gradient is None and others[key] is None) or torch.allclose(gradient, others[key]), key


def test_parameters_that_cannot_be_split_are_named(alone):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model.scale = nn.Parameter(torch.tensor(1.0))
    model.blocks[1].weight = model.blocks[0].weight
    with pytest.raises(ValueError, match="fsdp=True") as error:
        shard(model)
    assert "blocks.1.weight is shared between blocks" in str(error.value)
    assert "scale is one number without dimensions" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(model=dict(cuda_graphs=True)), "model.cuda_graphs"),
        (dict(compile=dict()), "sets compile"),
        (dict(model_wrapper_cfg=dict(type="MMDistributedDataParallel")), "model_wrapper_cfg"),
        (dict(activation_checkpointing=["backbone"]), "activation_checkpointing"),
        (dict(optim_wrapper=dict(precision="fp16")), "use bf16"),
        (dict(optim_wrapper=dict(optimizer=dict(type="Adafactor"))), "the optimizer Adafactor was not tried"),
        (dict(optim_wrapper=dict(optimizer=dict(type=torch.optim.Rprop))), "the optimizer Rprop was not tried"),
        (dict(optim_wrapper=dict(optimizer=torch.optim.SGD([torch.zeros(1)]))), "the optimizer is an object"),
        (dict(optim_wrapper=dict(type="mmengine.AmpOptimWrapper")), "use bf16"),
        (dict(optim_wrapper=dict(clip_grad=dict(max_norm=1.0, norm_type="inf"))), "use norm_type=2"),
        (dict(custom_hooks=[EMAHook()]), 'type="EMAHook"'),
    ],
)
def test_what_does_not_go_together_is_refused(changes, message, data, tmp_path):
    cfg = small_config(data, tmp_path)
    check_sharding(cfg, distributed=True)
    cfg.merge_from_dict(changes)
    with pytest.raises(ValueError, match="cannot be used here, switch it off or:") as error:
        check_sharding(cfg, distributed=True)
    assert message in str(error.value) and str(error.value).count("\n") == 1


def test_classes_in_the_place_of_names(data, tmp_path):
    cfg = small_config(data, tmp_path)
    cfg.optim_wrapper.optimizer.type = torch.optim.AdamW
    check_sharding(cfg, distributed=True)


def test_averages_have_parameters_that_two_layers_share_once():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    copy = _tensors_of(model)
    assert [name for name, _ in copy.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert copy.state_dict().keys() == model.state_dict().keys() and copy.get_submodule("0").weight is not model[0].weight


@pytest.mark.parametrize(
    ("environment", "flags", "message"),
    [
        (dict(WORLD_SIZE="2", TORCHELASTIC_RUN_ID="none"), [], "torchrun started 2 processes, each of which would do"),
        ({}, ["--launcher", "pytorch"], "for processes that torchrun starts: torchrun --nproc_per_node=N"),
    ],
)
def test_processes_that_do_not_know_of_each_other(environment, flags, message, data, tmp_path, capsys, monkeypatch):
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    small_config(data, tmp_path).dump(tmp_path / "small.py")
    with pytest.raises(SystemExit):
        commands.train([str(tmp_path / "small.py"), "--work-dir", str(tmp_path / "run"), *flags])
    assert message in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "run").exists()


def test_one_process_is_refused(data, tmp_path, capsys):
    small_config(data, tmp_path).dump(tmp_path / "small.py")
    with pytest.raises(SystemExit):
        commands.train([str(tmp_path / "small.py"), "--fsdp"])
    assert "start several with torchrun" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 2e-2)])
def test_two_gpus(precision, tolerance, data, tmp_path):
    quiet(data, tmp_path / "run").dump(tmp_path / "two.py")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", TRAIN, tmp_path / "two.py"]
    amp = [] if precision == "fp32" else ["--amp", precision]
    states = []
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        work_dir = ["--work-dir", tmp_path / name]
        process = run_python(*launch, "--launcher", "pytorch", *amp, *work_dir, *flags, gpus=True)
        assert process.returncode == 0, process.stderr[-4000:]
        states.append(read_training(tmp_path / name / LAST))
    assert len(states[1]["rng"]) == 2 and states[1]["rng"][0]["cuda"] is not None
    losses = [state["history"]["iterations"][:, 1] for state in states]
    assert torch.allclose(*losses, rtol=0, atol=tolerance)
    (tmp_path / "resumed").mkdir()
    shutil.copy(tmp_path / "fsdp" / MIDDLE, tmp_path / "resumed")
    resume = ["--fsdp", "--resume", "--work-dir", tmp_path / "resumed"]
    process = run_python(*launch, "--launcher", "pytorch", *amp, *resume, gpus=True)
    assert process.returncode == 0, process.stderr[-4000:]
    resumed = read_training(tmp_path / "resumed" / LAST)["history"]["iterations"][:, 1]
    assert torch.allclose(resumed, losses[1], rtol=0, atol=tolerance)
