"""What a library of edits costs, in ratios of one run: finding among thousands, adding one, memory of a row."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from ..core.layers import input_device
from ..core.records import EditRequest
from ..core.tokens import encode_prompt, pad_and_label
from ..lifelong.library import EditLibrary
from ..lifelong.reading import read_states
from ..lifelong.router import Router
from ..lifelong.routing import distinct_places
from ..lifelong.search import search_among
from ..lifelong.serving import forward_seconds, row_bytes, seconds_of
from ..lifelong.shelf import EditShelf

EDITS = 10_000
REQUEST = EditRequest("The winner of the 2010 FIFA World Cup was", "Uruguay", "2010 FIFA World Cup")
Ratio = dict[str, Any]


def library_ratios(
    model: Any, tokenizer: Any, editor: Any = None, *, router: Router | None = None, edits: int = EDITS
) -> list[Ratio]:
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
    rows = [_finding(model, tokenizer, router, edits)]
    if editor is not None:
        rows += [_adding(model, tokenizer, editor, router), _memory(model, tokenizer, editor)]
    return rows


def _layers(model: Any, editor: Any) -> list[str]:
    from ..core.layers import layers_to_edit

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
    search, none = search_among(vectors), ()
    shelf = EditShelf([str(place) for place in range(edits)], none, _no_edit, search)
    config = router.config
    finding = seconds_of(lambda: distinct_places(shelf, router(states, mask), config.threshold, config.most_edits))
    forward = forward_seconds(model, torch.tensor([ids], device=input_device(model)))
    return _ratio(
        "finding the edits of a prompt / a forward pass", f"{edits} edits, {len(ids)} tokens", finding, forward, "s"
    )


def _no_edit(key: str) -> Any:
    raise LookupError(f"edit {key} is a vector alone")


def _adding(model: Any, tokenizer: Any, editor: Any, router: Router) -> Ratio:
    """Time an edit that ends in a library, its file written and its request read, against the edit alone."""
    numbers = iter(range(1_000_000))

    def request() -> EditRequest:  # another one each time: what is there already is not written again
        return EditRequest(REQUEST.prompt, f"{REQUEST.target} {next(numbers)}", REQUEST.subject)

    alone = seconds_of(lambda: editor.edit(model, tokenizer, [request()], mode="independent"))
    with tempfile.TemporaryDirectory() as folder:
        library = EditLibrary(Path(folder) / "library", router, tokenizer)
        adding = seconds_of(lambda: library.edit(editor, model, tokenizer, [request()]))
    return _ratio("editing and adding / editing", "1 edit", adding, alone, "s")


def _memory(model: Any, tokenizer: Any, editor: Any) -> Ratio:
    edit = editor.edit(model, tokenizer, [REQUEST], mode="independent")
    weights = sum(parameter.nbytes for parameter in model.parameters())
    return _ratio("memory of a row with one edit / the model's weights", "1 edit", row_bytes(edit), weights, "bytes")


def _ratio(name: str, shape: str, ours: float, reference: float, unit: str) -> Ratio:
    return {
        "name": name,
        "shape": shape,
        "ours": ours,
        "reference": reference,
        "unit": unit,
        "ratio": ours / reference,
    }
