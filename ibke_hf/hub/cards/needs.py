"""What training an editor takes: parameters counted on the meta device, the rest estimated by formulas that are shown.

Nothing here was measured on a machine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

from ...core.configuration_ibke import PRESETS, IBKEConfig
from ...core.modeling_ibke import IBKEEditor
from ...evaluation.report.tabular import markdown_table
from ...training.recipe import PAPER_DTYPES

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
}
BYTES = {"float32": 4, "float16": 2}
CASES = 2  # of a record: a generality and a locality case, as UniEdit has them
ROW_TOKENS, TARGET_TOKENS = 64, 8  # of a case with its padding, and of its target; assumed
RANK = 16  # of an edit: the tokens that its request is read by; assumed
ACTIVATIONS = 5  # values that a decoder block keeps for the backward pass, per token and unit of d_in + d_out
LOGIT_COPIES, FACTOR_COPIES = 4, 8  # copies of logits, and of factors in the hypernetworks, that live at once


@dataclass(frozen=True)
class TrainingNeeds:
    """What `ibke train` with the preset of a backbone reads and keeps.

    Attributes:
        config: The preset.
        dtype: Precision of the backbone.
        backbone_parameters: Counted.
        editor_parameters: Counted.
        vocabulary: Number of token ids.
        layers: Decoder blocks from the lowest edited one up, which keep activations.
        batch: Records of a step.
    """

    config: IBKEConfig
    dtype: str
    backbone_parameters: int
    editor_parameters: int
    vocabulary: int
    layers: int
    batch: int

    @property
    def widths(self) -> list[int]:
        """d_in + d_out of each edited layer."""
        return [
            d_in + d_out
            for d_in, d_out in zip(self.config.input_dims or [], self.config.output_dims or [], strict=True)
        ]

    def memory(self) -> dict[str, tuple[str, int]]:
        """Return what the device holds at once: by name, the formula with its numbers, and bytes."""
        cases, requests, size, width = self.batch * CASES, self.batch, BYTES[self.dtype], self.widths[0]
        factors: dict[str, list[tuple[str, int]]] = {
            "backbone": [("parameters", self.backbone_parameters), (f"bytes of {self.dtype}", size)],
            "editor": [
                ("parameters", self.editor_parameters),
                ("bytes", 4),
                ("for weight, gradient and two moments of Adam", 4),
            ],
            "activations": [
                ("cases", cases),
                ("tokens", ROW_TOKENS),
                ("blocks from the lowest edited one up", self.layers),
                ("for what a block keeps", ACTIVATIONS),
                ("(d_in + d_out)", width),
                ("bytes", size),
            ],
            "logits": [
                ("cases", cases),
                ("target tokens", TARGET_TOKENS),
                ("ids", self.vocabulary),
                ("bytes", 4),
                ("copies", LOGIT_COPIES),
            ],
            "factors": [
                ("requests", requests),
                ("tokens", ROW_TOKENS),
                ("(d_in + d_out, of all edited layers)", sum(self.widths)),
                ("bytes", 4),
                ("copies", FACTOR_COPIES),
            ],
        }
        return {name: (_product(parts), math.prod(number for _, number in parts)) for name, parts in factors.items()}

    @property
    def total(self) -> int:
        """Bytes of device memory."""
        return sum(size for _, size in self.memory().values())

    def step(self) -> tuple[str, int]:
        """Return the floating-point operations of a step, as the formula with its numbers and their number.

        Two per backbone parameter and token, forward over requests, cases and the locality cases once more unedited,
        backward over requests and cases; six per editor parameter and token of a request.
        """
        requests = self.batch * ROW_TOKENS
        backward = requests * (1 + CASES)
        forward = backward + requests
        formula = (
            f"2 × {self.backbone_parameters:,} × ({forward:,} tokens forward + {backward:,} backward) "
            f"+ 6 × {self.editor_parameters:,} × {requests:,} tokens of requests"
        )
        return formula, 2 * self.backbone_parameters * (forward + backward) + 6 * self.editor_parameters * requests


def _product(parts: list[tuple[str, int]]) -> str:
    return " × ".join(f"{number:,} {what}" for what, number in parts)


@cache
def training_needs(backbone: str) -> TrainingNeeds:
    """Count and estimate what training an editor for a backbone of SPEC §6 takes, without its weights.

    Raises:
        ValueError: For a backbone without a preset.
    """
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from ...training.trainer import IBKETrainingArguments

    config = IBKEConfig.from_preset(backbone)
    kind, shape = SHAPES[backbone]
    of_backbone: Any = CONFIG_MAPPING[kind](**shape)
    with torch.device("meta"):
        models = (AutoModelForCausalLM.from_config(of_backbone), IBKEEditor(config))
    of_model, of_editor = (sum(p.numel() for p in model.parameters()) for model in models)
    lowest = min(PRESETS[backbone]["edited_layers"])
    return TrainingNeeds(
        config,
        PAPER_DTYPES[backbone],
        of_model,
        of_editor,
        vocabulary=of_backbone.vocab_size,
        layers=of_backbone.num_hidden_layers - lowest,
        batch=IBKETrainingArguments.per_device_train_batch_size,
    )


def needs_table(needs: TrainingNeeds) -> str:
    """Return the estimates as a Markdown table, each with its formula; 1 GB is 10⁹ bytes."""
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
            f"{editor} × 3 for weight and moments; two are kept",
            f"{12 * needs.editor_parameters / 1e9:.1f} GB",
        ),
        ("the trained editor", editor, f"{4 * needs.editor_parameters / 1e9:.1f} GB"),
        (
            "an edit",
            f"rank {RANK} × {widths:,} (d_in + d_out, of all edited layers) × 4 bytes",
            f"{4 * RANK * widths / 1e6:.1f} MB",
        ),
        ("work of a step", work, f"{operations / 1e12:.0f} TFLOP"),
    ]
    return markdown_table(["what", "formula", "estimate"], rows, left=2)
