"""An editor's code on the Hub: what travels, and other processes that run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hub_clients import CODE
from loopback_hub import LoopbackHub
from small_editors import REQUESTS
from training_runs import assert_equal_weights, new_editor, weights
from transformers.dynamic_module_utils import get_imports

from ibke_hf import LowRankEdit
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.editors.serac import SERACEditor

ID = "org/ibke-tiny"


ALONE = """
import json, sys
for absent in ("ibke_hf", "peft", "datasets", "accelerate", "evaluate"):
    sys.modules[absent] = None
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

folder, where = sys.argv[1:3]
editor = AutoModel.from_pretrained(where, trust_remote_code=True).eval()
EditRequest = get_class_from_dynamic_module("records.EditRequest", where)
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
requests = json.load(open(folder + "/requests.json"))
edit = editor.edit(model, tokenizer, [EditRequest(**request) for request in requests])
assert type(editor).__module__.startswith("transformers_modules."), type(editor).__module__
edit.save_pretrained(folder + "/edit")
for what in (editor, edit):
    try:
        what.push_to_hub("org/again")
    except ImportError as error:
        assert "publishing needs the package ibke_hf itself" in str(error)
    else:
        raise AssertionError("nothing of what publishes travels")
"""


def run_python(code: str, *arguments: str, **environment: str) -> None:
    """Run code in an interpreter of its own; what it prints to stderr is the failure's message."""
    command, surroundings = [sys.executable, "-c", code, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_process_that_has_imported_no_editor_pushes_every_type(
    hub: LoopbackHub, tiny_model: Any, tmp_path: Path
) -> None:
    backbone = tiny_model(num_hidden_layers=3)
    editors = {
        "mend": new_editor(backbone, kind=MENDEditor),
        "serac": SERACEditor.for_backbone(backbone, embedding_dim=8),
    }
    push = "import sys\nfrom ibke_hf.hub.push import push_folder\n"
    for name, editor in editors.items():
        editor.save_pretrained(tmp_path / name)
        push += f"push_folder(sys.argv[1] + '/{name}', 'org/{name}')\n"
    run_python(push, str(tmp_path), HF_HUB_OFFLINE="0", HF_HOME=str(tmp_path / "home"))
    for name, editor in editors.items():
        assert_equal_weights(weights(editor), weights(type(editor).from_pretrained(f"org/{name}")))


@pytest.mark.slow
def test_the_code_travels_and_needs_torch_and_transformers_alone(hub: LoopbackHub, world: Any, tmp_path: Path) -> None:
    model, tokenizer, editor, expected = world
    model.save_pretrained(tmp_path / "backbone")
    tokenizer.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "requests.json").write_text(json.dumps(list(map(asdict, REQUESTS))))
    editor.push_to_hub(ID)
    online = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    for environment in (online, {**online, "HF_HUB_OFFLINE": "1"}):
        asked = len(hub.requests)
        run_python(ALONE, str(tmp_path / "backbone"), ID, **environment)
        assert LowRankEdit.from_pretrained(tmp_path / "backbone" / "edit") == expected.padded(
            max(expected.ranks.values())
        )
    assert len(hub.requests) == asked
    assert set(hub.repositories) == {("models", ID)}


def test_the_code_that_travels_imports_torch_and_transformers_alone(
    hub: LoopbackHub, world: Any, tmp_path: Path
) -> None:
    world[2].push_to_hub(ID)
    come_with_them = {"huggingface_hub", "regex", "safetensors", "yaml", "typing_extensions"}
    for name in CODE:
        (tmp_path / name).write_bytes(hub[ID].files()[name])
        outside = set(get_imports(tmp_path / name)) - set(
            sys.stdlib_module_names
        )  # what the user is asked for, inside functions too
        assert outside <= {"torch", "transformers", *come_with_them}, name
