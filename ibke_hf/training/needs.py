"""What editing, training and serving take: counted from a backbone's config on the meta device, without its weights.

Parameters, bytes that are alive at once and floating-point operations are counted as the passes run
(:mod:`.passes`); nothing here was measured on a machine but the speed, which :func:`measured_speed` measures.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..core.configuration_ibke import PRESETS, IBKEConfig
from ..evaluation.report.tabular import markdown_table
from .arguments import MAX_STEPS, IBKETrainingArguments
from .passes import (
    CASES,
    Counted,
    Work,
    count,
    edit_passes,
    empty_editor,
    empty_model,
    serving_passes,
    training_passes,
)
from .recipe import PAPER_DTYPES
from .width import fit_width

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # as their configs on the Hub state them
    "openai-community/gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25, "vocab_size": 50257}),
    "EleutherAI/gpt-j-6b": ("gptj", {"n_embd": 4096, "n_layer": 28, "n_head": 16, "vocab_size": 50400}),
    "Qwen/Qwen3-1.7B": (
        "qwen3",
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen/Qwen3-8B": (
        "qwen3",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        },
    ),
    "smollm2": (
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "max_position_embeddings": 8192,
        },
    ),
}
DTYPES = ("float32", "bfloat16", "float16")
ROW_TOKENS, TARGET_TOKENS = 64, 8  # of a case with its padding, and of its target; assumed
RANK = 16  # of an edit: the tokens that its request is read by; assumed
STATES = 3  # what lies on the device for each editor parameter: weight and two moments of Adam
FEW_BLOCKS, ADDED = 2, 4  # blocks of the small backbones that speed is measured on, and how many more some have
MOST_RECORDS = 1024  # of a step, that are tried


@dataclass(frozen=True)
class TrainingNeeds:
    """What `ibke train` with an IBKE editor for a backbone reads and keeps, and what its edits and serving take.

    Attributes:
        config: Of the editor.
        dtype: Precision of the backbone.
        of_backbone: The backbone's config.
        backbone_parameters: Counted.
        editor_parameters: Counted.
        work: How much is run at once.
    """

    config: IBKEConfig
    dtype: str
    of_backbone: Any
    backbone_parameters: int
    editor_parameters: int
    work: Work

    @property
    def batch(self) -> int:
        """Records of a step."""
        return self.work.records

    @property
    def widths(self) -> list[int]:
        """d_in + d_out of each edited layer."""
        return [
            d_in + d_out
            for d_in, d_out in zip(self.config.input_dims or [], self.config.output_dims or [], strict=True)
        ]

    @property
    def backbone_bytes(self) -> int:
        """Bytes of the backbone's weights."""
        return self.backbone_parameters * dtype_of(self.dtype).itemsize

    @cached_property
    def step_passes(self) -> Counted:
        """What the passes of a training step take, the gradients of the editor among it."""
        return _counted(self, training_passes)

    @cached_property
    def edit_passes(self) -> Counted:
        """What making one edit of one request takes."""
        return _counted(self, edit_passes)

    @cached_property
    def serving_passes(self) -> Counted:
        """What reading the texts that are served takes, and keeping what generation goes on from."""
        return _counted(self, serving_passes)

    def memory(self) -> dict[str, tuple[str, int]]:
        """Return what the device holds at once in training: by name, how it is reckoned, and bytes."""
        size, work = dtype_of(self.dtype).itemsize, self.work
        counted = (
            "activations, logits, factors and gradients that are alive at once, counted on the meta device: "
            f"{work.records:,} requests and {work.records * CASES:,} cases of {work.tokens} tokens, "
            f"{work.targets} of them judged"
        )
        return {
            "backbone": (
                f"{self.backbone_parameters:,} parameters × {size} bytes of {self.dtype}",
                self.backbone_bytes,
            ),
            "editor": (
                f"{self.editor_parameters:,} parameters × 4 bytes × {STATES} for weight and two moments of Adam",
                self.editor_parameters * 4 * STATES,
            ),
            "a step": (counted, self.step_passes.peak),
        }

    @property
    def total(self) -> int:
        """Bytes of device memory that training takes."""
        return sum(size for _, size in self.memory().values())

    @property
    def edit_total(self) -> int:
        """Bytes of device memory that making an edit takes."""
        return self.backbone_bytes + 4 * self.editor_parameters + self.edit_passes.peak

    @property
    def serving_total(self) -> int:
        """Bytes of device memory that serving takes."""
        return self.backbone_bytes + self.serving_passes.peak

    def edit_bytes(self, rank: int = RANK) -> int:
        """Return the bytes of one edit."""
        return 4 * rank * sum(self.widths)

    def step(self) -> tuple[str, int]:
        """Return the floating-point operations of a step, and how they are reckoned."""
        return "matrix products of a step, forward and backward, counted on the meta device", self.step_passes.flops

    def with_work(self, **changes: Any) -> TrainingNeeds:
        """Return the needs for another amount of work at once."""
        return replace(self, work=replace(self.work, **changes))


def _counted(needs: TrainingNeeds, run: Any) -> Counted:
    model = empty_model(needs.of_backbone, dtype_of(needs.dtype))
    if run is serving_passes:
        return count(run, model, work=needs.work)
    with torch.device("meta"):
        from ..core.modeling_ibke import IBKEEditor

        editor = IBKEEditor(needs.config)
    return count(run, model, editor, work=needs.work)


def dtype_of(name: str) -> torch.dtype:
    """Return a precision by its name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def backbone_config(name: str) -> Any:
    """Return a backbone's config: of a folder, of a known shape, or of the Hub; no weights are read.

    Raises:
        ValueError: If there is none.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    if name in SHAPES and not Path(name).exists():
        kind, shape = SHAPES[name]
        return CONFIG_MAPPING[kind](**shape)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name}: has no config that could be read ({reason}); give a folder, a Hub id or one of "
            f"{', '.join(SHAPES)}"
        ) from error


def plan_needs(
    name: str,
    *,
    dtype: str | None = None,
    layers: Sequence[int] | None = None,
    fields: Mapping[str, Any] | None = None,
    work: Work | None = None,
) -> TrainingNeeds:
    """Count what editing a backbone takes, from its config alone.

    Args:
        name: Folder, Hub id or known shape of the backbone.
        dtype: Precision of the backbone; by default the paper's for its backbones, else its config's.
        layers: Edited layers; by default the preset's, else by depth.
        fields: Fields of the editor's config; by default the paper's for its backbones, else d_m by the model's size.
        work: How much is run at once.

    Raises:
        ValueError: If there is no such backbone.
        BackboneError: If its projections cannot be told by structure.
    """
    of_backbone = backbone_config(name)
    model, fields = empty_model(of_backbone), dict(fields or {})
    if name in PRESETS:
        config = IBKEConfig.from_preset(name, **({"edited_layers": list(layers)} if layers else {}), **fields)
        with torch.device("meta"):
            from ..core.modeling_ibke import IBKEEditor

            editor = IBKEEditor(config)
    else:
        editor = empty_editor(model, layers, fit_width("ibke", model, layers, fields))
    saved = str(getattr(of_backbone, "dtype", None) or "float32").removeprefix("torch.")
    of_model, of_editor = (sum(p.numel() for p in part.parameters()) for part in (model, editor))
    return TrainingNeeds(
        editor.config,
        dtype or PAPER_DTYPES.get(name, saved if saved in DTYPES else "float32"),
        of_backbone,
        of_model,
        of_editor,
        work or Work(IBKETrainingArguments.per_device_train_batch_size, ROW_TOKENS, TARGET_TOKENS),
    )


@cache
def training_needs(backbone: str) -> TrainingNeeds:
    """Count what training an editor for a backbone of SPEC §6 takes, without its weights.

    Raises:
        ValueError: For a backbone without a preset.
    """
    IBKEConfig.from_preset(backbone)
    return plan_needs(backbone)


def needs_table(needs: TrainingNeeds) -> str:
    """Return what training takes as a Markdown table, each entry with how it is reckoned; 1 GB is 10⁹ bytes."""
    rows = [(name, formula, f"{size / 1e9:.1f} GB") for name, (formula, size) in needs.memory().items()]
    editor, widths, (work, operations) = (
        f"{needs.editor_parameters:,} parameters × 4 bytes",
        sum(needs.widths),
        needs.step(),
    )
    rows += [
        (
            "**device memory**",
            "the sum of these; kernels and fragments take some more",
            f"**{needs.total / 1e9:.1f} GB**",
        ),
        (
            "a checkpoint",
            f"{editor} × {STATES} for weight and moments; two are kept",
            f"{4 * STATES * needs.editor_parameters / 1e9:.1f} GB",
        ),
        ("the trained editor", editor, f"{4 * needs.editor_parameters / 1e9:.1f} GB"),
        (
            "an edit",
            f"rank {RANK} × {widths:,} (d_in + d_out, of all edited layers) × 4 bytes",
            f"{needs.edit_bytes() / 1e6:.1f} MB",
        ),
        ("work of a step", work, f"{operations / 1e12:.0f} TFLOP"),
    ]
    return markdown_table(["what", "how it is reckoned", "estimate"], rows, left=2)


# --- what fits, and how fast --------------------------------------------------------------------------------------


def largest_batch(needs: TrainingNeeds, memory: int) -> int:
    """Return how many records of a step a device of so many bytes holds, 0 for none; large numbers to a sixteenth.

    Counted anew for each number that is tried: jointly edited records grow by the square of their number.
    """

    def fits(records: int) -> bool:
        return needs.with_work(records=records).total <= memory

    if needs.backbone_bytes > memory or not fits(1):
        return 0
    low = 1
    while low < MOST_RECORDS and fits(2 * low):
        low *= 2
    high = 2 * low
    while low < MOST_RECORDS and high - low > max(low // 16, 1):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@dataclass(frozen=True)
class Timed:
    """Seconds of some passes, by the parts of a backbone that they grow with.

    Attributes:
        base: Of `FEW_BLOCKS` blocks, the first of which is edited: embedding, vocabulary and losses among it.
        upper: Of one more block above the lowest edited layer, forward and backward.
        lower: Of one more block below it, forward alone.
        layer: Of one more edited layer.
    """

    base: float
    upper: float
    lower: float
    layer: float

    def seconds(self, needs: TrainingNeeds) -> float:
        """Return the seconds of the passes on a whole backbone."""
        layers = needs.config.edited_layers or [0]
        below, blocks = min(layers), number_of_blocks(needs.of_backbone)
        above = blocks - below - FEW_BLOCKS
        return self.base + above * self.upper + below * self.lower + (len(layers) - 1) * self.layer


@dataclass(frozen=True)
class Speed:
    """How fast a machine is at a backbone's own shapes.

    Attributes:
        step: Of the passes of a training step.
        edit: Of making one edit.
        parameters: Parameters a second that the optimizer changes.
    """

    step: Timed
    edit: Timed
    parameters: float

    def step_seconds(self, needs: TrainingNeeds) -> float:
        """Return the seconds of a training step."""
        return self.step.seconds(needs) + needs.editor_parameters / self.parameters

    def edit_seconds(self, needs: TrainingNeeds) -> float:
        """Return the seconds of making one edit."""
        return self.edit.seconds(needs)


def measured_speed(needs: TrainingNeeds, device: str = "cpu", runs: int = 3) -> Speed:
    """Time the passes on a few blocks of the backbone's shape, with random weights; CPU time on a CPU.

    Four small backbones that differ in one part each tell what a part takes; they take turns, and medians count.

    Args:
        needs: Says shape, precision and work.
        device: Where they run.
        runs: Rounds.
    """
    variants = {
        "base": (FEW_BLOCKS, [0]),
        "upper": (FEW_BLOCKS + ADDED, [0]),
        "lower": (FEW_BLOCKS + ADDED, [ADDED]),
        "layer": (FEW_BLOCKS, [0, 1]),
    }
    models = {name: _few_blocks(needs, blocks, layers, device) for name, (blocks, layers) in variants.items()}
    optimizer = torch.optim.AdamW(models["base"][1].parameters(), fused=True)
    times: dict[str, dict[str, list[float]]] = {part: {n: [] for n in models} for part in ("step", "edit")}
    steps: list[float] = []
    for turn in range(runs + 1):  # the first is not counted
        for name, (model, editor) in models.items():
            step = _seconds(partial(training_passes, model, editor.train(), needs.work), device)
            edit = _seconds(partial(edit_passes, model, editor.eval(), needs.work), device)
            if turn:
                times["step"][name].append(step)
                times["edit"][name].append(edit)
        steps.append(_seconds(optimizer.step, device))
        for _, editor in models.values():
            editor.zero_grad()
    parameters = sum(p.numel() for p in models["base"][1].parameters())
    return Speed(_parts(times["step"]), _parts(times["edit"]), parameters / median(steps[1:]))


def _few_blocks(needs: TrainingNeeds, blocks: int, layers: Sequence[int], device: str) -> tuple[Any, Any]:
    model = empty_model(few_blocks(needs.of_backbone, blocks), dtype_of(needs.dtype), device)
    fields = needs.config.to_dict()
    return model, empty_editor(model, layers, {name: fields[name] for name in EDITOR_FIELDS if name in fields}, device)


def _parts(times: Mapping[str, Sequence[float]]) -> Timed:
    seconds = {name: median(values) for name, values in times.items()}
    more = {name: max(value - seconds["base"], 0.0) for name, value in seconds.items()}
    return Timed(seconds["base"], more["upper"] / ADDED, more["lower"] / ADDED, more["layer"])


EDITOR_FIELDS = (
    "latent_dim",
    "latent_length",
    "second_stage_mlp",
    "second_stage_heads",
    "second_stage_skip",
    "use_information_bottleneck",
    "use_scale_factor",
    "edited_modules",
)


def number_of_blocks(config: Any) -> int:
    """Return how many decoder blocks a backbone has."""
    return int(config.num_hidden_layers)


def few_blocks(config: Any, number: int = FEW_BLOCKS) -> Any:
    """Return a backbone's config with its first blocks alone."""
    fields = config.to_dict()
    if types := fields.get("layer_types"):
        fields["layer_types"] = (types * number)[:number]
    fields[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = number
    return type(config).from_dict(fields)


def _seconds(run: Any, device: str) -> float:
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.accelerator.synchronize()
    start = time.perf_counter()
    run()
    torch.accelerator.synchronize()
    return time.perf_counter() - start


def days(needs: TrainingNeeds, speed: Speed, steps: int = MAX_STEPS) -> float:
    """Return the days that so many steps take."""
    return steps * speed.step_seconds(needs) / 86_400
