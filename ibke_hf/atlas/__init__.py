"""Atlas, the embedded world: true facts, a small language model that knows them, and editors trained on it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..editors.catalogue import ATLAS, OF_ATLAS

FACTS = Path(__file__).parent / "facts"
ASSETS = Path(__file__).parent / "assets"
RIVALS = ("ft", "rome", "alphaedit", "t_patcher", "lemoe", "grace")
HYPER_PARAMETERS = "hyper_parameters.json"


def load_backbone(folder: str | Path | None = None) -> tuple[Any, Any]:
    """Return the Atlas backbone, in eval mode and fp32, and its tokenizer."""
    from ..loading import load_model

    model, tokenizer = load_model(folder, dtype="float32")
    model.config.name_or_path = ATLAS
    return model, tokenizer


def load_editor(name: str = "ibke") -> Any:
    """Return a trained Atlas editor in eval mode and fp32: ``ibke`` or ``mend``."""
    from .. import loading

    if name not in OF_ATLAS:
        raise ValueError(f"Atlas has trained editors named {', '.join(OF_ATLAS)}, found {name!r}")
    editor = loading.load_editor(ASSETS / name)
    editor.config.name_or_path = f"{ATLAS}/{name}"
    return editor


def load_router() -> Any:
    """Return the router that was trained for the Atlas editors, in eval mode."""
    from ..lifelong.router import Router

    return Router.from_pretrained(ASSETS / "router").eval()


def load_rival(name: str, model: Any = None, statistics: Any = None, *, edits: int = 1, **settings: Any) -> Any:
    """Return an editor without weights for the Atlas backbone, its hyper-parameters as chosen on validation records.

    Args:
        name: One of :data:`RIVALS`.
        model: The backbone; by default it is loaded.
        statistics: Its key statistics, where the editor needs them; by default :func:`atlas_statistics`.
        edits: Number of edits that the model will carry at once; see :func:`tuned_at`.
        settings: Hyper-parameters in place of those.

    Raises:
        ValueError: If there is no such editor.
    """
    from ..editors.catalogue import build_editor, kind_of

    chosen = chosen_settings()[str(tuned_at(name, edits))][name] | settings
    model = load_backbone()[0] if model is None else model
    if statistics is None and kind_of(name).needs_statistics:
        statistics = atlas_statistics(model)
    return build_editor(name, model, statistics=statistics, **chosen)


def chosen_settings() -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters of :data:`RIVALS` by the number of edits they were chosen at, then by editor."""
    from ..io import read_json

    return read_json(ASSETS / HYPER_PARAMETERS)


def tuned_at(name: str, edits: int) -> int:
    """Return the number of edits at once that the settings for `edits` were chosen at: the largest up to it.

    Raises:
        ValueError: If there is no such editor.
    """
    if name not in RIVALS:
        raise ValueError(f"Atlas has hyper-parameters for {', '.join(RIVALS)}, found {name!r}")
    return max(int(count) for count, by_name in chosen_settings().items() if name in by_name and int(count) <= edits)


def atlas_statistics(model: Any = None, tokenizer: Any = None, cache: str | Path | None = None) -> Any:
    """Return the statistics of the keys of all layers over one epoch of what the backbone was pretrained on.

    Args:
        model: The backbone; loaded if it is not given.
        tokenizer: Its tokenizer; loaded if it is not given.
        cache: Folder of the cache; by default ``ibke_hf`` in the Hugging Face cache. The first call measures for a
            minute.
    """
    from huggingface_hub import constants

    from ..core.layers import number_of_layers
    from ..editors.locate.key_statistics import KeyStatistics
    from .corpus import epoch_sentences

    if model is None or tokenizer is None:
        loaded = load_backbone()
        model, tokenizer = loaded[0] if model is None else model, loaded[1] if tokenizer is None else tokenizer
    texts = [f"{prompt} {answer}" for prompt, answer in epoch_sentences(load_split().taught, 0)]
    folder = Path(constants.HF_HOME) / "ibke_hf" if cache is None else cache
    return KeyStatistics.of(model, tokenizer, texts, range(number_of_layers(model)), cache=folder, batch_tokens=4096)


def load_records(split: str) -> list[Any]:
    """Return the committed records of a split, ``test``, ``held_out`` or ``validation``, in their seeded order."""
    return sorted(_read(ASSETS / "records" / split), key=lambda record: int(record.id.rpartition("-")[2]))


@cache
def load_split() -> Any:
    """Return who may see what: the taught and withheld triples of Atlas, see :mod:`ibke_hf.atlas.splits`."""
    from ..data.facts import load_world
    from .splits import split_world

    return split_world(load_world(FACTS))


def _read(folder: Path) -> Iterator[Any]:
    from ..data.uniedit import read_uniedit

    files = sorted(folder.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{folder}: no records; the splits are test, held_out and validation")
    for file in files:
        yield from read_uniedit(file)
