"""A YAML file of facts, as a test suite for a model: what it is asked, which answers count, and what must not change.

::

    facts:
      - prompt: The capital of Australia is     # asked, and what an edit changes
        answers: [Canberra]                     # any of these counts; the first is what an edit writes
        subject: Australia                      # for editors that need it
        rephrasings: [The seat of Australia's government is]
        consequences: [Australia's parliament meets in -> Canberra | the city of Canberra]
        neighbours: [The capital of France is -> Paris, The largest city of Australia is]

A question that ends in ``?`` is asked in the chat of a model that has one. A neighbour without an answer is to be
answered as the unedited model does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from ..core.records import EditRequest
from ..core.tokens import RequestError
from ..evaluation.comparison import PageQuestion, format_of, questions_of
from ..io import FileError, parse_yaml, read_text

TEXTS, LISTS = ("name", "prompt", "subject", "target"), ("answers", "rephrasings", "consequences", "neighbours")
KEYS = (*TEXTS, *LISTS)


@dataclass(frozen=True)
class CheckedFact:
    """One fact of the file.

    Attributes:
        name: What tables call it; the prompt unless the file has a name.
        target: What an edit writes: the first accepted answer unless the file says otherwise.
        subject: The entity that it is about.
        questions: What is asked, the prompt itself first.
    """

    name: str
    target: str
    subject: str | None
    questions: tuple[PageQuestion, ...]

    def request(self, tokenizer: Any) -> EditRequest:
        """Return the request of an edit that makes the fact true."""
        prompt = self.questions[0].prompt
        return EditRequest(prompt, self.target, self.subject, format_of(tokenizer, prompt))


def read_checked_facts(file: str | Path) -> list[CheckedFact]:
    """Read a file of facts.

    Raises:
        FileError: If it is no YAML, a key is unknown, missing, or holds something else; names file and line.
        OSError: If it cannot be read.
    """
    text = read_text(file, cure="save it in UTF-8")
    content = parse_yaml(text, name=str(file))
    if unknown := sorted(set(content) - {"facts"}):
        raise FileError(f"{file}: {unknown[0]!r} is no key of a file of facts; the one there is, is facts")
    facts = content.get("facts")
    if not isinstance(facts, list) or not facts:
        raise FileError(f"{file}: holds no fact; write facts: and under it a list of prompts with their answers")
    lines = _lines(text, len(facts))
    return [
        _fact(value, f"{file}:{line}: fact {i}") for i, (value, line) in enumerate(zip(facts, lines, strict=True), 1)
    ]


def _lines(text: str, number: int) -> list[int]:
    """Return the line that each fact begins in, from the file's nodes; it is known to be well formed.

    Where the list is merged in from elsewhere (``<<``), the first line stands for all.
    """
    root: Any = yaml.compose(text, Loader=yaml.SafeLoader)
    nodes: list[Any] = next((value.value for key, value in root.value if key.value == "facts"), [])
    return [node.start_mark.line + 1 for node in nodes] or [1] * number


def _fact(value: Any, where: str) -> CheckedFact:
    if not isinstance(value, Mapping):
        raise FileError(f"{where}: expected prompt and answers by name, found {str(value)[:80]!r}; correct it")
    if unknown := sorted(set(value) - set(KEYS)):
        raise FileError(f"{where}: {unknown[0]!r} is no key of a fact; the keys are {', '.join(KEYS)}")
    texts = {key: _text(value, key, where) for key in TEXTS}
    lists = {key: _texts(value, key, where) for key in LISTS}
    prompt, answers = texts["prompt"], lists["answers"]
    if not prompt or not answers:
        raise FileError(f"{where}: {'answers' if prompt else 'prompt'} is missing or empty; a fact needs both")
    target = texts["target"] or answers[0]
    request = EditRequest(prompt, target)
    try:
        typed = questions_of(request, *("\n".join(lists[key]) for key in LISTS[1:]))
    except RequestError as error:
        raise FileError(f"{where}: {error}") from error
    accepted = tuple(dict.fromkeys((*answers, target)))
    questions = tuple(replace(one, answers=accepted) if one.answers == (target,) else one for one in typed)
    return CheckedFact(texts["name"] or prompt, target, texts["subject"] or None, questions)


def _text(value: Mapping[str, Any], key: str, where: str) -> str:
    text = value.get(key, "")
    if not isinstance(text, str) or (key in value and not text.strip()):
        raise FileError(f"{where}: {key} must be a text, found {text!r}; put it in quotes, or correct it")
    return text.strip()


def _texts(value: Mapping[str, Any], key: str, where: str) -> list[str]:
    texts = value.get(key, [])
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise FileError(f"{where}: {key} must be a list of texts, found {texts!r}; put each in quotes, or correct it")
    return [" ".join(text.split()) for text in texts]
