"""A saved edit is a PEFT LoRA adapter; damaged and foreign files are errors that name file and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_edits import CONFIG, INFO, WEIGHTS, change, make_edit
from torch import Tensor

from ibke_hf.core.adapter_files import AdapterError, MissingFileError
from ibke_hf.core.capture import NonFiniteError
from ibke_hf.core.edits import EditInfo, LowRankEdit


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make_edit().save_pretrained(tmp_path)
    return tmp_path


def test_an_edit_comes_back_bit_for_bit_with_its_description(saved: Path) -> None:
    edit, loaded = make_edit(), LowRankEdit.from_pretrained(saved)
    assert loaded == edit.padded(5)
    assert loaded.info == edit.info
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS, INFO]
    truncated = edit.truncate(2)
    truncated.save_pretrained(saved)
    assert LowRankEdit.from_pretrained(saved) == truncated
    assert LowRankEdit.from_pretrained(saved).relative_error == truncated.relative_error
    edit.save_pretrained(saved, rank=2)
    assert LowRankEdit.from_pretrained(saved) == truncated


@pytest.mark.parametrize("width", [48, 32])
@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
def test_peft_loads_a_saved_edit_with_the_same_logits(
    family: str, width: int, tiny_model: Callable[..., Any], tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = tiny_model(
        family, initializer_range=0.1, **({"n_inner": width} if family == "gpt2" else {"intermediate_size": width})
    )
    ids = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
    edit = make_edit(family, width)
    edit.save_pretrained(tmp_path)
    with torch.no_grad():
        original = model(ids).logits
        with edit.attached(model):
            expected = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, str(tmp_path))(ids).logits
    assert (expected - original).abs().max() > 0.05
    torch.testing.assert_close(adapted, expected, rtol=1e-5, atol=1e-5)


def test_any_lora_adapter_of_peft_reads_as_an_edit(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
    patterns = {"alpha_pattern": {"down_proj": 32}, "rank_pattern": {"1.mlp.down_proj": 2}}
    settings: list[dict[str, Any]] = [{}, {"use_rslora": True}, patterns]
    for number, extra in enumerate(settings):
        model = tiny_model("qwen3", initializer_range=0.1)
        config = peft.LoraConfig(
            r=4, lora_alpha=6, target_modules=["down_proj", "q_proj"], init_lora_weights=False, **extra
        )
        wrapped = peft.get_peft_model(model, config).eval()
        wrapped.save_pretrained(tmp_path / str(number))
        with torch.no_grad():
            expected = wrapped(ids).logits
            plain = tiny_model("qwen3", initializer_range=0.1)
            with LowRankEdit.from_pretrained(tmp_path / str(number)).attached(plain):
                torch.testing.assert_close(plain(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_a_description_is_an_edit_too(saved: Path) -> None:
    (saved / INFO).unlink()
    assert LowRankEdit.from_pretrained(saved).info == EditInfo(backbone="tiny")


def test_missing_and_truncated_files_are_named(saved: Path) -> None:
    content = (saved / WEIGHTS).read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (saved / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(AdapterError, match=f"{WEIGHTS}.*not a complete safetensors file"):
            LowRankEdit.from_pretrained(saved)
    (saved / WEIGHTS).unlink()
    with pytest.raises(MissingFileError, match=f"no {WEIGHTS}"):
        LowRankEdit.from_pretrained(saved)
    with pytest.raises(MissingFileError, match=f"no {CONFIG}"):
        LowRankEdit.from_pretrained(saved / "nowhere")


def test_foreign_weights_are_refused_by_key(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    first = next(key for key in weights if key.endswith("lora_A.weight"))

    def refused(changed: dict[str, Tensor], message: str) -> None:
        save_file(changed, saved / WEIGHTS)
        with pytest.raises(AdapterError, match=message):
            LowRankEdit.from_pretrained(saved)

    refused({"wte.weight": torch.ones(3, 3)}, r"key 'wte\.weight' is not a LoRA factor")
    refused(
        {key: tensor for key, tensor in weights.items() if key != first},
        r"layers without both factors: \['model\.layers\.1",
    )
    refused({**weights, first: torch.full_like(weights[first], float("nan"))}, "lora_A.weight is not finite")
    refused({}, "holds no tensor")
    refused(
        {**weights, first: weights[first][:2].clone()}, r"layers\.1\.mlp\.down_proj.*\(1, 2, 48\) and \(1, 5, 32\)"
    )


def test_foreign_descriptions_are_refused(saved: Path) -> None:
    change(saved / CONFIG, use_dora=True)
    with pytest.raises(AdapterError, match="only plain LoRA"):
        LowRankEdit.from_pretrained(saved)
    change(saved / CONFIG, use_dora=False)
    change(saved / INFO, format_version=2)
    with pytest.raises(AdapterError, match=r"edit\.json: format 2 is newer than 1; update"):
        LowRankEdit.from_pretrained(saved)
    (saved / INFO).write_text('{"format_version": 1}')
    with pytest.raises(AdapterError, match=r"edit\.json: requests is missing"):
        LowRankEdit.from_pretrained(saved)
    for path, text in ((saved / INFO, '{"requests'), (saved / CONFIG, "[]")):
        path.write_text(text)
        with pytest.raises(AdapterError, match=path.name):
            LowRankEdit.from_pretrained(saved)


def test_a_failed_save_leaves_the_old_edit(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("ibke_hf.core.adapter_files.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        make_edit(ranks=(1, 1)).save_pretrained(saved)
    assert LowRankEdit.from_pretrained(saved) == make_edit().padded(5)
    assert sorted(path.name for path in saved.iterdir()) == [CONFIG, WEIGHTS, INFO]


DEEP = "[" * 100_000 + "]" * 100_000
ENDLESS = r"(([a-z]|[a-z0-9._])+)+(?![a-z.])(?<=[0-9])"
MALFORMED: list[tuple[str, str, Any]] = [
    (CONFIG, "lora_alpha", None),
    (CONFIG, "lora_alpha", [1]),
    (CONFIG, "lora_alpha", float("nan")),
    (CONFIG, "lora_alpha", True),
    (CONFIG, "lora_alpha", 10**400),
    (CONFIG, "alpha_pattern", [1]),
    (CONFIG, "alpha_pattern", {"down_proj": "8"}),
    (CONFIG, "alpha_pattern", {"(": 8}),
    (CONFIG, "alpha_pattern", {ENDLESS: 8}),
    (CONFIG, "rank_pattern", "down_proj"),
    (CONFIG, "use_rslora", "yes"),
    (CONFIG, "target_modules", 5),
    (CONFIG, "target_modules", [1, 2]),
    (CONFIG, "target_modules", ENDLESS),
    (CONFIG, "base_model_name_or_path", {}),
    (CONFIG, "peft_type", 3),
    (INFO, "format_version", None),
    (INFO, "format_version", "1"),
    (INFO, "requests", {}),
    (INFO, "requests", [{"prompt": 1, "target": "x", "subject": None}]),
    (INFO, "requests", [{"prompt": "x", "target": "x", "author": "y"}]),
    (INFO, "editor", 5),
    (INFO, "fingerprint", {"layer": ["x"]}),
    (INFO, "transposed", None),
    (INFO, "scores", {"f1": float("inf")}),
    (INFO, "rows", [[1]]),
    (INFO, "relative_error", 3),
]


@pytest.mark.parametrize(("file", "key", "value"), MALFORMED)
def test_a_malformed_description_is_an_error_of_file_and_key(saved: Path, file: str, key: str, value: Any) -> None:
    change(saved / file, **{key: value})
    with pytest.raises(AdapterError, match=f"{file}: .*{key}"):
        LowRankEdit.from_pretrained(saved)


@pytest.mark.parametrize("file", [CONFIG, INFO])
@pytest.mark.parametrize("text", ["", "[]", f'{{"r": {DEEP}}}', '{"editor": "\\ud800"}', "{\xff"])
def test_a_description_that_is_no_json_object_is_an_error_of_the_file(saved: Path, file: str, text: str) -> None:
    (saved / file).write_bytes(text.encode("latin-1"))
    with pytest.raises(AdapterError, match=rf"{file}: .*save or download it again"):
        LowRankEdit.from_pretrained(saved)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, r"adapter_config\.json: .*found DoRA.*use_dora"),
        ({"target_parameters": ["experts.down_proj"]}, "found target_parameters"),
        ({"peft_type": "IA3"}, "only LoRA adapters .* found 'IA3'"),
    ],
)
def test_another_kind_of_adapter_is_named(saved: Path, fields: dict[str, Any], message: str) -> None:
    change(saved / CONFIG, **fields)
    with pytest.raises(AdapterError, match=message):
        LowRankEdit.from_pretrained(saved)


def test_factors_of_odd_types_shapes_and_sizes_are_refused_by_key(saved: Path) -> None:
    weights = load_file(saved / WEIGHTS)
    first = next(key for key in weights if key.endswith("lora_A.weight"))
    for odd, message in (
        (torch.ones(5, 48, dtype=torch.int32), "must be a matrix of floating-point numbers, found .* of int32"),
        (torch.ones(5, 48).to(torch.float8_e4m3fn), "is float8_e4m3fn"),
        (torch.tensor(1.0), "single number"),
        (torch.ones(5, 6, 8), r"must be a matrix .* found \(5, 6, 8\)"),
        (torch.ones(0, 48), r"must be a matrix .* found \(0, 48\)"),
        (torch.full((5, 48), 1e37), "no finite update"),
    ):
        save_file({**weights, first: odd}, saved / WEIGHTS)
        with pytest.raises(AdapterError, match=f"{WEIGHTS}: .*{message}"):
            LowRankEdit.from_pretrained(saved)
    save_file(weights, saved / WEIGHTS)
    change(saved / CONFIG, lora_alpha=1e300)
    with pytest.raises(AdapterError, match="no finite update"):
        LowRankEdit.from_pretrained(saved)


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    edit = make_edit()
    for bad in (float("nan"), float("inf")):
        damaged = LowRankEdit(edit.inputs, {name: u * bad for name, u in edit.outputs.items()}, edit.info)
        with pytest.raises(NonFiniteError, match="nothing is saved"):
            damaged.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rank_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 1000000 is beyond .* 512 is the most"):
        make_edit().save_pretrained(tmp_path, rank=1_000_000)
    make_edit().save_pretrained(tmp_path, rank=64)
    assert set(LowRankEdit.from_pretrained(tmp_path).ranks.values()) == {64}


def test_a_reloaded_edit_answers_bit_for_bit_as_the_saved_one(tiny_model: Callable[..., Any], tmp_path: Path) -> None:
    model, edit = tiny_model("qwen3"), make_edit(ranks=(5, 5))
    ids = torch.randint(2, 320, (2, 7), generator=torch.Generator().manual_seed(1))
    for padding in range(1, 40):  # the length of the header decides where the tensors lie
        edit.save_pretrained(tmp_path / str(padding))
        weights = load_file(tmp_path / str(padding) / WEIGHTS)
        save_file(weights, tmp_path / str(padding) / WEIGHTS, metadata={"format": "p" * padding})
    with torch.no_grad():
        with edit.attached(model):
            expected = model(ids).logits
        for padding in range(1, 40):
            loaded = LowRankEdit.from_pretrained(tmp_path / str(padding))
            assert all(tensor.data_ptr() % 16 == 0 for tensor in loaded.tensors().values())
            with loaded.attached(model):
                assert torch.equal(model(ids).logits, expected)
