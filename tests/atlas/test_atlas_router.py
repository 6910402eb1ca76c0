"""The shipped router finds the edits of Atlas prompts among a hundred, and leaves the others alone."""

from __future__ import annotations

import torch
from safetensors.torch import load_file

from ibke_hf.atlas import ASSETS, load_backbone, load_editor, load_records, load_router
from ibke_hf.evaluation.protocol import evaluate_records
from ibke_hf.lifelong.routed import RoutedEditor
from ibke_hf.lifelong.router import Router
from ibke_hf.training.router import judged, shares_found
from ibke_hf.training.router_batches import routed_records

FOUND = {
    "request": 95.0,
    "rephrase": 65.0,
    "multi-hop": 60.0,
    "none": 85.0,
}  # percent at least, of 100 test records in one library


def test_the_router_reads_below_the_lowest_layer_of_both_editors() -> None:
    router = load_router()
    for name in ("ibke", "mend"):
        assert load_editor(name).config.module_names()[0] == router.config.lowest


def test_prompts_find_their_edit_among_a_hundred_and_others_find_none() -> None:
    backbone, tokenizer = load_backbone()
    router = load_router()
    kinds, right, similarity = judged(router, backbone, routed_records(tokenizer, load_records("test")[:100]))
    shares = shares_found(kinds, right, similarity, router.config.threshold)
    assert all(shares[kind] >= least for kind, least in FOUND.items()), shares


def test_routed_edits_are_scored_as_each_alone_where_the_router_finds_them() -> None:
    backbone, tokenizer = load_backbone()
    records = load_records("test")[:12]
    editor = RoutedEditor(load_editor("ibke"), load_router())
    with torch.no_grad():
        routed = evaluate_records(
            editor, backbone, tokenizer, records, sequential=len(records), generate=False, progress=False
        )
    assert routed.summary["reliability"] >= 90 and routed.summary["locality"] >= 85


def test_the_router_is_stored_in_16_bit_and_computed_in_32() -> None:
    stored = load_file(ASSETS / "router" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    for router in (load_router(), Router.from_pretrained(ASSETS / "router")):
        assert {parameter.dtype for parameter in router.parameters()} == {torch.float32}
