"""What a device does for one batch, method by method. A step returns the bytes that travel for it.

Legend: K texts, T tokens, d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.classifier import Classifier, loss_of, with_all, with_lora
from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.store.streams import Slot
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.lora import LoraSpec
from sidestream.contract.plan import Plan, SideNetworkSpec, TierPlan, tap_layers
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.tensors import Tensor as Encoded
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.split_model.lower_half import LowerHalf
from sidestream.split_model.split_model import SplitModel

_LABELS: Final = 2
_TIER: Final = "tier"


class Traffic(NamedTuple):
    """Bytes for one batch; what travels once a round is not in them."""

    up: int
    down: int


class Step(Protocol):
    """One method on one device."""

    trainable: int
    """Parameters that the device trains."""

    def warm(self, texts: Sequence[str]) -> None:
        """Touch the code that a step runs, and keep nothing."""

    def run(self, texts: Sequence[str]) -> Traffic:
        """One batch."""


class AgentStep:
    """Sidestream's: forward, sample, quantise, pack, by the agent's own code and default plan."""

    trainable = 0

    def __init__(self, backbone: TorchBackbone, max_tokens: int) -> None:
        tier = TierPlan(
            backbone="measured",
            max_tokens=max_tokens,
            depth=backbone.depth,
            width=backbone.width,
            taps=tap_layers(backbone.depth, SideNetworkSpec().blocks),
            fingerprint=backbone.fingerprint,
        )
        plan = Plan(
            job="benchmark",
            run="0" * 32,
            revision=0,
            task=Task.TEXT_CLASSIFICATION,
            labels=tuple(f"label-{index}" for index in range(_LABELS)),
            tiers={_TIER: tier},
        )
        self._maker = BatchMaker(backbone, plan, _TIER, TARGET_MESSAGE_BYTES)

    def warm(self, texts: Sequence[str]) -> None:
        self.run(texts)

    def run(self, texts: Sequence[str]) -> Traffic:
        sampled = self._maker.forward(texts)
        rows = np.arange(len(texts))
        keys = [index.to_bytes(8, "big") for index in range(len(texts))]
        packed = self._maker.packer(sampled, [np.array(0)] * len(texts), rows, keys)
        payload = packed(Slot("0" * 32, 1, 1, 0, ""))
        return Traffic(up=len(payload), down=0)


class TrainStep:
    """Trains a model on the device.

    Args:
        model: What of it asks for gradients is trained.
        loss: Of a batch of texts.
    """

    def __init__(self, model: nn.Module, loss: Callable[[Sequence[str]], Tensor]) -> None:
        model.train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._loss = loss
        self._optimiser = torch.optim.AdamW(trained, lr=1e-4)
        self.trainable = sum(parameter.numel() for parameter in trained)

    def warm(self, texts: Sequence[str]) -> None:
        self._backward(texts)
        self._optimiser.zero_grad(set_to_none=True)

    def run(self, texts: Sequence[str]) -> Traffic:
        self._optimiser.zero_grad(set_to_none=True)
        self._backward(texts)
        self._optimiser.step()
        return Traffic(up=0, down=0)

    def _backward(self, texts: Sequence[str]) -> None:
        self._loss(texts).backward()  # type: ignore[no-untyped-call]


class HalfStep:
    """Split federated LoRA (arXiv 2506.02940) on the device's layers, by the product's own code.

    The states at the cut go up at int8, the trainer's gradient comes down at int8, and what that means for
    the adapters goes up at int8: they are the trainer's.
    """

    def __init__(self, backbone: TorchBackbone, tokens: int) -> None:
        self._reader, self._tokens = backbone.text_input, tokens
        self._half = LowerHalf(backbone, LoraSpec())
        self.trainable = sum(array.size for array in self._half.arrays().values())
        self._gradient: Encoded | None = None

    def warm(self, texts: Sequence[str]) -> None:
        self.run(texts)

    def run(self, texts: Sequence[str]) -> Traffic:
        passed = self._half.forward(self._reader.read(texts, self._tokens))
        sent = encode(passed.states, Codec.INT8)
        answer = self._trainer(sent)
        found = passed.backward(decode(answer))
        learnt = [encode(gradient, Codec.INT8) for gradient in found.values()]
        return Traffic(up=_size(sent) + sum(map(_size, learnt)), down=_size(answer))

    def _trainer(self, sent: Encoded) -> Encoded:
        """A gradient of the right shape; what a trainer computes does not cost the device anything."""
        if self._gradient is None or self._gradient.shape != sent.shape:
            rng = np.random.default_rng(0)
            self._gradient = encode(rng.standard_normal(sent.shape).astype(np.float32), Codec.INT8)
        return self._gradient


class WholeStep:
    """The same LoRA on all layers and a head, trained on the device with AdamW; no dropout either."""

    def __init__(self, backbone: TorchBackbone, tokens: int) -> None:
        self._reader, self._tokens = backbone.text_input, tokens
        task = Task.TEXT_CLASSIFICATION
        self._model = SplitModel(backbone, LoraSpec(), task=task, labels=_LABELS, seed=0)
        trained = list(self._model.parameters.values())
        self._optimiser = torch.optim.AdamW(trained, lr=1e-4)
        self.trainable = sum(parameter.numel() for parameter in trained)

    def warm(self, texts: Sequence[str]) -> None:
        self.run(texts)

    def run(self, texts: Sequence[str]) -> Traffic:
        answers = self._model.whole(self._reader.read(texts, self._tokens))
        targets = torch.zeros(len(texts), dtype=torch.long)
        self._optimiser.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(answers, targets).backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return Traffic(up=0, down=0)


CUTS: Final = {f"cut-{layers}": layers for layers in (1, 2, 3)}
"""Split LoRA by the number of layers on the device; ``split-lora`` has half of them there."""
STEPS: Final[Mapping[str, Callable[[TorchBackbone, int], Step]]] = {
    "agent": AgentStep,
    "lora": lambda backbone, tokens: _trained(with_lora(Classifier(backbone, _LABELS, tokens))),
    "full": lambda backbone, tokens: _trained(with_all(Classifier(backbone, _LABELS, tokens))),
    "split-lora": HalfStep,
    "lora-plain": WholeStep,
    **dict.fromkeys(CUTS, HalfStep),
}
"""Methods by name: made from a loaded backbone and the most tokens of a text."""


def layers_on_device(method: str, depth: int) -> int:
    """How many of a backbone's layers a method loads on the device; 0 for all."""
    return CUTS.get(method, max(1, depth // 2) if method == "split-lora" else 0)


def _trained(classifier: Classifier) -> Step:
    return TrainStep(classifier, lambda texts: loss_of(classifier, texts, [0] * len(texts)))


def _size(tensor: Encoded) -> int:
    return len(tensor.data) + len(tensor.scales)
