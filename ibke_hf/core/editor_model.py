"""What every editor with weights is: a `PreTrainedModel` whose files are whole and finite, or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from .capture import NonFiniteError
from .configuration_ibke import EditorConfig
from .files import give_usual_mode

logger = logging.get_logger(__name__)
ALIGNMENT = 64  # bytes: what torch's own allocator gives on a CPU
NAMED = 3  # tensors that an error names; the others are counted


class EditorFileError(ValueError):
    """Files of an editor that do not hold what its config promises; the message names editor, tensors and cure."""


class EditorModel(PreTrainedModel):
    """Base of the editors with weights: nothing that is missing, foreign or not finite gets in or out."""

    config: EditorConfig
    base_model_prefix = "editor"

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """Load an editor, as :meth:`transformers.PreTrainedModel.from_pretrained` does, and check what was loaded.

        The weights are copied to where the allocator would put them: those of a memory-mapped file may lie at odd
        addresses, where other kernels run, and an edit would differ in its last bits from that of the saved editor.

        Raises:
            EditorFileError: If tensors are missing, foreign, of another shape or not finite; names them.
            OSError: If there is no editor.
        """
        options = {"ignore_mismatched_sizes": True, **kwargs}  # they are refused below, in one line
        loaded: Any = super().from_pretrained(name_or_path, *args, output_loading_info=True, **options)
        editor, info = loaded
        wrong = {
            "does not hold": info["missing_keys"],
            "holds foreign tensors:": info["unexpected_keys"],
            "holds tensors of other shapes than the config says:": [key[0] for key in info["mismatched_keys"]],
        }
        for what, names in wrong.items():
            if names:
                raise EditorFileError(
                    f"{name_or_path}: its file of weights {what} {_listed(sorted(names))}; config.json and weights "
                    f"belong to different editors or versions: save or download the editor again"
                )
        try:
            require_finite_weights(editor.state_dict(), str(name_or_path))
        except NonFiniteError as error:
            raise EditorFileError(f"{error}; train it again, or load an earlier checkpoint") from error
        align(editor)
        return (editor, info) if output_loading_info else editor

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Save the editor, as :meth:`transformers.PreTrainedModel.save_pretrained` does.

        Raises:
            NonFiniteError: If a weight is not finite; nothing is written then.
        """
        state = kwargs.get("state_dict")
        require_finite_weights(self.state_dict() if state is None else state, f"the {type(self).__name__}")
        super().save_pretrained(save_directory, *args, **kwargs)
        give_usual_mode(Path(save_directory), "*.safetensors")

    def warn_of_other_backbone(self, model: Any) -> None:
        """Say so where a model has another name than that which the editor was trained for."""
        trained_for, name = self.config.base_model_name_or_path, getattr(model.config, "name_or_path", "")
        if trained_for and name and name != trained_for:
            logger.warning_once(f"the editor was trained for {trained_for!r} and is used on {name!r}")


def require_finite_weights(state: Mapping[str, Tensor], name: str) -> None:
    """Check the tensors of an editor.

    Raises:
        NonFiniteError: If a value is NaN or infinite; names the editor and the first tensors.
    """
    bad = [key for key, tensor in state.items() if not _is_finite(tensor)]
    if bad:
        raise NonFiniteError(f"{name}: {len(bad)} of {len(state)} tensors are not finite: {_listed(bad)}")


def align(module: torch.nn.Module) -> None:
    """Copy the tensors of a module that do not lie at a multiple of `ALIGNMENT` bytes."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def _is_finite(tensor: Tensor) -> bool:
    if tensor.device.type == "meta" or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    return bool(torch.isfinite(tensor).all())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")
