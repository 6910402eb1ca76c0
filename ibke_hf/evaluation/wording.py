"""Whether a generated answer says a name: whole words, by Unicode's word boundaries where the script has them."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from ..core.prompts import is_unspaced


def exact_match(text: str, names: Iterable[str]) -> bool:
    """Tell whether generated text is one of the names, or begins with one that ends there.

    A name ends where its last word does (:func:`within_word`); text and names are stripped. Case counts.
    """
    text = unicodedata.normalize("NFC", text.strip())
    for name in (unicodedata.normalize("NFC", name.strip()) for name in names):
        if name and text.startswith(name) and not within_word(text, len(name)):
            return True
    return False


def contains_answer(text: str, names: Iterable[str]) -> bool:
    """Tell whether generated text contains one of the names as whole words (PROTOCOL, Free generation).

    Case and punctuation are ignored, and numbers are whole: 19 is not in 1999, nor in 19.5.
    """
    text = normalised(text)
    for name in filter(None, map(normalised, names)):
        start = text.find(name)
        while start >= 0:
            if not within_word(text, start) and not within_word(text, start + len(name)):
                return True
            start = text.find(name, start + 1)
    return False


def normalised(text: str) -> str:
    """Return text in one case and width, with one space for each run of punctuation and blanks.

    A point or comma within a number stays.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    kept = [character if _is_said(character) or _joins_digits(text, i) else " " for i, character in enumerate(text)]
    return " ".join("".join(kept).split())


def within_word(text: str, index: int) -> bool:
    """Tell whether the place before a character of a text lies within a word or number, or at an end of the text.

    Letters, digits and marks hold together; but a script without spaces has a boundary at either side of each of its
    letters, save between Katakana (Unicode Standard Annex 29), and none before a mark.
    """
    if not 0 < index < len(text):
        return False
    before, after = text[index - 1], text[index]
    if _is_mark(after):
        return True
    if _joins_digits(text, index) or _joins_digits(text, index - 1):
        return True
    if not (_is_word(before) and _is_word(after)):
        return False
    if _is_katakana(before) and _is_katakana(after):
        return True
    return not (is_unspaced(before) or is_unspaced(after))


def _joins_digits(text: str, index: int) -> bool:
    """Tell whether a character is the point or comma of a number."""
    return (
        0 < index < len(text) - 1 and text[index] in ".," and text[index - 1].isdigit() and text[index + 1].isdigit()
    )


def _is_word(character: str) -> bool:
    return character.isalnum() or _is_mark(character)


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def _is_said(character: str) -> bool:
    """Tell whether a character is neither punctuation nor blank nor invisible; symbols such as + and € are said."""
    return unicodedata.category(character)[0] in "LNMS"


def _is_katakana(character: str) -> bool:
    return unicodedata.name(character, "").startswith(("KATAKANA", "HALFWIDTH KATAKANA"))
