"""A naive reference for PROTOCOL, from its text alone, with records and models to hold evaluation against."""

from __future__ import annotations

import copy
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from ibke_hf import EditCase, EditRecord, EditRequest, IBKEEditor
from ibke_hf.core.records import Hop
from ibke_hf.core.tokens import encode_requests

PLACES = [
    "Paris",
    "Rome",
    "Oslo",
    "Berlin",
    "Madrid",
    "Vienna",
    "Lisbon",
    "London",
    "Warsaw",
    "England",
    "Poland",
    "France",
]
THINGS = [
    "a bird",
    "a tree",
    "a metal",
    "the author",
    "physics",
    "chemistry",
    "the book",
    "a city",
    "the river",
    "a language",
]
SHORT = [
    "is",
    "of",
    "and",
    "the",
    "a",
    "in",
    "c",
    "P",
    "E",
    "is the",
]  # one token of the tiny tokenizer, all but the last
RELATIONS = ["lies in", "was born in", "worked in", "is written by", "is the capital of", "is a kind of"]
YES_NO = " The answer is (Yes/No):"


# --- records ------------------------------------------------------------------------------------------------------


def make_hop(rng: random.Random, names: list[str]) -> Hop:
    head, relation = rng.choice(names), rng.randrange(len(RELATIONS))
    tail = rng.choice(names) if rng.random() < 0.4 else rng.choice(SHORT)
    item = rng.random() < 0.7
    return Hop(f"{head} {RELATIONS[relation]}", tail, head, f"P{relation}", tail if item else f"string:{tail}", item)


def make_records(number: int, most_requests: int, seed: int = 0) -> list[EditRecord]:
    """Records with every kind of case: some locality cases collide, some hops restate an edit."""
    rng, records = random.Random(seed), []
    for index in range(number):
        names = [f"{rng.choice(PLACES)}{rng.randrange(40)}" for _ in range(5)] + rng.sample(PLACES + THINGS, 3)
        edits = [make_hop(rng, names) for _ in range(rng.randint(1, most_requests))]
        generality, locality = [], []
        for _ in range(rng.randint(1, 3)):
            supporting = tuple(
                rng.choice([make_hop(rng, names), edits[0]]) for _ in range(rng.choice([0, 0, 1, 2, 3]))
            )
            double = rng.random() < 0.3
            generality.append(
                EditCase(
                    prompt=rng.choice(["", "It is said that "])
                    + rng.choice([edits[-1], make_hop(rng, names)]).prompt
                    + YES_NO * double,
                    target="Yes" if double else edits[-1].target,
                    criteria=("Multi-Hop",) if supporting else ("Rephrase",),
                    hops=1 + len(supporting),
                    top_k=1 if double else 5,
                    aliases=(rng.choice(PLACES),),
                    supporting=supporting,
                    name=rng.choice(["gen_a", "gen_b"]),
                )
            )
        for _ in range(rng.randint(0, 3)):
            same_edit = rng.choice(edits)
            same = rng.choice(
                [
                    same_edit,
                    replace(same_edit, property="P9"),
                    replace(same_edit, head=same_edit.tail, tail=same_edit.head),
                ]
            )  # collides for items
            facts = tuple(make_hop(rng, names) if rng.random() < 0.8 else same for _ in range(rng.randint(1, 2)))
            locality.append(
                EditCase(
                    facts[-1].prompt,
                    facts[-1].target,
                    ("1-N Forgotten",),
                    len(facts),
                    rng.choice([1, 5]),
                    facts=facts,
                    name="loc",
                )
            )
        records.append(
            EditRecord(
                f"r{index}",
                "made",
                rng.choice(["art", "biology"]),
                tuple(hop.request() for hop in edits),
                tuple(generality),
                tuple(locality),
                tuple(edits),
                kind="unknown",
            )
        )
    return records


def settings_of(tiny_model, tiny_tokenizer, **config):
    """Return family -> model, tokenizer and calibrated editor, each made once; edits are large: predictions move."""
    setups = {}

    def build(family="qwen3"):
        if family not in setups:
            model = tiny_model(family, **config)
            torch.manual_seed(0)
            editor = IBKEEditor.for_backbone(
                model, latent_dim=16, latent_length=3, initial_edit_ratio=0.5, composition="sum"
            )
            requests = [request for record in make_records(40, 1, seed=7) for request in record.requests]
            editor.calibrate(model, [encode_requests(tiny_tokenizer, requests)])
            setups[family] = (model, editor)
        model, editor = setups[family]
        return model, tiny_tokenizer, editor

    return build


# --- the naive reference ------------------------------------------------------------------------------------------


class Naive:
    """PROTOCOL one case at a time: dense weights, full sorts, no padding, no batch."""

    def __init__(self, editor, model, tokenizer, match="ids"):
        self.editor, self.model, self.tokenizer, self.match = editor, model, tokenizer, match

    def logits_and_targets(self, model, prompt, target):
        ids = self.tokenizer(prompt + (target if target.startswith(" ") else " " + target))["input_ids"]
        start = len(self.tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].float()
        return logits[start - 1 :], ids[start:]

    def best(self, logits, k):
        return [torch.sort(row, descending=True, stable=True).indices[:k].tolist() for row in logits]

    def within(self, model, prompt, target, k):
        logits, targets = self.logits_and_targets(model, prompt, target)
        return [token in best for token, best in zip(targets, self.best(logits, k), strict=True)]

    def edited(self, model, *requests):
        """Copy the model and add the ΔW of each request, all of them read on the model as given."""
        changed = copy.deepcopy(model)
        for request in requests:
            edit = self.editor.edit(model, self.tokenizer, [request])
            for name in edit.inputs:
                layer, update = changed.get_submodule(name), edit.inputs[name][0].T @ edit.outputs[name][0]
                with torch.no_grad():
                    layer.weight += update if isinstance(layer, Conv1D) else update.T
        return changed

    def answers(self, model, prompt, names, new_tokens):
        ids = self.tokenizer(prompt)["input_ids"]
        answer = []
        for _ in range(new_tokens):
            with torch.no_grad():
                answer.append(int(model(torch.tensor([ids + answer])).logits[0, -1].argmax()))
            if answer[-1] == model.generation_config.eos_token_id:
                break
        text = self.tokenizer.decode(answer, skip_special_tokens=True).strip()
        return any(text == name or (text.startswith(name) and not text[len(name)].isalnum()) for name in names)

    def evaluate(self, records, n, joint=False, scope="set"):
        groups, group = [], []
        for record in records:
            group.append(record)
            if sum(len(r.requests) for r in group) >= n:
                groups.append(group)
                group = []
        groups += [group] if group else []
        return [row for g in groups for row in self.run_group(g, records if scope == "set" else g, joint)]

    def run_group(self, group, scope, joint):
        requests = [request for record in group for request in record.requests]
        model = self.edited(self.model, *requests) if joint else self.model
        for request in [] if joint else requests:
            model = self.edited(model, request)
        rows = []
        for record in group:
            for request in record.requests:
                logits, targets = self.logits_and_targets(model, request.prompt, request.target)
                row = self.row(
                    record,
                    "reliability",
                    request,
                    self.within(model, request.prompt, request.target, 1),
                    logits,
                    targets,
                )
                rows.append(
                    row | {"exact_match": self.answers(model, request.prompt, [request.target], len(targets) + 3)}
                )
            rows += [self.generality(model, record, case) for case in record.generality]
            rows += [self.locality(model, record, case) for case in record.locality if not self.dropped(case, scope)]
        return rows

    def generality(self, model, record, case):
        edited_hops = 0
        for hop in case.supporting:
            if not all(self.within(model, hop.prompt, hop.target, 5)):
                model, edited_hops = self.edited(model, EditRequest(hop.prompt, hop.target)), edited_hops + 1
        logits, targets = self.logits_and_targets(model, case.prompt, case.target)
        row = self.row(
            record, "generality", case, self.within(model, case.prompt, case.target, case.top_k), logits, targets
        )
        matched = self.answers(model, case.prompt, [case.target, *case.aliases], len(targets) + 3)
        return row | {"exact_match": matched, "edited_hops": edited_hops}

    def dropped(self, case, records):
        def fact(hop):
            return {hop.head, hop.tail} if hop.tail_is_item else (hop.head, hop.property, hop.tail)

        return any(fact(hop) == fact(edit) for hop in case.facts for record in records for edit in record.edits)

    def locality(self, model, record, case):
        original, _ = self.logits_and_targets(self.model, case.prompt, case.target)
        logits, _ = self.logits_and_targets(model, case.prompt, case.target)
        before, best = [row[0] for row in self.best(original, 1)], self.best(logits, case.top_k)
        if self.match == "string":
            hits = [
                self.tokenizer.decode([b]) in [self.tokenizer.decode([i]) for i in k]
                for b, k in zip(before, best, strict=True)
            ]
        else:
            hits = [b in k for b, k in zip(before, best, strict=True)]
        row = self.row(record, "locality", case, hits, logits, before)
        p, q = original.double().softmax(-1), logits.double().softmax(-1)
        halves = [(a * (a / ((p + q) / 2)).log2()).sum(-1) / 2 for a in (p, q)]
        return row | {"js_similarity": float((1 - halves[0] - halves[1]).mean())}

    def row(self, record, role, case, hits, logits, expected):
        top = [row[0] for row in self.best(logits, 1)]
        first = [a == b for a, b in zip(top, expected, strict=True)]
        if self.match == "string" and role == "locality":
            first = [
                self.tokenizer.decode([a]) == self.tokenizer.decode([b]) for a, b in zip(top, expected, strict=True)
            ]
        return {
            "record": record.id,
            "role": role,
            "prompt": case.prompt,
            "score": sum(hits) / len(hits),
            "top1": sum(first) / len(first),
            "first_token": float(first[0]),
            "after": self.tokenizer.decode(top),
            "exact_match": None,
            "js_similarity": None,
            "edited_hops": 0,
        }


def assert_same(rows, expected):
    assert len(rows) == len(expected)
    for mine, theirs in zip(rows, expected, strict=True):
        exact = {key: value for key, value in theirs.items() if key != "js_similarity"}
        assert {key: mine[key] for key in exact} == exact
        assert mine["js_similarity"] == (
            None if theirs["js_similarity"] is None else pytest.approx(theirs["js_similarity"], abs=5e-5)
        )


class OneAtATime:
    """The same editor, for which every edit is made alone."""

    supports_independent = False

    def __init__(self, editor):
        self.editor, self.modes = editor, Counter()

    def edit(self, *arguments, mode, previous):
        self.modes[mode] += 1
        return self.editor.edit(*arguments, mode=mode, previous=previous)
