"""Requests, hops, cases and records; the collision rule of PROTOCOL."""

from dataclasses import FrozenInstanceError

import pytest

from ibke_hf.core.records import EditCase, EditRecord, EditRequest, Hop, collides


def hop(head: str, prop: str, tail: str, item: bool = True) -> Hop:
    return Hop("prompt", "target", head, prop, tail, item)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (hop("Q1", "P1", "Q2"), hop("Q1", "P1", "Q2"), True),
        (hop("Q1", "P1", "Q2"), hop("Q2", "P9", "Q1"), True),  # item tails: either direction, whatever the property
        (hop("Q1", "P1", "Q2"), hop("Q1", "P1", "Q3"), False),
        (hop("Q1", "P1", "time:1869", False), hop("Q1", "P1", "time:1869", False), True),
        (hop("Q1", "P1", "time:1869", False), hop("Q1", "P2", "time:1869", False), False),
        (hop("Q1", "P1", "time:1869", False), hop("Q1", "P1", "string:1869", False), False),
        (hop("Q1", "P1", "Q2", False), hop("Q1", "P1", "Q2"), False),
        (hop("Q1", "P1", "Q1"), hop("Q1", "P2", "Q1"), True),  # a fact about itself
        (hop("Q1", "P1", "Q1"), hop("Q1", "P1", "Q2"), False),
    ],
)
def test_hops_state_the_same_fact(one: Hop, other: Hop, same: bool) -> None:
    assert (one.key() == other.key()) is same
    case = EditCase("prompt", "target", facts=(hop("Q7", "P7", "Q8"), one))
    assert collides(case, [hop("Q5", "P5", "Q6"), other]) is same


def test_nothing_collides_with_nothing() -> None:
    assert not collides(EditCase("prompt", "target"), [hop("Q1", "P1", "Q2")])
    assert not collides(EditCase("prompt", "target", facts=(hop("Q1", "P1", "Q2"),)), [])
    assert collides(
        EditCase("p", "t", facts=(hop("Q1", "P1", "Q2"),)), iter([hop("Q3", "P1", "Q4"), hop("Q1", "P1", "Q2")])
    )


def test_a_hop_is_an_edit_request() -> None:
    assert Hop("Oslo lies in", "Norway", "Q1", "P1", "Q2", subject="Oslo").request() == EditRequest(
        "Oslo lies in", "Norway", "Oslo"
    )


def test_a_record_without_a_request_is_refused() -> None:
    with pytest.raises(ValueError, match=r"record 'r-1' of 'mine' has no edit request"):
        EditRecord("r-1", "mine", "", ())


def test_records_are_values() -> None:
    request = EditRequest("a", "b")
    with pytest.raises(FrozenInstanceError):
        request.target = "c"  # type: ignore[misc]
    assert EditRecord("1", "d", "", (request,)) == EditRecord("1", "d", "", (EditRequest("a", "b", None),))
