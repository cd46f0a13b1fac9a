"""A trainer of split LoRA in a process of its own: ``python -m benchmarks.split_server``, a request on stdin.

Memory is the peak of resident memory, less what was resident once libraries were loaded and a tiny model had
learnt. Linux only.

Legend: K samples, T tokens, d hidden size.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import peft
import torch
from torch import Tensor, nn

from benchmarks.probe import ProbeError, memory, settle
from benchmarks.shapes import SHAPES, random_backbone
from sidestream.contract.lora import LoraSpec
from sidestream.contract.tasks import Task
from sidestream.contract.wire import prepared
from sidestream.split_model.split_model import SplitModel

_ROOT = Path(__file__).resolve().parents[1]
_LABELS: Final = 2
_TINY: Final = "tiny"


@prepared
class ServerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure."""

    form: str
    """One of :data:`FORMS`."""
    shape: str
    """Of the backbone, with random weights."""
    cuts: list[int]
    """One for each device."""
    batch: int
    """K."""
    tokens: int
    """T."""
    rank: int = 8
    """Of the adapters."""


@prepared
class ServerCost(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured, in bytes above the interpreter with its libraries."""

    loaded: int
    """With everything loaded."""
    peak: int
    """While every device's batch was learnt from."""


def measure_server(request: ServerRequest) -> ServerCost:
    """Run it in a process of its own.

    Raises:
        ProbeError: with the end of what it said.
    """
    ended = subprocess.run(
        [sys.executable, "-m", "benchmarks.split_server"],
        input=msgspec.json.encode(request),
        capture_output=True,
        cwd=_ROOT,
        check=False,
    )
    if ended.returncode:
        said = ended.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise ProbeError(f"measuring {request.form} failed ({ended.returncode}): {said[-1][:300]}")
    return msgspec.json.decode(ended.stdout, type=ServerCost)


class OneModel:
    """Ours: one model for every cut, one set of adapters, one device's batch after the other."""

    def __init__(self, request: ServerRequest) -> None:
        self._request = request
        lora = LoraSpec(rank=request.rank)
        backbone, task = random_backbone(request.shape), Task.TEXT_CLASSIFICATION
        self._model = SplitModel(backbone, lora, task=task, labels=_LABELS, seed=0)
        self._optimiser = torch.optim.AdamW(self._model.parameters.values(), lr=1e-4)

    def learn(self) -> None:
        """Each device's batch once."""
        batch, tokens = self._request.batch, self._request.tokens
        for cut in self._request.cuts:
            states = torch.randn(batch * tokens, self._model.width).requires_grad_()
            answers = self._model.answers(cut, states, np.full(batch, tokens))
            _loss(answers).backward()  # type: ignore[no-untyped-call]
            self._optimiser.step()
            self._optimiser.zero_grad(set_to_none=True)


class Submodels:
    """What is usual: for each device a model of the layers that it lacks, with adapters of its own.

    All batches are under way at once. There are no embeddings in them, nor copies of any one's weights.
    """

    def __init__(self, request: ServerRequest) -> None:
        self._request = request
        _, make = SHAPES[request.shape]
        self._models = [_layers_from(make, cut, request.rank) for cut in request.cuts]
        self._optimisers = [
            torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)
            for model in self._models
        ]

    def learn(self) -> None:
        """Each device's batch once."""
        losses = [_loss(self._pass(model)) for model in self._models]
        for loss, optimiser in zip(losses, self._optimisers, strict=True):
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()

    def _pass(self, layers: nn.ModuleList) -> Tensor:
        width = int(layers[0].attention.self.query.in_features)  # type: ignore[union-attr, arg-type]
        states = torch.randn(self._request.batch, self._request.tokens, width).requires_grad_()
        for layer in layers:
            found: Any = layer(states)
            states = found[0] if isinstance(found, tuple) else found
        return states.mean(dim=1)


FORMS: Final[Mapping[str, Callable[[ServerRequest], OneModel | Submodels]]] = {
    "one model": OneModel,
    "submodels": Submodels,
}
"""By name."""


def main() -> int:
    torch.set_num_threads(1)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerRequest)
    sys.stdout.buffer.write(msgspec.json.encode(_measured(request)))
    return 0


def _measured(request: ServerRequest) -> ServerCost:
    form = FORMS[request.form]
    form(msgspec.structs.replace(request, shape=_TINY, cuts=[1], batch=2, tokens=4)).learn()
    bare = settle()
    server = form(request)
    loaded = settle()
    server.learn()
    return ServerCost(loaded=loaded - bare, peak=memory("VmHWM") - bare)


def _layers_from(make: Callable[[], Any], cut: int, rank: int) -> nn.ModuleList:
    layers: nn.ModuleList = make().encoder.layer[cut:].eval().requires_grad_(False)
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    peft.inject_adapter_in_model(config, layers)
    return layers


def _loss(answers: Tensor) -> Tensor:
    return answers.square().mean()


if __name__ == "__main__":
    sys.exit(main())
