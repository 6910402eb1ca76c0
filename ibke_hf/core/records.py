"""Edit requests, the cases that judge an edit, and the records that hold both.

Plain frozen dataclasses without any other import of the package: every reader of :mod:`ibke_hf.data`
yields :class:`EditRecord`, and training, evaluation and the Space consume nothing else.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class EditRequest:
    """One edit request e = (q_e, o_e): after the edit, the model answers `prompt` with `target`.

    Args:
        prompt: The query q_e, without a trailing space.
        target: The wanted continuation o_e; one leading space is added on tokenisation if it has none.
        subject: The entity that the request is about, for editors that need to find it in the prompt.
    """

    prompt: str
    target: str
    subject: str | None = None


@dataclass(frozen=True)
class Hop:
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

    def key(self) -> Hashable:
        """Return what PROTOCOL's collision rule compares, so that many edits can be looked up at once.

        Item tails compare as an unordered (head, tail) pair with the property ignored; other tails compare as
        (head, property, value).
        """
        return frozenset((self.head, self.tail)) if self.tail_is_item else (self.head, self.property, self.tail)

    def request(self) -> EditRequest:
        """Return the hop as an edit request, for supporting hops that the model does not know."""
        return EditRequest(self.prompt, self.target, self.subject)


@dataclass(frozen=True)
class EditCase:
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


def collides(case: EditCase, edits: Iterable[Hop]) -> bool:
    """Tell whether any hop of a locality case states the same fact as any of the given edits (PROTOCOL, Procedure)."""
    edited = {edit.key() for edit in edits}
    return any(hop.key() in edited for hop in case.facts)
