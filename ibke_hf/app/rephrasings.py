"""The same question in other words, for facts that nobody rephrased: by Atlas's templates, or by a few English rules.

What a rule makes of a sentence may be no question that a model understands, so :meth:`ibke_hf.app.workbench.Workbench`
asks only those that the untouched model answers as it answers the original. Templates are known to mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ..data.facts import Relation, World

PARTICIPLES = {"wrote": "written", "sang": "sung", "built": "built", "made": "made", "won": "won"}
SAME_PAST = "founded|invented|painted|created|developed|discovered|composed|directed|designed|produced|directed"
PASTS = {**PARTICIPLES, **{verb: verb for verb in SAME_PAST.split("|")}}
VERBS, DONE = "|".join(PASTS), "|".join(dict.fromkeys(PASTS.values()))
ENGLISH = (
    (r"The (?P<what>.+?) of (?P<whom>.+) (?P<be>is|was)", ("What {be} the {what} of {whom}?", "{whom}'s {what} {be}")),
    (
        r"What (?P<be>is|was) the (?P<what>.+?) of (?P<whom>.+)\?",
        ("The {what} of {whom} {be}", "{whom}'s {what} {be}"),
    ),
    (r"(?P<whom>.+) was born in", ("Where was {whom} born?", "The birthplace of {whom} is")),
    (r"Where was (?P<whom>.+) born\?", ("{whom} was born in", "The birthplace of {whom} is")),
    (r"(?P<what>.+) is (?:located )?in", ("Where is {what}?", "{what} lies in", "{what} can be found in")),
    (r"Where is (?P<what>.+)\?", ("{what} is located in", "{what} lies in", "{what} can be found in")),
    (rf"(?P<what>.+) was (?P<done>{DONE}) by", ("Who {past} {what}?", "The one who {past} {what} is")),
    (rf"Who (?P<past>{VERBS}) (?P<what>.+)\?", ("{what} was {done} by", "The one who {past} {what} is")),
)
AROUND = ("As everybody knows, {clause}", "Here is a fact. {prompt}", "It is well known that {clause}")
AROUND_QUESTION = ("Question: {prompt}\nAnswer:", "Please answer. {prompt}", "Q: {prompt}\nA:")
OPENINGS = ("The ", "A ", "An ", "In ", "On ", "It ")  # words that are no names: small letters within a sentence
SHORTEST_TEMPLATE = 8  # letters besides the subject: "{} is in" would fit anything


def english_rephrasings(prompt: str) -> tuple[str, ...]:
    """Say an English prompt in other words by rule, best guesses first; without a rule put sentences around it."""
    texts = []
    for pattern, forms in ENGLISH:
        if match := re.fullmatch(pattern, prompt):
            parts = match.groupdict()
            parts["past"] = parts.get("past") or next((p for p, d in PASTS.items() if d == parts.get("done")), "")
            parts["done"] = PASTS.get(parts["past"], "")
            texts += [_capital(form.format(**parts)) for form in forms]
    clause = prompt[:1].lower() + prompt[1:] if prompt.startswith(OPENINGS) else prompt
    around = AROUND_QUESTION if prompt.endswith("?") else AROUND
    texts += [form.format(prompt=prompt, clause=clause) for form in around]
    return tuple(text for text in dict.fromkeys(texts) if text != prompt)


def template_of(world: World, prompt: str) -> tuple[Relation, int, str] | None:
    """Find the template that a prompt was made of: the relation, the number of its wording and the subject.

    Subjects that the world knows come first, then the template that says most about them.
    """
    known = set(world.entities) | {alias for aliases in world.aliases.values() for alias in aliases}
    return max(_fits(world, prompt), key=lambda fit: (fit[2] in known, len(fit[0].prompts[fit[1]])), default=None)


def _fits(world: World, prompt: str) -> Iterator[tuple[Relation, int, str]]:
    for relation in world.relations.values():
        for form, template in enumerate(relation.prompts):
            before, after = template.split("{}")
            if len(before) + len(after) < SHORTEST_TEMPLATE or not prompt.endswith(after):
                continue
            subject = prompt[len(before) : len(prompt) - len(after)]
            if subject.strip() and relation.prompt(subject, form) == prompt:
                yield relation, form, subject


def template_rephrasings(world: World, prompt: str) -> tuple[str, ...]:
    """Say a prompt in the other wordings of its template; nothing if it was made of none."""
    template = template_of(world, prompt)
    if template is None:
        return ()
    relation, form, subject = template
    return tuple(relation.prompt(subject, other) for other in range(len(relation.prompts)) if other != form)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
