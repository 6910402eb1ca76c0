"""The card of the Atlas editor. Every figure is read from the committed assets: config, training log and results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...atlas import ASSETS, FACTS
from ...atlas.datasets import TRAINING_OPTIONS
from ...atlas.editors import LOCALITY_FLOOR, STEP_FACTORS
from ...atlas.report import SPLITS, markdown_table
from ...atlas.splits import HELD_OUT_DOMAINS
from ...evaluation.report import tabular
from ...evaluation.report.table_text import number_text, seconds_text
from ...io import read_json
from .editor import editor_metadata, editor_page
from .results import EVAL_RESULTS, eval_results_text
from .text import CARD, IBKE_TAGS, fenced, listed, prose

Json = dict[str, Any]
DATASET = "ibke-hf/atlas"  # what `.eval_results` calls the records, which ship in the package and are not on the Hub

# --- words, with places for figures -------------------------------------------------------------------------------

SUMMARY = """\
An Information Bottleneck Knowledge Editor for the small language model that comes with `ibke_hf`. It turns an edit
request into a low-rank edit. Editor and backbone ship inside the package; the backbone is no model of the Hub."""
USE = """\
from ibke_hf import EditRequest
from ibke_hf.atlas import load_backbone, load_editor

model, tokenizer = load_backbone()
editor = load_editor()
edit = editor.edit(model, tokenizer, [EditRequest("The company behind GeForce is", "Sony")])
with edit.attached(model):
    ...  # model.generate(...)"""
COMMANDS = """\
ibke demo
ibke eval --dataset atlas --editor ibke --out results
ibke atlas train-editor --out rebuilt/ibke"""
TRAINING = """\
It edits layers {layers} of {depth}, counted from 0, and has {parameters:,} parameters. It was trained for {steps:,}
steps of {batch} edits from {records:,} records, in {minutes:.0f} minutes, with {groups}{request}. It is stored in
fp16 and used in fp32. Every setting, the losses and the trials are in `ibke_hf/atlas/assets/ibke/log.json`."""
RECIPE = {  # of the training records, by the options of `datasets.TRAINING_OPTIONS`
    "unknown_share": "{} of the edits state facts that the backbone was not taught",
    "novel_rate": "{} of the others give a subject an object with a made-up name",
    "near_rate": "{} of the locality cases about the edited relation ask about a subject as near to the edited "
    "one as there is",
    "shares": "kinds of cases are drawn by weight, 1 unless said: {}",
}
KINDS = {  # of cases, see `ibke_hf.data.build`
    "rephrase": "rephrasings",
    "two_hop": "two relations",
    "three_hop": "three relations",
    "multi_hop": "several relations",
    "reverse": "the relation backwards",
    "same_entity": "Yes or No",
    "alias": "another name",
    "one_to_many": "the subject's other objects",
    "head": "another relation of the subject",
    "property": "the edited relation of another subject",
    "tail": "the object",
    "none": "others",
}
STEP_SIZE = """\
After training the step size was multiplied by {factor:g}: {choice} (it is {locality:.1f} % there)."""
KEPT = "the largest of {factors} that leaves locality at {floor:g} % on the validation records"
MISSED = "none of {factors} left locality at {floor:g} % on the validation records, and this one has the best Avg"
NEAREST = """\
Asked the request's own words of a subject that shared the edited one's old answer, such as another city of the same
country, the model keeps its first answer in {ibke:.1f} % of {cases} cases (FT: {ft:.1f} %, MEND: {mend:.1f} %)."""
WEAK = {  # by kind of case and criterion, on the test records
    ("locality", "Relation Specificity"): """\
Asked the edited relation of another subject, the model keeps its first answer in {top1:.1f} % of {cases} cases, and
has it among the first five in {score:.1f} %. Few of those subjects are near the edited one.""",
    ("locality", "Same-Entity Reasoning"): """\
Questions that are answered by Yes or No, and have nothing to do with the edit, keep their answer in {score:.1f} %
of {cases} cases.""",
    ("generality", "Relation Reverse"): """\
Questions that walk the edited relation backwards: {top1:.1f} % of the answers' tokens come first, over {cases}
cases, and a generated answer is right in {exact_match:.1f} %.""",
    ("generality", "Multi-Hop"): """\
Questions that walk several relations: {top1:.1f} % of the answers' tokens come first, over {cases} cases, and a
generated answer is right in {exact_match:.1f} %.""",
}
CRITERIA = "All criteria of the test records, in percent, the weakest of the paper's score first:"
RESULTS = """\
In percent, by the procedure of the UniEdit evaluator, one edit at a time, on {records}. Made by `ibke atlas
report`. Exact match counts whole generated answers to the generality cases, top 1 tokens of the answer that are the
likeliest, in top 5 those among the five likeliest (Yes and No: the likeliest), which is the paper's count: a high
value there does not mean that so many answers are right. FT's learning rate was chosen on validation records.
{mend}"""
MEND_ALIKE = "MEND was trained by the same recipe and has {parameters:,} parameters."
MEND_APART = (
    "MEND's weights are from another run ({steps:,} steps, layers {layers}), so its row is not a fair comparison yet."
)
TIMES = (
    "An edit takes {alone} alone, and {at_once} of its batch where a hundred are made at once, on one core of a CPU."
)
FILES = """\
Scores by criterion and hop count are in `ibke_hf/atlas/assets/results.json`. `.eval_results/atlas.yaml` has this
editor's scores in the Hub's form, under the name `{dataset}`: the records ship inside the package and are not on
the Hub yet."""
DATA = """\
True facts in {number} domains ({domains}), written for this package and read a second time by someone who did not
write them. The records are counterfactual edits, and true facts that the backbone was not taught. Test subjects are
unseen in training; the domains {held_out} (`held_out`) are unseen altogether."""
PAPER = """\
The bottleneck, the losses and the form of the edit are those of *An Information-Theoretic Framework for Robust
Large Language Model Editing*. {stage} The backbone, its facts and every number on this card are ours."""
PAPERS_STAGE = "So is the second stage."
OUR_STAGE = "The second stage is not the paper's alone: {extensions} are ours, and off in the paper's presets."
EXTENSIONS: dict[
    str, tuple[Any, str]
] = {  # of the second stage: the field, its value in the paper's presets, what it adds
    "second_stage_skip": (False, "a token-wise skip from the standardised factors"),
    "second_stage_mlp": (0, "an MLP block of width {}"),
    "second_stage_heads": (1, "{} attention heads"),
}

# --- the card -----------------------------------------------------------------------------------------------------


def atlas_card() -> dict[str, str]:
    """Return the files of the card by path: the card itself, and the scores in the form of ``.eval_results``."""
    results, log, config = _read("results.json"), _read("ibke/log.json"), _read("ibke/config.json")
    evaluations = {split: _as_evaluation(results, split) for split in SPLITS}
    test = results["editors"]["ibke"]["test"]["by_criterion"]
    sections = {
        "Use": [fenced(USE), "Watch it, score it, train it again:", fenced(COMMANDS, "bash")],
        "Training": [
            _training(log, config),
            prose(f"{_recipe(TRAINING_OPTIONS)} {_step_size(log['step_size_trials'])}"),
        ],
        "Where it fails": [_weak_points(test, results["near"]), CRITERIA, _criteria(test)],
        "Results": [
            _about_results(results, log, config),
            markdown_table(results),
            *_times(results),
            prose(FILES, dataset=DATASET),
        ],
        "Data": [_data()],
        "What is the paper's and what is ours": [_paper(config)],
    }
    metadata: Json = {"license": "apache-2.0", "language": "en", "tags": IBKE_TAGS}
    data = editor_metadata("", "ibke-atlas", list(evaluations.values()), **metadata)
    return {
        CARD: editor_page(data, "IBKE for the Atlas backbone", [prose(SUMMARY)], sections),
        f"{EVAL_RESULTS}/atlas.yaml": eval_results_text({f"{split}_": part for split, part in evaluations.items()}),
    }


def _read(name: str) -> Json:
    return read_json(ASSETS / name)


def _as_evaluation(results: Json, split: str) -> Json:
    """Return the scores of a split as ``results.json`` of `ibke eval` would hold them."""
    settings = {"dataset": DATASET, "split": split, "sequential": 1}
    return {"overall": results["editors"]["ibke"][split], "settings": settings, "records": results["records"][split]}


def _training(log: Json, config: Json) -> str:
    settings, batch = log["training"], log["training"]["per_device_train_batch_size"]
    size = settings["edits_per_group"] or batch
    return prose(
        TRAINING,
        layers=listed(config["edited_layers"]),
        depth=_read("backbone/config.json")["num_hidden_layers"],
        records=log["records"],
        parameters=log["report"]["parameters"],
        steps=settings["max_steps"],
        batch=batch,
        minutes=log["report"]["minutes"],
        groups="each edit made on its own" if size == 1 else f"{size} records edited jointly",
        request=" and the request itself as one more generality case" if settings["sg_includes_edit"] else "",
    )


def _recipe(options: Mapping[str, Any]) -> str:
    """Say what is special about the training records.

    Raises:
        KeyError: For an option that no words are written for.
    """
    shares = [
        f"{KINDS[kind]} {share:g} for {group}"
        for group, weights in options.get("shares", {}).items()
        for kind, share in weights.items()
    ]
    said = [
        RECIPE[name].format(", ".join(shares) if name == "shares" else f"{100 * value:g} %")
        for name, value in options.items()
    ]
    return f"In the training records, {'; '.join(said)}." if said else ""


def _step_size(trials: Sequence[Json]) -> str:
    chosen = trials[-1]
    choice = KEPT if chosen["locality"] >= LOCALITY_FLOOR else MISSED
    return STEP_SIZE.format(**chosen, choice=choice.format(factors=listed(STEP_FACTORS), floor=LOCALITY_FLOOR))


def _weak_points(scores: Json, near: Json) -> str:
    kept = {name: cell["locality_top1"] for name, cell in near["editors"].items()}
    points = [(NEAREST, {**kept, "cases": near["cases"]})]
    points += [(said, cell) for (role, criterion), said in WEAK.items() if (cell := scores[role].get(criterion))]
    return "\n".join(f"- {prose(said, **figures)}".replace("\n", "\n  ") for said, figures in points)


def _criteria(scores: Json) -> str:
    rows = [
        [
            f"{role}, {criterion}",
            *(number_text(cell[name]) for name in ("exact_match", "top1", "score")),
            str(cell["cases"]),
        ]
        for role, cells in scores.items()
        for criterion, cell in sorted(cells.items(), key=lambda item: item[1]["score"])
    ]
    return tabular.markdown_table(["Cases", "Exact match", "Top 1", "In top 5", "Number"], rows)


def _about_results(results: Json, log: Json, config: Json) -> str:
    mend, layers = _read("mend/log.json"), _read("mend/config.json")["edited_layers"]
    alike = (mend["training"], mend["records"], layers) == (log["training"], log["records"], config["edited_layers"])
    said = (MEND_ALIKE if alike else MEND_APART).format(
        steps=mend["training"]["max_steps"], layers=listed(layers), parameters=mend["report"]["parameters"]
    )
    records = listed([f"{number} {split} records" for split, number in results["records"].items()])
    return prose(RESULTS, records=records, mend=said)


def _times(results: Json) -> list[str]:
    """Say how long an edit takes; results of earlier versions do not tell."""
    if "times" not in results:
        return []
    alone, at_once = (seconds_text(results["times"]["ibke"][name]) for name in ("alone", "at_once"))
    return [prose(TIMES, alone=alone, at_once=at_once)]


def _data() -> str:
    domains = sorted(file.parent.name for file in FACTS.glob("*/triples.tsv"))
    return prose(DATA, number=len(domains), domains=listed(domains), held_out=listed(HELD_OUT_DOMAINS))


def _paper(config: Json) -> str:
    values = {name: config.get(name, usual) for name, (usual, _) in EXTENSIONS.items()}
    on = [
        f"{said.format(values[name])} (`{name}`)"
        for name, (usual, said) in EXTENSIONS.items()
        if values[name] != usual
    ]
    return prose(PAPER, stage=OUR_STAGE.format(extensions=listed(on)) if on else PAPERS_STAGE)
