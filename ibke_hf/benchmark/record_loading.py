"""How long a training's records take to be at hand, and what they hold in memory, at the size of UniEdit."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ..training.recipe import records_of
from .ratios import Ratio

RECORDS, DOMAINS = 207_419, 25  # of UniEdit's training records, a file for each domain
START_UP = 60.0  # seconds that are asked for once the records were read for the first time
MEMORY = 512 * 2**20  # bytes beside what is mapped from the disk
DRAWN = 2_000  # records that are read in the order of a training
MEGABYTE = 10**6


def record_ratios(number: int = RECORDS, files: int = DOMAINS) -> list[Ratio]:
    """Time the start of a training on synthetic records in UniEdit's format, and measure what it keeps in memory.

    Args:
        number: Records.
        files: Files that they lie in.

    Returns:
        Seconds of the first time and of a later one, against `START_UP`; bytes of memory of its own, against
        `MEMORY`; and how far from even the shares of the files are among the first records of a training.
    """
    with TemporaryDirectory() as folder:
        source = Path(folder) / "train"
        size = write_records(source, number, files)
        shape = f"{number:,} records in {files} files, {size / MEGABYTE:,.0f} MB"
        first = _seconds_to_records(source, folder)[0]
        before = own_memory()
        again, records = _seconds_to_records(source, folder)
        order = random.Random(0).sample(range(len(records)), min(DRAWN, len(records)))
        domains = [records[index].domain for index in order]
        kept = max(own_memory() - before, 0)
    uneven = max(domains.count(name) for name in set(domains)) * files / len(domains)
    return [
        Ratio("records_first_time", shape, first, START_UP, "s"),
        Ratio("records_start_up", shape, again, START_UP, "s"),
        Ratio("records_memory", f"{shape}, {len(order):,} of them read", kept, MEMORY, "bytes"),
        Ratio(
            "records_of_largest_file", f"{len(order):,} drawn, over {len(set(domains))} files", uneven, 1.0, "share"
        ),
    ]


def _seconds_to_records(source: Path, cache: str) -> tuple[float, Any]:
    start = time.perf_counter()
    records = records_of([str(source)], {}, cache_dir=str(Path(cache) / "cache"))
    assert records is not None
    records[len(records) - 1]
    return time.perf_counter() - start, records


def own_memory() -> int:
    """Return the bytes of this process's memory that are not mapped from a file; 0 where the system does not say."""
    file = Path("/proc/self/status")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def write_records(folder: Path, number: int, files: int) -> int:
    """Write synthetic records in UniEdit's format, a file for each of several domains; return their bytes."""
    folder.mkdir(parents=True)
    shares = [number // files + (i < number % files) for i in range(files)]
    for place, share in enumerate(shares):
        with (folder / f"domain {place:02d}.json").open("w", encoding="utf-8") as file:
            file.write("{")
            for i, record in enumerate(_records(place, share)):
                file.write(f"{', ' if i else ''}{json.dumps(str(i))}: {json.dumps(record)}")
            file.write("}")
    return sum(file.stat().st_size for file in folder.iterdir())


def _records(domain: int, number: int) -> Iterator[dict[str, Any]]:
    """Yield records of a request with a generality case of two hops and a locality case, as UniEdit has them."""
    for i in range(number):
        head, tail, other = (_entity(f"{kind} {domain}-{i}") for kind in ("river", "sea", "lake"))
        region, country = _entity(f"region {domain}-{i % 97}"), _entity(f"country {i % 31}")
        edit = _fact(head, "mouth of the watercourse", tail)
        hops = [
            _hop(["h_e", "r_e", "t_e"], f"The {head['label']} flows into", edit),
            _hop(["t_e", "r_1", "e_1"], f"The {tail['label']} lies in", _fact(tail, "location", region)),
        ]
        local = _hop(["h_l", "r_l", "t_l"], f"The {other['label']} is in", _fact(other, "country", country))
        yield {
            "edit": {"prompt": hops[0]["prompt"], "target": tail["label"], "subject": head["label"], **edit},
            "generality": {"0": _case(f"The water that {head['label']} flows into lies in", region["label"], hops)},
            "locality": {"0": {"loc_type": "none", **_case(local["prompt"], country["label"], [local])}},
        }


def _entity(name: str) -> dict[str, Any]:
    return {"id": f"Q-{name}", "label": name, "description": f"the {name} of a made world", "aliases": [f"{name} too"]}


def _fact(head: dict[str, Any], relation: str, tail: dict[str, Any]) -> dict[str, Any]:
    named = {"id": f"P-{relation}", "label": relation, "description": "", "aliases": [], "single_value": True}
    value = {"order_in_property": 0, "datatype": "wikibase-item", "value": tail}
    return {"head_entity": head, "property": named, "tail_entity": value, "single_inverse": False}


def _hop(path: list[str], prompt: str, fact: dict[str, Any]) -> dict[str, Any]:
    names = {"subject": fact["head_entity"]["label"], "target": fact["tail_entity"]["value"]["label"]}
    return {"path": path, "reverse_in_multi_hop": False, "prompt": prompt, **names, **fact}


def _case(prompt: str, target: str, hops: list[dict[str, Any]]) -> dict[str, Any]:
    paths = [[*hop["path"], "f", "s"] for hop in hops]
    return {"path_type": "single", "prompt": prompt, "target": target, "paths": paths, "one_hops": hops}
