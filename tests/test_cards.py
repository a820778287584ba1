"""Model cards: complete, up to date, and with nothing that leads nowhere."""

import re
import runpy
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch

import vision_ssm
from vision_ssm.analysis import cards
from vision_ssm.analysis.cards import SECTIONS, card_families, fill_card, read_card
from vision_ssm.analysis.marked import fill_marked
from vision_ssm.analysis.reported import COUNTED_OTHERWISE, REPORTED_GMACS, agrees
from vision_ssm.analysis.route_figures import FIGURES, figures_of
from vision_ssm.analysis.tables import model_table
from vision_ssm.scans import Routes

ROOT = Path(__file__).resolve().parent.parent
CARDS = ROOT / "model_cards"
FAMILIES = sorted(card_families())


@pytest.fixture(scope="module")
def main():
    return runpy.run_path(str(ROOT / "tools" / "make_cards.py"))["main"]


def card(family: str) -> str:
    return (CARDS / f"{family}.md").read_text()


def sections(family: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)$", read_card(card(family))[1], flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2]))


def test_every_family_has_a_card():
    assert {path.stem for path in CARDS.glob("*.md")} == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_card_is_complete(family):
    found = sections(family)
    assert [name for name in found if name in SECTIONS] == list(SECTIONS)
    assert all(text.strip() for text in found.values())
    assert re.findall(r"<!-- table (\w+) -->", card(family)) == ["variants", "input", "routes", "recipes"]
    head = read_card(card(family))[0]
    assert head["family"] == family and head["paper"] in found["Citation"]
    listed = [entry["name"] for entry in head["variants"]]
    assert listed == [name for cls in card_families()[family] for name in cls.variants]
    assert "/work" not in card(family)


@pytest.mark.parametrize("family", FAMILIES)
def test_reported_macs_are_met_or_explained(family):
    for entry in read_card(card(family))[0]["variants"]:
        reported = REPORTED_GMACS.get(entry["name"])
        if reported is None:
            continue
        assert agrees(reported, entry["macs"]) == (entry["name"] not in COUNTED_OTHERWISE), entry["name"]
        if entry["name"] not in COUNTED_OTHERWISE:
            continue
        explained = sections(family)["MACs"]
        assert f"{entry['macs'] / 1e9:.2f}" in explained and f"{reported} G" in explained, entry["name"]


@pytest.mark.parametrize("family", FAMILIES)
def test_links_lead_somewhere(family):
    links = re.findall(r"\]\(([^)]+)\)", card(family))
    assert links and all(link.startswith("https://") or (CARDS / link).is_file() for link in links)


def test_pictures_are_there_and_small():
    used = {key for family in FAMILIES for key in figures_of(card(family))}
    files = {path.stem: path for path in (CARDS / "figures").iterdir()}
    assert used == set(files) and used >= set(FIGURES)
    assert all(path.stat().st_size < 40_000 for path in files.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_families_with_routes_show_them(family):
    name = next(name for cls in card_families()[family] for name in cls.variants if name.endswith("_micro"))
    with torch.device("meta"):
        model = vision_ssm.create_model(name)
    walks = any(isinstance(getattr(module, "routes", None), Routes) for module in model.modules())
    assert figures_of(card(family)) or not walks


@pytest.mark.parametrize("family", FAMILIES)
def test_code_of_a_card_builds(family):
    """All but the loading of weights, which are not here, and what needs them."""
    code = re.search(r"```python\n(.*?)```", sections(family)["Use"], flags=re.DOTALL)[1]
    lines = [re.sub(r", encoder_weights=\"[^\"]+\"", "", line) for line in code.splitlines()]
    lines = [line for line in lines if not re.match(r"vision_ssm\.load_weights|logits|scores|dense", line)]
    with torch.device("meta"):
        exec("\n".join(lines), {})


def test_check_finds_what_is_out_of_date(main, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cards, "describe_variants", cache(cards.describe_variants))
    for path in ("lbvim.md", "figures/raster_and_reverse.png"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(CARDS / path, tmp_path / path)
    assert main(["lbvim", "--check"], tmp_path) == 0 and capsys.readouterr().out.strip() == ""
    page = (tmp_path / "lbvim.md").read_text()
    (tmp_path / "lbvim.md").write_text(page.replace("6.4 M", "6.5 M").replace("one scan per block", "a scan per block"))
    (tmp_path / "figures" / "raster_and_reverse.png").unlink()
    assert main(["lbvim", "--check"], tmp_path) == 1
    shown = capsys.readouterr().out
    assert re.search(r"^-\| `lbvim_tiny` .* 6\.5 M", shown, re.MULTILINE)
    assert "raster_and_reverse.png is missing or shows something else" in shown and "run tools/make_cards.py" in shown
    assert main(["lbvim"], tmp_path) == 0
    assert (tmp_path / "lbvim.md").read_text() == page.replace("one scan per block", "a scan per block")
    assert (tmp_path / "figures" / "raster_and_reverse.png").is_file()


def test_unknown_families_are_named(main, tmp_path, capsys):
    for arguments, message in (
        (["vmambo"], "there is no card for a family 'vmambo'. Did you mean 'vmamba'"),
        (["vmamba"], "vmamba.md is missing: write its text, with the marks of another card in it"),
    ):
        with pytest.raises(SystemExit):
            main(arguments, tmp_path)
        assert message in capsys.readouterr().err
    with pytest.raises(KeyError, match="there is no card for a family 'plain_unet'"):
        fill_card("plain_unet", "", ROOT / "configs")
    with pytest.raises(KeyError, match="unknown picture 'snakes' of routes. Did you mean 'snake'"):
        figures_of("<!-- figures snakes -->")
    with pytest.raises(KeyError, match="no card in .* knows .*: run tools/make_cards.py"):
        model_table(tmp_path)


def test_a_page_keeps_what_is_not_marked():
    page = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n"
    assert fill_marked(page, {"x": lambda: "new"}) == page.replace("old", "new")
