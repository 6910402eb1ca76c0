"""The editors by their ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ibke_hf.editors.catalogue import KINDS, build_editor, editor_class


def test_every_id_has_its_class_and_the_unedited_model_has_none(tiny_model: Callable[..., Any]) -> None:
    for name, kind in KINDS.items():
        if name != "none":
            assert editor_class(name).__name__ == kind.class_name
            assert hasattr(editor_class(name), "edit")
            assert issubclass(editor_class(name), torch.nn.Module) == kind.trained
    assert build_editor("none", tiny_model()) is None
    with pytest.raises(ValueError, match="ROME needs statistics"):
        build_editor("rome", tiny_model())
    with pytest.raises(ValueError, match=r"FT: .*stepz"):
        build_editor("ft", tiny_model(), stepz=3)


def test_the_papers_network_is_a_kind_of_its_own(tiny_model: Callable[..., Any]) -> None:
    plain = build_editor("ibke_paper", tiny_model(), [1], latent_dim=8, latent_length=2)
    assert (plain.config.second_stage_skip, plain.config.second_stage_mlp, plain.config.second_stage_heads) == (
        False,
        0,
        1,
    )
    with pytest.raises(ValueError, match=r"IBKE \(paper\) has second_stage_skip = False; leave it out"):
        build_editor("ibke_paper", tiny_model(), [1], second_stage_skip=True)
