"""What an edit does, seen from outside: answers before and after, which are right, how strongly each token counted.

Pure work for pages and tables: models in, rows of plain values out. An answer is the model's own greedy one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from ..core.capture import target_logits
from ..core.edits import Edit
from ..core.records import PLAIN, EditCase, EditRecord, EditRequest, PromptFormat
from ..core.tokens import (
    RequestError,
    context_length,
    encode_prompt,
    pad_and_label,
    with_leading_space,
)
from .generation import FREE_TOKENS, MORE_TOKENS, answer_text, generate_ids
from .wording import contains_answer, exact_match

Role = Literal["request", "rephrase", "consequence", "neighbour", "question"]
ARROWS = ("->", "→")
BEST = 5
BATCH = 32  # prompts of a forward pass
QUESTION_MARKS = ("?", "？", "؟")
TOKENS_WITHOUT_ANSWER = 5  # so many are compared where no answer is stated
MAX_QUESTIONS, MAX_CHARACTERS = 32, 2000  # of one fact and of one text: what a visitor may ask of a shared machine
Row = dict[str, Any]
Reading = dict[str, Any]


@dataclass(frozen=True)
class PageQuestion:
    """One prompt that is asked before and after an edit.

    Attributes:
        role: ``"request"`` (judges reliability), ``"rephrase"`` and ``"consequence"`` (generality), ``"neighbour"``
            (locality), ``"question"`` (judges nothing).
        prompt: What is asked.
        answers: Spellings of the right answer; a neighbour's right answer is the one from before, which is the same
            as long as both are one of these.
        automatic: Whether the page asks it by itself; nobody typed it.
    """

    role: Role
    prompt: str
    answers: tuple[str, ...] = ()
    automatic: bool = False


# --- which questions ----------------------------------------------------------------------------------------------


def questions_of(
    request: EditRequest, rephrasings: str = "", consequences: str = "", neighbours: str = ""
) -> tuple[PageQuestion, ...]:
    """Read typed questions, one a line: ``prompt`` or ``prompt -> answer``, other spellings of it after a ``|``.

    A rephrasing without an answer is to be answered as the request is; a consequence without one is not judged.

    Raises:
        RequestError: If a line is an arrow without a prompt, or there are too many.
    """
    questions = [PageQuestion("request", request.prompt, (request.target,))]
    typed: tuple[tuple[Role, str], ...] = (
        ("rephrase", rephrasings),
        ("consequence", consequences),
        ("neighbour", neighbours),
    )
    for role, text in typed:
        for number, line in enumerate(filter(str.strip, text.splitlines()), 1):
            default = (request.target,) if role == "rephrase" else ()
            questions.append(_question(role, line, f"{role} {number}", default))
    if len(questions) > MAX_QUESTIONS:
        raise RequestError(
            f"{len(questions) - 1} questions are more than the {MAX_QUESTIONS - 1} that can be asked at once; leave "
            f"some out"
        )
    return tuple(questions)


def typed_lines(request: EditRequest, questions: Iterable[PageQuestion]) -> tuple[str, str, str]:
    """Write typed questions as :func:`questions_of` reads them: rephrasings, consequences, neighbours."""
    lines: dict[Role, list[str]] = {"rephrase": [], "consequence": [], "neighbour": []}
    for question in questions:
        if question.role not in lines or question.automatic:
            continue
        default = (request.target,) if question.role == "rephrase" else ()
        if question.answers != default:
            lines[question.role].append(f"{question.prompt} -> {' | '.join(question.answers)}")
        else:  # an arrow at the end keeps one within the question from being read as the answer's
            arrow = " ->" if any(arrow in question.prompt for arrow in ARROWS) else ""
            lines[question.role].append(question.prompt + arrow)
    return tuple(map("\n".join, lines.values()))  # type: ignore[return-value]


def without_answers(text: str) -> str:
    """Drop the stated answers of typed questions."""
    return "\n".join(_parts(line)[0] or line.strip() for line in text.splitlines() if line.strip())


def _parts(line: str) -> tuple[str, str]:
    """Split a typed question into prompt and stated answers, both empty if they are not there."""
    prompt, arrow, stated = line.rpartition(max(ARROWS, key=line.rfind))
    return (prompt.strip(), stated.strip()) if arrow else (line.strip(), "")


def _question(role: Role, line: str, name: str, default: tuple[str, ...]) -> PageQuestion:
    prompt, stated = _parts(line)
    if not prompt:
        raise RequestError(
            f"{name}: nothing is asked before the arrow ({line.strip()!r}); write it as: prompt -> answer"
        )
    return PageQuestion(role, prompt, tuple(name.strip() for name in stated.split("|") if name.strip()) or default)


def lines_of(record: EditRecord) -> tuple[str, str, str]:
    """Write the cases of a record as :func:`questions_of` reads them: rephrasings, consequences, neighbours."""
    rephrasings = [case for case in record.generality if is_rephrasing(case)]
    consequences = [case for case in record.generality if not is_rephrasing(case)]
    groups = (rephrasings, consequences, record.locality)
    return tuple("\n".join(_line(case) for case in cases) for cases in groups)  # type: ignore[return-value]


def _line(case: EditCase) -> str:
    return f"{case.prompt} -> {' | '.join(dict.fromkeys((case.target, *case.aliases)))}"


def is_rephrasing(case: EditCase) -> bool:
    """Tell whether a case asks for the edited fact itself, in other words."""
    return case.hops == 1 and "Rephrase" in case.criteria


def require_askable(model: Any, tokenizer: PreTrainedTokenizerBase, questions: Iterable[PageQuestion]) -> None:
    """Check that a model can be asked these questions.

    Raises:
        RequestError: If a text is too long for this page or for the model; names the question.
    """
    numbers: dict[str, int] = {}
    for question in questions:
        numbers[question.role] = number = numbers.get(question.role, 0) + 1
        name = "the fact" if question.role == "request" else f"{question.role} {number}"
        require_text(tokenizer, question.prompt, *question.answers, name=name, room=_room(model, tokenizer, question))


def require_text(tokenizer: PreTrainedTokenizerBase, prompt: str, *answers: str, name: str, room: int | None) -> None:
    """Check the texts of one question; `room` is the number of tokens that its prompt may have.

    Raises:
        RequestError: If one is too long, or is no Unicode text.
    """
    for text in (prompt, *answers):
        if len(text) > MAX_CHARACTERS:
            raise RequestError(
                f"{name}: {len(text)} characters are more than the {MAX_CHARACTERS} allowed here; shorten it"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise RequestError(f"{name}: the text holds half of a character (a lone surrogate); type it again")
    form = format_of(tokenizer, prompt)
    if room is not None and (length := len(encode_prompt(tokenizer, prompt, form))) > room:
        raise RequestError(
            f"{name}: {length} tokens leave no room for an answer in the model's context, {room} would; shorten it"
        )


def _room(model: Any, tokenizer: PreTrainedTokenizerBase, question: PageQuestion) -> int | None:
    limit = context_length(model)
    return None if limit is None else limit - _answer_tokens(tokenizer, question) - MORE_TOKENS


def _answer_tokens(tokenizer: PreTrainedTokenizerBase, question: PageQuestion) -> int:
    if not question.answers:
        return TOKENS_WITHOUT_ANSWER
    return max(
        len(tokenizer(with_leading_space(name), add_special_tokens=False)["input_ids"]) for name in question.answers
    )


def format_of(tokenizer: PreTrainedTokenizerBase, prompt: str) -> PromptFormat:
    """Return how a prompt is put to a model: a question in a chat where the model knows chats, else as plain text."""
    asks = prompt.rstrip().endswith(QUESTION_MARKS) and bool(getattr(tokenizer, "chat_template", None))
    return PromptFormat(chat=True) if asks else PLAIN


# --- before and after ---------------------------------------------------------------------------------------------


def compare_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[PageQuestion], edit: Edit | None
) -> list[Row]:
    """Ask questions of a model without and with an edit, within this very call.

    Args:
        model: The backbone, unchanged by the call.
        tokenizer: Its tokenizer.
        questions: What to ask.
        edit: The edit; None for none.

    Returns:
        A row for each question: ``role``, ``prompt``, ``answers``, ``automatic``, ``chat``, readings ``before`` and
        ``after``, and ``right``: whether the answer is one of the answers, or for a neighbour the one from before;
        None where nothing says what is right.
    """
    before = read_answers(model, tokenizer, questions)
    after = read_answers(model, tokenizer, questions, edit) if edit is not None else before
    return [
        {
            "role": question.role,
            "prompt": question.prompt,
            "answers": list(question.answers),
            "automatic": question.automatic,
            "chat": new["chat"],
            "before": old,
            "after": new,
            "right": is_right(question, old["answer"], new["answer"], chat=new["chat"]),
        }
        for question, old, new in zip(questions, before, after, strict=True)
    ]


def is_right(question: PageQuestion, before: str, after: str, *, chat: bool = False) -> bool | None:
    """Judge an answer; None where nothing says what is right.

    A continuation begins with the right answer; a chat's answer, which is a sentence, contains it. A neighbour keeps
    its answer: word for word, or at least the stated one, however the sentence goes on.
    """
    judged = contains_answer if chat else exact_match
    if question.role == "neighbour":
        return after == before or all(judged(text, question.answers) for text in (before, after))
    return judged(after, question.answers) if question.answers else None


@torch.no_grad()
def read_answers(
    model: Any, tokenizer: PreTrainedTokenizerBase, questions: Sequence[PageQuestion], edit: Edit | None = None
) -> list[Reading]:
    """Return for each question the greedy ``answer`` and the ``top`` five next tokens with their probabilities.

    ``chat`` tells whether it was asked in a chat (:func:`format_of`), where the model answers until it stops.
    """

    def attach(model: Any, _: Sequence[int]) -> AbstractContextManager[Any]:
        return nullcontext() if edit is None else edit.attached(model)

    formats = {i: format_of(tokenizer, question.prompt) for i, question in enumerate(questions)}
    asked = {
        i: (one.prompt, FREE_TOKENS if formats[i].chat else _answer_tokens(tokenizer, one) + MORE_TOKENS)
        for i, one in enumerate(questions)
    }
    ids = generate_ids(model, tokenizer, asked, BATCH, attach, formats)
    texts = {i: answer_text(tokenizer, tokens) for i, tokens in ids.items()}
    tops: list[list[tuple[str, float]]] = []
    for start in range(0, len(questions), BATCH):
        members = range(start, min(start + BATCH, len(questions)))
        prompts = [encode_prompt(tokenizer, questions[i].prompt, formats[i]) for i in members]
        batch = pad_and_label(
            [([*ids, 0], len(ids)) for ids in prompts]
        )  # a last token stands for the answer, and is not fed
        with attach(model, ()):
            probabilities = target_logits(model, batch)[0][:, -1].float().softmax(-1)
        values, indices = (t.tolist() for t in probabilities.topk(min(BEST, probabilities.shape[-1])))
        tops += [
            [(str(tokenizer.decode([i])), p) for i, p in zip(row, ps, strict=True)]
            for row, ps in zip(indices, values, strict=True)
        ]
    return [{"answer": _first_line(texts[i]), "chat": formats[i].chat, "top": top} for i, top in enumerate(tops)]


def _first_line(text: str) -> str:
    return next((line.strip() for line in text.splitlines() if line.strip()), "")
