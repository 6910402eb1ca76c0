"""Edit requests, the cases that judge an edit, and the records that hold both.

Plain frozen dataclasses without any other import of the package: every reader of :mod:`ibke_hf.data`
yields :class:`EditRecord`, and training, evaluation and the Space consume nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

LeadingSpace = Literal["auto", "protocol", "always", "never"]


@dataclass(frozen=True)
class PromptFormat:
    """How a prompt is put to a model, and what stands between it and its target.

    Args:
        chat: The prompt is a user's turn of the tokenizer's chat template, the target the assistant's answer.
        chat_options: What the template is given beside the turn, such as ``{"enable_thinking": False}``.
        leading_space: ``"auto"``: one space unless the target begins with one, but none where the text at hand is
            written without (scripts without spaces, after an opening quote or bracket, after a blank), and in a chat
            what the template itself puts before an answer; ``"protocol"``: one space unless the target begins with a
            blank character, whatever the text (in a chat as ``"auto"``); ``"always"``; or ``"never"``: the target as
            it is.

    Raises:
        ValueError: For another rule, or options that are no mapping.
    """

    chat: bool = False
    chat_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    leading_space: LeadingSpace = "auto"

    def __post_init__(self) -> None:
        """Refuse what no encoder would understand."""
        if self.leading_space not in get_args(LeadingSpace):
            raise ValueError(
                f"leading_space must be one of {', '.join(get_args(LeadingSpace))}, found {self.leading_space!r}"
            )
        if not isinstance(self.chat, bool) or not isinstance(self.chat_options, Mapping):
            raise ValueError(
                "chat must be True or False and chat_options a mapping of the template's options, found "
                f"{self.chat!r} and {self.chat_options!r}"
            )


PLAIN = PromptFormat()
PROTOCOL = PromptFormat(leading_space="protocol")  # as the benchmarks' own evaluators put prompt and target together


class _Formatted:
    """What a model is asked, with the format it is asked in; of a saved file the format may be a mapping."""

    format: PromptFormat

    def __post_init__(self) -> None:
        """Accept the format as a saved file has it."""
        if isinstance(self.format, Mapping):
            object.__setattr__(self, "format", PromptFormat(**self.format))


@dataclass(frozen=True)
class EditRequest(_Formatted):
    """One edit request e = (q_e, o_e): after the edit, the model answers `prompt` with `target`.

    Args:
        prompt: The query q_e, without a trailing space.
        target: The continuation o_e; what stands before it is added on tokenisation, see :class:`PromptFormat`.
        subject: The entity that the request is about, for editors that need to find it in the prompt.
        format: How the prompt is put to the model.
    """

    prompt: str
    target: str
    subject: str | None = None
    format: PromptFormat = PLAIN

    def to_json(self) -> dict[str, Any]:
        """Return the request as plain values; the format only where it is not the default."""
        return {name: value for name, value in asdict(self).items() if name != "format" or self.format != PLAIN}


@dataclass(frozen=True)
class Hop(_Formatted):
    """One triple (head, property, tail) that a case runs through, with the prompt that asks for it.

    `tail` is an entity id for item tails and ``"datatype:value"`` otherwise; `tail_is_item` tells which.
    """

    prompt: str
    target: str
    head: str
    property: str
    tail: str
    tail_is_item: bool = True
    subject: str | None = None
    format: PromptFormat = PLAIN

    def key(self) -> Hashable:
        """Return what PROTOCOL's collision rule compares, so that many edits can be looked up at once.

        Item tails compare as an unordered (head, tail) pair with the property ignored; other tails compare as
        (head, property, value).
        """
        return frozenset((self.head, self.tail)) if self.tail_is_item else (self.head, self.property, self.tail)

    def request(self) -> EditRequest:
        """Return the hop as an edit request, for supporting hops that the model does not know."""
        return EditRequest(self.prompt, self.target, self.subject, self.format)


@dataclass(frozen=True)
class EditCase(_Formatted):
    """One generality or locality case: `prompt` must be answered by `target`.

    Args:
        prompt: The text before the target.
        target: The expected continuation (generality) or the text whose predictions must not move (locality).
        criteria: Names of PROTOCOL's criteria that the case meets, such as ``"Rephrase"``.
        hops: Number of triples that the case runs through.
        top_k: A target token counts as a hit within the first `top_k` predictions (5; 1 for Yes/No cases).
        aliases: Other spellings of the target that generation may answer with.
        supporting: The hops other than the edit itself, in order.
        facts: Every triple that the case runs through, the edit included; what collisions are judged on.
        name: The dataset's list that the case belongs to, such as ``"uni_gen"``.
        format: How the prompt is put to the model.
    """

    prompt: str
    target: str
    criteria: tuple[str, ...] = ()
    hops: int = 1
    top_k: int = 5
    aliases: tuple[str, ...] = ()
    supporting: tuple[Hop, ...] = ()
    facts: tuple[Hop, ...] = ()
    name: str = ""
    format: PromptFormat = PLAIN


@dataclass(frozen=True)
class EditRecord:
    """One record of a dataset: one or more edit requests with the cases that judge them.

    `kind` is ``"counterfactual"`` or ``"unknown"`` where the dataset says so; `edits` are the requests as
    triples, where the dataset has them.
    """

    id: str
    dataset: str
    domain: str
    requests: tuple[EditRequest, ...]
    generality: tuple[EditCase, ...] = ()
    locality: tuple[EditCase, ...] = ()
    edits: tuple[Hop, ...] = ()
    kind: str = ""
    relation: str = ""
    metadata: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a record that edits nothing."""
        if not self.requests:
            raise ValueError(f"record {self.id!r} of {self.dataset!r} has no edit request; give it at least one")

    @property
    def subjects(self) -> frozenset[str]:
        """The subjects that the record edits, of the requests that name one, each by its :func:`subject_key`."""
        return frozenset(subject_key(request.subject) for request in self.requests if request.subject)

    def formatted(self, **changes: Any) -> EditRecord:
        """Return the record with all that a model is asked of it put in another format.

        Requests with their triples, cases and supporting hops change; facts, which are compared but not asked, stay.

        Args:
            changes: Fields of :class:`PromptFormat`; what is not given stays as each request or case has it.
        """

        def asked(one: Any) -> Any:
            return replace(one, format=replace(one.format, **changes))

        def case(one: EditCase) -> EditCase:
            return replace(asked(one), supporting=tuple(map(asked, one.supporting)))

        return replace(
            self,
            requests=tuple(map(asked, self.requests)),
            generality=tuple(map(case, self.generality)),
            locality=tuple(map(case, self.locality)),
            edits=tuple(map(asked, self.edits)),
        )


def subject_key(name: str) -> str:
    """Return a name as subjects are compared: case folded, blanks evened out."""
    return " ".join(name.casefold().split())


def collides(case: EditCase, edits: Iterable[Hop]) -> bool:
    """Tell whether any hop of a locality case states the same fact as any of the given edits (PROTOCOL, Procedure)."""
    edited = {edit.key() for edit in edits}
    return any(hop.key() in edited for hop in case.facts)
