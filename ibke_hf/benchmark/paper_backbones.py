"""What edits and training steps take on the paper's backbones: their true dimensions, random weights, one device.

Each backbone is held against the roofline that this run measures on the device: the product of large matrices and the
copy of a large tensor, in the backbone's precision. The passes are those of edits and of training steps, on random
tokens, so that no tokenizer and nothing of the Hub is needed.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..core.configuration_ibke import PRESETS, IBKEConfig
from ..core.modeling_ibke import IBKEEditor
from ..core.tokens import IGNORED, TokenBatch
from ..training.needs import TrainingNeeds, backbone_config, dtype_of, plan_needs
from ..training.objective import run_batch
from ..training.passes import Work, empty_model
from .memory_use import peak_bytes
from .ratios import seconds_of
from .tiny_models import tiny_config

MINUTES = 9.0  # for all backbones together
RUNS, WARM = 5, 2
WEIGHT_READS = 5  # of the backbone in a step: three passes forward and two back, each of which reads every weight
EDITOR_READS = 7  # and writes, of the editor: weights twice, gradients twice, two moments, weights written
VOCABULARY, WIDTH = 320, 16  # of the small ones
SMALL_WORK, PAPER_WORK = Work(2, 12, 3), Work(8, 32, 8)


@dataclass(frozen=True)
class Roofline:
    """What a device does at most, as measured.

    Attributes:
        flops: Floating-point operations a second, of a product of matrices.
        bandwidth: Bytes a second, read and written, of a copy.
    """

    flops: float
    bandwidth: float

    def seconds(self, flops: float, size: float) -> float:
        """Return the seconds that so many operations and bytes take at least."""
        return max(flops / self.flops, size / self.bandwidth)


def measure_paper_backbones(
    device: str | None = None,
    *,
    names: Sequence[str] = tuple(PRESETS),
    dtype: str | None = None,
    small: bool = False,
    minutes: float = MINUTES,
    runs: int = RUNS,
) -> Iterator[dict[str, Any]]:
    """Yield what each backbone takes: seconds, bytes, and the share of the roofline; or why it was not measured.

    Args:
        device: Where they are measured; by default the machine's accelerator, else its CPU.
        names: Of the backbones, which have a preset.
        dtype: Precision of the backbones; by default the paper's.
        small: Measure the same architectures at toy size, to try the measurement itself.
        minutes: A backbone that would begin after this time is left out.
        runs: Runs that a median is taken of.
    """
    place = torch.device(device) if device else torch.accelerator.current_accelerator() or torch.device("cpu")
    start = time.monotonic()
    for number, name in enumerate(names):
        spent = time.monotonic() - start
        if number and spent + spent / number > 60 * minutes:
            yield {"backbone": name, "left_out": f"no time: {spent:.0f} of {60 * minutes:.0f} s were spent before it"}
            continue
        model = editor = None
        try:
            needs, small_config = needs_of(name, dtype, small=small)
            if reason := _too_large(needs, place):
                yield {"backbone": name, "left_out": reason}
                continue
            model = empty_model(small_config or needs.of_backbone, dtype_of(needs.dtype), str(place))
            editor = IBKEEditor(needs.config)
            editor.to(place)  # type: ignore[arg-type]  # transformers wraps the method untyped
            yield {"backbone": name, "device": str(place), **_measured(model, editor, needs, place, runs)}
        finally:
            del model, editor
            gc.collect()
            if place.type != "cpu":
                torch.accelerator.memory.empty_cache()


def needs_of(name: str, dtype: str | None = None, *, small: bool = False) -> tuple[TrainingNeeds, Any]:
    """Count what a backbone takes, at its true dimensions or at toy size, with the config of the latter."""
    if not small:
        return _scaled(plan_needs(name, dtype=dtype, work=PAPER_WORK)), None
    config = tiny_config(backbone_config(name).model_type, VOCABULARY)
    with torch.device("meta"):
        model = empty_model(config)
        editor = IBKEEditor.for_backbone(model, latent_dim=WIDTH, latent_length=2)
    of_model, of_editor = (sum(p.numel() for p in part.parameters()) for part in (model, editor))
    return TrainingNeeds(editor.config, dtype or "float32", config, of_model, of_editor, SMALL_WORK), config


def _scaled(needs: TrainingNeeds) -> TrainingNeeds:
    """Have gradients in fp16 scaled, as a training has them."""
    if needs.dtype != "float16":
        return needs
    return replace(needs, config=IBKEConfig(**{**needs.config.to_diff_dict(), "capture_loss_scale": 1024.0}))


def _too_large(needs: TrainingNeeds, device: torch.device) -> str:
    """Say why a device cannot hold a backbone and the training of its editor; nothing where it can, or is a CPU."""
    if device.type == "cpu":
        return ""
    free = torch.accelerator.get_memory_info(device)[0]
    return f"takes {needs.total / 1e9:.1f} GB, and {free / 1e9:.1f} are free" if needs.total > free else ""


def _measured(model: Any, editor: IBKEEditor, needs: TrainingNeeds, device: torch.device, runs: int) -> dict[str, Any]:
    work, roof = needs.work, roofline(device, dtype_of(needs.dtype))
    request, batch = _tokens(model, 1, work), _batch(model, work)
    optimizer = torch.optim.AdamW(editor.parameters(), lr=1e-6, fused=device.type != "cpu")

    def edit() -> None:
        with torch.no_grad():
            editor.eval().as_edit(editor(editor.capture(model, request), with_variance=False))

    def step() -> None:
        judged = run_batch(editor.train(), editor, model, batch, hops="none")
        torch.stack(list(judged.terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = {name: _median(run, runs, device) for name, run in (("edit", edit), ("step", step))}
    stored = sum(tensor.nbytes for part in (model, editor) for tensor in part.state_dict().values())
    stored += 2 * sum(parameter.nbytes for parameter in editor.parameters())  # the moments of Adam
    sizes = {
        "edit": 2 * needs.backbone_bytes + 4 * needs.editor_parameters,
        "step": WEIGHT_READS * needs.backbone_bytes + EDITOR_READS * 4 * needs.editor_parameters,
    }
    flops = {"edit": needs.edit_passes.flops, "step": needs.step_passes.flops}
    return {
        "dtype": needs.dtype,
        "shape": f"{work.records} records of {work.tokens} tokens, layers {needs.config.edited_layers}",
        "backbone_parameters": needs.backbone_parameters,
        "editor_parameters": needs.editor_parameters,
        "edit_seconds": seconds["edit"],
        "step_seconds": seconds["step"],
        "peak_bytes": stored + peak_bytes(step, device),
        "planned_bytes": needs.total,
        "measured_flops_per_second": roof.flops,
        "measured_bytes_per_second": roof.bandwidth,
        **{f"{name}_share_of_roofline": roof.seconds(flops[name], sizes[name]) / seconds[name] for name in seconds},
    }


def roofline(device: torch.device, dtype: torch.dtype) -> Roofline:
    """Measure a device: a product of large matrices, and a copy of a tensor that no cache holds."""
    width, size = (768, 2**25) if device.type == "cpu" else (8192, 2**30)
    left = torch.randn(width, width, device=device, dtype=dtype)
    product = _median(partial(torch.matmul, left, left), RUNS, device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _median(partial(target.copy_, source), RUNS, device)
    return Roofline(2 * width**3 / product, 2 * size / copied)


def _median(run: Callable[[], Any], runs: int, device: torch.device) -> float:
    for _ in range(WARM):
        run()
    return statistics.median(seconds_of(run, device) for _ in range(runs))


def _tokens(model: Any, rows: int, work: Work) -> TokenBatch:
    """Return rows of random tokens, the last of which are judged."""
    weight: Tensor = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(0, weight.shape[0], (rows, work.tokens), generator=generator)
    judged = torch.arange(work.tokens) >= work.tokens - work.targets
    return TokenBatch(ids, torch.ones_like(ids), torch.where(judged, ids, IGNORED)).to(weight.device)


def _batch(model: Any, work: Work) -> dict[str, Any]:
    """Return a batch of training: a request, a generality and a locality case of each record, edited one by one."""
    number = work.records
    owners = torch.arange(number).repeat(3)
    return {
        "cases": _tokens(model, 3 * number, work),
        "groups": owners,
        "owners": owners,
        "names": [f"case {i}" for i in range(3 * number)],
        "records": [f"record {i}" for i in range(number)],
        "counts": (number, number, number),
        "hops": None,
        "hop_cases": torch.zeros(0, dtype=torch.long),
    }
