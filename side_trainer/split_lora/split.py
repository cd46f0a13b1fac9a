"""What the split methods have in common: one whole model, learnt above each device's cut from its states.

A step takes batches of one cut, updates the adapters from there on and the head, and gives the gradient at
the cut. Which batches, and what becomes of that gradient, is the methods' to say.

Legend: N vectors of a batch, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Final

import numpy as np
import numpy.typing as npt
import torch

from side_trainer.journal.journal import Journal
from side_trainer.journal.records import TierRecord
from side_trainer.method import Answers, Arrays, Export, Facts, Method
from side_trainer.settings.schema import LearnerSettings
from side_trainer.side_tuning.objectives import OBJECTIVES, Counts
from side_trainer.split_lora.optimiser import Optimiser
from side_trainer.split_lora.served_batch import Losses, ServedBatch, joined
from side_trainer.split_lora.whole_model import learning_model
from sidestream.contract.errors import StateError
from sidestream.contract.plan import Split
from sidestream.contract.tasks import TASKS, Targets
from sidestream.contract.tensors import Floats
from sidestream.side_network.bundle import WeightsCodec
from sidestream.split_model.adapter_bundle import AboutAdapters, encode_adapters

if TYPE_CHECKING:
    from sidestream.split_model.split_model import SplitModel

_B: Final = ".lora_B"


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What one update did."""

    losses: list[float]
    """Of each batch, before it."""
    gradients: list[Floats]
    """Of each batch, [N, d] of its own mean loss with respect to its states."""
    norm: float
    """Of the gradient of what was updated."""


class SplitMethod(Method):
    """The adapters of a whole model, and its head.

    Args:
        facts: What is fixed.
        journal: Where batches are read from.
        cache_bytes: Memory for what was decoded.
    """

    formats: ClassVar = ("peft",)

    def __init__(self, facts: Facts, journal: Journal, cache_bytes: int) -> None:
        super().__init__(facts, journal, cache_bytes)
        self._model: SplitModel | None = None
        self._optimiser: Optimiser | None = None
        self._samples = 0
        self._counts: dict[str, Counts] = {}  # by stream, statistics of its targets
        self.steps = 0
        """Updates of what is above a cut, by which the rate warms up."""

    # --- facts ---------------------------------------------------------------------------------------

    def settings_changed(self) -> None:
        if self._optimiser is not None:
            self._optimiser.configure(self.settings)

    def labels_fixed(self) -> None:
        """Nothing is made yet: only whoever learns needs the model."""

    def tier_settled(self, tier: TierRecord) -> None:
        """Likewise."""

    @property
    def settings(self) -> LearnerSettings:
        """In force."""
        return self.facts.settings.learner

    @property
    def split(self) -> Split:
        """The plan's part."""
        method = self.facts.settings.method
        assert isinstance(method, Split)
        return method

    @property
    def has_weights(self) -> bool:
        """Devices begin with adapters that nothing has been learnt into."""
        return self.is_known

    @property
    def is_known(self) -> bool:
        """Whether labels and a tier are fixed, which is all that the model takes."""
        known = bool(self.facts.labels) or not TASKS[self.facts.settings.task].named
        return known and bool(self.facts.tiers)

    @property
    def model(self) -> SplitModel:
        """Loaded when it is first asked for, once :attr:`is_known`.

        Raises:
            BackboneError: it is not on this machine, or another one.
        """
        if self._model is None:
            tier = next(iter(self.facts.tiers.values()))
            self._model = learning_model(
                self.facts.settings, tier.backbone, tier.whole_fingerprint, len(self.facts.labels)
            )
        return self._model

    @property
    def optimiser(self) -> Optimiser:
        """Of all that is trained."""
        if self._optimiser is None:
            self._optimiser = Optimiser(self.model.parameters, self.settings)
        return self._optimiser

    def cut_of(self, tier: str) -> int:
        """Layers that the devices of a tier hold."""
        return self.facts.tiers[tier].depth

    # --- learning ------------------------------------------------------------------------------------

    def learn(self, cut: int, batches: Sequence[ServedBatch], streams: Sequence[str], rate: float) -> Learnt:
        """One update of everything above a cut on batches that were cut there.

        Args:
            cut: Where.
            batches: Which.
            streams: Where each came from.
            rate: The share of the learning rate.
        """
        model, losses = self.model, self._losses()
        states, lengths = joined(batches)
        if int(lengths.max()) > model.view.text_input.longest:  # a liar's: devices cut what they send
            nothing = [np.full_like(one.states, np.nan) for one in batches]
            return Learnt(losses=[0.0] * len(batches), gradients=nothing, norm=0.0)
        self.optimiser.forget_gradients()
        answers = model.answers(cut, states, lengths)
        parts = torch.split(
            answers, [len(one.told if model.head is not None else one.lengths) for one in batches]
        )
        each = [
            losses.of(model, part, batch, self._adjustment(stream))
            for part, batch, stream in zip(parts, batches, streams, strict=True)
        ]
        torch.stack(each).mean().backward()  # type: ignore[no-untyped-call]
        for name, parameter in model.parameters.items():
            if (layer := model.layer_of(name)) is not None and layer < cut:
                parameter.grad = None
        self.steps += 1
        self.updates += 1
        norm = self.optimiser.step(rate * self.warmth)
        assert states.grad is not None
        gradients = torch.split(len(batches) * states.grad, [len(one.states) for one in batches])
        return Learnt(
            losses=[float(one.detach()) for one in each],
            gradients=[one.numpy() for one in gradients],
            norm=norm,
        )

    def falling(self, progress: float) -> float:
        """The share of the learning rate when so much of all passes is done."""
        final = self.settings.final_rate
        return final + (1 - final) * (1 - progress)

    @property
    def warmth(self) -> float:
        """The share of the learning rate that the first steps may have."""
        return min(1.0, self.steps / max(1, self.settings.warmup_updates))

    def count(self, stream: str, targets: Targets, samples: int) -> None:
        """Take note of a batch that came for the first time."""
        objective, labels = OBJECTIVES[self.facts.settings.task], len(self.facts.labels)
        self._samples += samples
        known = self._counts.get(stream)
        counted = objective.count(targets, labels)
        self._counts[stream] = counted if known is None else known + counted

    def _losses(self) -> Losses:
        objective = OBJECTIVES[self.facts.settings.task]
        counts = sum(self._counts.values(), objective.no_counts(len(self.facts.labels)))
        return Losses(
            objective=objective, smoothing=self.settings.label_smoothing, scale=objective.scale(counts)
        )

    def _adjustment(self, stream: str) -> npt.NDArray[np.float64]:
        """[C]: a device's label prior against the fleet's (Menon et al., arXiv 2007.07314)."""
        objective, strength = OBJECTIVES[self.facts.settings.task], self.settings.prior_correction
        none = objective.no_counts(len(self.facts.labels))
        fleet = objective.prior(sum(self._counts.values(), none))
        if not strength:
            return np.zeros_like(fleet)
        return strength * (objective.prior(self._counts.get(stream, none)) - fleet)

    # --- what others see -----------------------------------------------------------------------------

    def answers(self, tier: str, states: Floats, lengths: npt.NDArray[np.int64]) -> Answers:
        """By what is learnt so far; a language model's trainer generates nothing for devices.

        Raises:
            StateError: see above, or there is nothing to answer with yet.
            BackboneError: the model cannot be loaded.
        """
        task = self.facts.settings.task
        if TASKS[task].generates:
            raise StateError("the trainer generates no text for devices: that takes all layers on the device")
        if not self.is_known or tier not in self.facts.tiers:
            raise StateError("the job's labels, or the device's tier, are not settled yet")
        longest = self.model.view.text_input.longest
        if int(lengths.max()) > longest:
            raise StateError(f"a text of {int(lengths.max())} vectors: the model sees {longest} at most")
        with torch.no_grad():
            found = self.model.answers(self.cut_of(tier), torch.from_numpy(states), lengths)
        return Answers(numbers=found.numpy(), scale=self._losses().scale)

    @property
    def samples(self) -> int:
        return self._samples

    def moved_by(self, before: Mapping[str, Floats], now: Mapping[str, Floats]) -> float:
        """By the matrices that begin at zero, of the layers that devices hold: A hardly moves."""
        deepest = max((tier.depth for tier in self.facts.tiers.values()), default=0)
        names = [name for name in now if name.endswith(_B) and (self.model.layer_of(name) or 0) < deepest]
        return super().moved_by({name: before[name] for name in names}, {name: now[name] for name in names})

    def bundles(
        self, run: str, version: int, codec: WeightsCodec, *, final: bool = False
    ) -> Mapping[str, bytes]:
        """A tier gets the adapters that its devices hold; with the final version, all that answers take."""
        weights = self.weights()
        return {
            name: encode_adapters(
                self._about(tier, run, version, whole=final),
                self._of_tier(tier, weights, whole=final),
                codec=codec,
            )
            for name, tier in self.facts.tiers.items()
        }

    def _of_tier(
        self, tier: TierRecord, weights: Mapping[str, Floats], *, whole: bool
    ) -> Mapping[str, Floats]:
        if whole:
            return weights
        layers = {name: self.model.layer_of(name) for name in weights}
        return {
            name: weights[name] for name, layer in layers.items() if layer is not None and layer < tier.depth
        }

    def _about(self, tier: TierRecord, run: str, version: int, *, whole: bool) -> AboutAdapters:
        objective, settings = OBJECTIVES[self.facts.settings.task], self.facts.settings
        counts = sum(self._counts.values(), objective.no_counts(len(self.facts.labels)))
        return AboutAdapters(
            job=settings.job,
            run=run,
            version=version,
            task=settings.task,
            labels=self.facts.labels,
            lora=self.split.lora,
            tier=tier.tier,
            cut=tier.depth,
            whole=whole,
            round=self.rounds,
            scale=objective.scale(counts),
        )

    @property
    def rounds(self) -> int:
        """Averagings that are in the weights."""
        return 0

    def export(self, form: str, run: str, version: int, tier: str) -> Export:
        """For peft: all adapters, and the head.

        Raises:
            StateError: a tier is named that there is not.
        """
        if tier and tier not in self.facts.tiers:
            settled = ", ".join(sorted(self.facts.tiers)) or "none"
            raise StateError(f"--tier: {tier!r} is no settled tier of the job; there are: {settled}")
        record = self.facts.tiers[tier or min(self.facts.tiers, key=self.cut_of)]
        self._before_export(record)
        generates = TASKS[self.facts.settings.task].generates
        return Export(
            files=self.model.export(self.facts.labels),
            about=f"version {version}: LoRA of rank {self.split.lora.rank} for {record.backbone}",
            usage=_LM_USAGE.replace("BACKBONE", record.backbone) if generates else _USAGE,
        )

    def _before_export(self, tier: TierRecord) -> None:
        """Leave in the model only what answers of a tier take."""

    # --- checkpoints ---------------------------------------------------------------------------------

    def weights(self) -> dict[str, Floats]:
        return self.model.arrays() if self.is_known else {}

    def state(self) -> Arrays:
        if not self.is_known:
            return {}
        steps = np.array([self.steps], np.float32)
        weights = {f"current/{name}": array for name, array in self.model.arrays().items()}
        return {**weights, **self.optimiser.arrays(), "steps": steps}

    def restore(self, offset: int, updates: int, arrays: Arrays) -> None:
        self.updates = updates
        self.recall(offset)
        if self.is_known and arrays:
            prefix = "current/"
            self.model.load(
                {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}
            )
            self.optimiser.restore(arrays)
            self.steps = int(arrays["steps"][0])

    def recall(self, offset: int) -> None:
        """Read from the journal what of the state can be had from it without computing."""
        raise NotImplementedError


_USAGE: Final = """load it with
    import peft
    from sidestream.split_model.tuned import load_base
    base, tokenizer = load_base({out!r})
    model = peft.PeftModel.from_pretrained(base, {out!r})
    model(**tokenizer(["a text"], padding=True, return_tensors="pt")).logits"""
_LM_USAGE: Final = """load it with
    import peft, transformers
    base = transformers.AutoModelForCausalLM.from_pretrained("BACKBONE")
    model = peft.PeftModel.from_pretrained(base, {out!r})"""
