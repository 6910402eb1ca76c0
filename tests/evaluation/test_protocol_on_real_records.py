"""Evaluation of real records of every native format against the naive reference with dense weights."""

from __future__ import annotations

from collections import Counter

import pytest
from naive import Naive, assert_same, settings_of

from ibke_hf.data.sources import read_records
from ibke_hf.evaluation.protocol import evaluate_records

SAMPLES = {  # of each as many records as the reference has the patience for
    "counterfact/easyedit_flat_500.json": 5,
    "counterfact/easyedit_flat_train.json": 5,
    "counterfact/easyedit_flat_val.json": 5,
    "counterfact/rome_native_200.json": 2,
    "mquake/mquake_cf_3k_200.json": 3,
    "mquake/mquake_hard_200.json": 2,
    "uniedit/SYNTHETIC_schema_example.json": 4,
    "zsre/zsre_mend_train_500.json": 5,
    "zsre/zsre_mend_eval_24.json": 5,
    "zsre/knowedit_zsre_test_100.json": 4,
}


@pytest.fixture(scope="module")
def setting(tiny_model, tiny_tokenizer):
    return settings_of(
        tiny_model, tiny_tokenizer, max_position_embeddings=1024
    )  # bytes are many, and real prompts long


@pytest.mark.parametrize("sequential", [1, 3])
@pytest.mark.parametrize("name", SAMPLES)
def test_agrees_with_one_case_at_a_time(setting, native_data, name, sequential):
    model, tokenizer, editor = setting("qwen3")
    records = list(read_records(native_data(name), limit=SAMPLES[name], seed=11))
    evaluation = evaluate_records(
        editor, model, tokenizer, records, sequential=sequential, batch_size=7, progress=False
    )
    assert_same(evaluation.rows, Naive(editor, model, tokenizer).evaluate(records, sequential))
    roles = Counter(row["role"] for row in evaluation.rows)
    assert roles["reliability"] == sum(len(record.requests) for record in records)
    assert roles["generality"] == sum(len(record.generality) for record in records) > 0
