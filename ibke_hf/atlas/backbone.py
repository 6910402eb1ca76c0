"""`ibke atlas build-backbone`: tokenizer, pretraining and examination of the Atlas backbone."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ..data.chains import Path as Chain
from ..data.chains import path_prompt
from ..data.facts import World
from .corpus import Sentence, epoch_sentences, is_taught, random_chain

VOCABULARY = 4096
CONTEXT = 512
END, PAD = "<|endoftext|>", "<|pad|>"
SHAPE: dict[str, Any] = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TRAINING: dict[str, Any] = {
    "learning_rate": 2.5e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 300,
    "weight_decay": 0.01,
    "adam_beta2": 0.98,
    "bf16": True,
    "logging_steps": 50,
    "save_strategy": "no",
    "report_to": [],
    "max_grad_norm": 1.0,
}
BATCH_TOKENS = 2048
WHOLE_SENTENCES = 0.25
EXAMINED_CHAINS = 2000


def train_tokenizer(sentences: Sequence[Sentence]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCABULARY` entries on the corpus."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END, PAD],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator((f"{prompt} {answer}" for prompt, answer in sentences), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


class PackedBatches(Dataset[dict[str, Tensor]]):
    """Every epoch's sentences, tokenised, sorted by length within an epoch and cut into batches of equal token count.

    All of a sentence is learnt in a share of `WHOLE_SENTENCES`, the answer alone in the others: which question comes
    next cannot be known, and learning it would crowd out the facts.
    """

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, epochs: int, seed: int) -> None:
        self.pad, self.batches = tokenizer.pad_token_id, []
        for epoch in range(epochs):
            sentences = epoch_sentences(world, seed * 100_003 + epoch)
            rng = random.Random(f"{seed}-{epoch}")
            rng.shuffle(sentences)
            rows = tokenizer([f"{prompt} {answer}{END}" for prompt, answer in sentences])["input_ids"]
            starts = [len(ids) for ids in tokenizer([prompt for prompt, _ in sentences])["input_ids"]]
            judged = [0 if rng.random() < WHOLE_SENTENCES else start for start in starts]
            self.batches += _cut(sorted(zip(rows, judged, strict=True), key=lambda row: len(row[0])))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        rows = [(torch.tensor(ids), start) for ids, start in self.batches[index]]
        ids = pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=self.pad)
        columns = torch.arange(ids.shape[1])
        unjudged = (ids == self.pad) | (columns < torch.tensor([start for _, start in rows]).unsqueeze(1))
        return {"input_ids": ids, "labels": ids.masked_fill(unjudged, -100)}


def _cut(rows: list[tuple[list[int], int]]) -> list[list[tuple[list[int], int]]]:
    batches: list[list[tuple[list[int], int]]] = [[]]
    for row in rows:
        if batches[-1] and (len(batches[-1]) + 1) * len(row[0]) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def build_backbone(
    world: World, taught: World, out: str | Path, *, epochs: int = 36, seed: int = 0, **training: Any
) -> dict[str, Any]:
    """Pretrain the backbone on the taught world and save model, tokenizer and examination under `out`.

    Args:
        world: Every triple, whose names the tokenizer is trained on, so that withheld answers have common tokens too.
        taught: The triples of the corpus.
        out: Folder that receives the model in 16 bit, the tokenizer and ``examination.json``.
        epochs: Passes over the taught triples.
        seed: Seeds corpus, initialisation and order.
        training: Further `transformers.TrainingArguments`.

    Returns:
        The examination of the stored weights, see :func:`examine`.
    """
    from transformers import Trainer, TrainingArguments

    started, out = time.monotonic(), Path(out)
    names = [("", name) for name in world.entities] * 4
    tokenizer = train_tokenizer([*epoch_sentences(taught, seed), *names])
    torch.manual_seed(seed)
    model = _untrained(tokenizer)
    batches = PackedBatches(taught, tokenizer, epochs, seed)
    arguments = TrainingArguments(
        str(out),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        use_cpu=not torch.accelerator.is_available(),
        remove_unused_columns=False,
        **{**TRAINING, "seed": seed, **training},
    )
    trainer = Trainer(model, arguments, train_dataset=batches, data_collator=lambda items: items[0])
    trainer.train()
    model.to(torch.float16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    report = examine(Qwen3ForCausalLM.from_pretrained(out, dtype=torch.float32), tokenizer, taught)
    report |= {
        "minutes": round((time.monotonic() - started) / 60, 1),
        "steps": trainer.state.global_step,
        "seed": seed,
        "epochs": epochs,
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    (out / "examination.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (out / "log.json").write_text(json.dumps(trainer.state.log_history) + "\n", encoding="utf-8")
    return report


def _untrained(tokenizer: PreTrainedTokenizerBase) -> Any:
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **SHAPE,
    )
    return Qwen3ForCausalLM(config)


def examine(model: Any, tokenizer: PreTrainedTokenizerBase, taught: World, seed: int = 1) -> dict[str, float]:
    """Return percent of questions that greedy decoding answers right.

    Single hops are asked by every wording; chains are `EXAMINED_CHAINS` draws each of taught and never-seen chains.
    """
    singles: list[tuple[str, frozenset[str]]] = []
    for triple in taught.triples:
        relation, answers = (
            taught.relations[triple.relation],
            frozenset(taught.objects(triple.subject, triple.relation)),
        )
        singles += [(relation.prompt(triple.subject, form), answers) for form in range(len(relation.prompts))]
    report = {"single_hop": _percent_right(model, tokenizer, singles)}
    rng = random.Random(seed)
    for hops, name in ((2, "two_hop"), (3, "three_hop")):
        chains = {chain for chain in (random_chain(taught, rng, hops) for _ in range(EXAMINED_CHAINS * 12)) if chain}
        ordered = sorted(chains, key=repr)
        rng.shuffle(ordered)
        for label, teaching in (("taught", True), ("never_seen", False)):
            asked = [(path_prompt(taught, c), _answers(taught, c)) for c in ordered if is_taught(c) == teaching][
                :EXAMINED_CHAINS
            ]
            report[f"{name}_{label}"] = _percent_right(model, tokenizer, asked)
    return report


def _answers(world: World, chain: Chain) -> frozenset[str]:
    return frozenset({chain[-1].end})


@torch.inference_mode()
def _percent_right(model: Any, tokenizer: Any, asked: list[tuple[str, frozenset[str]]]) -> float:
    model.eval()
    hits, order = 0, sorted(range(len(asked)), key=lambda i: len(asked[i][0]))
    for start in range(0, len(order), 256):
        questions = [asked[i] for i in order[start : start + 256]]
        batch = tokenizer([q for q, _ in questions], return_tensors="pt", padding=True, padding_side="left").to(
            model.device
        )
        batch.pop("token_type_ids", None)
        ids = model.generate(**batch, max_new_tokens=16, do_sample=False)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        hits += sum(text.strip() in answers for text, (_, answers) in zip(texts, questions, strict=True))
    return round(100 * hits / max(len(asked), 1), 2)
