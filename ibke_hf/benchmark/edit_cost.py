"""What making, attaching and mixing edits costs, against plain passes of the backbone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..core.capture import case_losses, target_logits
from ..core.edits import LowRankEdit
from ..core.layers import modules_to_edit
from ..core.tokens import TokenBatch
from .ratios import Ratio, compare, in_turns
from .subject import Subject

ROWS = 64
EDITS = (1, 8)  # that are made at once
TOKENS = 8  # that a mixed batch generates where the edited layers are timed alone


def edit_ratios(subject: Subject, runs: int) -> list[Ratio]:
    """Time edits, from text to the edit, against a plain forward and an activation-only backward of the layers above.

    Args:
        subject: Backbone, editor and requests.
        runs: Rounds of each.
    """
    return [
        compare(
            f"edit_b{number}",
            subject.shape(number),
            partial(
                subject.editor.edit, subject.model, subject.tokenizer, subject.requests(number), mode="independent"
            ),
            partial(plain_gradients, subject, subject.batch(number)),
            runs,
            subject.device,
        )
        for number in EDITS
    ]


def plain_gradients(subject: Subject, batch: TokenBatch) -> Sequence[Tensor]:
    """Run the backbone on requests and back to the outputs of the edited layers: what no gradient editor can spare."""
    modules = list(modules_to_edit(subject.model, subject.editor.config.module_names()).values())
    outputs: list[Tensor] = []
    handles = [module.register_forward_hook(partial(_collect, outputs)) for module in modules]
    try:
        with torch.no_grad():
            loss = case_losses(*target_logits(subject.model, batch)).sum()
            return torch.autograd.grad(loss, outputs)
    finally:
        for handle in handles:
            handle.remove()


def _collect(outputs: list[Tensor], _: nn.Module, __: Any, output: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        torch.set_grad_enabled(True)  # ends with the no_grad of the pass
        output = output.detach().requires_grad_(True)
    outputs.append(output)
    return output


# --- attached -----------------------------------------------------------------------------------------------------


def attached_ratios(subject: Subject, runs: int) -> list[Ratio]:
    """Time a forward pass with one edit attached against a plain one, 8 rows."""
    edit = subject.editor.edit(subject.model, subject.tokenizer, subject.requests(1))
    shape = f"{subject.shape(8)}, rank {max(edit.ranks.values())}"
    plain = partial(forward, subject.model, subject.batch(8))
    return [
        compare("attached_forward", shape, partial(attached, edit, subject.model, plain), plain, runs, subject.device)
    ]


def attached(edit: LowRankEdit, model: Any, run: Callable[[], Tensor]) -> Tensor:
    """Run something with an edit attached."""
    with edit.attached(model):
        return run()


@torch.no_grad()
def forward(model: Any, batch: TokenBatch) -> Tensor:
    """Return the logits of the columns that hold targets."""
    return target_logits(model, batch)[0]


def mixed_ratios(subject: Subject, runs: int, rows: int = ROWS) -> list[Ratio]:
    """Time a forward of rows with an edit each against a plain one, and against PEFT's mixed batch where it is there.

    The last entry is of the edited layers alone, a new token for each row, as in generation: the rest of a forward is
    the same in both.

    Args:
        subject: Backbone, editor and requests.
        runs: Rounds of each.
        rows: Rows of the batch, each with an edit of its own.
    """
    edit = mixed_edit(subject, rows)
    shape = f"{subject.shape(rows)}, {rows} edits of rank {max(edit.ranks.values())}"
    batch = subject.batch(rows)
    plain = partial(forward, subject.model, batch)
    passes: dict[str, Callable[[], Any]] = {"plain": plain, "ours": partial(attached, edit, subject.model, plain)}
    with peft_copy(subject.model, edit) as (wrapped, names):
        if wrapped is not None:
            passes["peft"] = partial(peft_forward, wrapped, names, batch)
        medians = in_turns(passes, runs, subject.device)
        unit = "CPU s" if subject.device.type == "cpu" else "s"
        results = [Ratio(f"mixed_{rows}", shape, medians["ours"], medians["plain"], unit)]
        if wrapped is not None:
            results.append(Ratio(f"mixed_{rows}_vs_peft", shape, medians["ours"], medians["peft"], unit))
            results.append(_layers_ratio(subject, edit, wrapped, names, runs, unit))
    return results


def mixed_edit(subject: Subject, rows: int) -> LowRankEdit:
    """Make an edit for each row, the edits of a few requests over and over, each a little stronger than the last."""
    few = min(rows, len(subject.records), 8)
    made = subject.editor.edit(subject.model, subject.tokenizer, subject.requests(few), mode="independent")
    edit = made.select([i % few for i in range(rows)])
    strengths = torch.linspace(0.5, 1.0, rows, device=subject.device).view(-1, 1, 1)
    return LowRankEdit(edit.inputs, {name: outputs * strengths for name, outputs in edit.outputs.items()})


@contextmanager
def peft_copy(model: Any, edit: LowRankEdit) -> Iterator[tuple[Any, list[str]]]:
    """Give a copy of the backbone that carries the edits as PEFT adapters, and their names; None without PEFT."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        yield None, []
        return
    rank, names = max(edit.ranks.values()), [f"edit_{i}" for i in range(len(edit))]
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(edit.layers))
    wrapped: Any = get_peft_model(copy.deepcopy(model), settings, adapter_name=names[0])
    for name in names[1:]:
        wrapped.add_adapter(name, settings)
    with torch.no_grad():
        for layer in edit.layers:
            module = wrapped.base_model.model.get_submodule(layer)
            for row, name in enumerate(names):
                module.lora_A[name].weight.copy_(edit.inputs[layer][row])
                module.lora_B[name].weight.copy_(edit.outputs[layer][row].mT)
    yield wrapped.eval(), names


@torch.no_grad()
def peft_forward(wrapped: Any, names: list[str], batch: TokenBatch) -> Tensor:
    """Return the logits of PEFT's mixed batch, of the columns that hold targets."""
    logits: Tensor = wrapped(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.kept,
        adapter_names=names,
    ).logits
    return logits


def _layers_ratio(subject: Subject, edit: LowRankEdit, wrapped: Any, names: list[str], runs: int, unit: str) -> Ratio:
    """Time the edited layers alone, one token a row."""
    modules = modules_to_edit(subject.model, list(edit.layers))
    others = [wrapped.base_model.model.get_submodule(layer) for layer in edit.layers]
    inputs = {
        name: torch.randn(len(edit), 1, edit.inputs[name].shape[2], device=subject.device) for name in edit.layers
    }

    @torch.no_grad()
    def ours() -> None:
        with edit.attached(subject.model):
            for _ in range(TOKENS):
                for name, module in modules.items():
                    module(inputs[name])

    @torch.no_grad()
    def theirs() -> None:
        for _ in range(TOKENS):
            for name, module in zip(edit.layers, others, strict=True):
                module(inputs[name], adapter_names=names)

    medians = in_turns({"ours": ours, "peft": theirs}, runs, subject.device)
    shape = f"{len(edit)} × 1 token, the edited layers alone, {TOKENS} tokens one after another"
    return Ratio(f"mixed_{len(edit)}_layers_vs_peft", shape, medians["ours"], medians["peft"], unit)
