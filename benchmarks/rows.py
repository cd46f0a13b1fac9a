"""The rows of the accuracy table: each runs one method for one seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Final, TypeAlias

from benchmarks import baselines
from benchmarks.central import TierFeatures, run_central
from benchmarks.evaluator import Evaluator, trainable
from benchmarks.fleet import make_fleet
from benchmarks.fleet_run import FleetRun, run_fleet
from benchmarks.program import Tell
from benchmarks.result import Measured
from benchmarks.workload import Workload
from sidestream.contract.quality import tally_labels
from sidestream.contract.tasks import Task

CentralTuning: TypeAlias = Callable[[Workload, str, int, int, Tell], baselines.Tuned]
"""Trains a tier's backbone, with a seed, for so many epochs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line asks for, besides the data."""

    devices: int = 12
    """In the fleet."""
    alpha: float = 0.5
    """Dirichlet concentration of labels over devices."""
    churn: bool = False
    """Whether devices of the fleet come and go."""
    rounds: int = 8
    """Of FedAvg."""
    local_epochs: int = 1
    """Of FedAvg: on each device in each round."""
    lora_epochs: int = 6
    """Of centralised LoRA."""
    full_epochs: int = 3
    """Of full fine-tuning."""
    deepest_only: bool = False
    """Whether LoRA and full fine-tuning are done to the deepest tier's backbone alone."""


class Bench:
    """Runs rows; keeps what they share: features and evaluation samples.

    Args:
        work: Data and tiers.
        options: The command line's.
        folder: For scratch files.
        tell: Given progress.
    """

    def __init__(self, work: Workload, options: Options, folder: Path, tell: Tell) -> None:
        self._work = work
        self._options = options
        self._folder = folder
        self._tell = tell
        self._evaluator = Evaluator(work)
        self._features: dict[str, TierFeatures] = {}

    def run(self, row: str, seed: int) -> Measured:
        """Run one method with one seed."""
        started = time.monotonic()
        measured = ROWS[row](self, seed)
        measured.wall_s = time.monotonic() - started
        return measured

    def linear(self, seed: int) -> Measured:
        """Logistic regression on the mean of each tap, a tier at a time; it has no randomness."""
        accuracy, macro_f1, widths = {}, {}, {}
        for tier in self._work.tiers:
            features, evaluation = self._of(tier), self._of(tier, evaluation=True)
            pooled = features.pooled()
            widths[tier] = pooled.shape[1]
            answers = baselines.linear_probe(
                pooled, features.targets, evaluation.pooled(), len(self._work.labels)
            )
            measures = tally_labels(answers, evaluation.targets, len(self._work.labels)).measures(
                Task.TEXT_CLASSIFICATION
            )
            accuracy[tier], macro_f1[tier] = measures["accuracy"], measures["macro_f1"]
        return Measured(
            row="linear",
            seed=seed,
            accuracy=accuracy,
            macro_f1=macro_f1,
            trainable=(widths[self._work.deepest] + 1) * len(self._work.labels),
            device_cpu_s=mean(self._of(tier).forward_cpu_s for tier in self._work.tiers),
            forwards=1.0,
            backwards=0.0,
        )

    def central(self, seed: int) -> Measured:
        """The same network and recipe, a tier at a time, all samples through its backbone."""
        runs = {}
        for tier in self._work.tiers:
            features, say = self._of(tier), self._say(f"central {tier}, seed {seed}")
            runs[tier] = run_central(self._work, features, seed, self._scratch(), say)
            say(f"learnt in {runs[tier].wall_s:.0f} s")
        return self._side_network("central", seed, list(runs.values()), devices=len(runs))

    def fleet(self, seed: int) -> Measured:
        """One job, one side-network for all tiers."""
        options, say = self._options, self._say(f"fleet, seed {seed}")
        devices = make_fleet(
            self._work, devices=options.devices, alpha=options.alpha, seed=seed, churn=options.churn
        )
        folder = self._scratch()
        run = run_fleet(self._work.config(folder / "trainer", seed), devices, folder, say)
        return self._side_network("fleet", seed, [run], devices=options.devices)

    def fleet_per_tier(self, seed: int) -> Measured:
        """The same devices and data, a job a tier."""
        options = self._options
        devices = make_fleet(self._work, devices=options.devices, alpha=options.alpha, seed=seed, churn=False)
        runs = []
        for tier in self._work.tiers:
            folder, say = self._scratch(), self._say(f"fleet of {tier} only, seed {seed}")
            config = self._work.config(folder / "trainer", seed, [tier])
            runs.append(run_fleet(config, [one for one in devices if one.tier == tier], folder, say))
        return self._side_network("fleet-per-tier", seed, runs, devices=options.devices)

    def lora(self, seed: int) -> Measured:
        """LoRA, a tier's backbone at a time, all samples on one machine."""
        return self._central_tuned("lora", seed, baselines.central_lora, self._options.lora_epochs)

    def full(self, seed: int) -> Measured:
        """Every weight, a tier's backbone at a time, all samples on one machine."""
        return self._central_tuned("full", seed, baselines.central_full, self._options.full_epochs)

    def _central_tuned(self, row: str, seed: int, tune: CentralTuning, epochs: int) -> Measured:
        deepest, tuned = self._work.deepest, {}
        for tier in [deepest] if self._options.deepest_only else self._work.tiers:
            say = self._say(f"{row} {tier}, seed {seed}")
            tuned[tier] = tune(self._work, tier, seed, epochs, say)
            say(f"accuracy {tuned[tier].accuracies[-1]:.4f}")
        return self._tuned(row, seed, tuned, epochs)

    def fedavg_lora(self, seed: int) -> Measured:
        """LoRA on every device's whole backbone, averaged after so many local epochs."""
        options, say = self._options, self._say(f"fedavg-lora, seed {seed}")
        epochs = options.local_epochs
        devices = make_fleet(self._work, devices=options.devices, alpha=options.alpha, seed=seed, churn=False)
        shards = [device.examples for device in devices]
        tuned = baselines.fedavg_lora(self._work, shards, seed, options.rounds, say, local_epochs=epochs)
        measured = self._tuned("fedavg-lora", seed, {self._work.deepest: tuned}, epochs * options.rounds)
        measured.rounds = tuned.accuracies
        measured.bytes_up = measured.bytes_down = 4.0 * tuned.trainable * options.rounds
        return measured

    def _tuned(self, row: str, seed: int, tuned: Mapping[str, baselines.Tuned], passes: int) -> Measured:
        return Measured(
            row=row,
            seed=seed,
            accuracy={tier: one.accuracies[-1] for tier, one in tuned.items()},
            trainable=tuned[self._work.deepest].trainable,
            device_cpu_s=mean(one.cpu_s for one in tuned.values()),
            forwards=passes,
            backwards=passes,
        )

    def _side_network(self, row: str, seed: int, runs: list[FleetRun], *, devices: int) -> Measured:
        """``runs`` share the devices among them, and each tier is in one of them."""
        adopted = {tier: kept for run in runs for tier, kept in run.adopted.items()}
        measures = {tier: self._evaluator.measures(adopted[tier]) for tier in self._work.tiers}
        passes = len(self._work.train) * (len(runs) if row == "central" else 1)
        cpu_s = sum(run.device_cpu_s for run in runs)
        return Measured(
            row=row,
            seed=seed,
            accuracy={tier: one["accuracy"] for tier, one in measures.items()},
            macro_f1={tier: one["macro_f1"] for tier, one in measures.items()},
            trainable=trainable(adopted[self._work.deepest]),
            device_cpu_s=cpu_s / len(runs) if row == "central" else cpu_s,
            bytes_up=sum(run.bytes_up for run in runs) / devices,
            bytes_down=sum(run.bytes_down for run in runs) / devices,
            forwards=sum(run.rows_forwarded for run in runs) / passes,
            backwards=0.0,
        )

    def _of(self, tier: str, *, evaluation: bool = False) -> TierFeatures:
        name = f"{'evaluation' if evaluation else 'training'} data through {tier}"
        if name not in self._features:
            examples = self._work.evaluation if evaluation else self._work.train
            self._features[name] = TierFeatures(
                self._work, tier, examples, self._scratch() / "features", self._say(name)
            )
        return self._features[name]

    def _scratch(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._folder))

    def _say(self, what: str) -> Tell:
        return lambda text: self._tell(f"{what}: {text}")


ROWS: Final[Mapping[str, Callable[[Bench, int], Measured]]] = {
    "linear": Bench.linear,
    "central": Bench.central,
    "lora": Bench.lora,
    "full": Bench.full,
    "fleet": Bench.fleet,
    "fleet-per-tier": Bench.fleet_per_tier,
    "fedavg-lora": Bench.fedavg_lora,
}
"""By the name that the command line takes."""
