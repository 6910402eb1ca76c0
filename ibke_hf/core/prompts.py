"""What stands between a prompt and its target: the leading space, and the turns of a chat template.

A space before the target is a convention of scripts that separate words by spaces. A chat template has its own: what
a model reads is the template's token ids, and what it writes follows them.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from .records import PromptFormat

# begin the Unicode names of the characters of scripts that are written without spaces between words
UNSPACED = (
    "CJK ",
    "IDEOGRAPHIC",
    "HIRAGANA",
    "KATAKANA",
    "HALFWIDTH KATAKANA",
    "BOPOMOFO",
    "YI ",
    "THAI",
    "LAO",
    "KHMER",
    "MYANMAR",
    "TIBETAN",
    "TAI ",
    "NEW TAI",
    "JAVANESE",
    "BALINESE",
)
PLAIN_QUOTES = "\"'`"  # open or close, which their neighbours tell


class RequestError(ValueError):
    """A request or case that cannot be used; the message names it by its index and says what to change."""


@lru_cache(maxsize=65536)
def is_unspaced(character: str) -> bool:
    """Tell whether a character belongs to a script that is written without spaces between words."""
    return unicodedata.name(character, "").startswith(UNSPACED)


def with_leading_space(target: str) -> str:
    """Give the target one leading space unless it begins with one; a line break or tab is none (PROTOCOL's rule)."""
    return target if target.startswith(" ") else f" {target}"


def spaced_target(prompt: str, target: str, rule: str = "auto") -> str:
    """Return the target as it continues the prompt, by a rule of :class:`~ibke_hf.core.records.PromptFormat`."""
    if rule == "never" or (rule == "auto" and (target[:1].isspace() or not takes_space(prompt))):
        return target
    return with_leading_space(target)


def takes_space(prompt: str) -> bool:
    """Tell whether a space belongs between a prompt and the word that continues it.

    None does after a blank, after an opening bracket or quote, and in a script without spaces, which the prompt's last
    letter tells.
    """
    return not (prompt[-1:].isspace() or _opens(prompt) or is_unspaced_text(prompt))


def is_unspaced_text(text: str) -> bool:
    """Tell whether the last letter of a text belongs to a script that is written without spaces between words."""
    for character in reversed(text):
        if is_unspaced(character):
            return True
        if unicodedata.category(character).startswith("L"):
            return False
    return False


def _opens(prompt: str) -> bool:
    """Tell whether a prompt ends in an opening bracket or quote."""
    last, before = prompt[-1:], prompt[-2:-1]
    if not last:
        return False
    kind = unicodedata.category(last)
    if kind == "Ps" or last in "¿¡":
        return True
    if last in PLAIN_QUOTES or kind in ("Pi", "Pf"):  # a quote behind a word or a stop closes
        return not before or before.isspace() or unicodedata.category(before) in ("Ps", "Pd") or _opens(prompt[:-1])
    return False


# --- chat templates -------------------------------------------------------------------------------------------------


def chat_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Mapping[str, Any]) -> list[int]:
    """Return the token ids that a user's turn is put to a model with: the chat template's own, up to the answer.

    Raises:
        RequestError: If the tokenizer has no chat template, or its template cannot render the turn.
    """
    ids = _apply(tokenizer, prompt, None, options, tokenize=True, return_dict=False)
    return [int(token) for token in ids]


def chat_text(tokenizer: PreTrainedTokenizerBase, prompt: str, options: Mapping[str, Any]) -> str:
    """Return the same as text."""
    return str(_apply(tokenizer, prompt, None, options, tokenize=False))


def chat_offsets(
    tokenizer: PreTrainedTokenizerBase, prompt: str, options: Mapping[str, Any]
) -> list[tuple[int, int]] | None:
    """Return where in the prompt each token of :func:`chat_ids` begins and ends; negative before it, None if unknown.

    Unknown is what a slow tokenizer, or a template that rewrites the prompt, does not tell.
    """
    text, content = chat_text(tokenizer, prompt, options), prompt.strip()
    begin = text.rfind(content) - (len(prompt) - len(prompt.lstrip()))
    if not tokenizer.is_fast or content not in text:
        return None
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] != chat_ids(tokenizer, prompt, options):
        return None
    return [(first - begin, last - begin) for first, last in encoded["offset_mapping"]]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, prompt_format: PromptFormat
) -> tuple[list[int], int]:
    r"""Return the ids of a user's turn and the assistant's answer, and the index of the answer's first token.

    The turn has the template's own ids whatever follows, as in a generation. Before the answer stands what the
    template itself puts there: nothing behind ``assistant\n``, a space behind Llama 2's ``[/INST]``.

    Raises:
        RequestError: As :func:`chat_ids` does.
    """
    ids, text = (
        chat_ids(tokenizer, prompt, prompt_format.chat_options),
        chat_text(tokenizer, prompt, prompt_format.chat_options),
    )
    if prompt_format.leading_space in ("auto", "protocol"):
        answer = target.lstrip(" ")
        answer = _before_answer(tokenizer, prompt, text, prompt_format.chat_options) + answer
    else:
        answer = spaced_target("", target, prompt_format.leading_space)
    whole: list[int] = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
    if whole[: len(ids)] != ids:  # a merge across the seam, which no model that goes on from the turn can write
        whole = [*ids, *tokenizer(answer, add_special_tokens=False)["input_ids"]]
    return whole, len(ids)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the special token that a chat template puts behind an answer; None if there is none of the kind."""
    mark = "answer"
    try:
        whole = str(_apply(tokenizer, mark, mark, {}, tokenize=False))
    except RequestError:  # no template, or one of user's turns alone
        return None
    _, found, rest = whole.rpartition(mark)
    ids: list[int] = tokenizer(rest, add_special_tokens=False)["input_ids"] if found else []
    if not ids:
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(ids[0])
    return ids[0] if ids[0] in tokenizer.all_special_ids or getattr(added, "special", False) else None


def _before_answer(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str, options: Mapping[str, Any]) -> str:
    """Return the blanks that a template puts between the header of the assistant's turn and an answer."""
    mark = "answer"
    try:
        whole = str(_apply(tokenizer, prompt, mark, options, tokenize=False))
    except RequestError:  # a template of user's turns alone
        return ""
    rest = whole.removeprefix(text)
    between = rest[: max(rest.find(mark), 0)]
    return between if rest != whole and not between.strip() else ""


def _apply(
    tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str | None, options: Mapping[str, Any], **how: Any
) -> Any:
    if not getattr(tokenizer, "chat_template", None):
        raise RequestError("the tokenizer has no chat template; leave the chat option off for this model")
    turns = [{"role": "user", "content": prompt}]
    if answer is not None:
        turns.append({"role": "assistant", "content": answer})
    try:
        return tokenizer.apply_chat_template(turns, add_generation_prompt=answer is None, **how, **options)
    except Exception as error:  # templates are programs of others, which fail in ways of their own
        raise RequestError(
            f"the chat template cannot render {prompt[:80]!r} ({type(error).__name__}: {error})"
        ) from error
