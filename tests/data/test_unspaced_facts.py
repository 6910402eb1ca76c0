"""Facts in a script without spaces: the records built of them ask without a space before the target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ibke_hf.core.tokens import encode
from ibke_hf.data.fields import RecordError
from ibke_hf.data.folders import build_folder
from ibke_hf.data.sources import read_records

TABLES = {
    "relations": [
        "relation\tlabel\tsubject_kind\tobject_kind\tsingle_value\tinverse_single",
        "首都\t首都\t国\t城\tyes\tno",
    ],
    "templates": [
        "relation\tform\ttext",
        "首都\tprompt\t{}的首都是",
        "首都\tprompt\t{}的首府叫做",
        "首都\tnoun\t{}的首都",
    ],
    "triples": ["subject\trelation\tobject"]
    + [f"{country}\t首都\t{city}" for country, city in zip("甲乙丙丁戊己", "子丑寅卯辰巳", strict=True)],
}


@pytest.fixture
def facts(tmp_path: Path) -> Path:
    for name, lines in TABLES.items():
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


def test_records_of_such_facts_take_no_space(facts: Path, tmp_path: Path, tiny_tokenizer: Any) -> None:
    build_folder(facts, tmp_path / "built", records=6, validation=0, generality=1, locality=1)
    records = list(read_records(tmp_path / "built" / "train"))
    assert records
    for request in (request for record in records for request in record.requests):
        ids, start = encode(tiny_tokenizer, request.prompt, request.target, prompt_format=request.format)
        assert tiny_tokenizer.decode(ids[start:]) == request.target


@pytest.mark.parametrize("rule", ["sometimes", None, []])
def test_a_rule_that_is_none_is_named(tmp_path: Path, rule: Any, native_data: Callable[[str], Path]) -> None:
    content = json.loads(native_data("uniedit/SYNTHETIC_schema_example.json").read_text(encoding="utf-8"))
    next(iter(content.values()))["leading_space"] = rule
    (tmp_path / "art.json").write_text(json.dumps(content))
    with pytest.raises(
        RecordError, match=r"art\.json: record 'art-12': field 'leading_space' is none of auto, protocol"
    ):
        list(read_records(tmp_path / "art.json"))
