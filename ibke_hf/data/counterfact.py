"""Reader of CounterFact: ROME's nested records and EasyEdit's flat ones (PROTOCOL, Datasets)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..core.records import EditCase, EditRecord, EditRequest
from .fields import Field, cases
from .files import read_each

EMPTY = "edit with an empty prompt, target or subject"
NEIGHBORS = ("Relation Specificity",)  # the edited relation of other subjects
ATTRIBUTES = (
    "Relation Specificity",
    "Object Specificity",
)  # the edited relation of subjects whose object is the edit's new one
MORE_THAN_A_CLAUSE = re.compile(r"[^A-Za-z', ]")


def read_counterfact(file: str | Path, skipped: Counter[str] | None = None) -> Iterator[EditRecord]:
    """Yield the records of one CounterFact file; a record's id is its ``case_id``, in both forms.

    ROME's form gives the lists ``paraphrase_prompts`` (generality), ``neighborhood_prompts`` and ``attribute_prompts``
    (locality); its ``generation_prompts``, which have no target, are counted in `skipped`. EasyEdit's form gives
    ``rephrase_prompt`` and ``locality_prompt``. A null or empty prompt or target is skipped and counted by reason.

    Raises:
        RecordError: For any other unreadable record, naming file, record and field.
    """
    counted: Counter[str] = Counter() if skipped is None else skipped
    yield from read_each(file, "list", "CounterFact", partial(_parse, skipped=counted))


def rephrase_kind(prompt: str, subject: str) -> str:
    """Tell what EasyEdit's ``rephrase_prompt`` is: ``"Paraphrase"`` or ``"Generation Prompt"``.

    EasyEdit drew it from ROME's paraphrases and generation prompts and kept no note of which. A generation prompt is
    one plain clause about the subject; a paraphrase opens with a sentence torn from elsewhere, hence with a stop, a
    digit or a line break.
    """
    return "Paraphrase" if MORE_THAN_A_CLAUSE.search(prompt.replace(subject, "")) else "Generation Prompt"


def _parse(value: Any, key: str, skipped: Counter[str]) -> EditRecord | None:
    record = Field(value, "", Field(value, "", key)["case_id"].ident())
    return _nested(record, skipped) if "requested_rewrite" in record else _flat(record, skipped)


def _nested(record: Field, skipped: Counter[str]) -> EditRecord | None:
    rewrite = record["requested_rewrite"]
    subject, new, true = rewrite.text("subject"), rewrite["target_new"].text("str"), rewrite["target_true"].text("str")
    if not (rewrite.text("prompt") and new and subject):
        skipped[EMPTY] += 1
        return None

    def listed(name: str, target: str, *criteria: str) -> tuple[EditCase, ...]:
        return tuple(case for p in record[name].texts() for case in cases(name, p, target, skipped, criteria=criteria))

    if unscored := len(record["generation_prompts"].texts()):
        skipped["generation prompt without a target"] += unscored
    return EditRecord(
        record.record,
        "counterfact",
        "",
        (EditRequest(rewrite["prompt"].filled(subject), new, subject),),
        generality=listed("paraphrase_prompts", new, "Rephrase", "Paraphrase"),
        locality=listed("neighborhood_prompts", true, *NEIGHBORS) + listed("attribute_prompts", new, *ATTRIBUTES),
        kind="counterfactual",
        relation=rewrite["relation_id"].of(str),
        metadata={"original": true},
    )


def _flat(record: Field, skipped: Counter[str]) -> EditRecord | None:
    subject, prompt, new = record.text("subject"), record.text("prompt"), record.text("target_new")
    if not (prompt and new and subject):
        skipped[EMPTY] += 1
        return None
    for key in ("prompt", "target_new", "rephrase_prompt", "locality_prompt", "locality_ground_truth"):
        record[key]  # named if it is missing: a blank text is skipped, another format is not
    rephrase, locality = record.text("rephrase_prompt"), record.text("locality_prompt")
    return EditRecord(
        record.record,
        "counterfact",
        "",
        (EditRequest(prompt, new, subject),),
        generality=cases(
            "rephrase_prompt", rephrase, new, skipped, criteria=("Rephrase", rephrase_kind(rephrase, subject))
        ),
        locality=cases("locality_prompt", locality, record.text("locality_ground_truth"), skipped, criteria=NEIGHBORS),
        kind="counterfactual",
        metadata={"original": record.text("ground_truth")},
    )
