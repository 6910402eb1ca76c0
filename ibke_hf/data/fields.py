"""JSON values that know where they stand, so that every reader's errors name file, record and field."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

from ..core.records import EditCase

T = TypeVar("T")
LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class RecordError(ValueError):
    """An unreadable record or record file; the message names file, record and field."""


@dataclass(frozen=True)
class Field:
    """A JSON value that knows where in its record it stands, so that an error can name it."""

    value: Any
    path: str
    record: str

    def __contains__(self, key: str) -> bool:
        return key in self.of(dict)

    def __getitem__(self, key: str) -> Field:
        content = self.of(dict)
        if key not in content:
            raise RecordError(f"record {self.record!r}: field {self._join(key)!r} is missing")
        return Field(content[key], self._join(key), self.record)

    def error(self, what: str) -> RecordError:
        """Return an error that names the field, to be raised by who finds it wrong."""
        where = f"field {self.path!r}" if self.path else "the record"
        return RecordError(f"record {self.record!r}: {where} {what}, found {_shown(self.value)}")

    def of(self, kind: type[T]) -> T:
        """Return the value itself.

        Raises:
            RecordError: If it is of another JSON type.
        """
        if not isinstance(self.value, kind):
            expected = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}[kind]
            raise self.error(f"is not {expected}")
        if isinstance(self.value, str) and not self.value.isascii() and LONE_SURROGATE.search(self.value):
            raise self.error("holds half of a character (a lone surrogate)")
        return self.value

    def text(self, key: str) -> str:
        """Return a text that may be missing, null or blank, which are all ``""``."""
        value = self.of(dict).get(key)
        text = "" if value is None else Field(value, self._join(key), self.record).of(str)
        return text if text.strip() else ""

    def items(self) -> list[Field]:
        """Return the parts of a list that is not empty."""
        if not self.of(list):
            raise RecordError(f"record {self.record!r}: field {self.path!r} is empty")
        return self.parts()

    def parts(self) -> list[Field]:
        """Return the parts of a list."""
        return [Field(part, f"{self.path}[{i}]", self.record) for i, part in enumerate(self.of(list))]

    def texts(self) -> list[str]:
        """Return the parts of a list of texts."""
        return [Field(part, f"{self.path}[{i}]", self.record).of(str) for i, part in enumerate(self.of(list))]

    def names(self) -> tuple[str, ...]:
        """Return the texts of a list at any depth, or a lone text, in order, without blank ones and repetitions."""
        parts = self.parts() if isinstance(self.value, list) else None
        texts = [self.of(str)] if parts is None else [text for part in parts for text in part.names()]
        return tuple(dict.fromkeys(text for text in texts if text.strip()))

    def values(self) -> list[Field]:
        """Return the values of an object."""
        return [self[key] for key in self.of(dict)]

    def ident(self) -> str:
        """Return a number or text that names the record.

        Raises:
            RecordError: If it is neither, or blank.
        """
        if isinstance(self.value, bool) or not isinstance(self.value, int | str) or not str(self.value).strip():
            raise self.error("is not a number or text")
        return str(self.value)

    def filled(self, subject: str) -> str:
        """Return a template with `subject` in its place.

        Raises:
            RecordError: If it has not exactly one place ``{}``.
        """
        template = self.of(str)
        if template.count("{}") != 1:
            raise self.error("must hold exactly one {} for the subject")
        return template.replace("{}", subject)  # not str.format: a subject may hold braces of its own

    def _join(self, key: str) -> str:
        return f"{self.path}.{key}" if self.path else key


def cases(name: str, prompt: str, target: str, skipped: Counter[str], **details: Any) -> tuple[EditCase, ...]:
    """Return the case of a dataset's list `name`; none, and a count, where its prompt or target is blank."""
    if prompt.strip() and target.strip():
        return (EditCase(prompt, target, name=name, **details),)
    skipped[f"{name} case with an empty prompt or target"] += 1
    return ()


def _shown(value: Any) -> str:
    """Return the beginning of a JSON value as text."""
    try:
        return json.dumps(value)[:80]
    except RecursionError:
        return "a value that is nested too deeply"
