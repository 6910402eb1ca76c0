"""A cache of what the frozen backbone computes: steps equal those without it, nothing stale or broken is read."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_templates import TEMPLATE
from torch import Tensor
from training_runs import assert_equal_weights, record, weights

from ibke_hf import IBKEEditor
from ibke_hf.core.records import EditRecord, EditRequest
from ibke_hf.editors.mend import MENDEditor
from ibke_hf.io import FileError
from ibke_hf.training.activation_store import DATA, INDEX, ActivationStore, from_half, to_half
from ibke_hf.training.activations import ActivationCache
from ibke_hf.training.objective import run_batch

HALF = (5e-3, 2e-5)  # relative and absolute: what rounding to 16 bit leaves
SAME = (1e-4, 1e-6)


def records() -> list[EditRecord]:
    """Records of one and of two requests, with supporting hops, with and without cases of a kind."""
    two = record(1, 1, 3, hops=1)
    more = EditRequest("The Rome bridge crosses the", "river Thames")
    return [record(0, 2, 1), replace(two, requests=(*two.requests, more)), record(2, 1, 2, hops=1), record(3, 0, 1)]


def step(trainer: Any, inputs: Any, cache: ActivationCache | None, **options: Any) -> tuple[dict[str, Tensor], Any]:
    """Terms of the loss and gradients of one step, at the same noise."""
    editor = trainer.model.train()
    editor.zero_grad()
    torch.manual_seed(0)
    batch = run_batch(editor, editor, trainer.backbone, inputs, cache=cache, **options)
    torch.stack(list(batch.terms.values())).sum().backward()
    return dict(batch.terms), {name: p.grad.clone() for name, p in editor.named_parameters()}


def assert_close(left: Any, right: Any, tolerance: tuple[float, float]) -> None:
    relative, absolute = tolerance
    for name in left[0]:
        torch.testing.assert_close(left[0][name], right[0][name], rtol=relative, atol=absolute)
    largest = max(float(gradient.norm()) for gradient in left[1].values())
    for name, gradient in left[1].items():  # a key's bias has none but of rounding
        difference = (gradient - right[1][name]).norm() / gradient.norm().clamp(min=1e-2 * largest)
        assert difference < relative, name


def opened(trainer: Any, folder: Path, gigabytes: float = 1.0) -> ActivationCache:
    cache = ActivationCache.open(folder, trainer.backbone, trainer.model, gigabytes)
    assert cache is not None
    return cache


def forbid(monkeypatch: pytest.MonkeyPatch, cache: ActivationCache) -> None:
    """Fail where the backbone is run on what the cache should hold."""

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("the backbone was run on what is cached")

    monkeypatch.setattr(cache.parts, "lower", fail)
    monkeypatch.setattr("ibke_hf.core.modeling_ibke.capture_factors", fail)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
@pytest.mark.parametrize(("kind", "hops", "per_group"), [(IBKEEditor, "all", 1), (MENDEditor, "unknown", 0)])
def test_a_step_with_the_cache_equals_the_step_without(
    family: str,
    kind: Any,
    hops: str,
    per_group: int,
    trainer_for: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = trainer_for(records(), family=family, kind=kind, edits_per_group=per_group, train_supporting_hops=hops)
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator(records())
    plain = step(trainer, inputs, None, hops=hops, sg_includes_edit=per_group == 1)
    cache = opened(trainer, tmp_path / "cache")
    filling = step(trainer, inputs, cache, hops=hops, sg_includes_edit=per_group == 1)
    forbid(monkeypatch, cache)
    filled = step(trainer, inputs, cache, hops=hops, sg_includes_edit=per_group == 1)
    reopened = step(trainer, inputs, opened(trainer, tmp_path / "cache"), hops=hops, sg_includes_edit=per_group == 1)
    assert_close(plain, filling, HALF)
    assert_close(filling, filled, SAME)
    assert_close(filled, reopened, SAME)


def test_chat_turns_are_cached_as_well(
    trainer_for: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny_tokenizer, "chat_template", TEMPLATE)
    plain, chat = records()[:2], [item.formatted(chat=True) for item in records()[:2]]
    trainer = trainer_for(chat)
    trainer.calibrate(trainer.model)
    cache = opened(trainer, tmp_path)
    for item in (chat, plain):
        inputs = trainer.data_collator(item)
        stored = len(cache.store)
        assert_close(step(trainer, inputs, None), step(trainer, inputs, cache), HALF)
        assert len(cache.store) > stored


def test_a_backbone_that_cannot_be_run_in_parts_is_trained_without(
    trainer_for: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(records(), activation_cache=str(tmp_path / "cache"))
    blocks = trainer.backbone.model.layers
    blocks[3].register_forward_pre_hook(
        lambda _, args: (args[0] + blocks[0].state,)
    )  # a block that reads what a lower one has left
    blocks[0].register_forward_hook(lambda module, _, output: setattr(module, "state", output))
    with caplog.at_level("WARNING"):
        assert trainer.activations is None
    assert "Qwen3ForCausalLM: trained without activation cache, since" in caplog.text
    trainer.train()
    assert not (tmp_path / "cache").exists()


def test_a_pass_in_parts_leaves_the_model_as_it_was(trainer_for: Any, tmp_path: Path) -> None:
    trainer = trainer_for(records())
    methods = {name: vars(module).get("forward") for name, module in trainer.backbone.named_modules()}
    cases = trainer.data_collator(records())["cases"]
    plain = trainer.backbone(cases.input_ids).logits
    cache = opened(trainer, tmp_path)
    cache.logits(cache.states(cases))
    with pytest.raises(RuntimeError):
        cache.parts.upper(cases, torch.zeros(1, 1, 1))  # fails within a block
    assert methods == {name: vars(module).get("forward") for name, module in trainer.backbone.named_modules()}
    assert not any(module._forward_hooks for module in trainer.backbone.modules())
    torch.testing.assert_close(trainer.backbone(cases.input_ids).logits, plain, rtol=0, atol=0)


def test_mend_reads_what_ibke_has_stored(trainer_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (trainer_for(records(), kind=kind) for kind in (IBKEEditor, MENDEditor))
    inputs = first.data_collator(records())
    first.calibrate(first.model)
    second.calibrate(second.model)
    step(first, inputs, opened(first, tmp_path))
    plain = step(second, inputs, None)
    cache = opened(second, tmp_path)
    forbid(monkeypatch, cache)
    assert_close(plain, step(second, inputs, cache), HALF)


def test_a_text_is_one_entry_whatever_it_is_padded_with(trainer_for: Any, tmp_path: Path) -> None:
    trainer = trainer_for(records())
    cache = opened(trainer, tmp_path)
    cases = trainer.data_collator(records())["cases"]
    together = cache.states(cases)
    stored = len(cache.store)
    for alone in (cases[1:2].trimmed(), cases[1:2].trimmed(64)):
        cache.new_batch()
        first = int((cases.labels[:1] >= 0).sum())
        torch.testing.assert_close(cache.states(alone), together[first : first + int((alone.labels >= 0).sum())])
    right = replace(cases, **{name: flipped(getattr(cases, name), cases.attention_mask) for name in vars(cases)})
    torch.testing.assert_close(cache.states(right), together)
    assert len(cache.store) == stored


def flipped(tensor: Tensor, mask: Tensor) -> Tensor:
    """Move the columns of left-padded rows to the left."""
    shifts = mask.argmax(1).tolist()
    return torch.stack([row.roll(-shift) for row, shift in zip(tensor, shifts, strict=True)])


def test_training_uses_a_cache_only_where_it_is_asked_for(trainer_for: Any, tmp_path: Path) -> None:
    plain = trainer_for(records(), folder="plain")
    plain.train()
    assert plain.activations is None
    cached = trainer_for(records(), folder="cached", activation_cache=str(tmp_path / "cache"))
    cached.train()
    assert len(cached.activations.store) > 0
    losses = [[log["loss"] for log in trainer.state.log_history if "loss" in log] for trainer in (plain, cached)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_calibration_is_read_from_the_cache_the_next_time(
    trainer_for: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = trainer_for(records())
    plain.calibrate(plain.model)
    cached = [trainer_for(records(), activation_cache=str(tmp_path / "cache")) for _ in range(2)]
    for trainer in cached:
        trainer.calibrate(trainer.model)
        forbid(monkeypatch, trainer.activations)
    for name, value in weights(plain.model).items():
        torch.testing.assert_close(weights(cached[0].model)[name], value, rtol=1e-2, atol=1e-5)
    assert_equal_weights(*(weights(trainer.model) for trainer in cached))


@pytest.mark.parametrize("change", ["weights", "config", "layers", "precision"])
def test_what_another_backbone_has_stored_is_not_read(change: str, trainer_for: Any, tmp_path: Path) -> None:
    trainer = trainer_for(records())
    inputs = trainer.data_collator(records())
    step(trainer, inputs, opened(trainer, tmp_path))
    assert len(opened(trainer, tmp_path).store)
    if change == "weights":
        trainer.backbone.get_input_embeddings().weight.data[100, 20] += 0.1
    elif change == "config":
        trainer.backbone.config.rms_norm_eps *= 2
    elif change == "layers":
        trainer.model.config.edited_layers = [0, 2]
    else:
        trainer.backbone.bfloat16()
    assert not len(opened(trainer, tmp_path).store)


def test_a_backbone_of_the_same_weights_that_answers_otherwise_is_refused(trainer_for: Any, tmp_path: Path) -> None:
    trainer = trainer_for(records())
    opened(trainer, tmp_path)
    opened(trainer, tmp_path)
    trainer.backbone.model.layers[0].register_forward_hook(lambda _, __, output: output * 1.5)
    with pytest.raises(FileError, match="answered otherwise"):
        opened(trainer, tmp_path)


def test_the_room_is_never_exceeded_and_what_has_none_is_computed(trainer_for: Any, tmp_path: Path) -> None:
    trainer = trainer_for(records())
    trainer.calibrate(trainer.model)
    inputs = trainer.data_collator(records())
    plain = step(trainer, inputs, None)
    other = tmp_path / "other"
    other.mkdir()
    (other / DATA).write_bytes(bytes(5_000))
    cache = opened(trainer, tmp_path, 20_000 / 1e9)
    for _ in range(2):
        assert_close(plain, step(trainer, inputs, cache), HALF)
    assert cache.store.is_full
    assert 12_000 < sum(file.stat().st_size for file in tmp_path.glob("*/*") if file.name != "backbone.json") <= 20_000


def arrays(*numbers: int) -> dict[str, tuple[Tensor, tuple[float, ...]]]:
    return {f"key {n}": (torch.full((n + 1, 3), float(n), dtype=torch.float16), (n / 4,)) for n in numbers}


def test_half_written_and_damaged_entries_are_not_read(tmp_path: Path) -> None:
    tmp_path = tmp_path / "cache" / "store"  # what lies beside a store counts too
    store = ActivationStore(tmp_path, 10_000)
    store.put(arrays(1, 2))
    with (tmp_path / DATA).open("ab") as data, (tmp_path / INDEX).open("ab") as index:
        data.write(b"half of an arr")  # a process was killed here
        index.write(b'{"key":"key 3","offset":0,"sha')
    store = ActivationStore(tmp_path, 10_000)
    assert len(store) == 2
    store.put(arrays(3, 4))
    for each in (store, ActivationStore(tmp_path, 10_000)):
        for n in (1, 2, 3, 4):
            array, numbers = each.get(f"key {n}")  # type: ignore[misc]
            assert array.tolist() == [[float(n)] * 3] * (n + 1)
            assert numbers == (n / 4,)
    with (tmp_path / DATA).open("r+b") as data:
        data.write(b"damage")
    store = ActivationStore(tmp_path, 10_000)
    assert store.get("key 1") is None
    store.put(arrays(1))
    assert ActivationStore(tmp_path, 10_000).get("key 1") is not None


WRITER = """
import sys
import torch
from pathlib import Path
from ibke_hf.training.activation_store import ActivationStore
store = ActivationStore(Path(sys.argv[1]), 10**8)
print("open", flush=True)
sys.stdin.readline()
for n in range(int(sys.argv[2]), int(sys.argv[3])):
    store.put({f"key {n}": (torch.full((100, 100), float(n % 100), dtype=torch.float16), (float(n),))})
    print(n, flush=True)
"""


@contextmanager
def writer(folder: Path, first: int, end: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(end)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process


def start(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()


def assert_whole(store: ActivationStore, number: int) -> None:
    """Check that each entry is what its writer meant, and stored once."""
    store.refresh()
    assert len(store) == number
    for n in range(number):
        array, numbers = store.get(f"key {n}")  # type: ignore[misc]
        assert numbers == (float(n),)
        assert (array == n % 100).all()
    assert (store.folder / DATA).stat().st_size == number * 20_000


def test_two_processes_fill_one_store_and_one_that_is_killed_leaves_it_usable(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with writer(folder, 0, 60) as one, writer(folder, 30, 4000) as killed:
        start(one)
        start(killed)
        assert killed.stdout is not None
        while killed.stdout.readline() != "50\n":
            pass
        killed.kill()
        assert one.wait(60) == 0
    store = ActivationStore(folder, 10**8)
    number = len(store)
    assert 60 <= number < 4000
    for n in range(number, number + 5):
        store.put({f"key {n}": (torch.full((100, 100), float(n % 100), dtype=torch.float16), (float(n),))})
    assert_whole(ActivationStore(folder, 10**8), number + 5)


def test_sixteen_bit_keep_the_digits_of_gradients_of_any_size() -> None:
    sizes = torch.tensor([1e-25, 1e-12, 1e-5, 1.0, 1e4, 1e9])
    rows = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * sizes[:, None]
    rows = torch.cat((rows, torch.zeros(1, 50)))
    torch.testing.assert_close(from_half(to_half(rows)), rows, rtol=2**-10, atol=0)
