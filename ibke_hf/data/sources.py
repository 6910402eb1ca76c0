"""Records of every native format, from a file, a folder or a dataset of the Hub, by one call."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from ..core.records import EditCase, EditRecord
from .counterfact import read_counterfact
from .fields import RecordError
from .files import SUFFIXES, json_items, stem
from .knowedit import read_knowedit
from .mquake import read_mquake
from .qaedit import read_qaedit
from .uniedit import read_uniedit
from .zsre import read_zsre

T = TypeVar("T")
Reader = Callable[[Path, Counter[str]], Iterator[EditRecord]]
FORMATS: dict[str, tuple[Reader, tuple[frozenset[str], ...]]] = {  # each with the keys of a record that tell its forms
    "uniedit": (read_uniedit, (frozenset({"edit", "generality"}),)),
    "mquake": (read_mquake, (frozenset({"requested_rewrite", "questions"}),)),
    "counterfact": (
        read_counterfact,
        (frozenset({"requested_rewrite", "paraphrase_prompts"}), frozenset({"case_id", "rephrase_prompt"})),
    ),
    "zsre": (
        read_zsre,
        (frozenset({"src", "alt"}), frozenset({"target_new", "rephrase_prompt"})),
    ),
    "knowedit": (
        read_knowedit,
        (
            frozenset({"target_new", "portability"}),
            frozenset({"target_new", "locality"}),
            frozenset({"text", "labels", "concept"}),
        ),
    ),
    "qaedit": (read_qaedit, (frozenset({"prompt", "target", "rephrase", "locality"}),)),
}
SPLITS = {
    "train": "train",
    "test": "test",
    "eval": "eval",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
}
DESCRIPTIONS = ("dataset_info.json", "dataset_infos.json")  # what `datasets` writes beside its data
SLICE = re.compile(r"(?P<source>.+)\[(?P<start>\d*):(?P<stop>\d*)\]")
HUB_ID = re.compile(r"(?P<id>\w[\w.-]*/\w[\w.-]*)(/(?P<inside>.+))?")


def read_records(
    source: str | Path,
    *,
    format: str | None = None,  # noqa: A002  the word of PROTOCOL and of `datasets`
    split: str | None = None,
    domains: str | Collection[str] | None = None,
    criteria: str | Collection[str] | None = None,
    hops: int | Collection[int] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    without: Collection[str] = (),
    skipped: Counter[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[EditRecord]:
    """Yield the records of a file, a folder or a Hub dataset, one after another; only a set of ids is held.

    Args:
        source: A file; a folder; or the id of a Hub dataset, optionally followed by a path in it, as in
            ``"zjunlp/KnowEdit/benchmark/ZsRE"``. Of a folder or dataset, the record files at its top are read, else
            those further down. A Hub file is downloaded when its turn comes. Each may end in a slice of its records,
            as in ``"zsre.json[:420]"``, which comes before every filter.
        format: One of `FORMATS`; by default each file's first record tells it.
        split: Reads the files of this split alone: those in a folder of this name, or with it as a word of their own
            name.
        domains: Keeps the records of these domains. Where files are named after them, no other file is read.
        criteria: Keeps the cases, of generality and locality, that meet any of these criteria.
        hops: Keeps the cases of these numbers of hops.
        limit: Keeps the first `limit` records that are left; with `seed`, so many drawn with equal chances.
        seed: Seeds the draw; the records drawn keep their order. It takes reading the source to its end.
        without: Leaves out the records that edit any of these subjects, each written as
            :func:`~ibke_hf.core.records.subject_key` does.
        skipped: Counts by reason what was left out.
        revision: Branch, tag or commit of a Hub dataset.
        token: For private Hub datasets.
        cache_dir: Where Hub files are kept.

    Raises:
        ValueError: If `format` is unknown or `limit` is below 1.
        RecordError: While reading: if nothing is found, a file's format is not recognised, several splits are there
            and `split` names none, two records share an id, or a record is unreadable.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, found {format!r}")
    counted: Counter[str] = Counter() if skipped is None else skipped

    def read() -> Iterator[EditRecord]:
        place = find_source(source, split=split, domains=domains, revision=revision, token=token, cache_dir=cache_dir)
        records = _read_files(map(place.fetch, place.names), format, counted)
        yield from islice(records, *_sliced(source)[1])

    chosen: dict[str, Any] = {
        "domains": domains,
        "criteria": criteria,
        "hops": hops,
        "limit": limit,
        "seed": seed,
        "without": without,
    }
    return select(read(), **chosen, skipped=counted)


def select(
    records: Iterable[EditRecord],
    *,
    domains: str | Collection[str] | None = None,
    criteria: str | Collection[str] | None = None,
    hops: int | Collection[int] | None = None,
    limit: int | None = None,
    seed: int | None = None,
    without: Collection[str] = (),
    skipped: Counter[str] | None = None,
) -> Iterator[EditRecord]:
    """Yield the records that pass the filters of :func:`read_records`, which are the same here.

    Raises:
        ValueError: If `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, found {limit}")
    names = _several(criteria, str)
    filters = _Filters(
        _several(domains, str),
        None if names is None else frozenset(map(str.casefold, names)),
        _several(hops, int),
        frozenset(without),
    )
    passing = filters.of(records, Counter() if skipped is None else skipped)
    return islice(passing, limit) if limit is None or seed is None else _sample(passing, limit, seed)


@dataclass(frozen=True)
class Source:
    """The record files of a file, folder or Hub dataset: their names, how to get one, what changes with them."""

    names: tuple[str, ...]
    fetch: Callable[[str], Path]
    stamp: str


def find_source(
    source: str | Path,
    *,
    split: str | None = None,
    domains: str | Collection[str] | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Source:
    """List the record files that :func:`read_records` would read of a source, without reading or downloading any.

    Raises:
        RecordError: If there is none, or the split is not clear.
    """
    source = _sliced(source)[0]
    path = Path(source)
    chosen = _several(domains, str)
    if path.is_dir():
        files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
        names, folder = _select(files, split, chosen, str(source)), path
    elif path.exists():
        names, folder = [path.name], path.parent  # whatever it is called
    else:
        named = HUB_ID.fullmatch(str(source).removeprefix("hf://datasets/")) if isinstance(source, str) else None
        if named is None:
            raise _nothing(str(source))
        return _hub_source(named["id"], named["inside"] or "", split, chosen, revision, token, cache_dir)
    states = [(folder / name).stat() for name in names]
    return Source(
        tuple(names),
        folder.joinpath,
        repr([(n, s.st_size, s.st_mtime_ns) for n, s in zip(names, states, strict=True)]),
    )


def _hub_source(
    repository: str,
    inside: str,
    split: str | None,
    domains: frozenset[str] | None,
    revision: str | None,
    token: str | bool | None,
    cache_dir: str | Path | None,
) -> Source:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    of_client = (
        kind for kind in HfHubHTTPError.__mro__ if issubclass(kind, Exception) and kind.__name__ == "HTTPError"
    )
    failures: tuple[type[Exception], ...] = (
        OSError,
        ValueError,
        *of_client,
    )  # of_client: what a network that is down raises
    label = f"{repository}/{inside}".rstrip("/")

    def asked(call: Callable[[], T]) -> T:
        try:
            return call()
        except failures as error:
            raise RecordError(
                f"{label}: no file or folder here, and the Hub does not give a dataset of this name ({error})"
            ) from error

    info = asked(lambda: HfApi(token=token).dataset_info(repository, revision=revision))
    files = [PurePosixPath(file.rfilename) for file in info.siblings or ()]
    base = PurePosixPath(inside)
    exact = [file.name for file in files if file == base]
    names = exact or _select(
        [str(f.relative_to(base)) for f in files if f.is_relative_to(base)], split, domains, label
    )
    base = base.parent if exact else base

    def fetch(name: str) -> Path:
        return Path(
            asked(
                lambda: hf_hub_download(
                    repository,
                    str(base / name),
                    repo_type="dataset",
                    revision=info.sha,
                    token=token,
                    cache_dir=cache_dir,
                )
            )
        )

    return Source(tuple(names), fetch, f"{repository}@{info.sha}: {names}")


def _select(files: Iterable[str], split: str | None, domains: frozenset[str] | None, label: str) -> list[str]:
    """Choose files by their names: those of the split, then those of the domains if any is named after one."""
    names = sorted(
        n
        for n in files
        if n.endswith(SUFFIXES) and not n.startswith(".") and "/." not in n and not n.endswith(DESCRIPTIONS)
    )
    if not names:
        raise _nothing(label)
    splits = {name: _split_of(name) for name in names}
    if split is None:
        names = [name for name in names if "/" not in name] or names
        told = {splits[name] for name in names}
        if len(told - {""}) > 1 and (
            "" not in told or "/" in names[0]
        ):  # a domain at the top may be called "test drives"
            raise RecordError(f"{label}: holds the splits {', '.join(sorted(told - {''}))}; choose one with split")
    else:
        known = SPLITS.get(split.lower(), split)
        names = [name for name in names if splits[name] == known or split in PurePosixPath(name).parts[:-1]]
        if not names:
            there = ", ".join(sorted(set(splits.values()) - {""})) or "none"
            raise RecordError(f"{label}: no record file of the split {split!r}; the splits found are: {there}")
    named = [name for name in names if domains and stem(name) in domains]
    if named and (missing := sorted(domains - {stem(name) for name in named})):  # type: ignore[operator]
        raise RecordError(
            f"{label}: no file of the domain {', '.join(missing)}; found {', '.join(sorted({stem(n) for n in names}))}"
        )
    return named or names


def _split_of(name: str) -> str:
    """Return the split that a folder, or a word of the file's name, says; "" if none does."""
    *folders, file = PurePosixPath(name.lower()).parts
    return next((SPLITS[word] for word in [*reversed(folders), *re.split(r"[-_ .]", file)] if word in SPLITS), "")


def _nothing(label: str) -> RecordError:
    return RecordError(
        f"{label}: no record file here; expected UniEdit JSON, see `ibke data build`, or MQuAKE, CounterFact, "
        f"ZSRE, KnowEdit or QAEdit JSON"
    )


def _read_files(files: Iterable[Path], format: str | None, skipped: Counter[str]) -> Iterator[EditRecord]:  # noqa: A002
    seen: set[tuple[str, str]] = set()
    for file in files:
        known = format or recognise(file)
        if known is None:
            skipped["file without any record"] += 1
            continue
        for record in FORMATS[known][0](file, skipped):
            if (record.dataset, record.id) in seen:
                raise RecordError(
                    f"{file}: record {record.id!r} of {record.dataset!r} was read before; no two records may "
                    f"share an id"
                )
            seen.add((record.dataset, record.id))
            yield record


def recognise(file: str | Path) -> str | None:
    """Return which of `FORMATS` a file is of, by the keys of its first record; None if it has no record.

    Raises:
        RecordError: If it is none of them, with what was found and what was looked for.
    """
    _, record = next(json_items(file), (None, None))
    if record is None:
        return None
    keys = set(record) if isinstance(record, dict) else set()
    for name, (_, forms) in FORMATS.items():
        if any(form <= keys for form in forms):
            return name
    told = f"the keys {', '.join(sorted(keys)[:12])}" if keys else f"no keys ({str(record)[:40]!r})"
    looked = "; ".join(
        f"{name}: {' or '.join(' + '.join(sorted(form)) for form in forms)}" for name, (_, forms) in FORMATS.items()
    )
    raise RecordError(
        f"{file}: no known format; its first record has {told}. Expected one of {looked}. Name it with format if "
        f"it is one"
    )


@dataclass(frozen=True)
class _Filters:
    """The filters, with criteria in lower case; None lets everything pass."""

    domains: frozenset[str] | None
    criteria: frozenset[str] | None
    hops: frozenset[int] | None
    without: frozenset[str] = frozenset()

    def of(self, records: Iterable[EditRecord], skipped: Counter[str]) -> Iterator[EditRecord]:
        """Yield the records that pass, with the cases that do, and count the others."""
        for record in records:
            if self.domains is not None and record.domain not in self.domains:
                skipped["record of another domain"] += 1
            elif not self.without.isdisjoint(record.subjects):
                skipped["record of a subject to be kept out"] += 1
            elif self.criteria is None and self.hops is None:
                yield record
            else:
                kept = replace(
                    record, generality=self._cases(record.generality), locality=self._cases(record.locality)
                )
                if left_out := len(record.generality + record.locality) - len(kept.generality + kept.locality):
                    skipped["case of other criteria or hops"] += left_out
                if kept.generality or kept.locality:
                    yield kept
                else:
                    skipped["record without a case of these criteria and hops"] += 1

    def _cases(self, cases: tuple[EditCase, ...]) -> tuple[EditCase, ...]:
        kept = [case for case in cases if self.hops is None or case.hops in self.hops]
        return tuple(
            case
            for case in kept
            if self.criteria is None or not self.criteria.isdisjoint(map(str.casefold, case.criteria))
        )


def _sliced(source: str | Path) -> tuple[str | Path, tuple[int, int | None]]:
    """Return a source without the slice that it may end in, and the slice's bounds."""
    sliced = SLICE.fullmatch(source) if isinstance(source, str) and not Path(source).exists() else None
    if sliced is None:
        return source, (0, None)
    return sliced["source"], (int(sliced["start"] or 0), int(sliced["stop"]) if sliced["stop"] else None)


def _several(value: Any, kind: type[T]) -> frozenset[T] | None:
    return None if value is None else frozenset([value] if isinstance(value, kind) else value)


def _sample(records: Iterable[EditRecord], size: int, seed: int) -> Iterator[EditRecord]:
    """Yield a uniform sample in the order of the source, holding no more than it (reservoir sampling)."""
    rng = random.Random(seed)
    kept: list[tuple[int, EditRecord]] = []
    for index, record in enumerate(records):
        if index < size:
            kept.append((index, record))
        elif (place := rng.randrange(index + 1)) < size:
            kept[place] = (index, record)
    yield from (record for _, record in sorted(kept, key=lambda pair: pair[0]))
