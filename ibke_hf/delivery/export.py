"""`ibke export`, ``edit.export(...)``: an edit in the form that a serving engine takes, and what serves it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.adapter_files import save_edit, with_uniform_rank
from ..core.edits import LowRankEdit, WeightEdit
from ..core.files import written_together
from ..core.layers import input_device
from ..core.tokens import encode_prompt
from ..editors.saved import unmergeable
from ..io import write_text
from ..loading import gguf_file, load_model
from .engines import ENGINES, GGUF_ADAPTER, LORA_ENGINES, MODELFILE, ExportError, serving_line
from .gguf_adapter import BaseFile, modelfile, write_gguf_adapter
from .merged import write_merged

PLACEHOLDER = "BASE_MODEL.gguf"  # in the line of a model whose GGUF file is not known
PROBE = "The quick brown fox jumps over the lazy dog."
SAME_EFFECT = 0.02  # of the edit's own effect: what PEFT may differ by, which rounds and sums otherwise
ROUNDING = 4  # units of the model's precision, of the largest logit: likewise


@dataclass(frozen=True)
class Export:
    """What was written for an engine.

    Attributes:
        engine: One of `ENGINES`.
        folder: Where it lies.
        line: What serves it.
        rank: Of the adapter; 0 for a full model.
        relative_error: ‖ΔW - ΔW_r‖ / ‖ΔW‖ by layer where the edit was truncated; empty where nothing was lost.
        checks: What was checked here, in words.
    """

    engine: str
    folder: Path
    line: str
    rank: int = 0
    relative_error: Mapping[str, float] | None = None
    checks: tuple[str, ...] = ()


def export_edit(
    edit: Any,
    to: str,
    out: str | Path,
    *,
    model: Any = None,
    tokenizer: Any = None,
    base: str | Path | None = None,
    max_rank: int | None = None,
    name: str | None = None,
    force: bool = False,
) -> Export:
    """Write an edit as what an engine serves, check it, and say how to serve it.

    Args:
        edit: A single low-rank edit; for ``merged`` also a dense one.
        to: ``vllm``, ``sglang``, ``peft`` (LoRA adapters), ``gguf``, ``ollama`` (a GGUF LoRA) or ``merged``.
        out: Folder, made if needed.
        model: The loaded backbone. An adapter for PEFT's format is then attached to it by PEFT, and has to have the
            effect of the attached edit; ``merged`` needs it, and leaves it as it was. By default loaded for
            ``merged``.
        tokenizer: Its tokenizer.
        base: Name of the served model: folder, id, or GGUF file (which the adapter is then checked against). By
            default the backbone that the edit names.
        max_rank: Truncate to a rank of at most this.
        name: What requests call the edited model; by default the folder's name.
        force: Merge also into weights other than the edit was made on.

    Raises:
        ValueError: If there is no such engine, the edit holds several independent ones or a memory, or has no form
            that the engine serves; says why and what to do.
    """
    if to not in ENGINES:
        raise ValueError(f"there is no engine {to!r}; engines are {', '.join(ENGINES)}")
    if not isinstance(edit, WeightEdit):
        raise ValueError(unmergeable(str(getattr(edit, "kind", type(edit).__name__))))
    base = edit.info.backbone if base is None else str(base)
    name = name or _server_name(out)
    if to == "merged":
        if max_rank is not None:
            raise ValueError("--max-rank: a merged model has no rank; leave it out")
        if model is None:
            model, tokenizer = load_model(base or None)
        files = write_merged(edit, model, tokenizer, out, force=force)
        checks = (f"{len(files)} file(s) of {str(model.dtype).removeprefix('torch.')} read back as merged",)
        return Export(to, Path(out), serving_line(to, out, base, name=name), checks=checks)
    edit = _low_rank(edit)
    if edit is None:
        raise ValueError(
            f"a dense edit is as large as the weights that it changes and has no adapter for {to}; give --to merged"
        )
    write = _write_gguf if to in ("gguf", "ollama") else _write_lora
    return write(edit, to, Path(out), base, name, max_rank, model, tokenizer)


def _write_lora(
    edit: LowRankEdit, to: str, out: Path, base: str, name: str, most: int | None, model: Any, tokenizer: Any
) -> Export:
    engine = LORA_ENGINES[to]
    engine.require_layers(edit.layers)
    rank = engine.rank(max(edit.ranks.values()), most)
    served = with_uniform_rank(edit, rank=rank)
    save_edit(served, out)
    checks = [_read_back(served, out)]
    if engine.layers:
        checks.append(f"layers and rank {rank} are ones that {engine.name} serves")
    if model is not None and find_spec("peft") is not None:
        checks.append(_same_through_peft(served, out, model, tokenizer))
    layers = " ".join(sorted({layer.rpartition(".")[2] for layer in served.layers}))
    line = serving_line(to, out, base, name=name, rank=rank, layers=layers)
    return Export(to, out, line, rank, _lost(served, edit), tuple(checks))


def _write_gguf(
    edit: LowRankEdit, to: str, out: Path, base: str, name: str, most: int | None, model: Any, tokenizer: Any
) -> Export:
    del model, tokenizer  # llama.cpp's own file is what the adapter has to fit
    file = gguf_file(base) if base else None
    header = None if file is None else BaseFile(file)
    served = with_uniform_rank(edit, max_rank=most)
    place = PLACEHOLDER if file is None else str(file)
    with written_together(out) as scratch:
        write_gguf_adapter(served, scratch, header)
        if to == "ollama":
            write_text(scratch / MODELFILE, modelfile(place, base))
    checks = [f"{GGUF_ADAPTER} reads back as written"]
    if header is not None:
        checks.append(f"architecture {header.architecture}, tensors and widths are those of {header.file.name}")
    rank = max(served.ranks.values())
    line = serving_line(to, out, place, name=name)
    return Export(to, out, line, rank, _lost(served, edit), tuple(checks))


def _low_rank(edit: WeightEdit) -> LowRankEdit | None:
    """Return an edit as factors, such as a solved one, which is a chain of them; None for a dense one."""
    if isinstance(edit, LowRankEdit):
        return edit
    inputs, outputs = {}, {}
    for name in edit.layers:
        first, *rest = edit.matrices(name)
        if not rest:
            return None
        inputs[name], outputs[name] = first.mT, reduce(torch.matmul, rest)
    return LowRankEdit(inputs, outputs, edit.info)


def _lost(served: LowRankEdit, edit: LowRankEdit) -> dict[str, float]:
    """Return the relative errors of a truncation that was made here."""
    return dict(served.relative_error) if max(edit.ranks.values()) > max(served.ranks.values()) else {}


def _read_back(edit: LowRankEdit, folder: Path) -> str:
    if LowRankEdit.from_pretrained(folder) != edit.to("cpu"):
        raise ExportError(f"{folder}: reads back otherwise than it was written; export it again")
    return "the adapter reads back as written"


@torch.no_grad()
def _same_through_peft(edit: LowRankEdit, folder: Path, model: Any, tokenizer: Any) -> str:
    """Attach the adapter by PEFT, and compare logits with those of the attached edit.

    Raises:
        ExportError: If they differ by more than rounding.
    """
    from peft import PeftModel

    prompt = next((request.prompt for request in edit.info.requests), PROBE)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=input_device(model))
    plain = model(input_ids=ids).logits.float()
    with edit.attached(model):
        expected = model(input_ids=ids).logits.float()
    adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    try:
        error = float((adapted(input_ids=ids).logits.float() - expected).abs().max())
    finally:
        adapted.unload()
    effect, rounding = float((expected - plain).abs().max()), ROUNDING * torch.finfo(model.dtype).eps
    if not error <= max(SAME_EFFECT * effect, rounding * float(expected.abs().max())):
        raise ExportError(
            f"{folder}: the edit moves logits by up to {effect:.2g}, and through PEFT they differ from that by "
            f"{error:.2g}; the adapter does not serve this model"
        )
    return f"through PEFT it moves logits as the attached edit does (by up to {effect:.2g}; difference {error:.1g})"


def _server_name(out: str | Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", Path(out).resolve().name.lower()).strip("-.") or "edit"
