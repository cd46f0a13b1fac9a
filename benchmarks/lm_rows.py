"""The rows of the language-model table: each runs one method for one seed."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np

from benchmarks.evaluator import plan_of, trainable
from benchmarks.fleet import FleetDevice
from benchmarks.fleet_run import run_fleet
from benchmarks.lm_data import TIER, LmWorkload
from benchmarks.lm_table import LmMeasured
from benchmarks.lm_tuned import BATCH, LmTuned, Tuner
from benchmarks.probe import ProbeError, Request, measure
from benchmarks.program import Tell
from benchmarks.split_fleet import SplitFleet, Weather, above
from edge_agent.batches.token_maker import TokenMaker
from edge_agent.samples.sample import Row
from edge_agent.weights.adopted import AdoptedWeights
from edge_agent.weights.token_evaluation import TokenEvaluation
from side_trainer.settings.schema import TrainerConfig
from sidestream.backbone.runtimes import shared_backbone
from sidestream.backbone.text_input import Tokens, padded
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.contract.plan import Split
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import TARGET_MESSAGE_BYTES
from sidestream.demo.shards import Example
from sidestream.side_network.inference import InferenceNetwork
from sidestream.split_model.tuned_model import TunedModel

_METHODS: Final = {"fleet": "lm-agent", "central": "lm-agent", "lora": "lm-lora", "full": "lm-full"}
_BATCHES: Final = 4
_EVERY_TOKEN: Final = 10**9


@dataclass(frozen=True, kw_only=True)
class LmOptions:
    """What the command line asks for, besides the data."""

    lora_epochs: float = 3.0
    """Of LoRA."""
    lora_rate: float = 8e-3
    """Its learning rate."""
    full_epochs: float = 3.0
    """Of full fine-tuning."""
    full_rate: float = 5e-4
    """Its learning rate."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """The trainer's, by dotted name, where they are not its defaults."""
    memory: bool = True
    """Whether to measure memory."""


class LmBench:
    """Runs rows.

    Args:
        work: The documents and the model.
        options: The command line's.
        folder: For scratch files.
        tell: Given progress.
    """

    def __init__(self, work: LmWorkload, options: LmOptions, folder: Path, tell: Tell) -> None:
        self._work = work
        self._options = options
        self._folder = folder
        self._tell = tell
        model = shared_backbone(work.backbone, task=Task.CAUSAL_LM)
        assert isinstance(model, TorchLanguageModel)
        self._model = model
        self._tuner = Tuner(work, self._model, tell)
        self._peaks: dict[str, int | None] = {}

    @property
    def tokens(self) -> int:
        """Of training, all devices together."""
        return self._tuner.tokens

    def run(self, row: str, seed: int) -> LmMeasured:
        """Run one method with one seed."""
        started = time.monotonic()
        measured = ROWS[row](self, seed)
        measured.wall_s = time.monotonic() - started
        if self._options.memory and row in _METHODS:
            measured.peak_bytes = self._peak_bytes(_METHODS[row])
        return measured

    def frozen(self, seed: int) -> LmMeasured:
        """The model as it is."""
        return _tuned("frozen", seed, self._tuner.frozen(), 0.0)

    def lora(self, seed: int) -> LmMeasured:
        """LoRA, all of the text on one machine."""
        epochs = self._options.lora_epochs
        return _tuned("lora", seed, self._tuner.lora(seed, epochs, self._options.lora_rate), epochs)

    def full(self, seed: int) -> LmMeasured:
        """Every weight, all of the text on one machine."""
        epochs = self._options.full_epochs
        return _tuned("full", seed, self._tuner.full(seed, epochs, self._options.full_rate), epochs)

    def fleet(self, seed: int) -> LmMeasured:
        """Every device with its own part of the text."""
        shards = self._work.shards
        devices = [self._device(f"device-{number}", shard) for number, shard in enumerate(shards, start=1)]
        return self._side_network("fleet", seed, devices)

    def central(self, seed: int) -> LmMeasured:
        """One device with all of the text, in random order."""
        order = np.random.default_rng([seed, 3]).permutation(len(self._work.train))
        documents = [self._work.train[index] for index in order]
        return self._side_network("central", seed, [self._device("central", documents)])

    def split_lora(self, seed: int) -> LmMeasured:
        """Devices hold the first layer, or as many as ``tier.cut`` says; every batch is answered."""
        return self._split("split-lora", seed)

    def split_frozen(self, seed: int) -> LmMeasured:
        """The same, and devices' layers stay as they are."""
        return self._split("split-frozen", seed)

    def _split(self, method: str, seed: int) -> LmMeasured:
        shards = self._work.shards
        devices = [self._device(f"device-{number}", shard) for number, shard in enumerate(shards, start=1)]
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        config = self._work.config(folder / "trainer", seed, {"method": method, **self._options.settings})

        def say(text: str) -> None:
            self._tell(f"{method}, seed {seed}: {text}")

        run = SplitFleet(config, devices, folder, weather=Weather(), seed=seed, tell=say).run()
        weights = run.weights
        if method == "split-frozen":
            weights = above(weights, run.layers, run.cuts[TIER])
        return LmMeasured(
            row=method,
            seed=seed,
            perplexity=self._perplexity_with(config, weights),
            trainable=sum(one.size for one in weights.values()),
            device_cpu_s=run.device_cpu_s,
            up_per_token=run.bytes_up / self.tokens,
            down_per_token=run.bytes_down / self.tokens,
            forwards=run.passes,
            backwards=run.backwards,
        )

    def _perplexity_with(self, config: TrainerConfig, weights: Mapping[str, Floats]) -> float:
        """Of the whole model with adapters, over all held-out documents."""
        method = config.method_plan()
        assert isinstance(method, Split)
        tuned = TunedModel(self._model, method.lora, Task.CAUSAL_LM, 0, weights)
        windows, total, count = self._work.windows(self._model, self._work.held_out), 0.0, 0
        for start in range(0, len(windows), 4 * BATCH):
            part = windows[start : start + 4 * BATCH]
            ids, mask = padded([one.inputs for one in part], 0)
            targets = np.concatenate([np.asarray(one.targets) for one in part])
            losses, _ = tuned.judge(Tokens(ids, mask), targets)
            total, count = total + float(losses.sum()), count + len(losses)
        return math.exp(total / count)

    def _device(self, name: str, documents: Sequence[str]) -> FleetDevice:
        return FleetDevice(
            name=name,
            tier=TIER,
            examples=[Example(document, "") for document in documents],
            windows=len(self._work.windows(self._model, documents)),
        )

    def _side_network(self, row: str, seed: int, devices: Sequence[FleetDevice]) -> LmMeasured:
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        config = self._work.config(folder / "trainer", seed, self._options.settings)
        run = run_fleet(config, devices, folder, lambda text: self._tell(f"{row}, seed {seed}: {text}"))
        kept = run.adopted[TIER]
        return LmMeasured(
            row=row,
            seed=seed,
            perplexity=self._perplexity(kept),
            trainable=trainable(kept),
            device_cpu_s=run.device_cpu_s,
            up_per_token=run.bytes_up / self.tokens,
            down_per_token=run.bytes_down / self.tokens,
            forwards=run.tokens_forwarded / self.tokens,
            backwards=0.0,
        )

    def _perplexity(self, kept: AdoptedWeights) -> float:
        """Of adopted weights, by the agent's own measure, over all held-out documents."""
        adopted = kept.adopted
        rows = [Row(document, None) for document in self._work.held_out]
        maker = TokenMaker(self._model, plan_of(kept), adopted.tier, TARGET_MESSAGE_BYTES)
        score = TokenEvaluation(maker, lambda: rows, _EVERY_TOKEN, stopped=lambda: False).measure(
            InferenceNetwork(kept.bundle), adopted.tier_plan.align
        )
        assert score is not None, "nobody stops it"
        return score.measures["perplexity"]

    def _peak_bytes(self, method: str) -> int | None:
        """Peak memory above the loaded model over a few batches of windows; measured once a method."""
        if method not in self._peaks:
            texts = self._work.train[: BATCH * _BATCHES]
            request = Request(
                method=method,
                batches=[texts[start : start + BATCH] for start in range(0, len(texts), BATCH)],
                max_tokens=self._work.max_tokens,
                backbone=self._work.backbone,
            )
            try:
                self._peaks[method] = measure(request).peak_bytes
            except ProbeError as exc:
                self._tell(str(exc))
                self._peaks[method] = None
        return self._peaks[method]


def _tuned(row: str, seed: int, tuned: LmTuned, epochs: float) -> LmMeasured:
    return LmMeasured(
        row=row,
        seed=seed,
        perplexity=tuned.perplexity,
        trainable=tuned.trainable,
        device_cpu_s=tuned.cpu_s,
        forwards=epochs,
        backwards=epochs,
    )


ROWS: Final[Mapping[str, Callable[[LmBench, int], LmMeasured]]] = {
    "frozen": LmBench.frozen,
    "fleet": LmBench.fleet,
    "central": LmBench.central,
    "lora": LmBench.lora,
    "full": LmBench.full,
    "split-lora": LmBench.split_lora,
    "split-frozen": LmBench.split_frozen,
}
"""By the name that the command line takes."""
