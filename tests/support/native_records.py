"""Small records of CounterFact, ZSRE and MQuAKE as their native files hold them, and a reader of any of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from ibke_hf.core.records import EditRecord
from ibke_hf.data.counterfact import read_counterfact
from ibke_hf.data.mquake import read_mquake
from ibke_hf.data.zsre import read_zsre

Json = dict[str, Any]


def rewrite(**changes: Any) -> Json:
    return {
        "prompt": "{} lies in",
        "relation_id": "P17",
        "target_new": {"str": "Norway", "id": "Q20"},
        "target_true": {"str": "Denmark", "id": "Q35"},
        "subject": "Oslo",
        **changes,
    }


def rome(**changes: Any) -> Json:
    return {
        "case_id": 7,
        "requested_rewrite": rewrite(),
        "paraphrase_prompts": ["A. Oslo is in"],
        "neighborhood_prompts": ["Ribe is in"],
        "attribute_prompts": ["Bergen is in"],
        "generation_prompts": [],
        **changes,
    }


def easyedit(**changes: Any) -> Json:
    return {
        "case_id": 7,
        "prompt": "Oslo lies in",
        "target_new": "Norway",
        "subject": "Oslo",
        "ground_truth": "Denmark",
        "rephrase_prompt": "People in Oslo speak",
        "locality_prompt": "Ribe is in",
        "locality_ground_truth": "Denmark",
        **changes,
    }


def mend(**changes: Any) -> Json:
    return {
        "subject": "Oslo",
        "src": "Where does Oslo lie?",
        "pred": "Denmark",
        "rephrase": "Where is Oslo?",
        "alt": "Norway",
        "answers": ["Denmark"],
        "loc": "nq question: who sang it",
        "loc_ans": "Abba",
        "cond": "",
        **changes,
    }


def knowedit(**changes: Any) -> Json:
    return {
        "subject": "Oslo",
        "target_new": "Norway",
        "prompt": "Where does Oslo lie?",
        "ground_truth": ["Denmark"],
        "rephrase_prompt": "Where is Oslo?",
        "locality": {},
        "portability": {},
        **changes,
    }


def mquake(**changes: Any) -> Json:
    def hop(cloze: str, answer: str, *aliases: str) -> Json:
        return {"question": f"{cloze}?", "cloze": cloze, "answer": answer, "answer_alias": list(aliases)}

    triples = [["Q585", "P17", "Q20"], ["Q20", "P37", "Q9043"]]
    return {
        "case_id": 7,
        "requested_rewrite": [{**rewrite(), "question": "Where?"}],
        "questions": ["Which language? ", "What tongue?", "Q?"],
        "answer": "Danish",
        "answer_alias": [],
        "new_answer": "Norwegian",
        "new_answer_alias": ["Norwegian", "norsk", "norsk"],
        "single_hops": [],
        "new_single_hops": [hop("Oslo lies in", "Norway"), hop("The language of Norway is", "Norwegian")],
        "orig": {"new_triples": triples, "edit_triples": triples[:1]},
        **changes,
    }


READERS = {"counterfact": read_counterfact, "zsre": read_zsre, "mquake": read_mquake}


def read(folder: Path, dataset: str, *records: Any, skipped: Counter[str] | None = None) -> list[EditRecord]:
    file = folder / f"{dataset}-cf.v2.json"
    file.write_text(json.dumps(records), encoding="utf-8")
    return list(READERS[dataset](file, skipped))
