"""The passes of an edit, a training step and serving, in their plainest form: run on the meta device they are counted.

Tensors of the meta device have shapes and no values, so a backbone of any size is run in a moment and without its
weights. The same passes with real tensors on a few blocks tell how fast a machine does them.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from ..core.capture import GradientFactors, recording
from ..core.edits import LowRankEdit
from ..core.layers import modules_to_edit
from ..core.modeling_ibke import GradientEditor

CASES = 2  # of a record: a generality and a locality case, as UniEdit has them


@dataclass(frozen=True)
class Work:
    """How much is run at once.

    Attributes:
        records: Of a training step.
        tokens: Of a text with its padding.
        targets: Tokens of a text that are judged.
        rows: Texts that are served at once.
        context: Tokens of each of them.
    """

    records: int = 8
    tokens: int = 64
    targets: int = 8
    rows: int = 1
    context: int = 2048


@dataclass(frozen=True)
class Counted:
    """What some passes take.

    Attributes:
        peak: Bytes that they allocate at once, beside what was there before.
        flops: Floating-point operations of their matrix products.
    """

    peak: int
    flops: int


class Counter(TorchDispatchMode):
    """Counts bytes that are alive at once, and floating-point operations, of what runs inside of the block.

    Args:
        present: Tensors that are there already, such as weights, and do not count.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.alive = self.peak = self.flops = 0
        self._known: Any = WeakIdKeyDictionary()
        for tensor in present:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.alive -= size


class FusedAttention(TorchFunctionMode):
    """Has attention on the meta device keep no matrix of scores, as the kernels of real devices do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention or not args or not args[0].is_meta:
            return func(*args, **kwargs)
        query, key, value = args[:3]
        groups = query.shape[1] // key.shape[1]
        if groups > 1:  # a kernel reads each head of keys for several of queries: as wide, and not kept
            key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
        mask = kwargs.get("attn_mask")
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.to(query.dtype)
        operation = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return operation(query, key, value, 0.0, False, attn_mask=mask, scale=kwargs.get("scale"))[0]


def count(run: Callable[..., Any], *models: nn.Module, work: Work) -> Counted:
    """Run one of the passes of this module and count it.

    Args:
        run: Such as :func:`training_passes`.
        models: Its models, on the meta device or any other.
        work: How much is run.
    """
    present = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    with FusedAttention(), Counter(present) as counter:
        result = run(*models, work)
    del result
    for model in models:
        model.zero_grad()
    return Counted(counter.peak, counter.flops)


# --- the passes ---------------------------------------------------------------------------------------------------


def training_passes(model: Any, editor: GradientEditor, work: Work) -> None:
    """Run what a step of :func:`~ibke_hf.training.objective.run_batch` runs, without its bookkeeping, and back."""
    factors = _capture(model, editor, work.records, work)
    adapted = editor(factors, sample=True)
    edit = editor.as_edit(adapted)
    cases = work.records * CASES
    with edit.attached(model):
        logits = _logits(model, cases, work.tokens, work.targets).flatten(0, 1)
    general, local = logits.chunk(2)
    with torch.no_grad():
        original = _logits(model, cases // 2, work.tokens, work.targets).flatten(0, 1)
    labels = torch.zeros(len(general), dtype=torch.long, device=logits.device)
    loss = functional.cross_entropy(general.float(), labels)
    edited, before = local.float().log_softmax(-1), original.float().log_softmax(-1)
    loss = loss + (edited.exp() * (edited - before)).sum(-1).mean()
    for layer in adapted:
        if layer.mean is not None and layer.log_variance is not None:
            loss = loss + (layer.log_variance.exp() + layer.mean.square() - layer.log_variance).sum()
    loss.backward()


@torch.no_grad()
def edit_passes(model: Any, editor: GradientEditor, work: Work) -> LowRankEdit:
    """Make one edit of one request."""
    return editor.as_edit(editor(_capture(model, editor, 1, work), with_variance=False))


@torch.no_grad()
def serving_passes(model: Any, work: Work) -> Any:
    """Read `rows` texts of `context` tokens and keep what generation goes on from."""
    return _call(model, work.rows, work.context, 1, use_cache=True)


def _capture(model: Any, editor: GradientEditor, rows: int, work: Work) -> list[GradientFactors]:
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}
    modules = modules_to_edit(model, editor.config.module_names())
    with torch.no_grad(), recording(modules, inputs, outputs):
        logits = _logits(model, rows, work.tokens, work.targets).flatten(0, 1)
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = functional.cross_entropy(logits.float(), labels)
        gradients = torch.autograd.grad(loss, [outputs[name] for name in modules])
    mask = torch.ones(rows, work.tokens, dtype=torch.bool, device=logits.device)
    shape, norms = (rows, work.tokens, -1), torch.ones(rows, device=logits.device)
    return [
        GradientFactors(inputs[name].float().view(shape), gradient.float().view(shape), mask, norms)
        for name, gradient in zip(modules, gradients, strict=True)
    ]


def _logits(model: Any, rows: int, tokens: int, kept: int) -> Tensor:
    logits: Tensor = _call(model, rows, tokens, kept, use_cache=False).logits
    return logits[:, -kept:]


def _call(model: Any, rows: int, tokens: int, kept: int, *, use_cache: bool) -> Any:
    weight = model.get_input_embeddings().weight
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=weight.device)
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool, device=weight.device)
    positions = torch.arange(tokens, device=weight.device).expand(rows, -1)
    accepted = set(inspect.signature(model.forward).parameters)
    extra = {"attention_mask": mask, "position_ids": positions, "logits_to_keep": kept}
    return model(input_ids=ids, use_cache=use_cache, **{n: v for n, v in extra.items() if n in accepted})


def empty_model(config: Any, dtype: torch.dtype = torch.float32, device: str = "meta") -> Any:
    """Return a frozen backbone of a config with the weights of its initialisation, on the meta device with none."""
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def empty_editor(model: Any, layers: Sequence[int] | None, fields: dict[str, Any], device: str = "meta") -> Any:
    """Return an untrained editor for a backbone, on the meta device without weights."""
    from ..core.modeling_ibke import IBKEEditor

    with torch.device(device):
        return IBKEEditor.for_backbone(model, layers, **fields)


__all__ = [
    "CASES",
    "Counted",
    "Counter",
    "Work",
    "count",
    "edit_passes",
    "empty_editor",
    "empty_model",
    "serving_passes",
    "training_passes",
]
