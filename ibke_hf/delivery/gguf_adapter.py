"""A low-rank edit as a GGUF LoRA for llama.cpp, by the `gguf` library's tensor names, and a Modelfile for Ollama.

The format is that of llama.cpp's ``convert_lora_to_gguf.py``: for each edited weight ``<tensor>.weight.lora_a``
(r, d_in) and ``.lora_b`` (d_out, r), y += scale · alpha / r · B A x. Weights of the GGUF file are (d_out, d_in)
whatever they were in the model: its converter turns Conv1D weights round, and A = ĥ, B = ûᵀ fit both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..core.edits import LowRankEdit
from ..core.files import written_file
from .engines import GGUF_ADAPTER, ExportError

# architectures that llama.cpp calls otherwise; of the rest the names differ in punctuation at most
ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "phi": "phi2", "cohere": "commandr"}
PLAIN = ("FFN_DOWN", "FFN_UP", "FFN_GATE", "FFN_DOWN_SHEXP", "FFN_UP_SHEXP", "FFN_GATE_SHEXP", "ATTN_OUT", "ATTN_V")
Reader = Any  # gguf.GGUFReader: an extra, imported where it is used


def library() -> Any:
    """Return the `gguf` library.

    Raises:
        ImportError: If it is not installed.
    """
    if find_spec("gguf") is None:
        raise ImportError('writing a GGUF adapter needs the extra "gguf": pip install "ibke-hf[gguf]"')
    import gguf

    return gguf


class BaseFile:
    """The GGUF file of the model that an adapter is made for, as far as the adapter has to fit it."""

    def __init__(self, file: str | Path) -> None:
        self.file = Path(file)
        try:
            reader = library().GGUFReader(self.file)
            self.architecture = str(reader.get_field("general.architecture").contents())
            self.shapes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors}  # (d_in, d_out)
        except (ValueError, AttributeError, IndexError) as error:
            raise ExportError(f"{file}: no readable GGUF file ({error}); give the file of the served model") from error

    def require(self, tensor: str, layer: str, width: tuple[int, int]) -> None:
        """Check that the file has a weight of this shape (d_in, d_out).

        Raises:
            ExportError: Says what was expected and found.
        """
        shape = self.shapes.get(tensor)
        if shape != width:
            what = "has no such tensor" if shape is None else f"maps {shape[0]} to {shape[1]} there"
            raise ExportError(
                f"{layer} is {tensor} in llama.cpp and maps {width[0]} to {width[1]}, and {self.file.name} {what}; "
                f"the edit was made for another model"
            )


def architecture_of(model_type: str) -> str:
    """Return what llama.cpp calls an architecture of transformers.

    Raises:
        ExportError: If the library knows none of that name.
    """
    plain = re.sub(r"[^a-z0-9]", "", model_type.lower().removesuffix("_text"))
    plain = ARCHITECTURES.get(plain, plain)
    names = {re.sub(r"[^a-z0-9]", "", name): str(name) for name in library().MODEL_ARCH_NAMES.values()}
    if plain not in names:
        raise ExportError(
            f"the backbone is {f'a {model_type} model' if model_type else 'of an unknown architecture'}, for which "
            f"llama.cpp has no name; give the GGUF file of the served model (--model FILE.gguf)"
        )
    return names[plain]


def tensor_names(architecture: str, layers: Sequence[str]) -> dict[str, str]:
    """Return llama.cpp's name of the weight of each layer, by the library's own map.

    Raises:
        ExportError: If a layer has none, is fused with others, or its rows stand in another order in a GGUF file.
    """
    gguf = library()
    codes = {name: code for code, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in codes:
        raise ExportError(f"the gguf library knows no architecture {architecture!r}; update it: pip install -U gguf")
    blocks = 1 + max((int(part) for name in layers for part in name.split(".") if part.isdigit()), default=0)
    names = gguf.get_tensor_name_map(codes[architecture], blocks)
    plain = {getattr(gguf.MODEL_TENSOR, name) for name in PLAIN}
    tensors = {}
    for layer in layers:
        known = names.get_type_and_name(layer)
        cure = "write the edited model (--to merged) and convert that"
        if known is None:
            raise ExportError(f"{layer}: a {architecture} model of llama.cpp has no tensor for it; {cure}")
        if known[0] not in plain:
            reason = "fuses the experts of a mixture" if "_exps" in known[1] else "reorders the rows of that tensor"
            raise ExportError(f"{layer} is {known[1]} in llama.cpp, which {reason}: no adapter of it fits; {cure}")
        tensors[layer] = f"{known[1]}.weight"
    return tensors


def write_gguf_adapter(edit: LowRankEdit, folder: str | Path, base: BaseFile | None = None) -> Path:
    """Write a single edit as ``adapter.gguf``, then read it back and compare.

    Args:
        edit: A single edit of one rank.
        folder: Exists.
        base: The GGUF file that it will be served beside, whose architecture and shapes it has to fit.

    Returns:
        The file.

    Raises:
        ExportError: If a layer has no tensor in llama.cpp, or does not fit `base`.
    """
    gguf = library()
    architecture = architecture_of(edit.info.model_type) if base is None else base.architecture
    tensors, rank = tensor_names(architecture, edit.layers), max(edit.ranks.values())
    factors: dict[str, torch.Tensor] = {}
    for layer, tensor in tensors.items():
        a, b = edit.inputs[layer][0].float().cpu(), edit.outputs[layer][0].float().cpu().T
        if base is not None:
            base.require(tensor, layer, (a.shape[1], b.shape[0]))
        factors |= {f"{tensor}.lora_a": a.contiguous(), f"{tensor}.lora_b": b.contiguous()}
    file = Path(folder) / GGUF_ADAPTER
    with written_file(file) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
        if edit.info.backbone:
            writer.add_string("general.base_model.0.name", edit.info.backbone)
        for name, factor in factors.items():
            writer.add_tensor(name, factor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _require_same(temporary, factors)
    return file


def read_gguf_adapter(file: str | Path) -> dict[str, torch.Tensor]:
    """Return the factors of a GGUF LoRA by the names of their tensors: A (r, d_in) and B (d_out, r)."""
    return {
        tensor.name: torch.from_numpy(tensor.data.copy()).view(*reversed(tensor.shape.tolist()))
        for tensor in library().GGUFReader(file).tensors
    }


def _require_same(file: Path, factors: Mapping[str, torch.Tensor]) -> None:
    """Read back what was written: a full disk, or a library that orders axes otherwise, is told here."""
    stored = read_gguf_adapter(file)
    if stored.keys() != factors.keys() or not all(torch.equal(stored[name], factors[name]) for name in factors):
        raise ExportError(f"{file}: reads back otherwise than it was written; write it again, or update gguf")


def modelfile(file: str | Path, model: str = "") -> str:
    """Return the Modelfile of Ollama that puts the adapter beside it on a model.

    Args:
        file: The model's GGUF file.
        model: What the model is called.
    """
    return f"# an edit{f' of {model}' if model else ''}\nFROM {file}\nADAPTER ./{GGUF_ADAPTER}\n"
