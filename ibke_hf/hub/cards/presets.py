"""Cards of the paper's backbones, whose editors nobody has trained yet: how to train one, and what that takes."""

from __future__ import annotations

from typing import Any

from ...core.configuration_ibke import PRESETS
from ...training.needs import ROW_TOKENS, TARGET_TOKENS, TrainingNeeds, needs_table, training_needs
from ...training.passes import CASES
from ...training.recipe import PATIENCE
from .editor import editor_metadata, editor_page
from .text import CARD, IBKE_TAGS, fenced, listed, prose

PAPERS_LAYERS = ("openai-community/gpt2-xl",)  # whose edited layers the paper states; the others' are ours (SPEC §6)
DATASET = "qizhou/UniEdit"

STATUS = (
    "**Not published yet: weights do not exist.** The commands below make them. Numbers here are settings "
    "and estimates, not results."
)
SUMMARY = """\
An Information Bottleneck Knowledge Editor for [{backbone}](https://huggingface.co/{backbone}). It would turn an
edit request into a low-rank edit of {modules}."""
SPLIT = """\
UniEdit has no validation records. This keeps one subject in a hundred for them, with all its records, from the
train files:"""
SPLIT_CODE = """\
import json
from pathlib import Path
from zlib import crc32

from huggingface_hub import snapshot_download

source = Path(snapshot_download("{dataset}", repo_type="dataset", allow_patterns="train/*.json"))
for file in sorted((source / "train").glob("*.json")):
    parts = {{"train": {{}}, "validation": {{}}}}
    for key, record in json.loads(file.read_text(encoding="utf-8")).items():
        held = crc32(record["edit"]["head_entity"]["id"].encode()) % 100 == 0
        parts["validation" if held else "train"][key] = record
    for name, part in parts.items():
        target = Path("uniedit", name, file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(part), encoding="utf-8")"""
TRAIN = """\
pip install "ibke-hf[train]"
ibke train --backbone {backbone} --records uniedit/train --validation uniedit/validation --out {name}"""
PRESET = """\
The preset of this backbone applies by itself: layers {layers}, the backbone in {dtype}. Training stops once the
validation loss has not fallen for {patience:,} steps, and at {steps:,} steps at the latest; `--resume` goes on
after a cut. `--augment FILE ...` mixes in {augmented} records of each further dataset, as the paper does where it
puts an asterisk."""
PUBLISH = """\
ibke eval --dataset {dataset} --split test --model {backbone} --dtype {dtype} --editor {name} --out results
ibke card {name} --repository me/{name} --results results
ibke push {name} me/{name} --results results"""
PUBLISHED = """\
`ibke eval --limit 1000 --seed 0` scores a draw of the records, which is quicker. `ibke card` shows the card that
the push will write, with the results in it."""
ESTIMATES = """\
Estimates, not measurements. `{command}` makes this table: it counts the parameters of backbone and editor without
their weights, and takes records of {cases} cases (one generality, one locality), {tokens} tokens a case with its
padding and {targets} tokens a target. 1 GB is 10⁹ bytes, 1 TFLOP is 10¹² operations."""
TIME = """\
Time is not measured: it is steps × {operations:.0f} TFLOP / the TFLOP per second that your device reaches. A short
run prints its steps per second:"""
TRIAL = "ibke train --backbone {backbone} --records uniedit/train --max-steps 100 --out trial"
PAPER = """\
From *An Information-Theoretic Framework for Robust Large Language Model Editing*: the architecture and the losses,
{papers_layers}a latent of {length} rows, β={beta:g}, UniEdit's train records, the precision, and when training
stops. Where the paper is silent, or our copy of it, the choice is ours: {our_layers}a module dimension of {dim:,},
Adam at a constant learning rate of {rate:g}, {batch} records a step, gradients clipped at {clip:g}, an evaluation
every {every:,} steps, and how validation records are kept apart. No result of the paper is repeated here. The
editor is under the licence above; backbone and records have their own."""


def preset_card(name: str, backbone: str) -> dict[str, str]:
    """Return the files of the card of an editor that is not trained yet, by path.

    Args:
        name: Name of the card, such as ``"qwen3-8b"``.
        backbone: Id of the backbone, one of SPEC §6.
    """
    needs, editor = training_needs(backbone), f"ibke-{name}"
    words = {"backbone": backbone, "name": editor, "dataset": DATASET, "dtype": needs.dtype}
    sections = {
        "Train it": [
            prose(SPLIT),
            fenced(SPLIT_CODE.format(**words)),
            fenced(TRAIN.format(**words), "bash"),
            _preset(needs),
        ],
        "Evaluate and publish": [fenced(PUBLISH.format(**words), "bash"), prose(PUBLISHED)],
        "Needs": needs_section(name, backbone),
        "What is the paper's and what is ours": [_paper(needs)],
    }
    fields: dict[str, Any] = {"license": "apache-2.0", "language": "en", "datasets": [DATASET], "tags": IBKE_TAGS}
    summary = prose(
        SUMMARY, backbone=backbone, modules=listed([f"`{module}`" for module in needs.config.module_names()])
    )
    return {
        CARD: editor_page(
            editor_metadata(backbone, editor, **fields), f"IBKE for {backbone}", [summary], sections, status=STATUS
        )
    }


def needs_section(name: str, backbone: str) -> list[str]:
    """Return what training takes as paragraphs: the assumptions, the table, and time."""
    needs = training_needs(backbone)
    about = prose(
        ESTIMATES, command=f"ibke card {name} --needs", cases=CASES, tokens=ROW_TOKENS, targets=TARGET_TOKENS
    )
    time = prose(TIME, operations=needs.step()[1] / 1e12)
    return [about, needs_table(needs), time, fenced(TRIAL.format(backbone=backbone), "bash")]


def _preset(needs: TrainingNeeds) -> str:
    from ...data.augmentation import RECORDS_OF_EACH
    from ...training.arguments import MAX_STEPS

    return prose(
        PRESET,
        layers=listed(needs.config.edited_layers or []),
        dtype=needs.dtype,
        patience=PATIENCE,
        steps=MAX_STEPS,
        augmented=RECORDS_OF_EACH,
    )


def _paper(needs: TrainingNeeds) -> str:
    from ...training.trainer import IBKETrainingArguments as Arguments

    layers = f"layers {listed(PRESETS[needs.config.base_model_name_or_path]['edited_layers'])}, "
    papers = needs.config.base_model_name_or_path in PAPERS_LAYERS
    return prose(
        PAPER,
        length=needs.config.latent_length,
        dim=needs.config.latent_dim,
        beta=Arguments.beta,
        rate=Arguments.learning_rate,
        batch=needs.batch,
        clip=Arguments.max_grad_norm,
        every=Arguments.eval_steps,
        papers_layers=layers if papers else "",
        our_layers="" if papers else layers,
    )
