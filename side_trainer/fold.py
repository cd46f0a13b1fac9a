"""The fold: weights as a pure function of the journal.

:meth:`Fold.apply` takes one record after another. Whatever it draws at random derives from the seed and the
record's offset, so the same records give the same bits, in this process or another, from the start or from a
checkpoint. It knows nothing of brokers, clocks or publishing.

Per batch record: one optimiser update on its rows, then ``replay`` updates on rows drawn from the journal so
far. Per idle record: updates on the next slice of a shuffled pass over the journal. The loss is the task's
(:mod:`side_trainer.objectives`), with each row's answers adjusted by its tier's label prior against the
fleet's (Menon et al., arXiv 2007.07314): that keeps messages with skewed labels from pulling the shared head
about.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Final

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from contract.bundle import state_digest
from contract.errors import StateError, WireError
from contract.output_head import OutputHead
from contract.plan import SideNetworkSpec
from contract.side_network import SideNetwork
from contract.tasks import TASKS, Scale, Task
from contract.tensors import Floats
from contract.wire import Message
from side_trainer.config import LearnerSettings
from side_trainer.heads import Heads
from side_trainer.journal import Journal, Record
from side_trainer.objectives import OBJECTIVES, Counts, Objective
from side_trainer.rows import MiniBatch, RowStore, StoredBatch, gather
from side_trainer.token_loss import token_loss
from side_trainer.views import Tapped, Views

_BATCH_STREAM: Final = 1
_IDLE_STREAM: Final = 2


class SettingsRecord(Message, frozen=True, kw_only=True):
    """Starts a journal, and stands wherever the operator changed a setting of the learner."""

    job: str
    """The job's name."""
    task: Task
    """What is learnt."""
    side_network: SideNetworkSpec
    """Never changes within a journal."""
    learner: LearnerSettings
    """In force for the records that follow."""


class LabelsRecord(Message, frozen=True, kw_only=True):
    """Fixes the labels."""

    labels: tuple[str, ...]
    """In index order."""


class TierRecord(Message, frozen=True, kw_only=True):
    """Fixes what the first device of a tier showed."""

    tier: str
    """Its name."""
    align: str
    """The alignment map it uses."""
    depth: int
    """Layers in use."""
    width: int
    """Hidden size."""
    taps: tuple[int, ...]
    """Layers tapped."""
    fingerprint: str
    """Of the backbone's weights."""
    head: str = ""
    """Of its output head, where the task goes by one."""
    vocabulary: int = 0
    """Tokens that the head can foretell."""
    backbone: str = ""
    """Where the trainer's machine has it, for exports."""


class IdleRecord(Message, frozen=True, kw_only=True):
    """A slice of training over the journal while nothing arrives."""

    phase: int
    """The offset that the phase started at: its rows are those of the batches up to there."""
    position: Annotated[int, msgspec.Meta(ge=0)]
    """The slice's first row, counted over the phase's shuffled passes."""
    rows: Annotated[int, msgspec.Meta(ge=1)]
    """Rows in the slice."""
    total: Annotated[int, msgspec.Meta(ge=1)]
    """Rows that the whole phase is meant to train on: the learning rate falls over them."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """What applying a record did."""

    updates: int = 0
    """Optimiser updates."""
    losses: dict[str, float] = {}
    """By tier, mean loss of the first update's rows, before it."""


class Fold:
    """The learner's state, and how records change it.

    Args:
        journal: Where replayed rows are read from.
        cache_bytes: Memory for decoded rows.
    """

    def __init__(self, journal: Journal, *, cache_bytes: int = 256 * 2**20) -> None:
        self.offset = 0
        """The last record applied."""
        self.updates = 0
        """Optimiser updates so far."""
        self.idle_rows = 0
        """Rows that idle records trained on."""
        self.last_idle: IdleRecord | None = None
        self.settings: SettingsRecord | None = None
        self.labels: tuple[str, ...] = ()
        self.tiers: dict[str, TierRecord] = {}
        self.network: SideNetwork | None = None
        self.average: SideNetwork | None = None
        """The running mean of the network over updates: what devices get (Polyak averaging)."""
        self.heads = Heads(journal.folder)
        """Backbones' output heads, those that the task goes by."""
        self.rows = RowStore(journal, cache_bytes=cache_bytes)
        self._journal = journal
        self._optimiser: torch.optim.AdamW | None = None
        self._counts: dict[str, Counts] = {}
        self._order: tuple[tuple[int, int], npt.NDArray[np.int64]] | None = None

    # --- records -------------------------------------------------------------------------------------

    def apply(self, record: Record) -> Step:
        """Apply the record that follows the last one.

        Raises:
            StateError: if the record is not what the trainer wrote: the journal is damaged.
        """
        if record.offset != self.offset + 1:
            raise StateError(f"the journal is damaged: record {self.offset + 1} is missing")
        try:
            step = self._apply(record)
        except (msgspec.MsgspecError, WireError, AssertionError, KeyError, IndexError) as exc:
            raise StateError(f"the journal is damaged: record {record.offset} cannot be folded") from exc
        self.offset = record.offset
        return step

    def _apply(self, record: Record) -> Step:
        if record.kind == "batch":
            return self._apply_batch(record)
        if record.kind == "idle":
            return self._apply_idle(record)
        self._apply_fact(record)
        return Step()

    def _apply_fact(self, record: Record) -> None:
        if record.kind == "settings":
            self.settings = msgspec.json.decode(record.payload, type=SettingsRecord)
            self._set_rates()
            if self.network is None and not TASKS[self.settings.task].named:
                self._make_network()
        elif record.kind == "labels":
            self.labels = msgspec.json.decode(record.payload, type=LabelsRecord).labels
            self._make_network()
        elif record.kind == "tier":
            tier = msgspec.json.decode(record.payload, type=TierRecord)
            self.tiers[tier.tier] = tier
            self._counts[tier.tier] = self._objective.no_counts(len(self.labels))
            self._add_align(tier)
        else:
            raise StateError(f"the journal holds a {record.kind!r} record, which this version cannot fold")

    def _make_network(self) -> None:
        """Once it is known how many labels there are."""
        assert self.settings is not None
        self.network = SideNetwork(
            self.settings.side_network,
            labels=len(self.labels),
            seed=self.settings.learner.seed,
            dropout=self.settings.learner.dropout,
            task=self.settings.task,
        )
        self.average = copy.deepcopy(self.network)
        for tier in self.tiers.values():
            self._add_align(tier)
        self._counts = {name: self._objective.no_counts(len(self.labels)) for name in self.tiers}
        self._make_optimiser()

    def _apply_batch(self, record: Record) -> Step:
        assert record.tier is not None
        settings = self._learner
        stored = StoredBatch.read(record.tier, record.payload)
        self._counts[record.tier] += self._objective.count(stored.targets, len(self.labels))
        self.rows.add(record.offset, record.samples)
        generator = self._generator(_BATCH_STREAM, record.offset)
        with self._seeded(record.offset):
            fresh = gather([(stored, row) for row in range(record.samples)], self._align_of)
            losses = self._update(fresh)
            for _ in range(settings.replay):
                self._update(self._mini_batch(generator.integers(len(self.rows), size=settings.replay_rows)))
        return Step(updates=1 + settings.replay, losses=losses)

    def _apply_idle(self, record: Record) -> Step:
        settings = self._learner
        idle = msgspec.json.decode(record.payload, type=IdleRecord)
        total = self.rows.rows_before(idle.phase + 1)
        chosen = np.concatenate(
            [
                self._shuffled(idle.phase, position // total, total)[position % total :][: idle.rows]
                for position in _parts(idle.position, idle.rows, total)
            ]
        )[: idle.rows]
        starts = range(0, len(chosen), settings.pass_rows)
        losses: dict[str, float] = {}
        with self._seeded(record.offset):
            for start in starts:
                shown = self._update(
                    self._mini_batch(chosen[start : start + settings.pass_rows]),
                    rate=_half_cosine((idle.position + start) / idle.total, settings.final_rate),
                )
                losses = losses or shown
        self.idle_rows += idle.rows
        self.last_idle = idle
        return Step(updates=len(starts), losses=losses)

    # --- learning ------------------------------------------------------------------------------------

    def _update(self, batch: MiniBatch, *, rate: float = 1.0) -> dict[str, float]:
        """One optimiser update; returns each tier's mean loss before it."""
        assert self.network is not None and self._optimiser is not None
        settings = self._learner
        self.updates += 1
        warmup = min(1.0, self.updates / max(1, settings.warmup_updates))
        for group in self._optimiser.param_groups:
            group["lr"] = settings.learning_rate * rate * warmup
        loss, shown = self._loss(batch)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), settings.clip_norm)
        if torch.isfinite(norm):  # one step with what is no number would leave nothing but that, for ever
            self._optimiser.step()
            self._move_average()
        return {
            tier: float(np.mean([value for value, of in zip(shown, batch.tiers, strict=True) if of == tier]))
            for tier in sorted(set(batch.tiers))
        }

    def _move_average(self) -> None:
        """Short memory at first, the last hundred or so updates later."""
        assert self.network is not None and self.average is not None
        memory = min(self._learner.averaging, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            pairs = zip(self.average.parameters(), self.network.parameters(), strict=True)
            for mean, parameter in pairs:
                mean.lerp_(parameter, 1 - memory)

    def _loss(self, batch: MiniBatch) -> tuple[torch.Tensor, npt.NDArray[Any]]:
        """The mini-batch's loss, and each row's own [K] to show.

        Rows with more taps than another tier are also asked for that tier's answer; it learns from the label
        and from the row's own, deeper answer.
        """
        assert self.network is not None and self.settings is not None
        settings = self._learner
        if TASKS[self.settings.task].generates:
            return token_loss(self.network.train(), batch, self._head_of, settings.label_smoothing)
        exits = {len(tier.taps) for tier in self.tiers.values()}
        families = [(family.align, family.activations) for family in batch.families]
        answers = self.network.train()(families, batch.mask, exits)
        raw = _own_answers(answers, [(len(taps), taps.shape[1]) for _, taps in families])
        targets = self._scaled(batch.targets)

        def shaped(lean: torch.Tensor) -> torch.Tensor:
            return lean[:, None] if batch.per_vector else lean

        lean = shaped(self._leanings(batch.tiers))
        losses = self._losses(raw, lean, targets)
        total = self._anchored(batch, raw, answers, losses, targets).sum()
        for taps in sorted(exits):
            deeper = sum(
                family.activations.shape[1] for family in batch.families if len(family.activations) > taps
            )
            if deeper:
                lean = shaped(self._leanings(batch.tiers, taps))[:deeper]
                early, own = answers[taps][:deeper], raw[:deeper]
                hard = self._losses(early, lean, targets[:deeper]).sum()
                soft = self._objective.distilled(early + lean, own + lean, targets[:deeper]).sum()
                share = settings.distillation
                total = total + settings.exit_weight * ((1 - share) * hard + share * soft)
        return total / len(batch.targets), losses.detach().numpy()

    def _losses(self, answers: torch.Tensor, lean: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[K]: of answers that lean as the rows' labels do."""
        smoothing = self._learner.label_smoothing
        return self._objective.losses(answers + lean, targets, smoothing, lean if self._by_view else None)

    def _anchored(
        self,
        batch: MiniBatch,
        own: torch.Tensor,
        answers: dict[int, torch.Tensor],
        losses: torch.Tensor,
        targets: torch.Tensor,
    ) -> torch.Tensor:
        """[K]: ``losses``; where a shallower answer is to be trusted more, partly the distance from that."""
        if not self._by_view:
            return losses
        views, exits = self._views, answers.keys()
        anchors = {tier: views.anchor(tier, exits, self._all_counts) for tier in set(batch.tiers)}
        base = own.detach().clone()
        for tier, anchor in anchors.items():
            rows = [row for row, of in enumerate(batch.tiers) if of == tier]
            base[rows] = answers[anchor.taps][rows].detach()
        share = torch.tensor([anchors[tier].share for tier in batch.tiers])
        return share * losses + (1 - share) * self._objective.distilled(own, base, targets)

    def _leanings(self, tiers: list[str], taps: int = 0) -> torch.Tensor:
        """[K, C]: what each row's answer leans by, at ``taps`` taps, or 0 for its own last."""
        views, fleet = self._views, self._objective.prior(self._all_counts)
        own = {
            tier: views.lean(tier, taps or len(self.tiers[tier].taps), fleet)
            if self._by_view
            else self._objective.prior(self._counts[tier]) - fleet
            for tier in set(tiers)
        }
        stacked = np.stack([own[tier] for tier in tiers]).astype(np.float32)
        return self._learner.prior_correction * torch.from_numpy(stacked)

    @property
    def _views(self) -> Views:
        tapped = {name: Tapped(tier.align, tier.taps) for name, tier in self.tiers.items()}
        return Views(tapped, self._counts, self._objective, self._learner.exit_weight)

    @property
    def _by_view(self) -> bool:
        return self._learner.correction == "view"

    def _scaled(self, targets: torch.Tensor) -> torch.Tensor:
        """Targets in the measure of answers."""
        scale = self.scale
        return targets if scale == Scale() else (targets - scale.mean) / scale.deviation

    @property
    def scale(self) -> Scale:
        """What answers are measured in, by the targets folded so far."""
        return self._objective.scale(self._all_counts)

    @property
    def _all_counts(self) -> Counts:
        none = self._objective.no_counts(len(self.labels))
        return sum(self._counts.values(), none)

    def _mini_batch(self, rows: npt.NDArray[np.int64]) -> MiniBatch:
        picks = ((self.rows.batch(offset), row) for offset, row in self.rows.locate(rows))
        return gather(picks, self._align_of)

    def _align_of(self, tier: str) -> str:
        return self.tiers[tier].align

    def _head_of(self, align: str) -> OutputHead:
        return self.heads.get(next(tier.head for tier in self.tiers.values() if tier.align == align))

    @property
    def _objective(self) -> Objective:
        assert self.settings is not None
        return OBJECTIVES[self.settings.task]

    @property
    def _learner(self) -> LearnerSettings:
        assert self.settings is not None
        return self.settings.learner

    def _generator(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self._learner.seed, *purpose])

    @contextmanager
    def _seeded(self, offset: int) -> Iterator[None]:
        """Torch's randomness (dropout) within a record."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(self._generator(0, offset).integers(2**62)))
            yield

    def _shuffled(self, phase: int, number: int, total: int) -> npt.NDArray[np.int64]:
        """The order of a phase's pass ``number``; the last one is kept, slices come one after another."""
        if self._order is None or self._order[0] != (phase, number):
            self._order = ((phase, number), self._generator(_IDLE_STREAM, phase, number).permutation(total))
        return self._order[1]

    def _add_align(self, tier: TierRecord) -> None:
        if self.network is None or tier.align in self.network.align_names:
            return
        for network in (self.network, self.average):
            assert network is not None
            network.add_align(tier.align, tier.width)
        if self._optimiser is not None:
            for group in self._decay_groups():
                self._optimiser.add_param_group(group)
            self._set_rates()

    def _make_optimiser(self) -> None:
        assert self.network is not None
        self._optimiser = torch.optim.AdamW(self._decay_groups(), fused=True)
        self._set_rates()

    def _decay_groups(self) -> list[dict[str, Any]]:
        """Parameters that the optimiser does not have yet; matrices decay, biases, gates and norms do not."""
        assert self.network is not None
        groups = self._optimiser.param_groups if self._optimiser is not None else []
        known = {id(parameter) for group in groups for parameter in group["params"]}
        new = [(name, one) for name, one in self.network.named_parameters() if id(one) not in known]
        split: dict[bool, list[torch.nn.Parameter]] = {True: [], False: []}
        for name, parameter in new:
            split[name.endswith("weight") and parameter.dim() > 1].append(parameter)
        return [
            {"params": parameters, "decays": decays} for decays, parameters in split.items() if parameters
        ]

    def _set_rates(self) -> None:
        if self._optimiser is not None:
            for group in self._optimiser.param_groups:
                group["weight_decay"] = self._learner.weight_decay if group["decays"] else 0.0
        if self.network is not None:
            self.network.dropout = self._learner.dropout

    # --- state ---------------------------------------------------------------------------------------

    def weights(self) -> dict[str, Floats]:
        """The side-network's averaged parameters; empty before the labels are fixed."""
        return self.average.arrays() if self.average is not None else {}

    def digest(self) -> str:
        """sha256 of :meth:`weights`."""
        return state_digest(self.weights())

    def state(self) -> dict[str, Floats]:
        """All that the journal up to :attr:`offset` cannot give back without computing: for a checkpoint."""
        arrays = {f"average/{name}": array for name, array in self.weights().items()}
        if self.network is not None:
            arrays |= {f"current/{name}": array for name, array in self.network.arrays().items()}
        for name, moments in self._moments().items():
            for key, value in moments.items():
                arrays[f"{key}/{name}"] = np.atleast_1d(value.numpy()).astype(np.float32)
        return arrays

    def restore(self, offset: int, updates: int, arrays: dict[str, Floats]) -> None:
        """Return to a :meth:`state` taken at ``offset``; everything else is read from the journal.

        Raises:
            DecodeError: if the arrays do not fit the journal.
        """
        self.recall_facts(offset)
        for record in self._journal.others(offset, ("idle",)):
            self.last_idle = msgspec.json.decode(record.payload, type=IdleRecord)
            self.idle_rows += self.last_idle.rows
        for at, tier, samples in self._journal.batches(offset):
            self.rows.add(at, samples)
            targets = StoredBatch.read_targets(self._journal.get(at).payload)
            self._counts[tier] += self._objective.count(targets, len(self.labels))
        if self.network is not None and self.average is not None:
            self.network.load_arrays(_below("current", arrays))
            self.average.load_arrays(_below("average", arrays))
            self._restore_moments(arrays)
        self.offset, self.updates = offset, updates

    def recall_facts(self, offset: int) -> None:
        """Read settings, labels and tiers up to ``offset``, without their batches."""
        for record in self._journal.others(offset, ("settings", "labels", "tier")):
            self._apply_fact(record)

    def _moments(self) -> dict[str, dict[str, torch.Tensor]]:
        """AdamW's state by parameter name."""
        if self.network is None or self._optimiser is None:
            return {}
        states: dict[torch.Tensor, dict[str, Any]] = self._optimiser.state
        return {
            name: dict(states[parameter])
            for name, parameter in self.network.named_parameters()
            if parameter in states
        }

    def _restore_moments(self, arrays: dict[str, Floats]) -> None:
        assert self.network is not None and self._optimiser is not None
        steps, means, squares = (_below(key, arrays) for key in ("step", "exp_avg", "exp_avg_sq"))
        for name, parameter in self.network.named_parameters():
            if name in steps:
                self._optimiser.state[parameter] = {
                    "step": torch.tensor(float(steps[name][0])),
                    "exp_avg": torch.from_numpy(means[name]).reshape(parameter.shape),
                    "exp_avg_sq": torch.from_numpy(squares[name]).reshape(parameter.shape),
                }


def _below(key: str, arrays: dict[str, Floats]) -> dict[str, Floats]:
    prefix = f"{key}/"
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def _own_answers(answers: dict[int, torch.Tensor], families: list[tuple[int, int]]) -> torch.Tensor:
    """Each row's answers at its own last tap, [K, …]; ``families`` are (taps, rows), by falling taps."""
    parts, start = [], 0
    for taps, rows in families:
        parts.append(answers[taps][start : start + rows])
        start += rows
    return torch.cat(parts)


def _parts(position: int, rows: int, total: int) -> list[int]:
    """Where a slice starts, and where each further pass that it runs into does."""
    return [position, *range((position // total + 1) * total, position + rows, total)]


def _half_cosine(progress: float, final: float) -> float:
    """1 at progress 0, ``final`` at progress 1."""
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
