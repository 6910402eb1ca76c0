"""Record files for small trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]


CITIES = ("Paris", "Rome", "Berlin", "Oslo", "Vienna", "Madrid")


def fact(head: str, tail: str) -> Json:
    def entity(name: str) -> Json:
        return {"id": f"Q-{name}", "label": name, "description": "", "aliases": []}

    return {
        "head_entity": entity(head),
        "property": {"id": "P1", "label": "place", "description": "", "aliases": []},
        "subject": head,
        "tail_entity": {"order_in_property": 0, "datatype": "wikibase-item", "value": entity(tail)},
    }


def case(prompt: str, target: str, head: str) -> Json:
    hop = {
        "path": ["h", "r", "t"],
        "reverse_in_multi_hop": False,
        "prompt": prompt,
        "target": target,
        **fact(head, target),
    }
    return {
        "path_type": "single",
        "prompt": prompt,
        "target": target,
        "paths": [["h", "r", "t", "f", "s"]],
        "one_hops": [hop],
        "loc_type": "none",
    }


def write_records(file: Path, cities: tuple[str, ...]) -> str:
    records = {
        str(i): {
            "edit": {
                "prompt": f"The {city} tower is in",
                "target": f"{city} West",
                **fact(f"{city} tower", f"{city} West"),
            },
            "generality": {"0": case(f"Where is the {city} tower? It is in", f"{city} West", f"{city} tower")},
            "locality": {"0": case(f"The river of {city} is", "Thames", city)},
        }
        for i, city in enumerate(cities)
    }
    records["empty"] = {**records["0"], "edit": {**records["0"]["edit"], "target": ""}}
    file.write_text(json.dumps(records))
    return str(file)
