"""Plans of `ibke table`: cells, shards, and what is wrong with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from benchmark_runs import PLAN

from ibke_hf.benchmark import BenchmarkError, Plan
from ibke_hf.editors.catalogue import KINDS


def test_shards_share_the_cells_out_and_no_editor_is_trained_twice() -> None:
    plan = Plan(tuple(KINDS), ("a", "b"), ("counterfactual", "unknown"), (1, 10), seeds=3)
    whole = plan.cells()
    assert len(whole) == len(set(whole)) == len(KINDS) * 2 * 2 * 2 * 3
    shards = [plan.cells((i, 4)) for i in (1, 2, 3, 4)]
    assert Counter(cell for shard in shards for cell in shard) == Counter(whole)
    units = [{(cell.editor, cell.seed) for cell in shard} for shard in shards]
    assert sum(map(len, units)) == len(set.union(*units)) == 3 * len(KINDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"editors": ()}, "editors must name at least one"),
        ({"editors": ("ft", "ft")}, "none of them twice, found ft, ft"),
        ({"editors": ("rom",)}, "no editor 'rom'; editors are none, ft, rome"),
        ({"edits": ("new",)}, "some of all, .*found new"),
        ({"seeds": 0}, "at least 1"),
        ({"sequential": (0,)}, "at least 1"),
    ],
)
def test_a_bad_plan_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan(**{"editors": ("ft",), "splits": ("a",), **fields})


@pytest.mark.parametrize("shard", [(0, 2), (3, 2)])
def test_a_bad_shard_is_named(shard: tuple[int, int]) -> None:
    with pytest.raises(BenchmarkError, match=f"found {shard[0]}/{shard[1]}"):
        PLAN.cells(shard)
