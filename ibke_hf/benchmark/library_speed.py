"""What a library of edits costs, in ratios of one run: finding among thousands, adding one, memory of a row."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..core.layers import input_device, layers_to_edit
from ..core.records import EditRequest
from ..core.tokens import encode_prompt, pad_and_label
from ..lifelong.library import EditLibrary
from ..lifelong.reading import read_states
from ..lifelong.router import Router
from ..lifelong.routing import distinct_places
from ..lifelong.search import search_among
from ..lifelong.serving import row_bytes
from ..lifelong.shelf import EditShelf
from .ratios import RUNS, Ratio, compare

EDITS = 10_000
REQUEST = EditRequest("The winner of the 2010 FIFA World Cup was", "Uruguay", "2010 FIFA World Cup")
FIND, ADD, MEMORY = "library_find", "library_add", "library_row_memory"


def library_ratios(
    model: Any, tokenizer: Any, editor: Any = None, *, router: Router | None = None, edits: int = EDITS
) -> list[dict[str, Any]]:
    """Measure a library of edits against the work of the model and of the editor.

    Args:
        model: The backbone.
        tokenizer: Its tokenizer.
        editor: Makes the edit that is added; None leaves out what needs one.
        router: By default an untrained one of the editor's layers, or of the model's middle: it costs the same.
        edits: Edits that the library holds.

    Returns:
        One dict for each measurement: name, shape, ours, reference, unit, and ratio, ours by the reference.
    """
    router = router or Router.for_backbone(model, _layers(model, editor)).eval()
    ratios = [_finding(model, tokenizer, router, edits)]
    if editor is not None:
        ratios += [_adding(model, tokenizer, editor, router), _memory(model, tokenizer, editor)]
    return [ratio.to_json() for ratio in ratios]


def _layers(model: Any, editor: Any) -> list[str]:
    if editor is not None and hasattr(editor.config, "module_names"):
        names: list[str] = editor.config.module_names()
        return names
    template, layers = layers_to_edit(model)
    return [template.format(i=layer) for layer in layers]


def _finding(model: Any, tokenizer: Any, router: Router, edits: int) -> Ratio:
    """Time the router and the search on states that the model has computed anyway, against the model's pass."""
    ids = encode_prompt(tokenizer, REQUEST.prompt)
    states, mask = read_states(model, router.sources, pad_and_label([([*ids, 0], len(ids))]))
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(edits, router.config.dim, generator=generator), dim=-1)
    shelf = EditShelf([str(place) for place in range(edits)], (), _no_edit, search_among(vectors))
    config, device = router.config, input_device(model)
    given = torch.tensor([ids], device=device)

    @torch.no_grad()
    def find() -> None:
        distinct_places(shelf, router(states, mask), config.threshold, config.most_edits)

    @torch.no_grad()
    def run() -> None:
        model(input_ids=given, use_cache=False)

    return compare(FIND, f"{edits:,} edits, 1 × {len(ids)} tokens", find, run, RUNS, device)


def _no_edit(key: str) -> Any:
    raise LookupError(f"edit {key} is a vector alone")


def _adding(model: Any, tokenizer: Any, editor: Any, router: Router) -> Ratio:
    """Time an edit that ends in a library, its file written and its request read, against the edit alone."""
    numbers = iter(range(1_000_000))

    def request() -> EditRequest:  # another one each time: what is there already is not written again
        return EditRequest(REQUEST.prompt, f"{REQUEST.target} {next(numbers):04}", REQUEST.subject)

    with tempfile.TemporaryDirectory() as folder:
        library = EditLibrary(Path(folder) / "library", router, tokenizer)
        return compare(
            ADD,
            "1 request",
            lambda: library.edit(editor, model, tokenizer, [request()]),
            lambda: editor.edit(model, tokenizer, [request()], mode="independent"),
            RUNS,
            input_device(model),
        )


def _memory(model: Any, tokenizer: Any, editor: Any) -> Ratio:
    """Weigh what a row that carries one edit holds of it, against the model's weights."""
    edit = editor.edit(model, tokenizer, [REQUEST], mode="independent")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return Ratio(MEMORY, "1 row, 1 edit", row_bytes(edit), weights, "bytes")
