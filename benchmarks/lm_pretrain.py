"""A small decoder where there is none to download: a Llama with its own tokenizer, pretrained on plain text.

It is saved as any model is, in a folder named after the text and the settings, and found there the next time.
"""

from __future__ import annotations

import hashlib
import math
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from benchmarks.program import Tell
from benchmarks.wikitext import as_written
from sidestream.contract.errors import DataError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically

_END: Final = "<|endoftext|>"
_HELD_OUT: Final = 0.02
_ABOUT: Final = "pretraining.json"
_TELL_EVERY_S: Final = 10.0


@prepared
class PretrainSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Everything, besides the text, that decides the model."""

    minutes: float = 6.0
    """Processor time of all threads together: 6 are three minutes of two cores."""
    vocabulary: int = 4096
    """Tokens of the byte-level BPE tokenizer."""
    width: int = 256
    """Hidden size."""
    layers: int = 6
    """Depth."""
    heads: int = 4
    """Attention heads."""
    inner: int = 704
    """Inner width of an MLP."""
    context: int = 128
    """Tokens of a training window."""
    positions: int = 512
    """Tokens that the model may see at once."""
    batch: int = 8
    """Windows an update."""
    learning_rate: float = 1.5e-3
    """AdamW's, after warm-up; it falls along half a cosine over the time."""
    weight_decay: float = 0.1
    """AdamW's, of matrices."""
    warmup: float = 0.03
    """Share of the time over which the learning rate rises."""
    seed: int = 0
    """Of the first weights and of the order."""


@prepared
class PretrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it; kept beside the model."""

    parameters: int
    """Of the model, its embedding once."""
    text_tokens: int
    """Tokens to train on."""
    seen_tokens: int
    """Tokens trained on, repetitions counted."""
    updates: int
    """AdamW's."""
    cpu_s: float
    """Processor time."""
    perplexity: float
    """A token, of the end of each file, which was kept out of training."""


def pretrained(
    files: Sequence[Path], settings: PretrainSettings, cache: Path, tell: Tell
) -> tuple[Path, PretrainReport]:
    """A model's folder; pretrains it if the cache holds none of this text and these settings.

    Raises:
        DataError: a file cannot be read, or there is too little text.
    """
    texts = [read_text(path) for path in files]
    digest = hashlib.blake2b(msgspec.json.encode(settings), digest_size=8)
    for text in texts:
        digest.update(hashlib.blake2b(text.encode()).digest())
    folder = cache / f"pretrained-{digest.hexdigest()}"
    if not (folder / _ABOUT).exists():
        tell(f"pretraining into {folder}")
        making = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(making, ignore_errors=True)
        report = _pretrain(texts, settings, making, tell)
        write_atomically(making / _ABOUT, msgspec.json.format(msgspec.json.encode(report)), public=True)
        making.rename(folder)
    report = msgspec.json.decode((folder / _ABOUT).read_bytes(), type=PretrainReport)
    tell(
        f"pretrained: {report.parameters / 1e6:.1f} M parameters, {report.seen_tokens / 1e6:.1f} M tokens in "
        f"{report.cpu_s / 60:.1f} processor minutes, held-out perplexity {report.perplexity:.1f}"
    )
    return folder, report


def read_text(path: Path) -> str:
    """A whole file, as people write.

    Raises:
        DataError: it cannot be read as UTF-8 text.
    """
    try:
        return as_written(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"{path}: cannot be read as text: {exc}") from exc


def _pretrain(texts: Sequence[str], settings: PretrainSettings, folder: Path, tell: Tell) -> PretrainReport:
    cuts = [int(len(text) * (1 - _HELD_OUT)) for text in texts]
    tokenizer = _train_tokenizer([text[:cut] for text, cut in zip(texts, cuts, strict=True)], settings)
    ids = _ids(tokenizer, [text[:cut] for text, cut in zip(texts, cuts, strict=True)])
    held_out = _ids(tokenizer, [text[cut:] for text, cut in zip(texts, cuts, strict=True)])
    if len(ids) < 2 * settings.context or len(held_out) < 2:
        raise DataError(f"{len(ids):,} tokens of text are too few to pretrain a model on")
    torch.manual_seed(settings.seed)
    model: Any = LlamaForCausalLM(_config(settings, len(tokenizer)))
    parameters = sum(one.numel() for one in model.parameters())
    tell(
        f"{len(ids):,} tokens of text, a vocabulary of {len(tokenizer)}, {parameters / 1e6:.1f} M parameters"
    )
    updates, cpu_s = _fit(model, ids, settings, tell)
    report = PretrainReport(
        parameters=parameters,
        text_tokens=len(ids),
        seen_tokens=updates * settings.batch * settings.context,
        updates=updates,
        cpu_s=cpu_s,
        perplexity=math.exp(_loss(model, held_out, settings.context)),
    )
    with _quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return report


def _train_tokenizer(texts: Sequence[str], settings: PretrainSettings) -> Any:
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bytewise.train_from_iterator((line for text in texts for line in text.splitlines(True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bytewise,
        bos_token=_END,
        eos_token=_END,
        pad_token=_END,
        model_max_length=settings.positions,
    )


def _ids(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    return torch.tensor([token for text in texts for token in tokenizer(text, verbose=False)["input_ids"]])


def _config(settings: PretrainSettings, vocabulary: int) -> Any:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=settings.width,
        intermediate_size=settings.inner,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.positions,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def _fit(model: Any, ids: Tensor, settings: PretrainSettings, tell: Tell) -> tuple[int, float]:
    """Train for the time given. Returns updates and processor seconds."""
    decayed = [one for one in model.parameters() if one.dim() > 1]
    others = [one for one in model.parameters() if one.dim() < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    batches = _batches(ids, settings)
    low = _bf16_is_faster(model, next(batches))
    model.train()
    budget_s, began, told_s = 60 * settings.minutes, time.process_time(), time.monotonic()
    updates, smooth = 0, math.nan
    while (spent := (time.process_time() - began) / budget_s) < 1:
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * _schedule(spent, settings.warmup)
        optimiser.zero_grad(set_to_none=True)
        loss = _step(model, next(batches), low)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        updates += 1
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            tell(f"pretraining, {100 * spent:.0f} % of its time: loss {smooth:.3f} after {updates} updates")
    return updates, time.process_time() - began


def _step(model: Any, windows: Tensor, low: bool) -> float:
    """Loss and gradients of some windows [K, T + 1]."""
    with torch.autocast("cpu", torch.bfloat16) if low else nullcontext():
        logits = model(input_ids=windows[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _bf16_is_faster(model: Any, windows: Tensor) -> bool:
    """Some processors multiply bf16 matrices much faster, others much slower."""
    took: dict[bool, float] = {}
    for low in (False, True, False, True):  # the first of each warms up
        started = time.process_time()
        _step(model, windows, low)
        took[low] = time.process_time() - started
    return took[True] < took[False]


def _schedule(spent: float, warmup: float) -> float:
    if spent < warmup:
        return max(spent / warmup, 0.01)
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (spent - warmup) / (1 - warmup)))


def _batches(ids: Tensor, settings: PretrainSettings) -> Iterator[Tensor]:
    """Windows [batch, context + 1] without end; an epoch meets every token, cut elsewhere each time."""
    rng = np.random.default_rng(settings.seed)
    span = settings.context
    while True:
        offset = int(rng.integers(span))
        starts = rng.permutation(np.arange(offset, len(ids) - span - 1, span))
        for first in range(0, max(1, len(starts) - settings.batch + 1), settings.batch):
            yield torch.stack(
                [ids[start : start + span + 1] for start in starts[first : first + settings.batch]]
            )


def _loss(model: Any, ids: Tensor, span: int) -> float:
    """Mean loss a token, in nats."""
    model.eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(ids) - 1, span):
            part = ids[start : start + span + 1]
            logits = model(input_ids=part[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits, part[1:], reduction="sum"))
            count += len(part) - 1
    return total / count


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own progress bars."""
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
