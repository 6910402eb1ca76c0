"""The hardest locality there is in Atlas: the very words of an edit, asked of subjects that shared its old object."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from ..core.records import EditCase, EditRecord
from .splits import Split

NEAR_CASES = 3  # a record


def near_records(split: Split, records: Sequence[EditRecord], seed: int = 0) -> list[EditRecord]:
    """Return the counterfactual records whose old object other subjects keep, with those as locality cases.

    After "The winner of 2010 FIFA World Cup was" moves from Spain to Uruguay, what Spain won otherwise is asked in the
    same words (CounterFact's neighbourhood prompts). Records without such subjects are left out.

    Args:
        split: Says what the backbone was taught.
        records: Atlas records.
        seed: Seeds the draw of at most `NEAR_CASES` subjects a record.
    """
    relations = {relation.label: relation for relation in split.world.relations.values()}
    rng, variants = random.Random(seed), []
    for record in records:
        request, old = record.requests[0], record.metadata.get("original")
        relation = relations[record.relation]
        wordings = [
            form
            for form in range(len(relation.prompts))
            if relation.prompt(request.subject or "", form) == request.prompt
        ]
        known = [
            t
            for t in split.taught.by_relation.get(relation.id, ())
            if t.object == old and t.subject != request.subject
        ]
        if wordings and known:
            prompts = [relation.prompt(t.subject, wordings[0]) for t in rng.sample(known, min(NEAR_CASES, len(known)))]
            cases = tuple(EditCase(prompt, str(old)) for prompt in prompts)
            variants.append(replace(record, generality=(), locality=cases))
    return variants
