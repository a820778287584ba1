"""The command line: train, test, predict, list_models; what they write, and what they say to wrong input."""

import csv
import re
import shutil
from pathlib import Path

import pytest
import torch
from engine_support import (
    CLASSES,
    ITERATIONS,
    QUICKSTART,
    ROOT,
    VAL_PER_CLASS,
    run_python,
    small_config,
)
from PIL import Image

from vision_ssm import create_model, list_models, list_unets
from vision_ssm.engine import commands, read_training
from vision_ssm.engine.config import load_config
from vision_ssm.engine.predict import (
    Predictor,
    class_names,
    image_files,
    model_from_file,
    stored_config,
    stored_keywords,
    stored_transform,
)
from vision_ssm.engine.predict_command import predict
from vision_ssm.weights import read_checkpoint

TOOLS = ("train", "test", "predict", "list_models")


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """Work dir of a run of ``train``; its config is ``small.py``, with the data folder given on the command line."""
    folder = tmp_path_factory.mktemp("trained")
    small_config(Path("no/such/folder"), folder, epochs=2).dump(folder / "small.py")
    arguments = [folder / "small.py", "--work-dir", folder, "--data-root", data, "--seed", 3, "--amp"]
    assert commands.train([*map(str, arguments), "--cfg-options", "optim_wrapper.optimizer.lr=0.003"]) == 0
    return folder


def fails(capsys, command, *arguments) -> str:
    """What `command` prints to standard error on its way out."""
    with pytest.raises(SystemExit) as stop:
        command([str(argument) for argument in arguments])
    assert stop.value.code != 0
    return capsys.readouterr().err


def test_train_applies_its_flags(trained):
    state = read_training(trained / "epoch_2.pth")
    assert state["meta"]["iter"] == 2 * ITERATIONS and state["meta"]["seed"] == 3
    assert state["meta"]["fingerprint"]["optim_wrapper.precision"] == "'bf16'"
    assert state["history"]["iterations"][:, 2].max() == pytest.approx(0.003)


def test_resume_flag_continues_with_more_epochs_only_when_told(trained, data, tmp_path, capsys):
    (tmp_path / "epoch_2.pth").write_bytes((trained / "epoch_2.pth").read_bytes())
    arguments = [trained / "small.py", "--work-dir", tmp_path, "--data-root", data, "--seed", 3, "--amp", "--resume"]
    longer = ["--cfg-options", "optim_wrapper.optimizer.lr=0.003", "train_cfg.max_epochs=3"]
    message = fails(capsys, commands.train, *arguments, *longer)
    assert "train_cfg.max_epochs: checkpoint 2, config 3" in message and "Traceback" not in message
    assert commands.train([*map(str, arguments), "--resume-anyway", *longer]) == 0
    assert read_training(tmp_path / "epoch_3.pth")["meta"]["iter"] == 3 * ITERATIONS


def test_test_reports_and_writes(trained, data, tmp_path, capsys):
    out = tmp_path / "out.csv"
    assert commands.test(
        [str(trained / "small.py"), str(trained / "best_top1.pth"), "--data-root", str(data),
         "--work-dir", str(tmp_path), "--out", str(out)]
    ) == 0  # fmt: skip
    printed = capsys.readouterr().out
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == VAL_PER_CLASS * len(CLASSES) and {row["label"] for row in rows} == set(CLASSES)
    accuracy = 100 * sum(int(row["correct"]) for row in rows) / len(rows)
    assert re.search(rf"top1\s*│\s*{accuracy:.2f}", printed) and "most taken for" in printed
    best = read_training(trained / "best_top1.pth")["meta"]["value"]
    assert accuracy == pytest.approx(best, abs=100 / len(rows) + 1e-6)  # validated in float32 as well
    assert {"per_class.csv", "confusion_matrix.png", "predictions.png"} <= {file.name for file in tmp_path.iterdir()}


def test_predict_one_image_and_a_folder(trained, data, tmp_path, capsys):
    picture = tmp_path / "one.png"
    image = data / "val" / "rows" / "00.png"
    arguments = [str(trained / "small.py"), str(trained / "best_top1.pth")]
    assert predict([*arguments, str(image), "--out", str(picture)]) == 0
    printed = capsys.readouterr().out
    chances = [float(number) for number in re.findall(r"([\d.]+) %", printed)]
    assert len(chances) == 3 and sum(chances) == pytest.approx(100, abs=0.1) and chances == sorted(chances)[::-1]
    assert Image.open(picture).width > 400

    (tmp_path / "broken.png").write_bytes(image.read_bytes()[:60])
    assert predict([*arguments, str(data / "val"), str(tmp_path / "broken.png"), "--out", str(picture)]) == 0
    captured = capsys.readouterr()
    assert captured.out.count(".png") == VAL_PER_CLASS * len(CLASSES) + 1  # a row each, and the picture
    assert "broken.png" in captured.err and "left out" in captured.err


def test_images_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "c/d.jpeg", "notes.txt", "._b.png", ".cache/e.png", "c/.hidden/f.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    assert image_files([tmp_path]) == [tmp_path / name for name in ("a.JPG", "b.png", "c/d.jpeg")]
    assert image_files([tmp_path / "._b.png"]) == [tmp_path / "._b.png"]  # named is wanted
    below = tmp_path / ".cache"  # hidden is what lies below, not where the folder lies
    assert image_files([below]) == [below / "e.png"]


def test_predict_agrees_with_test(trained, data):
    """Config and checkpoint give the same answers as name and weight file: the transform is the only difference."""
    from mmengine.config import Config

    cfg = Config.fromfile(str(trained / "small.py"))
    files = image_files([data / "val"])
    assert len(files) == VAL_PER_CLASS * len(CLASSES)
    predictor = Predictor.from_config(cfg, trained / "best_top1.pth")
    assert predictor.classes == CLASSES
    found = predictor(files, top=1)
    truth = {str(file): file.parent.name for file in files}
    accuracy = 100 * sum(found[file][0][0] == truth[file] for file in truth) / len(truth)
    assert accuracy == pytest.approx(read_training(trained / "best_top1.pth")["meta"]["value"], abs=1e-3)


def test_predict_by_name_and_weight_file(tmp_path, data, capsys):
    file = tmp_path / "weights.pth"
    torch.save({"model": create_model("vmamba_micro", num_classes=4, in_chans=1).state_dict()}, file)
    predictor = Predictor.from_weights("vmamba_micro", file)
    assert predictor.classes == ("class 0", "class 1", "class 2", "class 3") and predictor.channels == 1
    picture = tmp_path / "picture.png"
    arguments = ["--model", "vmamba_micro", "--weights", file, "--out", picture, "--top", 2]
    assert predict([str(a) for a in (data / "val" / "rows" / "00.png", *arguments)]) == 0
    assert len(re.findall(r"class \d", capsys.readouterr().out)) == 2 and picture.exists()


def test_class_names_of_imagenet():
    names = class_names({}, 1000)
    assert names[0] == "tench" and names[207] == "golden retriever" and len(names) == 1000


def test_list_models(capsys):
    assert commands.list_models_command(["vmamba_tiny_*"]) == 0
    printed = capsys.readouterr().out
    for name in list_models("vmamba_tiny_*"):
        assert name in printed
    assert "30,249,064" in printed and "82.6" in printed and "vmamba_micro" not in printed
    assert "download" in printed and "official weights" in printed
    assert commands.list_models_command(["*unet_*micro"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in list_unets("*unet_*micro")) and "574,795" in printed
    assert commands.list_models_command(["v*m*_micro", "--num-classes", "0"]) == 0
    printed = capsys.readouterr().out
    backbone = sum(parameter.numel() for parameter in create_model("vim_micro", num_classes=0).parameters())
    assert f"{backbone:,}" in printed and "574,795" in printed  # a U-Net as it is published
    with pytest.raises(SystemExit):
        commands.list_models_command(["vim_micro", "--num-classes", "-1"])
    assert "num_classes must be 0 (no classifier) or more, got -1" in capsys.readouterr().err
    assert commands.list_models_command(["spatialmamba_*", "--pretrained"]) == 0
    printed = capsys.readouterr().out
    assert "spatialmamba_tiny" in printed and "page" in printed and "spatialmamba_micro" not in printed
    assert commands.describe_weights("vssd_tiny") == "download (.ema_in1k), download (.mesa_in1k)"
    assert [commands.describe_weights(name) for name in ("vmunet_isic", "plain_unet_micro", "lbvim_tiny")] == ["encoder", "-", "-"]
    assert commands.list_models_command(["*_micro", "--pretrained"]) == 1
    assert "of no model that matches '*_micro' weights are published" in capsys.readouterr().err
    assert commands.list_models_command(["vnamba*"]) == 1
    assert "no model matches 'vnamba*'" in capsys.readouterr().err


@pytest.mark.parametrize("tool", TOOLS)
def test_help_shows_examples(tool, capsys):
    command = {"list_models": commands.list_models_command, "predict": predict}.get(tool) or getattr(commands, tool)
    with pytest.raises(SystemExit) as stop:
        command(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and f"  {tool}.py" in printed


def test_scripts_run_the_commands():
    process = run_python(ROOT / "tools" / "list_models.py", "vmamba_micro")
    assert process.returncode == 0 and "vmamba_micro" in process.stdout, process.stderr
    for tool in TOOLS:
        text = (ROOT / "tools" / f"{tool}.py").read_text()
        assert re.search(r"vision_ssm\.engine\.(predict_)?commands? import", text) and len(text.splitlines()) <= 12


def test_missing_config_suggests(capsys):
    message = fails(capsys, commands.train, QUICKSTART.with_name("quikstart_digit.py"))
    assert "quikstart_digit.py does not exist. Did you mean" in message and "quickstart_digits.py" in message
    assert "Traceback" not in message


def test_unknown_option_and_folder(capsys, tmp_path):
    wrong = ["--cfg-options", "optim_wrapper.optimizer.lrr=1"]
    message = fails(capsys, commands.train, QUICKSTART, "--work-dir", tmp_path, *wrong)
    assert "optim_wrapper.optimizer has no key 'lrr'. Did you mean 'lr'" in message
    message = fails(capsys, commands.train, QUICKSTART, "--work-dir", tmp_path, "--data-root", tmp_path / "nothing")
    assert "nothing is not a folder" in message
    (tmp_path / "empty").mkdir()
    message = fails(capsys, commands.train, QUICKSTART, "--work-dir", tmp_path, "--data-root", tmp_path / "empty")
    assert "empty" in message and "train" in message and "Traceback" not in message


def test_unwritable_work_dir_is_the_first_thing_said(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for command, more in ((commands.train, []), (commands.test, [tmp_path / "file"])):
        wrong = ["--work-dir", tmp_path / "file" / "below", "--cfg-options", "no_such_key=1"]
        message = fails(capsys, command, QUICKSTART, *more, *wrong)
        assert re.search(
            r"work dir .*below is not writable \(Not a directory\); choose another with --work-dir", message
        )


def test_missing_checkpoints(capsys, trained, tmp_path, data):
    message = fails(
        capsys, commands.train, trained / "small.py", "--work-dir", tmp_path, "--resume", trained / "epoch_9.pth"
    )
    assert "epoch_9.pth: there is no such checkpoint. Did you mean" in message and "epoch_2.pth" in message
    message = fails(capsys, commands.test, trained / "small.py", trained / "best_top2.pth")
    assert "there is no checkpoint" in message and "best_top1.pth" in message
    message = fails(capsys, predict, trained / "small.py", trained / "none.pth", data / "val")
    assert "none.pth" in message


def test_wrong_predictions(capsys, trained, tmp_path, data):
    checkpoint = trained / "best_top1.pth"
    assert "neither an image nor a folder" in fails(
        capsys, predict, trained / "small.py", checkpoint, "nowhere"
    )
    message = fails(capsys, predict, trained / "small.py", checkpoint, tmp_path)
    assert "no image in" in message and ".png" in message
    assert "belong together" in fails(capsys, predict, "x.png", "--model", "vmamba_micro")
    assert "expected CONFIG CHECKPOINT IMAGES" in fails(capsys, predict, "x.png")
    message = fails(capsys, predict, data / "val", "--model", "vmamba_mirco", "--weights", checkpoint)
    assert "Did you mean 'vmamba_micro'" in message


def test_fp16_without_a_gpu_says_what_to_use(capsys, tmp_path, data):
    small_config(data, tmp_path).dump(tmp_path / "small.py")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    message = fails(capsys, commands.train, tmp_path / "small.py", "--amp", "fp16", "--work-dir", tmp_path)
    assert "precision 'fp16' needs a GPU; on the CPU use 'bf16' (--amp bf16)" in message


def test_cuda_graphs_without_a_gpu_say_what_is_missing(capsys, tmp_path, data):
    small_config(data, tmp_path).dump(tmp_path / "small.py")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    message = fails(capsys, commands.train, tmp_path / "small.py", "--cuda-graphs", "--work-dir", tmp_path)
    assert "the model is on the cpu, CUDA graphs need a CUDA device: train on a GPU" in message
    assert "Traceback" not in message and not list(tmp_path.glob("*.pth"))


def test_weights_of_a_run_come_with_its_transform(trained, data, tmp_path):
    """By name, a checkpoint is seen through the transform that its run evaluated with, not through the variant's."""
    cfg = load_config(trained / "small.py")
    by_config = Predictor.from_config(cfg, trained / "best_top1.pth")
    by_name = Predictor.from_weights("vmamba_micro", trained / "best_top1.pth")
    picture = Image.open(data / "val" / "rows" / "00.png")
    assert torch.equal(by_name.transform(picture), by_config.transform(picture)) and by_name.classes == CLASSES
    checkpoint = {"meta": {"cfg": "import os\nval_dataloader = dict(dataset=dict(transform=dict(crop_pct=open('x'))))\n"}}
    assert stored_transform(checkpoint) == {} and stored_transform({"meta": {"cfg": "a = ("}}) == {}
    checkpoint["meta"]["cfg"] += "test_cfg = dict(also=dict({'384': dict(a=1)}, b=2))\n"  # as mmengine writes such keys
    checkpoint["meta"]["cfg"] += "odd = dict(5)\nodder = {[1]: 2}\nfirst, second = 1, 2\n"  # no data, passed over
    checkpoint["meta"]["cfg"] += "test_dataloader = dict(dataset=dict(transform=dict(input_size=192)))\n"
    assert stored_transform(checkpoint) == dict(input_size=192)
    assert stored_config(checkpoint)["test_cfg"] == dict(also={"384": dict(a=1), "b": 2})


def test_weights_of_a_run_come_with_the_keywords_of_its_model(trained, data, tmp_path):
    """By name, a checkpoint is that of the model that was trained, also where another would have the same shapes."""
    cfg = load_config(trained / "small.py")
    cfg.model.backbone.scan = dict(routes="cascade")
    meta = {**read_training(trained / "best_top1.pth")["meta"], "cfg": cfg.pretty_text}
    torch.manual_seed(0)
    model = create_model(**{"name": "vmamba_micro", **cfg.model.backbone, "num_classes": 3})
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    torch.save({"state_dict": model.state_dict(), "meta": meta}, tmp_path / "run.pth")
    files = image_files([data / "val"])[:3]
    by_name = Predictor.from_weights("vmamba_micro", tmp_path / "run.pth")
    assert by_name(files) == Predictor.from_config(cfg, tmp_path / "run.pth")(files)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "bare.pth")
    bare, _ = model_from_file("vmamba_micro", tmp_path / "bare.pth", dims=8, depths=(1, 1))
    assert len(bare.stages[0].blocks[0].mixer.core.routes.tables(4, 4)) == 1
    overridden, _ = model_from_file("vmamba_micro", tmp_path / "run.pth", scan=dict(routes="snake"))
    assert len(overridden.stages[0].blocks[0].mixer.core.routes.tables(4, 4)) == 1
    assert stored_keywords(read_checkpoint(tmp_path / "run.pth"), "vim_micro") == {}


def test_a_position_table_of_another_size_is_said(tmp_path, data, capsys):
    torch.save(create_model("plstm_micro", num_classes=2, img_size=48).state_dict(), tmp_path / "a.pth")
    arguments = ["--model", "plstm_micro", "--weights", tmp_path / "a.pth", "--out", tmp_path / "a.png", "--size", 64, 48]
    predict([str(argument) for argument in (data / "val" / "rows" / "00.png", *arguments)])
    captured = capsys.readouterr()
    assert "a.pth is of another image size, position tables are resampled: pos_embed.table from (3, 3)" in captured.err


def test_size_of_predicted_images(trained, data, tmp_path, capsys):
    arguments = [trained / "small.py", trained / "best_top1.pth", data / "val" / "rows" / "00.png", "--out", tmp_path / "a.png"]
    cfg = load_config(trained / "small.py")
    sizes = [Predictor.from_config(cfg, trained / "best_top1.pth", size=size).transform(Image.new("L", (50, 50))).shape
             for size in (None, (64, 40))]  # fmt: skip
    assert [tuple(size) for size in sizes] == [(1, 32, 32), (1, 64, 40)]
    assert predict([*map(str, arguments), "--size", "48"]) == 0
    capsys.readouterr()
    assert "--size takes one or two numbers" in fails(capsys, predict, *arguments, "--size", 0)
    assert "Top 3 classes" not in fails(capsys, predict, *arguments, "--size", 1, 2, 3)


def test_options_without_a_value(trained, capsys):
    said = fails(capsys, commands.train, trained / "small.py", "--cfg-options", "model")
    assert "--cfg-options takes KEY=VALUE, got 'model'" in said and "Traceback" not in said


def test_test_refuses_other_classes(trained, data, tmp_path, capsys):
    other = tmp_path / "val"
    shutil.copytree(data / "val", other)
    (other / "blob").rename(other / "zebra")
    said = fails(capsys, commands.test, trained / "small.py", trained / "best_top1.pth", "--data-root", tmp_path)
    assert "rows instead of blob, zebra instead of rows" in said and "classes=[...]" in said
    inside = [trained / "small.py", trained / "best_top1.pth", data / "val" / "rows" / "00.png", "--out", tmp_path]
    assert "is a folder; name a file" in fails(capsys, predict, *inside)
