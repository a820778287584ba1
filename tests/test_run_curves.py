"""Several runs in one picture: what is read, drawn and printed, and what is refused."""

import json

import numpy as np
import pytest
from PIL import Image

from vision_ssm.engine.config import UsageError
from vision_ssm.engine.run_curves import Run, choose_metrics, draw_runs, read_runs, runs_table
from vision_ssm.engine.visualize_command import visualize


def history(top1, **further) -> list[dict]:
    """An epoch per value of top1, validated in every second one."""
    rows = [dict(epoch=1 + number, train_loss=1 / (1 + number), lr=0.1) for number in range(len(top1))]
    for number, value in enumerate(top1):
        if number % 2:
            metrics = dict(top1=value, cross_entropy=2 - value / 100, **further)
            rows[number].update({f"val_{key}": metric for key, metric in metrics.items()})
    return rows


def write(folder, rows):
    folder.mkdir(parents=True)
    (folder / "history.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        write(tmp_path / "a" / "vim", history([0, 60, 0, 80, 0, 70], **{"384/top1": 50.0})),
        write(tmp_path / "b" / "vim", history([0, 40, 0, 90])),
    ]


def cells(table) -> list[list[str]]:
    return [list(column.cells) for column in table.columns]


def test_the_command_writes_the_picture_and_a_table(runs, tmp_path, capsys):
    out = tmp_path / "out" / "runs.png"
    assert visualize(["runs", *map(str, runs), "--out", str(out), "--title", "Two"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1] == str(out)
    assert "70.00 (best 80.00, epoch 4)" in printed and "a/vim" in printed and "b/vim" in printed
    with Image.open(out) as picture:
        assert picture.format == "PNG" and np.asarray(picture.convert("L")).std() > 5


def test_a_run_of_one_epoch_and_losses_close_together(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vision_ssm.engine.run_curves.save", lambda figure, *_: drawn.append(figure))
    write(tmp_path / "one", [dict(epoch=1, train_loss=0.6931, val_top1=50.0)])
    write(tmp_path / "flat", [dict(epoch=1 + i, train_loss=0.69315 + i * 1e-7, val_top1=50.0) for i in range(4)])
    draw_runs(read_runs([tmp_path / "one", tmp_path / "flat"]), ["top1"], tmp_path / "a.png")
    loss = drawn[0].axes[0]
    assert [line.get_marker() for line in loss.lines] == ["o", "None"]
    assert not loss.yaxis.get_major_formatter().get_useOffset()


def test_names_tell_runs_of_one_folder_name_apart(runs, tmp_path):
    assert [run.name for run in read_runs(runs)] == ["a/vim", "b/vim"]
    other = write(tmp_path / "other", history([0, 50]))
    assert [run.name for run in read_runs([runs[0], other / "history.json"])] == ["vim", "other"]
    assert [run.name for run in read_runs(runs, ["1e-3", "1e-4"])] == ["1e-3", "1e-4"]
    assert [run.name for run in read_runs([other, other], ["x", "y"])] == ["x", "y"]
    with pytest.raises(UsageError, match="other.*given twice"):
        read_runs([other, other])


def test_the_main_metric_is_drawn_on_every_set(runs):
    found = read_runs(runs)
    assert choose_metrics(found) == ["top1", "384/top1"]
    assert choose_metrics(found, ["cross_entropy"]) == ["cross_entropy"]
    medical = Run("unet", [dict(epoch=1, train_loss=1.0, val_hd95=3.0, val_dice=0.5)])
    assert choose_metrics([medical]) == ["dice"]
    detector = dict(epoch=1, val_loss=1.0) | {"val_coco/bbox_mAP_50": 0.7, "val_coco/bbox_mAP": 0.5}
    assert choose_metrics([Run("detector", [detector])]) == ["coco/bbox_mAP"]
    assert choose_metrics([Run("other", [dict(epoch=1, val_R2=0.5)])]) == ["R2"]
    assert choose_metrics([Run("untested", [dict(epoch=1, train_loss=1.0)])]) == []
    with pytest.raises(UsageError, match="no run has top5; their validations have top1, cross_entropy, 384/top1"):
        choose_metrics(found, ["top5"])


def test_the_table_has_the_last_and_the_best(runs):
    names, epochs, losses, top1, entropy, large = cells(
        runs_table(read_runs(runs), ["top1", "cross_entropy", "384/top1"])
    )
    assert names == ["a/vim", "b/vim"] and epochs == ["6", "4"] and losses == ["0.1667", "0.25"]
    assert top1 == ["70.00 (best 80.00, epoch 4)", "90.00 (best 90.00, epoch 4)"]
    assert entropy[0] == "1.30 (best 1.20, epoch 4)"  # the lowest
    assert large == ["50.00 (best 50.00, epoch 2)", "-"]


def test_lines_go_as_far_as_their_runs(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vision_ssm.engine.run_curves.save", lambda figure, path, dpi: drawn.append(figure))
    draw_runs(read_runs(runs), ["top1", "cross_entropy", "384/top1"], tmp_path / "a.png")
    loss, top1, _, large, *empty = drawn[0].axes
    assert [line.get_xdata()[-1] for line in loss.lines] == [6, 4] and loss.get_yscale() == "linear"
    assert [list(line.get_ydata()) for line in top1.lines] == [[60, 80, 70], [40, 90]]
    assert [len(line.get_xdata()) for line in large.lines] == [3, 0]
    assert not any(axis.axison for axis in empty)
    colors = [line.get_color() for line in loss.lines]
    assert colors == [line.get_color() for line in top1.lines] and len(set(colors)) == 2
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == ["a/vim", "b/vim"]


def test_losses_over_decades_have_a_log_scale(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("vision_ssm.engine.run_curves.save", lambda figure, path, dpi: drawn.append(figure))
    many = [Run(f"run {number}", [dict(epoch=e, train_loss=10.0**-e) for e in (1, 2, 3)]) for number in range(21)]
    draw_runs(many, [], tmp_path / "a.png")
    lines = drawn[0].axes[0].lines
    assert drawn[0].axes[0].get_yscale() == "log"
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 21


def test_what_is_no_run_is_named(runs, tmp_path, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit):
            visualize(["runs", *map(str, arguments), "--out", str(tmp_path / "a.png")])
        return capsys.readouterr().err

    assert "has no history.json; name the work dir of a run" in refused(tmp_path)
    assert "nowhere is no file and no folder" in refused(tmp_path / "nowhere")
    assert "2 runs, 1 names" in refused(*runs, "--names", "one")
    assert "22 runs are too many" in refused(*([runs[0]] * 22))
    damaged = runs[0] / "history.json"
    damaged.write_text(damaged.read_text()[:50])
    assert f"{damaged} is damaged" in refused(*runs)
    for content in ("{}", "[]", "[1]", '[{"loss": 1}]'):
        damaged.write_text(content)
        assert f"{damaged} is not the history of a run" in refused(*runs)
    damaged.write_bytes(b"\xff\xfe\x00")
    assert f"{damaged} is damaged" in refused(*runs)
    assert not (tmp_path / "a.png").exists()
