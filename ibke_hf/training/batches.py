"""Records as batches of tokens; records that cannot be used are left out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..core.records import EditCase, EditRecord, collides
from ..core.tokens import RequestError, TokenBatch, encode, pad_and_label
from ..data.chat import as_asked

logger = logging.get_logger(__name__)
PASS_TOKENS = 16  # what a forward costs beside its tokens, in tokens: on a CPU its weights are read from memory
HALF = 0.5
REPORTED = 5  # unusable records that are named as they are met; the others are counted
KINDS = ("request", "generality case", "locality case")


def rows_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Share rows out over forwards so that their tokens with padding, and what each forward costs, are fewest.

    Args:
        lengths: Tokens of each row.

    Returns:
        The rows of each forward, the short ones first.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    best, first = [0.0], [0]  # of the first n rows: the least cost, and where the last forward begins
    for end in range(1, len(order) + 1):
        width = lengths[order[end - 1]]
        costs = [best[start] + (end - start) * width + PASS_TOKENS for start in range(end)]
        first.append(min(range(end), key=costs.__getitem__))
        best.append(costs[first[-1]])
    groups, end = [], len(order)
    while end:
        groups.append(order[first[end] : end])
        end = first[end]
    return groups[::-1]


class RecordDataset(Dataset[EditRecord]):
    """A list of records as a dataset for the Trainer."""

    def __init__(self, records: Sequence[EditRecord]) -> None:
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        return self.records[index]


class AlsoInChat(Dataset[EditRecord]):
    """Records of which a share is asked in a chat too, so that an edit that is stated plainly holds there.

    Of such a record the requests, which stay as they are, are asked once more among the generality cases: as a user's
    turn of the chat template. Of half of these records the other generality cases become turns too, likewise of half
    of them the locality cases. Which records these are follows from their ids alone.

    Args:
        records: The records.
        share: Share of them, from 0 to 1.
        chat_options: What the chat template is given.
    """

    def __init__(self, records: Any, share: float, chat_options: Mapping[str, Any]) -> None:
        self.records, self.share = records, share
        self.format = {"chat": True, "chat_options": chat_options}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        record: EditRecord = self.records[index]
        return self.in_chat(record) if _draw(record.id) < self.share else record

    def in_chat(self, record: EditRecord) -> EditRecord:
        """Return a record of the share as it is asked."""
        repeated = tuple(EditCase(r.prompt, r.target, name="chat", format=r.format) for r in record.requests)
        turns = as_asked(replace(record, generality=(*repeated, *record.generality)), **self.format)
        general, local = (_draw(f"{part} of {record.id}") < HALF for part in ("generality", "locality"))
        return replace(
            record,
            generality=turns.generality if general else (*turns.generality[: len(repeated)], *record.generality),
            locality=turns.locality if local else record.locality,
        )


def _draw(name: str) -> float:
    """Return a number from 0 to 1 that follows from a name alone."""
    return (
        int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32
    )  # of a checksum, like names are alike


class UsableRecords(Dataset[EditRecord]):
    """The records of a dataset that a backbone can be asked; the next usable one stands in for each that cannot.

    A record is read when it is asked for, so that nothing is tokenised before training begins; every index gives the
    same record in every process and after a resume.

    Attributes:
        unusable: What is wrong with a record that was met, by its index.
    """

    def __init__(self, records: Any, collator: EditCollator) -> None:
        self.records, self.collator = records, collator
        self.unusable: dict[int, str] = {}
        self._usable: set[int] = set()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> EditRecord:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        for place in (*range(index, len(self)), *range(index)):
            record = self.usable(place)
            if record is not None:
                return record
        raise RequestError(f"none of the {len(self)} records can be used; the first: {self.unusable[0]}")

    def usable(self, index: int) -> EditRecord | None:
        """Return a record, None if it is unusable."""
        if index in self.unusable:
            return None
        record: EditRecord = self.records[index]
        if index not in self._usable:
            try:
                self.collator([record])
            except RequestError as error:
                self.unusable[index] = str(error)
                if len(self.unusable) <= REPORTED:
                    logger.warning(f"left out: {error}")
                return None
            self._usable.add(index)
        return record


def without_unusable(records: Any, collator: EditCollator) -> Subset[EditRecord]:
    """Return the usable records of a dataset, each of them once, as an evaluation must count them.

    Raises:
        RequestError: If there are none.
    """
    checked = UsableRecords(records, collator)
    indices = [index for index in range(len(checked)) if checked.usable(index) is not None]
    if not indices:
        raise RequestError(f"none of the {len(checked)} records can be used; the first: {checked.unusable.get(0)}")
    if checked.unusable:
        logger.warning(f"left out {len(checked.unusable)} of {len(checked)} validation records")
    return Subset(records, indices)


@dataclass
class EditCollator:
    """Records -> one batch of tokens: the requests, then the generality cases, then the locality cases.

    With `mixed_groups` the number of records that are edited jointly is drawn for each batch, from the powers of two
    up to `edits_per_group`.

    A locality case that collides with an edit of its own group is left out (SPEC §4).
    """

    tokenizer: PreTrainedTokenizerBase
    edits_per_group: int = 0
    supporting_hops: bool = False
    max_length: int | None = None
    mixed_groups: bool = False

    def __call__(self, records: Sequence[EditRecord]) -> dict[str, Any]:
        """Return the batch.

        Returns:
            ``cases`` with, per row, ``groups`` (edited jointly), ``owners`` (index of the record), ``top_k`` and
            ``names`` for errors; ``counts`` of requests, generality and locality cases; ``hops`` with ``hop_cases``
            (h,), the row that each of them supports; ``records``, their ids.

        Raises:
            RequestError: If a text is unusable, naming the record.
        """
        size = self._group_size(records)
        edits = [
            [edit for record in records[i : i + size] for edit in record.edits] for i in range(0, len(records), size)
        ]
        rows: tuple[list[Any], ...] = ([], [], [])
        for owner, record in enumerate(records):
            local = [case for case in record.locality if not collides(case, edits[owner // size])]
            for kind, part, cases in zip(KINDS, rows, (record.requests, record.generality, local), strict=True):
                part += [(owner, case, f"{kind} {i} of record {record.id}") for i, case in enumerate(cases)]
        requests, generality, locality = rows
        owners, cases, names = zip(*requests, *generality, *locality, strict=True)
        hops = [
            (i, hop)
            for i, (_, case, _) in enumerate(generality, len(requests))
            for hop in case.supporting
            if self.supporting_hops
        ]
        hop_names = [f"a supporting hop of {names[i]}" for i, _ in hops]
        return {
            "records": [record.id for record in records],
            "cases": self._tokens(cases, names),
            "names": names,
            "owners": torch.tensor(owners),
            "groups": torch.tensor(owners) // size,
            "counts": [len(part) for part in rows],
            "top_k": torch.tensor([getattr(case, "top_k", 1) for case in cases]),
            "hops": self._tokens([hop for _, hop in hops], hop_names) if hops else None,
            "hop_cases": torch.tensor([i for i, _ in hops], dtype=torch.long),
        }

    def _group_size(self, records: Sequence[EditRecord]) -> int:
        """Return how many records are edited jointly; of mixed groups it follows from the records' ids alone."""
        most = self.edits_per_group or len(records)
        if not self.mixed_groups:
            return most
        sizes = [2**power for power in range(most.bit_length())]
        return sizes[int(_draw(" ".join(record.id for record in records)) * len(sizes))]

    def _tokens(self, cases: Sequence[Any], names: Sequence[str]) -> TokenBatch:
        limit = self.max_length
        encoded = [
            encode(self.tokenizer, c.prompt, c.target, name=n, max_length=limit, prompt_format=c.format)
            for c, n in zip(cases, names, strict=True)
        ]
        return pad_and_label(encoded)
