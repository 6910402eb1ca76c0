"""Small records in the native format of UniEdit, and files of them."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ibke_hf.data.uniedit import read_uniedit

Json = dict[str, Any]


def entity(name: str, *aliases: str, **extra: Any) -> Json:
    return {"id": f"Q-{name}", "label": name, "description": "", "aliases": list(aliases), **extra}


def fact(head: Json, relation: str, tail: Any, datatype: str = "wikibase-item") -> Json:
    named = {"id": f"P-{relation}", "label": relation, "description": "", "aliases": [], "single_value": True}
    return {
        "head_entity": head,
        "property": named,
        "tail_entity": {"order_in_property": 0, "datatype": datatype, "value": tail},
        "single_inverse": False,
    }


def hop(path: list[str], prompt: str, target: str, triple: Json, **extra: Any) -> Json:
    return {
        "path": path,
        "reverse_in_multi_hop": False,
        "prompt": prompt,
        "subject": triple["head_entity"]["label"],
        "target": target,
        **triple,
        **extra,
    }


def single(prompt: str, target: str, *hops: Json, **extra: Any) -> Json:
    paths = [[*h["path"], "f", "s"] for h in hops]
    return {**extra, "path_type": "single", "prompt": prompt, "target": target, "paths": paths, "one_hops": list(hops)}


OSLO, NORWAY, BERGEN = entity("Oslo", "Christiania", P31=["Q-city"]), entity("Norway", "Norge"), entity("Bergen")


EDIT_HOP = hop(["h_e", "r_e", "t_e"], "Oslo lies in", "Norway", fact(OSLO, "country", NORWAY))


def record() -> Json:
    """A record with one case of each role and keys that no description knows."""
    speech = hop(
        ["t_e", "r_1", "e_1"], "The language of Norway is", "Norwegian", fact(NORWAY, "language", entity("Norwegian"))
    )
    founded = fact(BERGEN, "inception", {"time": "+1070", "precision": 9}, "time")
    other = hop(["h_l", "r_l", "t_l"], "Bergen was founded in", "1070", founded)
    edit = {
        "prompt": "Oslo lies in",
        "target": "Norway",
        "subject": "Oslo",
        "note": "unknown key",
        **fact(OSLO, "country", NORWAY),
    }
    return json.loads(
        json.dumps(
            {  # no two parts share an object
                "edit": edit,
                "extra": 1,
                "generality": {"0": single("The language of the country of Oslo is", "Norwegian", EDIT_HOP, speech)},
                "locality": {"0": single("Bergen was founded in", "1070", other, loc_type="none")},
            }
        )
    )


def write(folder: Path, records: Any, name: str = "geography.json") -> Path:
    file = folder / name
    text = json.dumps(records)
    file.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return file


def read(folder: Path, *records: Json, skipped: Counter[str] | None = None) -> list[Any]:
    return list(read_uniedit(write(folder, {str(i): r for i, r in enumerate(records)}), skipped))
