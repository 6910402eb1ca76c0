"""Figures from run outputs: arrays of a sweep, files with their data and labels, and titles that their data say."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_editors import make_editor
from sweep_lines import DOMAINS, sweep_lines
from table_cells import many_cells

from ibke_hf.analysis import editors, trainings
from ibke_hf.analysis.drawings import trainings as trainings_drawn
from ibke_hf.analysis.drawings.domains import gains_in_and_out, hop_gains
from ibke_hf.analysis.drawings.ranks import title_of_ranks
from ibke_hf.analysis.editors import Compared, latent_maps, pruning, scale_factor_maps
from ibke_hf.analysis.figures import FIGURES, trade_off, write_figure, write_index
from ibke_hf.analysis.pruning import pruning_curves
from ibke_hf.analysis.ranks import AFTERWARDS, IN_THE_LOOP, quality_by_rank
from ibke_hf.analysis.trainings import NoTrainingsError, mean_and_error
from ibke_hf.cli import main

Data = dict[str, Any]


@pytest.fixture(scope="module")
def figures(tiny_model: Callable[..., Any], tiny_tokenizer: Any) -> dict[str, Data]:
    """The data of all figures: of a made-up sweep, and of two tiny editors."""
    pytest.importorskip("sklearn")
    from test_measuring import records_of

    lines, model = sweep_lines(), tiny_model()
    compared = [
        Compared("with IB", {seed: make_editor(model, tiny_tokenizer) for seed in (0, 1)}),
        Compared("without IB", {0: make_editor(model, tiny_tokenizer, use_information_bottleneck=False)}),
    ]
    records = [replace(record, relation=("birth", "capital")[i % 2]) for i, record in enumerate(records_of(9))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(editors, "pruning_curves", _all_successful)
        pruned = pruning(compared, model, tiny_tokenizer, records[:3], fractions=(0.0, 0.5, 1.0))
    made = [
        trade_off(many_cells()),
        trainings.hyper_parameters(lines),
        trainings.ablation(lines),
        trainings.domains(lines),
        trainings.criteria(lines),
        latent_maps(compared, model, tiny_tokenizer, records),
        scale_factor_maps(compared, model, tiny_tokenizer, records[:3], drawn=2),
        pruned,
        quality_by_rank(_by_rank(compared), model, tiny_tokenizer, records[:3], many=2),
    ]
    return {data["figure"]: data for data in made}


def _by_rank(compared: list[Compared]) -> Data:
    whole, other = (one.editors for one in compared)
    return {AFTERWARDS: {1: whole, 0: whole}, IN_THE_LOOP: {0: whole, 1: other}}


def _all_successful(*arguments: Any, **options: Any) -> Any:
    """No edit of an untrained editor succeeds; count all of them."""
    curves = pruning_curves(*arguments, **options)
    return replace(curves, successful=torch.ones_like(curves.successful))


LABELS = {
    "2": {"Generality, in the top 5 (%)", "Locality, in the top 5 (%)", "SERAC"},
    "3": {"Reliability, top 1 (%)", "β, weight of the information term", "l_m, length of the latent", "20", "0.01"},
    "4": {"IBKE (paper)", "- IB", "- SF", "- IB - SF", "IBKE (ours)", "Locality, in the top 5 (%)"},
    "5a": {*DOMAINS, "generality, with IB", "locality, without IB", "reliability, difference"},
    "5b": {"with IB", "without IB", "Rephrase  (400)", "2 hops  (310)", "Generality, in the top 5 (%)"},
    "6": {"birth", "capital", "with IB", "without IB"},
    "7a": {"with IB", "without IB", "layer 0"},
    "ranks": {
        AFTERWARDS,
        IN_THE_LOOP,
        "rank of an edit",
        "full",
        "Average, 2 edits solved (%)",
        "Size of an edit (kB)",
    },
    "7b": {"with IB", "without IB", "pruned scale factors (%)", "Locality: similarity (1 − JS)"},
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_has_its_files_for_both_pages_with_labels_and_data(
    name: str, figures: dict[str, Data], tmp_path: Path
) -> None:
    files = write_figure(figures[name], tmp_path)
    stems = [f"figure_{name}.{end}" for end in ("json", "svg", "png", "dark.svg", "dark.png")]
    assert [file.name for file in files] == stems == sorted(stems, key=stems.index)
    assert json.loads(files[0].read_text(encoding="utf-8")) == json.loads(json.dumps(figures[name]))
    for file in (files[1], files[3]):
        text = file.read_text(encoding="utf-8")
        words = {
            "".join(part.itertext()).strip() for part in ET.fromstring(text).iter("{http://www.w3.org/2000/svg}text")
        }
        missing = {label for label in LABELS[name] if label not in words and not any(label in word for word in words)}
        assert not missing, (missing, words)
        assert "DOCTYPE" not in text
    assert all(
        file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5000 for file in (files[2], files[4])
    )
    first = files[1].read_text(encoding="utf-8")
    write_figure(json.loads(files[0].read_text(encoding="utf-8")), tmp_path)  # drawn again of the saved data
    assert files[1].read_text(encoding="utf-8") == first


def test_arrays_hold_the_score_of_each_configuration_and_seed() -> None:
    lines = sweep_lines()
    data = trainings.hyper_parameters(lines)
    assert (data["latent_lengths"], data["betas"], data["seeds"]) == (
        [1, 5, 10, 20],
        [0.01, 0.1, 1.0, 10.0],
        [0, 1, 2],
    )
    for line in lines:
        plain = all(
            line[name] == value for name, value in trainings.PAPER.items() if name not in ("latent_length", "beta")
        )
        if plain:
            i, j = data["latent_lengths"].index(line["latent_length"]), data["betas"].index(line["beta"])
            assert data["values"]["locality"][i][j][line["seed"]] == line["scores"]["locality"]
    without_one = [line for line in lines if line["name"] != "ibke_paper.l5.b1.2"]
    assert trainings.hyper_parameters(without_one)["values"]["locality"][1][2][2] is None
    variants = trainings.ablation(lines)
    means = {
        name: mean_and_error(v)[0]
        for name, v in zip(variants["variants"], variants["values"]["generality"], strict=True)
    }
    assert means["IBKE (ours)"] > means["IBKE (paper)"] > means["- SF"] > means["- IB"] > means["- IB - SF"]


def test_gains_at_home_and_elsewhere_and_by_hops() -> None:
    lines = sweep_lines()
    inside, outside = gains_in_and_out(trainings.domains(lines), "generality")
    assert inside == pytest.approx(4)
    assert outside == pytest.approx(6)
    assert hop_gains(trainings.criteria(lines)) == pytest.approx({1: 4, 2: 5, 3: 6})


def test_the_page_of_a_folder_shows_its_figures_with_their_titles(figures: dict[str, Data], tmp_path: Path) -> None:
    for name in ("ranks", "3"):
        write_figure(figures[name], tmp_path)
    text = write_index(tmp_path).read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Figure 3", "## Ranks"]
    for title in (trainings_drawn.title_of_hyper_parameters(figures["3"]), title_of_ranks(figures["ranks"])):
        assert f"\n\n{title}.\n" in text
    links = re.findall(r'(?:src|srcset)="([^"]+)"|\]\(([^)]+)\)', text)
    assert len(links) == 8
    assert all((tmp_path / (one or other)).is_file() for one, other in links)


@pytest.mark.parametrize(
    "make", [trainings.hyper_parameters, trainings.ablation, trainings.domains, trainings.criteria]
)
def test_a_sweep_without_the_trainings_of_a_figure_says_so(make: Callable[[Any], Any]) -> None:
    with pytest.raises(NoTrainingsError, match=r"Figure .* `ibke sweep`"):
        make([line for line in sweep_lines() if line["name"] == "ibke_paper.l10.b0.1.0"])


def test_the_command_draws_what_there_is_data_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": sweep_lines(seeds=1)}))
    out = tmp_path / "figures"
    command = ["figures", "--out", str(out), "--sweep", str(tmp_path), "--figures"]
    assert main([*command, "3", "4"]) == 0
    assert {file.stem.split(".")[0] for file in out.iterdir()} == {"figure_3", "figure_4", "README"}
    assert main([*command, "2"]) == 2
    assert capsys.readouterr().err.endswith("ibke figures: figure 2 needs --table\n")
    (tmp_path / "sweep.json").write_text('{"cells": [{"editor": "ibke"}]}')
    assert main([*command, "3"]) == 2
    assert "a cell has no 'latent_length'; make the file again with `ibke sweep`" in capsys.readouterr().err
