"""Split in two over the wire, LoRA is what it is on one machine: the same weights, in f32 and in step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from sidestream.backbone.runtimes import load_backbone
from sidestream.backbone.text_input import Tokens, padded
from sidestream.backbone.torch_runtime.backbone import TorchBackbone
from sidestream.contract.lora import LoraSpec
from sidestream.contract.messages import ActivationBatch, context_of
from sidestream.contract.plan import RoundPlan
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import unpack
from sidestream.split_model.split_model import SplitModel
from tests.agent.tiny import save_tiny
from tests.split.fleet import SplitFleet, config, fleet


def tokens_of(made: SplitFleet) -> dict[bytes, tuple[Tokens, torch.Tensor]]:
    """By ticket: what a device forwarded."""
    found = {}
    for device in made.devices:
        with device.outbox.reading() as db:
            rows = [one for (one,) in db.execute("SELECT id FROM split_batches")]
        for number in rows:
            batch = device.batches.get(number)
            ids, mask = padded(batch.body.ids, 1)
            labels = np.frombuffer(batch.body.targets, "<u2").astype(np.int64)
            found[batch.base] = Tokens(ids, mask), torch.from_numpy(labels)
    return found


def served(made: SplitFleet) -> list[tuple[str, bytes]]:
    """Device and ticket of every batch, in the order in which they were served."""
    method = made.trainer.method
    order: dict[int, tuple[str, bytes]] = {}
    for record in made.trainer.journal.read(0, limit=10_000):
        if record.kind == "batch":
            part = unpack(ActivationBatch, record.payload).part
            assert part is not None and not context_of(part, 1).any()
            ticket = method.tickets.get(method.owner(record), part.ticket)
            assert ticket is not None
            order[ticket.served] = ticket.device, part.ticket
    return [order[number] for number in sorted(order)]


def whole(folder: Path, labels: int) -> SplitModel:
    backbone = load_backbone(str(folder), 0, runtime="torch")
    assert isinstance(backbone, TorchBackbone)
    return SplitModel(backbone, LoraSpec(), task=Task.TEXT_CLASSIFICATION, labels=labels, seed=0)


def adamw(parameters: list[torch.nn.Parameter], rate: float = 5e-3) -> torch.optim.AdamW:
    matrices, vectors = ([one for one in parameters if (one.dim() > 1) is wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)


def backward(loss: torch.Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


def far(before: dict[str, Floats], after: dict[str, Floats]) -> float:
    return max(float(np.abs(before[name] - after[name]).max()) for name in before)


@pytest.mark.parametrize("cut", [1, 3])
def test_one_device_in_step_learns_what_one_machine_would(tmp_path: Path, cut: int) -> None:
    backbone = save_tiny(tmp_path / "bert", "bert")
    settings = config(tmp_path, backbone, cuts=(cut,))
    with fleet(tmp_path, settings, {f"cut{cut}": 200}) as made:
        start = made.trainer.method.weights()
        made.run()
        batches, order = tokens_of(made), served(made)
        assert len(order) == 50
        model = whole(backbone, 2)
        model.load(start)
        optimiser = adamw(list(model.parameters.values()))
        for _, ticket in order:
            tokens, labels = batches[ticket]
            optimiser.zero_grad()
            backward(functional.cross_entropy(model.whole(tokens), labels))
            optimiser.step()
        found = made.trainer.method.weights()
        assert far(found, start) > 0.01
        assert far(found, model.arrays()) <= 1e-6


@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_form_is_fedavg_with_as_many_local_steps(tmp_path: Path, seed: int) -> None:
    backbone = save_tiny(tmp_path / "bert", "bert")
    rounds = RoundPlan(batches=4, devices=3, learning_rate=5e-3, clip_norm=1e9, final_rate=1.0)
    split = {"adapters": "local", "upper": "per-device", "round": rounds}
    settings = config(tmp_path, backbone, cuts=(1, 2, 3), split=split)
    shares = {"cut1": 48, "cut2": 48, "cut3": 48}
    with fleet(tmp_path, settings, shares, seed=seed) as made:
        start = made.trainer.method.weights()
        made.run()
        assert made.trainer.method.rounds == 3
        batches, order = tokens_of(made), served(made)
        model = whole(backbone, 2)
        common = start
        for number in range(3):
            locals_ = []
            for device in made.devices:
                mine = [ticket for name, ticket in order if name == device.name][4 * number : 4 * number + 4]
                model.load(common)
                optimiser = adamw(list(model.parameters.values()))
                for ticket in mine:
                    tokens, labels = batches[ticket]
                    optimiser.zero_grad()
                    backward(functional.cross_entropy(model.whole(tokens), labels))
                    optimiser.step()
                locals_.append(model.arrays())
            common = {
                name: np.asarray(
                    np.mean([one[name] for one in locals_], axis=0, dtype=np.float64), np.float32
                )
                for name in common
            }
        found = made.trainer.method.weights()
        assert far(found, start) > 0.01
        assert far(found, common) <= 1e-6
