"""The methods that Sidestream is compared with: linear probe, LoRA, full fine-tuning, FedAvg of LoRA."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from benchmarks.classifier import Classifier, loss_of, with_all, with_lora
from benchmarks.program import Tell
from benchmarks.workload import Workload
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.demo.shards import Example

_BATCH: Final = 16
_WINDOW: Final = 16  # batches within which samples of similar length come together
_WARMUP: Final = 0.06
_LORA_RATE: Final = 1e-3
_FULL_RATE: Final = 5e-5
_HEAD_RATE: Final = 1e-3
_PROBE_DECAY: Final = 1e-4
_TELL_EVERY_S: Final = 10.0


@dataclass(kw_only=True)
class Tuned:
    """What came of training a backbone."""

    trainable: int
    """Parameters trained."""
    cpu_s: float = 0.0
    """CPU time of training, evaluation left out."""
    accuracies: list[float] = field(default_factory=list)
    """At the end, or after each round."""


def linear_probe(
    features: Tensor, targets: npt.NDArray[np.int64], asked: Tensor, labels: int
) -> npt.NDArray[np.int64]:
    """Multinomial logistic regression on standardised features, to convergence.

    Args:
        features: [K, F].
        targets: [K].
        asked: [L, F].
        labels: C.

    Returns:
        Answers [L].
    """
    centre, scale = features.mean(dim=0), features.std(dim=0) + 1e-6
    inputs, wanted = (features - centre) / scale, torch.from_numpy(targets)
    head = nn.Linear(features.shape[1], labels)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(inputs), wanted)
        loss = loss + _PROBE_DECAY * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    with torch.inference_mode():
        answers: npt.NDArray[np.int64] = head((asked - centre) / scale).argmax(dim=1).numpy()
    return answers


def central_lora(work: Workload, tier: str, seed: int, epochs: int, tell: Tell) -> Tuned:
    """LoRA and a head on a tier's backbone, all samples on one machine."""
    torch.manual_seed(seed)
    classifier = with_lora(_load(work, tier))
    return _central(work, classifier, seed, epochs, _LORA_RATE, tell)


def central_full(work: Workload, tier: str, seed: int, epochs: int, tell: Tell) -> Tuned:
    """Every weight of a tier's backbone and a head, all samples on one machine."""
    torch.manual_seed(seed)
    classifier = with_all(_load(work, tier))
    return _central(work, classifier, seed, epochs, _FULL_RATE, tell)


def fedavg_lora(
    work: Workload,
    shards: Sequence[Sequence[Example]],
    seed: int,
    rounds: int,
    tell: Tell,
    *,
    local_epochs: int = 1,
) -> Tuned:
    """FedAvg (McMahan et al. 2017) of LoRA adapters and head.

    Each round every device starts from the global parameters with a fresh optimiser, trains some epochs on
    its own samples, and sends its parameters; they are averaged, weighted by samples.
    """
    torch.manual_seed(seed)
    classifier = with_lora(_load(work, work.deepest))
    tuned = Tuned(trainable=_count(classifier))
    parameters = classifier.trained()
    current = [parameter.detach().clone() for parameter in parameters]
    total = sum(len(shard) for shard in shards)
    for number in range(rounds):
        mean = [torch.zeros_like(value) for value in current]
        for device, shard in enumerate(shards):
            with torch.no_grad():
                for parameter, value in zip(parameters, current, strict=True):
                    parameter.copy_(value)
            rng = np.random.default_rng([seed, number, device])
            tuned.cpu_s += _fit(
                work, classifier, shard, rng, epochs=local_epochs, rate=_LORA_RATE, decay=False, tell=tell
            )
            for value, parameter in zip(mean, parameters, strict=True):
                value += parameter.detach() * (len(shard) / total)
        current = mean
        with torch.no_grad():
            for parameter, value in zip(parameters, current, strict=True):
                parameter.copy_(value)
        tuned.accuracies.append(_accuracy(work, classifier))
        tell(f"round {number + 1} of {rounds}: accuracy {tuned.accuracies[-1]:.4f}")
    return tuned


def _central(
    work: Workload, classifier: Classifier, seed: int, epochs: int, rate: float, tell: Tell
) -> Tuned:
    rng = np.random.default_rng(seed)
    cpu_s = _fit(work, classifier, work.train, rng, epochs=epochs, rate=rate, decay=True, tell=tell)
    return Tuned(trainable=_count(classifier), cpu_s=cpu_s, accuracies=[_accuracy(work, classifier)])


def _load(work: Workload, tier: str) -> Classifier:
    backbone = TorchBackbone.load(work.backbone_of(tier), work.tiers[tier])
    return Classifier(backbone, len(work.labels))


def _count(classifier: Classifier) -> int:
    return sum(parameter.numel() for parameter in classifier.trained())


def _fit(
    work: Workload,
    classifier: Classifier,
    examples: Sequence[Example],
    rng: np.random.Generator,
    *,
    epochs: int,
    rate: float,
    decay: bool,
    tell: Tell,
) -> float:
    """Train in place; with ``decay`` the learning rate warms up and falls to 0. Returns CPU seconds."""
    head = list(classifier.head.parameters())
    others = [one for one in classifier.trained() if all(one is not mine for mine in head)]
    optimiser = torch.optim.AdamW([{"params": others, "lr": rate}, {"params": head, "lr": _HEAD_RATE}])
    batches = [batch for _ in range(epochs) for batch in _batches(examples, rng)]
    index = {label: number for number, label in enumerate(work.labels)}
    rates = [group["lr"] for group in optimiser.param_groups]
    classifier.train()
    began, told_s = time.thread_time(), time.monotonic()
    for step, batch in enumerate(batches):
        for group, full in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = full * schedule(step, len(batches)) if decay else full
        texts, targets = [one.text for one in batch], [index[one.label] for one in batch]
        optimiser.zero_grad(set_to_none=True)
        loss_of(classifier, texts, targets).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(classifier.trained(), 1.0)
        optimiser.step()
        if time.monotonic() - told_s > _TELL_EVERY_S:
            told_s = time.monotonic()
            tell(f"{step + 1} of {len(batches)} updates")
    # Autograd runs backward passes on a CPU in the calling thread, so the thread's time holds them.
    return time.thread_time() - began


def schedule(step: int, steps: int) -> float:
    """The learning rate's share: a short warm-up, then a straight line down to 0."""
    warmup = max(1, int(_WARMUP * steps))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _batches(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[list[Example]]:
    """An epoch in random order; within a window, samples of similar length share a batch."""
    order = rng.permutation(len(examples)).tolist()
    for window in range(0, len(order), _BATCH * _WINDOW):
        rows = sorted(order[window : window + _BATCH * _WINDOW], key=lambda row: len(examples[row].text))
        starts = range(0, len(rows), _BATCH)
        for number in rng.permutation(len(starts)).tolist():
            yield [examples[row] for row in rows[starts[number] : starts[number] + _BATCH]]


def _accuracy(work: Workload, classifier: Classifier) -> float:
    classifier.eval()
    examples = sorted(work.evaluation, key=lambda example: len(example.text))
    right = 0
    with torch.inference_mode():
        for start in range(0, len(examples), 4 * _BATCH):
            part = examples[start : start + 4 * _BATCH]
            answers = classifier([one.text for one in part]).argmax(dim=1).tolist()
            right += sum(work.labels[answer] == one.label for answer, one in zip(answers, part, strict=True))
    return right / len(examples)
