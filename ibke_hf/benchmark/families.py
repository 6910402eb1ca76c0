"""What works on which family of decoders: every class of transformers' mapping, tried at toy size; `ibke families`.

A toy model has random weights, so this says whether the machinery fits a family, not how good its edits are.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from transformers import __version__ as transformers_version
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..core.capture import capture_factors, case_losses
from ..core.edits import LowRankEdit
from ..core.forward import padding_of, target_logits
from ..core.layers import BackboneError, find_ffn_output, layers_to_edit
from ..core.modeling_ibke import IBKEEditor
from ..core.records import EditRequest
from ..core.tokens import TokenBatch, encode_requests
from ..editors.ft import FineTuningEditor
from ..io import read_json, write_json, write_text
from .tiny_models import DEPTH, SEED, SPREAD, NotTinyError, tiny_model

RECIPE = {"version": 2, "blocks": DEPTH, "spread": SPREAD, "seed": SEED, "tolerance": 1e-3, "effect": 0.05}
REQUESTS = (
    EditRequest("The capital of France is", "Rome"),
    EditRequest("Marie Curie was born in the city of", "Lisbon in Europe"),
    EditRequest("An oak is", "metal"),
)
NAMED = {  # where structure leaves none or several projections, the one that is tried
    "falcon_mamba": "backbone.layers.{i}.mixer.out_proj",
    "mamba": "backbone.layers.{i}.mixer.out_proj",
    "mamba2": "backbone.layers.{i}.mixer.out_proj",
    "axk2": "model.layers.{i}.mlp.shared_experts.down_proj",
    "git": "git.encoder.layer.{i}.output.dense",
    "hrm_text": "model.L_module.layers.{i}.mlp.down_proj",
    "nemotron_h": "model.layers.{i}.mixer.shared_experts.down_proj",
    "phi4_multimodal": "model.layers.{i}.mlp.down_proj",
    "xlstm": "backbone.blocks.{i}.ffn.proj_down",
    "xmod": "roberta.encoder.layer.{i}.output.dense",
    "zamba2": "model.layers.{i}.shared_transformer.feed_forward.down_proj",
}
CHECKS = {
    "ibke": "IBKE edit, undo exact",
    "ft": "FT edit, undo exact",
    "batched": "batched = single",
    "merged": "merged = attached",
    "peft": "PEFT loads it and it acts",
}
PADDED = (
    "*Padded on the right*: the model reads padding before a text as text (it ignores the attention mask, or counts "
    "positions from the first column), so its batches are rearranged; *none*: only texts of one length share a batch."
)
FILE, PAGE = "families.json", "FAMILIES.md"
Row = dict[str, Any]


def all_families() -> list[str]:
    """Return the model types of every decoder class of the installed transformers."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def try_family(family: str, tokenizer: Any) -> Row:
    """Try a family: the projection that is found, and each of `CHECKS`, True or the reason why not.

    Args:
        family: A model type.
        tokenizer: Any; the model gets its vocabulary.
    """
    row: Row = {"class": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]}
    try:
        model = tiny_model(family, len(tokenizer))
    except NotTinyError as error:
        return row | {"not_tried": str(error)}
    try:
        target_logits(model, encode_requests(tokenizer, REQUESTS[:1]))
    except Exception as error:  # noqa: BLE001  whatever a foreign model raises is the reason
        return row | {"not_tried": f"does not run on token ids alone ({_reason(error)})"}
    row |= {"padding": padding_of(model)}
    requests = REQUESTS if row["padding"] != "none" else REQUESTS[:1]
    batch = encode_requests(tokenizer, requests)
    try:
        template, layers = layers_to_edit(model)
        row |= {"projection": template, "layers": layers, "found": _how(model, template)}
    except BackboneError as error:
        if family not in NAMED:
            return row | {"not_edited": str(error)}
        template, layers = layers_to_edit(model, None, NAMED[family])
        row |= {"projection": template, "layers": layers, "found": "named by hand"}
    edits: list[Any] = []

    def ibke() -> str | bool:
        edits.extend(_ibke_edit(model, tokenizer, requests, layers, template))
        return _acts_and_goes(model, batch, edits[1])

    row["ibke"] = _outcome(ibke)
    if not edits:
        return row | dict.fromkeys(("ft", "batched", "merged", "peft"), "no IBKE edit could be made")
    row["ft"] = _outcome(lambda: _fine_tuning_learns(model, tokenizer, requests, layers, template))
    row["batched"] = _outcome(
        lambda: _batched_is_single(model, edits[0], tokenizer, encode_requests(tokenizer, REQUESTS))
    )
    row["merged"] = _outcome(lambda: _merged_is_attached(model, batch, edits[1]))
    row["peft"] = _outcome(lambda: _peft_applies(model, batch, edits[1]))
    return row


def families_report(
    tokenizer: Any, families: Sequence[str] | None = None, progress: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Try families, by default all of them, and return what the status file holds."""
    rows = {}
    for family in families or all_families():
        rows[family] = try_family(family, tokenizer)
        progress(f"{family}: {'not tried' if 'not_tried' in rows[family] else _summary(rows[family])}")
    return {**_circumstances(), "families": rows}


def _circumstances() -> dict[str, Any]:
    torch_version = torch.__version__.partition("+")[0]
    return {"recipe": RECIPE, "transformers": transformers_version, "torch": torch_version}


def status_beside(folder: str | Path) -> dict[str, Any] | None:
    """Return the status that a folder holds, None for none.

    Raises:
        ValueError: If it was written by another recipe or with other versions, so that a part of it cannot be renewed.
    """
    if not (Path(folder) / FILE).is_file():
        return None
    report = read_report(folder)
    for name, value in _circumstances().items():
        if report.get(name) != value:
            raise ValueError(
                f"{Path(folder) / FILE}: was written with {name} {report.get(name)}, here it is {value}; try all "
                "families again (without --families), or choose another --out"
            )
    return report


def merged(report: Mapping[str, Any], newer: Mapping[str, Any]) -> dict[str, Any]:
    """Return a status with the rows of a newer one in place of its own, in the order of :func:`all_families`."""
    rows = {**report["families"], **newer["families"]}
    return {**report, "families": {family: rows[family] for family in all_families() if family in rows}}


def write_report(report: Mapping[str, Any], folder: str | Path) -> None:
    """Write ``families.json`` and the page ``FAMILIES.md`` made of it."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_json(Path(folder) / FILE, report)
    write_text(Path(folder) / PAGE, page(report))


def read_report(folder: str | Path) -> dict[str, Any]:
    """Read a status file; see :func:`families_report`."""
    return read_json(Path(folder) / FILE, cure="make it again with `ibke families`")


def page(report: Mapping[str, Any]) -> str:
    """Return the status page, Markdown."""
    rows: Mapping[str, Row] = report["families"]
    tried = {name: row for name, row in rows.items() if "not_tried" not in row}
    edited = {name: row for name, row in tried.items() if "projection" in row}
    whole = [name for name, row in edited.items() if all(row.get(check) is True for check in CHECKS)]
    table = [
        [name, f"`{row['projection']}`", row["found"], row["padding"], *(_mark(row.get(check)) for check in CHECKS)]
        for name, row in edited.items()
    ]
    faults = [
        f"- **{name}**, {what}: {row[check]}"
        for name, row in edited.items()
        for check, what in CHECKS.items()
        if row.get(check) is not True
    ]
    refused = [f"- **{name}**: {row['not_edited']}" for name, row in tried.items() if "not_edited" in row]
    absent = [f"- **{name}** ({row['class']}): {row['not_tried']}" for name, row in rows.items() if "not_tried" in row]
    headers = ["family", "edited projection", "it is", "padded on the", *CHECKS.values()]
    versions = f"transformers {report['transformers']} and torch {report['torch']}"
    summary = (
        f"Written by `ibke families` with {versions}. Every class of `MODEL_FOR_CAUSAL_LM_MAPPING` ({len(rows)} model "
        f"types) with a toy config of {report['recipe']['blocks']} blocks and random weights: whether the machinery "
        f"fits, not how good edits are. {len(whole)} pass every check, {len(edited) - len(whole)} some; "
        f"{len(refused)} have no projection that could be told by structure; {len(absent)} were not tried."
    )
    parts = [
        "# Families of decoders that were tried",
        summary,
        PADDED,
        tabulate(table, headers, tablefmt="github"),
        *_section("What does not hold", faults),
        *_section("Not edited without `edited_modules`", refused),
        *_section("Not tried", absent),
    ]
    return "\n\n".join(parts) + "\n"


def _section(title: str, items: Sequence[str]) -> list[str]:
    return [f"## {title}", "\n".join(items)] if items else []


def _mark(outcome: Any) -> str:
    return "yes" if outcome is True else "no"


def _summary(row: Row) -> str:
    return ", ".join(f"{check} {_mark(row[check])}" for check in CHECKS if check in row)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _outcome(check: Callable[[], str | bool]) -> str | bool:
    """Return True, or why a check did not hold."""
    torch.manual_seed(SEED)
    try:
        return check()
    except Exception as error:  # noqa: BLE001  what goes wrong in a foreign model is its entry in the table
        return _reason(error)


def _how(model: Any, template: str) -> str:
    """Say what the projection that was found ends."""
    try:
        ends_ffn = find_ffn_output(model) == template
    except BackboneError:
        ends_ffn = False
    if not ends_ffn:
        return "attention's output"
    return "a shared expert's output" if "shared" in template else "the FFN's output"


def _ibke_edit(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], layers: Sequence[int], template: str
) -> tuple[IBKEEditor, LowRankEdit]:
    torch.manual_seed(SEED)
    editor = IBKEEditor.for_backbone(model, layers, template, latent_dim=16, initial_edit_ratio=RECIPE["effect"])
    editor.calibrate(model, [encode_requests(tokenizer, requests)])
    return editor, editor.edit(model, tokenizer, requests)


@torch.no_grad()
def _logits(model: Any, batch: TokenBatch, edit: Any = None) -> Tensor:
    with edit.attached(model) if edit is not None else nullcontext():
        return target_logits(model, batch)[0].float()


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _close(a: Tensor, b: Tensor, what: str, scale: Tensor | None = None) -> str | bool:
    error = float((a - b).norm() / (b if scale is None else scale).norm().clamp(min=1e-12))
    return True if error < RECIPE["tolerance"] else f"{what} differ by {error:.1e}"


def _acts_and_goes(model: Any, batch: TokenBatch, edit: Any) -> str | bool:
    """An attached edit changes the answers; without it they are what they were, bit by bit."""
    before = _logits(model, batch)
    during = _logits(model, batch, edit)
    if not torch.isfinite(during).all() or _distance(during, before) < 1e-5:
        return "the edit has no effect" if torch.isfinite(during).all() else "the edited answers are not finite"
    return True if torch.equal(_logits(model, batch), before) else "the answers did not come back exactly"


def _fine_tuning_learns(
    model: Any, tokenizer: Any, requests: Sequence[EditRequest], layers: Sequence[int], template: str
) -> str | bool:
    batch = encode_requests(tokenizer, requests)
    editor = FineTuningEditor.for_backbone(model, layers, template, steps=5, learning_rate=1e-2)
    edit = editor.edit(model, tokenizer, requests)
    with torch.no_grad():
        before = case_losses(*target_logits(model, batch)).sum()
        with edit.attached(model):
            after = case_losses(*target_logits(model, batch)).sum()
    return _acts_and_goes(model, batch, edit) if after < before else f"the loss went from {before:.2f} to {after:.2f}"


def _batched_is_single(model: Any, editor: IBKEEditor, tokenizer: Any, batch: TokenBatch) -> str | bool:
    """Losses and gradient factors are those of each text alone."""
    with torch.no_grad():
        together = case_losses(*target_logits(model, batch))
    modules = editor.modules_of(model)
    factors = capture_factors(model, modules, batch)
    for row, request in enumerate(REQUESTS):
        single = encode_requests(tokenizer, [request])
        with torch.no_grad():
            alone = case_losses(*target_logits(model, single))
        outcome = _close(together[row : row + 1], alone, "losses")
        for name, captured in capture_factors(model, modules, single).items():
            real = factors[name].mask[row]
            for part in ("layer_inputs", "output_gradients"):
                mine, its = getattr(factors[name], part)[row][real], getattr(captured, part)[0]
                outcome = _close(mine, its, part.replace("_", " ")) if outcome is True else outcome
        if outcome is not True:
            return outcome
    return True


def _merged_is_attached(model: Any, batch: TokenBatch, edit: LowRankEdit) -> str | bool:
    before, attached = _logits(model, batch), _logits(model, batch, edit)
    merged = edit.merge_into(model)
    inside = _logits(model, batch)
    merged.undo()
    if not torch.equal(_logits(model, batch), before):
        return "undoing the merge did not bring the answers back exactly"
    return _effect(inside, attached, before, "merged and attached answers")


def _peft_applies(model: Any, batch: TokenBatch, edit: LowRankEdit) -> str | bool:
    from peft import PeftModel

    before, attached = _logits(model, batch), _logits(model, batch, edit)
    with tempfile.TemporaryDirectory() as folder:
        edit.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()
        return _effect(_logits(loaded, batch), attached, before, "PEFT's and attached answers")


def _effect(answers: Tensor, attached: Tensor, before: Tensor, what: str) -> str | bool:
    """Compare answers relative to what the edit changes in them."""
    if torch.equal(answers, before):
        return "no effect"
    error = float((answers - attached).norm() / (attached - before).norm())
    return True if error < 0.01 else f"{what} differ by {error:.1e} of the edit's effect"
