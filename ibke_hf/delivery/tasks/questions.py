"""What the tasks ask: the questions of a file of facts, by what they judge; and facts that any model may know.

The file is that of `ibke check`, named by the environment variable ``IBKE_FACTS``; by default a few common facts. A
harness knows no model before the edit, so a neighbour is asked only where its answer is stated.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from ...atlas import FACTS as ATLAS_FACTS
from ...core.prompts import spaced_target
from ...data.facts import load_world
from ...evaluation.wording import contains_answer, exact_match
from ..facts import read_checked_facts

VARIABLE = "IBKE_FACTS"
DEFAULT = Path(__file__).with_name("facts.yaml")
ROLES = {"reliability": ("request",), "generality": ("rephrase", "consequence"), "locality": ("neighbour",)}
TOKENS = 24  # of an answer
NUMBER, CHOICES, SEED = 100, 4, 0
Row = dict[str, Any]


def questions(kind: str) -> list[Row]:
    """Return the questions that judge reliability, generality or locality, each with its accepted answers."""
    facts = read_checked_facts(os.environ.get(VARIABLE) or DEFAULT)
    return [
        {"fact": fact.name, "prompt": one.prompt, "answers": list(one.answers)}
        for fact in facts
        for one in fact.questions
        if one.role in ROLES[kind] and one.answers
    ]


def said(row: Row, text: str) -> bool:
    """Tell whether a generated text answers a question: a question's contains the answer, others begin with it."""
    judged = contains_answer if row["prompt"].rstrip().endswith("?") else exact_match
    return judged(text, row["answers"])


def common_facts(number: int = NUMBER) -> list[Row]:
    """Return facts of the package's own tables, each with its object and three others to choose from."""
    world = load_world(ATLAS_FACTS)
    generator = random.Random(SEED)
    triples = [t for t in world.triples if world.relations[t.relation].single_value]
    rows = []
    for triple in generator.sample(triples, min(number, len(triples))):
        others = sorted({other.object for other in world.by_relation[triple.relation]} - {triple.object})
        if len(others) < CHOICES - 1:
            continue
        choices = [triple.object, *generator.sample(others, CHOICES - 1)]
        generator.shuffle(choices)
        prompt = world.relations[triple.relation].prompt(triple.subject)
        rows.append(
            {
                "prompt": prompt,
                "choices": [spaced_target(prompt, choice).removeprefix(" ") for choice in choices],
                "gold": choices.index(triple.object),
            }
        )
    return rows
