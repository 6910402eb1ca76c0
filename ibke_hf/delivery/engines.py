"""What each serving engine takes of a LoRA adapter: its ranks, the layers that it knows, and the line that serves it.

vLLM: `vllm/config/lora.py` (ranks), `vllm/lora/lora_model.py` (an adapter is refused whole where the last part of one
name is no layer of the model's). SGLang: `sglang/srt/lora/utils.py` (the layers that its memory pool holds).
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ENGINES = ("vllm", "sglang", "peft", "gguf", "ollama", "merged")
# last parts of the names of linear layers of the decoders that both engines serve adapters for
LLAMA_NAMES = frozenset(
    "q_proj k_proj v_proj o_proj qkv_proj gate_proj up_proj gate_up_proj down_proj".split()  # noqa: SIM905
)
GGUF_ADAPTER, MODELFILE = "adapter.gguf", "Modelfile"


class ExportError(ValueError):
    """An edit that an engine cannot serve in the form asked for; the message says why, and what can be done."""


@dataclass(frozen=True)
class LoraEngine:
    """An engine that serves PEFT's LoRA adapters.

    Attributes:
        name: Its name.
        ranks: The ranks that it has room for, ascending; empty for any.
        layers: Last parts of the names of the layers that its models take adapters of; empty for any.
    """

    name: str
    ranks: tuple[int, ...] = ()
    layers: frozenset[str] = frozenset()

    def rank(self, needed: int, most: int | None = None) -> int:
        """Return the rank that an adapter is written in.

        Args:
            needed: The rank of the edit.
            most: The highest that the server is to be started with, `--max-lora-rank`.

        Raises:
            ValueError: If the engine has no rank of at most `most`.
        """
        allowed = [rank for rank in self.ranks if most is None or rank <= most]
        if not self.ranks:
            return needed if most is None else min(needed, most)
        if not allowed:
            raise ValueError(
                f"--max-rank {most}: {self.name} has no rank so low; its ranks are {', '.join(map(str, self.ranks))}"
            )
        return next((rank for rank in allowed if rank >= needed), allowed[-1])

    def require_layers(self, names: Sequence[str]) -> None:
        """Refuse layers that the engine has no adapters for.

        Raises:
            ExportError: Names the layer, says why, and what to do.
        """
        if not self.layers:
            return
        cure = "write the edited model instead (--to merged), or edit other layers (edited_modules=...)"
        for name in names:
            parts = name.split(".")
            if "experts" in parts:
                raise ExportError(
                    f"{name} is one of a mixture's routed experts, which {self.name} fuses into one weight and serves "
                    f"no adapter of this form for; {cure}"
                )
            if parts[-1] not in self.layers:
                raise ExportError(
                    f"{name}: {self.name} serves adapters of layers named {', '.join(sorted(self.layers))} "
                    f"and refuses an adapter with any other; {cure}"
                )


LORA_ENGINES = {
    "vllm": LoraEngine("vLLM", (1, 8, 16, 32, 64, 128, 256, 320, 512), LLAMA_NAMES),
    "sglang": LoraEngine("SGLang", (), LLAMA_NAMES),
    "peft": LoraEngine("PEFT"),
}


def serving_line(engine: str, folder: str | Path, base: str, *, name: str, rank: int = 0, layers: str = "") -> str:
    """Return the line that serves an export.

    Args:
        engine: One of `ENGINES`.
        folder: What was written.
        base: The model that it is served on.
        name: What requests call the edited model.
        rank: Of the adapter.
        layers: Last parts of the names of the edited layers.
    """
    place, model = shlex.quote(str(folder)), shlex.quote(base or "BASE_MODEL")
    lines = {
        "vllm": f"vllm serve {model} --enable-lora --max-lora-rank {rank} --lora-modules {name}={place}",
        "sglang": f"python -m sglang.launch_server --model-path {model} --enable-lora --max-lora-rank {rank} "
        f"--lora-target-modules {layers} --lora-paths {name}={place}",
        "peft": f"model = peft.PeftModel.from_pretrained(model, {str(folder)!r}, autocast_adapter_dtype=False)",
        "gguf": f"llama-server -m {model} --lora {shlex.quote(str(Path(folder) / GGUF_ADAPTER))}",
        "ollama": f"ollama create {name} -f {shlex.quote(str(Path(folder) / MODELFILE))} && ollama run {name}",
        "merged": f"vllm serve {place}",
    }
    return lines[engine]
