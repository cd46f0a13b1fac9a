"""The rows of the table of split methods: each runs one for one seed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from benchmarks.fleet import FleetDevice, make_fleet
from benchmarks.program import Tell
from benchmarks.split_fleet import SplitFleet, SplitRun, Weather, above, split_config
from benchmarks.workload import Workload
from side_trainer.settings.schema import TrainerConfig
from side_trainer.split_lora.optimiser import Optimiser
from side_trainer.split_lora.whole_model import load_whole
from sidestream.contract.plan import RoundPlan, Split
from sidestream.demo.shards import Example
from sidestream.split_model.split_model import SplitModel

_BATCH: Final = 16
_WINDOW: Final = 4  # batches within which samples of similar length come together, as on a device
_NEVER_S: Final = 1e12
CENTRAL: Final = "central"


@dataclass(kw_only=True)
class SplitMeasured:
    """One method, one seed."""

    row: str
    """The method."""
    seed: int
    """Of the deal, the order and the learner."""
    accuracy: dict[str, float]
    """By tier, where tiers' models differ; else of the one model."""
    samples: int
    """Of training, all devices together."""
    up: float | None = None
    """Bytes a sample that its device sends, over all passes; None where nothing travels."""
    down: float | None = None
    """Bytes a sample that its device receives: answers and adapters."""
    device_ms: float | None = None
    """A device's processor time a sample, over all passes."""
    trainer_ms: float | None = None
    """The trainer's; of the centralised row, its machine's."""
    forwards: float = 0.0
    """Forward passes a sample, on its device."""
    backwards: float = 0.0
    """Backward passes."""
    reused: float = 0.0
    """The share of batches that an earlier one's activations stood for."""
    changed: float = 0.0
    """The share of batches of which only their activations' change was sent."""
    late: float = 0.0
    """Batches that were served between one and what its device made of the answer, in the mean."""
    rounds: int = 0
    """Of averaging."""
    versions: int = 0
    """Of adapters that were published."""
    duration: float = 0.0
    """By counted clocks."""
    wall_s: float = 0.0
    """What the run took here."""

    @property
    def mean(self) -> float:
        """Accuracy, mean over tiers."""
        return sum(self.accuracy.values()) / len(self.accuracy)


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a row is, beside the data."""

    method: str = "split-lora"
    """The job's."""
    split: Mapping[str, Any] = field(default_factory=dict)
    """Of the table [split]."""
    learner: Mapping[str, Any] = field(default_factory=dict)
    """Of the table [learner]."""
    tier: Mapping[str, Any] = field(default_factory=dict)
    """Of every tier."""
    weather: Weather = field(default_factory=Weather)
    """Of the way back."""


def _local(upper: str, batches: int) -> dict[str, Any]:
    round_ = RoundPlan(batches=batches, deadline_s=_NEVER_S)
    return {"adapters": "local", "upper": upper, "round": round_, "reuse_below": 0.0, "change_bits": 0}


PACES: Final = ("even", "own")


FORMS: Final[Mapping[str, Form]] = {
    "held": Form(),
    "held-whole": Form(split={"change_bits": 0}),
    "held-all": Form(split={"reuse_below": 0.0, "change_bits": 0}),
    "held-in-step": Form(split={"window": 1}),
    "held-fifo": Form(learner={"schedule": "fifo"}),
    "held-together": Form(learner={"serve_together": 4}),
    "held-prior": Form(learner={"prior_correction": 1.0}),
    "held-int4": Form(tier={"codec": "int4", "gradient_codec": "int4"}),
    "held-late": Form(split={"window": 6}, weather=Weather(late=4)),
    "held-lost": Form(weather=Weather(lost=0.5)),
    "local": Form(split=_local("shared", 8)),
    "per-device": Form(split=_local("per-device", 8)),
    "frozen": Form(method="split-frozen"),
    "frozen-plain": Form(method="split-frozen", learner={"prior_correction": 0.0}),
}
"""By the name that the command line takes; the centralised one beside."""
ROWS: Final = (CENTRAL, *FORMS)


class SplitBench:
    """Runs rows.

    Args:
        work: Data and tiers: each with the layers that its devices hold.
        devices: How many.
        alpha: Dirichlet concentration of labels over them.
        pace: ``even``: devices are as fast as their data is much, and so done together; ``own``: a batch
            takes every device as long, and those with the most data end alone.
        trainer_speed: In devices that are as fast as most.
        settings: Of the trainer, for all rows; tables are merged into a row's own.
        folder: For scratch files.
        tell: Given progress.
    """

    def __init__(
        self,
        work: Workload,
        *,
        devices: int,
        alpha: float,
        pace: str,
        trainer_speed: float,
        settings: Mapping[str, Any],
        folder: Path,
        tell: Tell,
    ) -> None:
        self._work = work
        self._devices = devices
        self._alpha = alpha
        self._pace = pace
        self._trainer_speed = trainer_speed
        self._settings = settings
        self._folder = folder
        self._tell = tell

    def run(self, row: str, seed: int) -> SplitMeasured:
        """Run one method with one seed."""
        started = time.monotonic()
        measured = self._central(seed) if row == CENTRAL else self._fleet(row, FORMS[row], seed)
        measured.wall_s = time.monotonic() - started
        return measured

    def _fleet(self, row: str, form: Form, seed: int) -> SplitMeasured:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        config = self._config(form, folder / "trainer", seed)
        dealt = make_fleet(self._work, devices=self._devices, alpha=self._alpha, seed=seed, churn=False)
        fleet = [self._paced(one) for one in dealt]
        weather, say = (
            replace(form.weather, trainer_speed=self._trainer_speed),
            self._say(f"{row}, seed {seed}"),
        )
        run = SplitFleet(config, fleet, folder, weather=weather, seed=seed, tell=say).run()
        accuracy = self._judged(config, run)
        return _measured(row, seed, accuracy, run)

    def _paced(self, device: FleetDevice) -> FleetDevice:
        """Tiers have as many layers as suits their devices: a batch takes all the same, but for ``even``."""
        speed = float(self._work.tiers[device.tier])
        if self._pace == "even":
            speed *= len(device.examples) * self._devices / len(self._work.train)
        return replace(device, speed=speed)

    def _central(self, seed: int) -> SplitMeasured:
        """All samples on one machine, the same model, optimiser and rates."""
        config = self._config(Form(), Path("unused"), seed)
        model, learner = self._model(config), config.learner
        optimiser, passes = Optimiser(model.parameters, learner), config.split.passes
        rng = np.random.default_rng(seed)
        batches = [batch for _ in range(passes) for batch in _batches(self._work.train, rng)]
        say, told_s, began = self._say(f"central, seed {seed}"), time.monotonic(), time.thread_time()
        for step, batch in enumerate(batches, start=1):
            optimiser.forget_gradients()
            self._loss(model, batch).backward()  # type: ignore[no-untyped-call]
            fallen = 1 - (1 - learner.final_rate) * step / len(batches)
            optimiser.step(fallen * min(1.0, step / max(1, learner.warmup_updates)))
            if time.monotonic() - told_s > 20:
                told_s = time.monotonic()
                say(f"{step} of {len(batches)} updates")
        cpu_s, samples = time.thread_time() - began, len(self._work.train)
        return SplitMeasured(
            row=CENTRAL,
            seed=seed,
            accuracy={"all": self._accuracy(model)},
            samples=samples,
            trainer_ms=1e3 * cpu_s / samples,
        )

    def _config(self, form: Form, folder: Path, seed: int) -> TrainerConfig:
        """The row's own settings, and over them those for all rows."""
        given = dict(self._settings)
        tables = {
            name: {**own, **given.pop(name, {})}
            for name, own in (
                ("split", form.split),
                ("learner", {**form.learner, "seed": seed}),
                ("tier", form.tier),
            )
        }
        labels = {"labels": list(self._work.labels), "method": form.method}
        work = self._work
        return split_config(folder, work.tiers, work.backbone, **labels, **tables, **given)

    def _model(self, config: TrainerConfig) -> SplitModel:
        backbone, method = load_whole(self._work.backbone, config.task), config.method_plan()
        assert isinstance(method, Split)
        labels = len(self._work.labels)
        return SplitModel(backbone, method.lora, task=config.task, labels=labels, seed=config.learner.seed)

    def _loss(self, model: SplitModel, batch: Sequence[Example]) -> torch.Tensor:
        answers = model.whole(model.view.text_input.read([one.text for one in batch], 128))
        targets = torch.tensor([self._work.labels.index(one.label) for one in batch])
        return torch.nn.functional.cross_entropy(answers, targets)

    def _judged(self, config: TrainerConfig, run: SplitRun) -> dict[str, float]:
        """Accuracy; of frozen devices by tier, for below its cut there are no adapters."""
        model = self._model(config)
        if config.method != "split-frozen":
            model.load(run.weights)
            return {"all": self._accuracy(model)}
        found = {}
        for tier, cut in run.cuts.items():
            model.load(above(run.weights, run.layers, cut))
            found[tier] = self._accuracy(model)
        return found

    def _accuracy(self, model: SplitModel) -> float:
        examples = sorted(self._work.evaluation, key=lambda example: len(example.text))
        right = 0
        for start in range(0, len(examples), 4 * _BATCH):
            part = examples[start : start + 4 * _BATCH]
            with torch.no_grad():
                tokens = model.view.text_input.read([one.text for one in part], 128)
                answers = model.whole(tokens).argmax(dim=1).tolist()
            labels = self._work.labels
            right += sum(labels[answer] == one.label for answer, one in zip(answers, part, strict=True))
        return right / len(examples)

    def _say(self, what: str) -> Tell:
        return lambda text: self._tell(f"{what}: {text}")


def _measured(row: str, seed: int, accuracy: dict[str, float], run: SplitRun) -> SplitMeasured:
    samples, counts = run.samples, run.counts
    batches = max(1, run.batches)
    return SplitMeasured(
        row=row,
        seed=seed,
        accuracy=accuracy,
        samples=samples,
        up=run.bytes_up / samples,
        down=run.bytes_down / samples,
        device_ms=1e3 * run.device_cpu_s / samples,
        trainer_ms=1e3 * run.trainer_cpu_s / samples,
        forwards=run.passes,
        backwards=run.backwards,
        reused=counts.get("batches_reused", 0) / batches,
        changed=counts.get("batches_changed", 0) / batches,
        late=run.staleness,
        rounds=run.rounds,
        versions=run.versions,
        duration=run.duration,
    )


def _batches(examples: Sequence[Example], rng: np.random.Generator) -> Iterator[list[Example]]:
    """A pass in random order; samples of similar length share a batch."""
    order = rng.permutation(len(examples)).tolist()
    groups = []
    for start in range(0, len(order), _BATCH * _WINDOW):
        rows = sorted(order[start : start + _BATCH * _WINDOW], key=lambda row: len(examples[row].text))
        groups += [rows[at : at + _BATCH] for at in range(0, len(rows), _BATCH)]
    for number in rng.permutation(len(groups)).tolist():
        yield [examples[row] for row in groups[number]]
