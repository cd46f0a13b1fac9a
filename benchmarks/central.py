"""The centralised side-network of a tier: the same network, trainer and recipe, all samples from one device.

A tier's training samples are forwarded once, through the agent's own code, and kept; for each seed they are
quantised into a journal in random order, as one device would have sent them, and the real trainer learns from
it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.evaluator import Load
from benchmarks.fleet import FleetDevice
from benchmarks.fleet_run import FleetRun, run_fleet
from benchmarks.program import Tell
from benchmarks.workload import Workload
from edge_agent.batches.batch_maker import BatchMaker
from edge_agent.store.streams import Slot
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.receive.inbox import arrived
from side_trainer.settings.schema import TrainerConfig
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.sampled import Sampled
from sidestream.contract.messages import ActivationBatch, Status
from sidestream.contract.plan import Plan
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, unpack
from sidestream.demo.shards import Example
from sidestream.side_network.inference import InferenceNetwork

_TELL_EVERY_S = 10.0
_DEVICE = "central"
_ASKED = 256  # samples that are answered at once


class Sent(NamedTuple):
    """What a device would have sent."""

    payload_bytes: int
    cpu_s: float
    """Of quantising and storing it."""


class TierFeatures:
    """A tier's sampled taps of some samples, computed once.

    Args:
        work: Data and tiers.
        tier: Which.
        examples: The samples.
        folder: For scratch files.
        tell: Given progress.
        load: Gives the backbone of a reference and so many layers.
    """

    def __init__(
        self,
        work: Workload,
        tier: str,
        examples: Sequence[Example],
        folder: Path,
        tell: Tell,
        load: Load = shared_backbone,
    ) -> None:
        self.tier = tier
        self._backbone = load(work.backbone_of(tier), work.tiers[tier])
        folder.mkdir(parents=True)
        journal = Journal(folder / FILE_NAME)
        plan = _settle(journal, work.config(folder, seed=0), tier, self._backbone)
        journal.close()
        self._batch_size = plan.tiers[tier].batch_size
        self._align = plan.tiers[tier].align
        self._maker = BatchMaker(self._backbone, plan, tier, TARGET_MESSAGE_BYTES)
        index = {label: number for number, label in enumerate(work.labels)}
        self.targets = np.array([index.get(example.label, -1) for example in examples])
        """[K] label indices; -1 for a label that the job does not have."""
        self.forward_cpu_s = 0.0
        """CPU time of the passes, sampling included."""
        self._samples = self._forward([example.text for example in examples], tell)

    def _forward(self, texts: Sequence[str], tell: Tell) -> list[Floats]:
        """One forward pass a sample, similar lengths together: [B, N, d] each."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        samples: list[Floats] = [np.empty(0, np.float32)] * len(texts)
        told_s = time.monotonic()
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            began = time.thread_time()
            sampled = self._maker.forward([texts[row] for row in rows])
            self.forward_cpu_s += time.thread_time() - began
            ends = np.cumsum(sampled.lengths)[:-1]
            for row, vectors in zip(rows, np.split(sampled.vectors, ends, axis=1), strict=True):
                samples[row] = vectors.copy()
            if time.monotonic() - told_s > _TELL_EVERY_S:
                told_s = time.monotonic()
                tell(f"{start + len(rows)} of {len(texts)} samples forwarded")
        return samples

    def pooled(self) -> torch.Tensor:
        """[K, B·d]: each tap's mean over a sample's vectors, after quantising, as the trainer gets it."""
        means = [decode(self._maker.quantised(sample)).mean(axis=1).ravel() for sample in self._samples]
        return torch.from_numpy(np.stack(means))

    def fill(self, journal: Journal, config: TrainerConfig, seed: int) -> Sent:
        """Journal every sample once, in random order, as a device would have sent them."""
        self.settle(journal, config)
        order = np.random.default_rng([seed, 3]).permutation(len(self._samples))
        stream, total, sent, began = secrets.token_hex(16), 0, 0, time.thread_time()
        with journal.transaction():
            for number, (samples, packer) in enumerate(self._packers(order), start=1):
                payload = packer(Slot(stream, number, number, sent, ""))
                total, sent = total + len(payload), sent + samples
                batch = unpack(ActivationBatch, payload)
                journal.append_batch(arrived(batch, payload, self.tier, _DEVICE))
        return Sent(total, time.thread_time() - began)

    def settle(self, journal: Journal, config: TrainerConfig) -> None:
        """Journal the facts that the tier's first device would settle."""
        _settle(journal, config, self.tier, self._backbone)

    def batches(
        self, rows: npt.NDArray[np.int64], targets: npt.NDArray[np.int64], slot: Slot
    ) -> Iterator[ActivationBatch]:
        """Some samples as messages of one stream, from a place in it on, with targets of one's own.

        Args:
            rows: Which samples, [K].
            targets: [K].
            slot: The first message's place.
        """
        for start in range(0, len(rows), self._batch_size):
            part = slice(start, start + self._batch_size)
            sampled = self.sampled(rows[part])
            packer = self._maker.packer(sampled, targets[part].tolist(), np.arange(len(sampled.lengths)), ())
            yield unpack(ActivationBatch, packer(slot))
            slot = slot._replace(
                sequence=slot.sequence + 1, first_sample=slot.first_sample + len(sampled.lengths)
            )

    def answers(
        self, network: InferenceNetwork, change: Callable[[Floats], Floats] = lambda vectors: vectors
    ) -> npt.NDArray[np.int64]:
        """[K]: the label that a network gives each sample, its vectors perhaps changed before."""
        found = []
        for rows in np.array_split(np.arange(len(self._samples)), len(self._samples) // _ASKED + 1):
            sampled = self.sampled(rows)
            found.append(
                network.predict(self._align, change(sampled.vectors), sampled.lengths).argmax(axis=1)
            )
        return np.concatenate(found)

    def _packers(self, order: npt.NDArray[np.int64]) -> Iterator[tuple[int, Callable[[Slot], bytes]]]:
        """Each message's number of samples, and what writes it."""
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            sampled, targets = self.sampled(rows), list(self.targets[rows])
            for part in self._maker.split(sampled, np.arange(len(rows))):
                yield len(part), self._maker.packer(sampled, targets, part, ())

    def sampled(self, rows: npt.NDArray[np.int64]) -> Sampled:
        """What the forward passes of some samples left behind."""
        chosen = [self._samples[row] for row in rows.tolist()]
        lengths = np.array([sample.shape[1] for sample in chosen])
        return Sampled(vectors=np.concatenate(chosen, axis=1), lengths=lengths)


def run_central(work: Workload, features: TierFeatures, seed: int, folder: Path, tell: Tell) -> FleetRun:
    """Train a tier's side-network on all samples; a device without data receives it."""
    config = work.config(folder / "trainer", seed)
    (folder / "trainer").mkdir(parents=True, mode=0o700)
    journal = Journal(folder / "trainer" / FILE_NAME)
    sent = features.fill(journal, config, seed)
    journal.close()
    run = run_fleet(config, [FleetDevice(name=_DEVICE, tier=features.tier, examples=[])], folder, tell)
    run.bytes_up = sent.payload_bytes
    run.device_cpu_s = features.forward_cpu_s + sent.cpu_s
    run.rows_forwarded = len(work.train)
    return run


def _settle(journal: Journal, config: TrainerConfig, tier: str, backbone: Backbone) -> Plan:
    job = Job(config, journal)
    birth = Status(
        state="online",
        birth=1,
        stream="0" * 32,
        fingerprint=backbone.fingerprint,
        depth=backbone.depth,
        width=backbone.width,
    )
    job.on_birth(tier, _DEVICE, birth, 0.0)
    return job.plan
