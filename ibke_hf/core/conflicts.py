"""What speaks against carrying some edits together: told before they are composed, and wherever edits get company.

Two edits can ask for different things of one fact, which their requests tell; or a layer reads nearly the same where
their targets begin, which their keys tell. At the lowest edited layer the keys are those of the unedited model,
whatever an edit does, and the token at which a target begins has not read it yet: two edits of one prompt are the
same there. :data:`NEARLY` was chosen on 300 validation records of Atlas: of 44,846 pairs of unlike facts 2 are that
near; of one prompt with another target all are; of a rephrased prompt with another target 27 of 100 are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from .records import EditRequest

Kind = Literal["override", "contradiction", "same keys"]
NEARLY = 0.85  # cosine of two edits' keys from which a layer can hardly tell them apart
NAMED = 3  # conflicts that a warning names; the others are counted
PUNCTUATION = re.compile(r"[\W_]+")
FILLERS = {"a", "an", "the", "is", "are", "was", "were", "of", "in", "at", "by"}
FILLERS |= {"what", "which", "who", "where", "whose", "does", "do", "did", "s"}


@dataclass(frozen=True)
class Conflict:
    """Two edits of which at most one can hold, or that a layer can hardly tell apart.

    Attributes:
        kind: ``"override"``: a later edit gives the very prompt of an earlier one another target; ``"contradiction"``:
            one subject and relation, in other words, with different targets; ``"same keys"``: the layers read nearly
            the same where the targets begin, which differ.
        first: Index of the earlier edit.
        second: Index of the later edit.
        requests: The request of each that is at odds.
        similarity: Cosine of their keys, where that tells.
    """

    kind: Kind
    first: int
    second: int
    requests: tuple[EditRequest, EditRequest]
    similarity: float | None = None

    def __str__(self) -> str:
        return self.told(str(self.first), str(self.second))

    def told(self, first: str, second: str) -> str:
        """Return the conflict in words, with names for the two edits."""
        one, two = (f"{request.prompt!r} -> {request.target!r}" for request in self.requests)
        what = {
            "override": "overrides one of the same prompt,",
            "contradiction": "is of the same subject and relation, with another target, as",
            "same keys": "is nearly the same to the edited layers, with another target, as",
        }[self.kind]
        return f"edit {second} ({two}) {what} edit {first} ({one})"


def conflicts(edits: Sequence[Any]) -> list[Conflict]:
    """Return what is at odds among edits, by the place of the later edit and then of the earlier one.

    Args:
        edits: Edits in their order; the parts of edits that were solved together or are routed count one by one, and
            so do independent ones.
    """
    parts = list(chain.from_iterable(_single(edit) for edit in edits))
    pairs: dict[tuple[int, int], Conflict] = {}
    for conflict in (*conflicting_requests([part.info.requests for part in parts]), *_by_keys(parts)):
        pairs.setdefault((conflict.second, conflict.first), conflict)  # what requests say goes first
    return [pairs[pair] for pair in sorted(pairs)]


def conflict_warning(conflicting: Sequence[Conflict], names: Sequence[str] = ()) -> str:
    """Return a warning of one line; empty where there is no conflict.

    Args:
        conflicting: What is at odds.
        names: Of all edits, by their place; by default their places.
    """
    if not conflicting:
        return ""
    more = len(conflicting) - NAMED
    told = [one.told(names[one.first], names[one.second]) if names else str(one) for one in conflicting[:NAMED]]
    shown = "; ".join(told) + (f"; and {more} more" if more > 0 else "")
    return f"edits are at odds, so that they may not hold: {shown}. Leave out those that are not to hold"


def _single(edit: Any) -> list[Any]:
    parts = getattr(edit, "parts", (edit,))
    return [one for part in parts for one in (part if len(part) > 1 else (part,))]


# --- requests ---


def conflicting_requests(edits: Sequence[Sequence[EditRequest]]) -> list[Conflict]:
    """Compare the requests of edits by what is asked: the prompt, or subject and relation; the former come first."""
    earlier: dict[tuple[str, ...], list[tuple[int, EditRequest]]] = {}
    conflicting: dict[tuple[int, EditRequest, int, EditRequest], Conflict] = {}
    for place, requests in enumerate(edits):
        fresh: list[tuple[tuple[str, ...], EditRequest]] = []
        for request in dict.fromkeys(requests):
            for key in _what_is_asked(request):
                for other, before in earlier.get(key, []):
                    if plain(before.target) != plain(request.target):
                        kind: Kind = "override" if key[0] == "prompt" else "contradiction"
                        pair = Conflict(kind, other, place, (before, request))
                        conflicting.setdefault((other, before, place, request), pair)
                fresh.append((key, request))
        for key, request in fresh:
            earlier.setdefault(key, []).append((place, request))
    return sorted(conflicting.values(), key=lambda conflict: conflict.kind != "override")


def _what_is_asked(request: EditRequest) -> list[tuple[str, ...]]:
    prompt = plain(request.prompt)
    keys: list[tuple[str, ...]] = [("prompt", prompt)]
    if request.subject and (subject := plain(request.subject)) in prompt:
        # the words of the relation, whatever order a wording has them in and where the subject stands
        relation = " ".join(sorted(set(prompt.replace(subject, " ").split()) - FILLERS))
        keys.append(("relation", subject, relation))
    return keys


def plain(text: str) -> str:
    """Return the words of a text, without case and punctuation."""
    return PUNCTUATION.sub(" ", text).casefold().strip()


# --- keys ---


def _by_keys(parts: Sequence[Any]) -> list[Conflict]:
    """Compare what the layers read of single requests; where edits are of several, their requests alone tell."""
    single = [
        place for place, part in enumerate(parts) if len(part.info.requests) == 1 and getattr(part, "has_keys", False)
    ]
    if len(single) < 2:
        return []
    lowest = next(iter(parts[single[0]].layers))
    single = [place for place in single if next(iter(parts[place].layers)) == lowest]
    units = torch.nn.functional.normalize(torch.stack([_where_target_begins(parts[p].keys[lowest]) for p in single]))
    cosines = units @ units.T
    rows, columns = (cosines.tril(-1) >= NEARLY).nonzero(as_tuple=True)
    conflicting = []
    for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
        first, second = single[column], single[row]
        before, after = parts[first].info.requests[0], parts[second].info.requests[0]
        if plain(before.target) != plain(after.target):
            conflicting.append(Conflict("same keys", first, second, (before, after), float(cosines[row, column])))
    return conflicting


def _where_target_begins(keys: Tensor) -> Tensor:
    """Return the key (d_in,) of the last token of a prompt; keys (1, l, d_in) of tokens that say a target are longer.

    Where all are of one length, it is the last of them.
    """
    lengths = keys[0].float().norm(dim=-1)
    shortest, longest = lengths[lengths > 0].min(), lengths.max()
    says_target = lengths > (shortest + longest) / 2
    place = says_target.nonzero()[0] if longest > 1.5 * shortest else (lengths > 0).nonzero()[-1]
    return keys[0, int(place)].float().cpu()
