"""The job as it stands: what the operator configured, and what the first devices showed.

Keeps the plan. Labels and tiers are settled once, as journal records; from then on every restart finds them
there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from queue import SimpleQueue
from typing import Final

import msgspec

from side_trainer.cells.steps import last_step
from side_trainer.codebook_store import CodebookStore
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import LabelsRecord, RecordKind, SettingsRecord, TierRecord
from side_trainer.method_registry import SETTLERS
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from side_trainer.settling import UnsuitableTier
from sidestream.contract.errors import BackboneError, ConfigError, WireError
from sidestream.contract.messages import Status, check_labels
from sidestream.contract.plan import METHODS, MethodPlan, Plan, RoundPlan, SideTuning, Split, TierPlan

_log = logging.getLogger(__name__)
_TELL_EVERY_S: Final = 15.0


class Contradiction(ConfigError):  # noqa: N818  (it says which)
    """A setting is another one than the journal has fixed."""


def check(config: TrainerConfig, journal: Journal) -> None:
    """Hold settings against what a journal has fixed.

    Raises:
        Contradiction: they differ.
    """
    last, labels, settled = recalled(journal)
    if last is None:
        return
    _check_cells(config, journal)
    if (last.task, last.side_network) != (config.task, config.side_network):
        raise Contradiction(
            "side_network", "differs from the one that this state_dir has trained; start a new state_dir"
        )
    if _form(last.method) != _form(config.method_plan()):
        raise Contradiction(
            "method", "or what it fixes differs from the one of this state_dir; start a new state_dir"
        )
    if labels and config.labels and config.labels != labels:
        raise Contradiction(
            "labels", f"differ from the {len(labels)} that this state_dir has fixed; start a new state_dir"
        )
    for name, tier in settled.items():
        if name in config.tiers:
            _check_codebooks(name, config.tiers[name], tier, CodebookStore(journal.folder))
    if last.job != config.job:
        raise Contradiction("job", f"is {config.job!r}, but this state_dir belongs to {last.job!r}")


def _check_cells(config: TrainerConfig, journal: Journal) -> None:
    """A journal is one cell's, or one trainer's: what another one's weights hang on, it does not have."""
    step = last_step(journal)
    if step is not None:
        before = len(step.parts)
        if before != len(config.cells):
            raise Contradiction(
                "cells", f"this state_dir was learnt in {before} of them; give as many, or a new state_dir"
            )
    elif config.cells and any(journal.last(kind) for kind in (RecordKind.LEARN.value, RecordKind.IDLE.value)):
        raise Contradiction(
            "cells", "this state_dir was learnt by one trainer; start a new one for each cell"
        )


def _check_codebooks(name: str, config: TierConfig, tier: TierRecord, store: CodebookStore) -> None:
    remedy = "were fixed with its first device; put them back, or add a tier of another name"
    if config.codes and not tier.codebooks:
        raise Contradiction(
            f"tiers.{name}.codec", f"takes codebooks, and the tier has none: its facts {remedy}"
        )
    if config.codebooks and tier.codebooks:
        try:
            same = store.take(config.codebooks, tier, config.stages) == tier.codebooks
        except BackboneError as exc:
            _log.warning("tiers.%s.codebooks: %s; going on with the copy in the state directory", name, exc)
            return
        if not same:
            raise Contradiction(f"tiers.{name}.codebooks", f"are others than the tier's, which {remedy}")


def _form(method: MethodPlan) -> object:
    """What of a method's part stays as it is for a journal's life: the rest may change between two starts."""
    if isinstance(method, SideTuning):
        return SideTuning
    free = {"passes": 1, "window": 1, "reuse_below": 0.0, "change_bits": 0, "round": RoundPlan()}
    return msgspec.structs.replace(
        method, **{name: value for name, value in free.items() if name in method.__struct_fields__}
    )


def recalled(journal: Journal) -> tuple[SettingsRecord | None, tuple[str, ...], dict[str, TierRecord]]:
    """The last settings, the labels and the settled tiers."""
    last: SettingsRecord | None = None
    labels: tuple[str, ...] = ()
    settled: dict[str, TierRecord] = {}
    for record in journal.others(journal.tail, ("settings", "labels", "tier")):
        if record.kind == "settings":
            last = msgspec.json.decode(record.payload, type=SettingsRecord)
        elif record.kind == "labels":
            labels = msgspec.json.decode(record.payload, type=LabelsRecord).labels
        else:
            tier = msgspec.json.decode(record.payload, type=TierRecord)
            settled[tier.tier] = tier
    return last, labels, settled


class Job:
    """Settles labels and tiers, and says what the plan is.

    Args:
        config: The operator's settings.
        journal: Where facts are kept.
        device: On what kind of device is learnt: cpu or cuda.

    Raises:
        Contradiction: if a setting is another one than the journal has fixed.
        BackboneError: if the task takes the backbones' output heads, and one is not on this machine. In a
            job that has begun, such a tier waits, as one that is added does.
    """

    def __init__(self, config: TrainerConfig, journal: Journal, device: str = "cpu") -> None:
        self.codebooks = CodebookStore(journal.folder)
        """Those that the plan names."""
        self._config = config
        self._device = device
        self._journal = journal
        self._offered: set[str] = set()
        self._devices: set[str] = set()
        self._last_news: float | None = None
        self._told = 0.0
        self._settler = SETTLERS[METHODS[config.method]](config, journal)
        self._looked = 0.0
        self._elsewhere: SimpleQueue[Mapping[str, TierRecord]] = SimpleQueue()
        self._labels: tuple[str, ...] = ()
        self._settled: dict[str, TierRecord] = {}
        self._policies: Mapping[str, frozenset[str]] = journal.policies
        self._recall()
        if config.labels and not self._labels:
            self._fix_labels(config.labels)
        self._stale = False  # set while a fact is journaled and the plan does not show it yet
        self._look(patient=bool(self._settled))
        self._plan = self._next_plan()

    @property
    def plan(self) -> Plan:
        """The plan in force."""
        return self._plan

    @property
    def settled(self) -> dict[str, TierRecord]:
        """The tiers that are settled."""
        return dict(self._settled)

    @property
    def policies(self) -> Mapping[str, frozenset[str]]:
        """By tier, every token-sampling policy of its plans, today's and earlier ones'.

        A device may hold for long what it made by an earlier plan.
        """
        return self._policies

    def on_birth(self, tier: str, device: str, status: Status, now: float) -> bool:
        """Learn from a device that came online; return whether the plan changed.

        Raises:
            StateError: if the journal cannot be written; say it again later.
        """
        changed = self._settle(tier, status)
        if self._plan.lacks_labels and status.labels:
            if not self._offered.issuperset(status.labels):
                self._last_news = now
            self._devices.add(device)
            self._offered.update(status.labels)
        return self._publishable(changed)

    def tick(self, now: float) -> bool:
        """Fix discovered labels when it is time, look for missing heads; return whether the plan changed.

        Raises:
            StateError: as :meth:`on_birth`.
        """
        if self._settle_as_elsewhere():
            return self._publishable(True)
        self._looked = self._looked or now  # the first look was at the start
        if now - self._looked >= _TELL_EVERY_S:
            self._looked = now
            if self._look(patient=True):
                return self._publishable(True)
        if not self._plan.lacks_labels:
            return False
        if now - self._told >= _TELL_EVERY_S:
            self._told = now
            _log.info(
                "waiting for labels: %d devices have brought %d labels so far, and it takes two; "
                "or give labels = [...]",
                len(self._devices),
                len(self._offered),
            )
        if self._last_news is None:
            return False
        enough = len(self._devices) >= self._config.label_devices
        if not enough or now - self._last_news < self._config.label_wait_s or len(self._offered) < 2:
            return False
        try:
            check_labels(sorted(self._offered))
        except WireError as exc:
            _log.error("labels: the devices' label names cannot be used (%s); set labels = [...]", exc)
            self._last_news = None
            return False
        self._fix_labels(sorted(self._offered))
        return self._publishable(True)

    def offer(self, tiers: Mapping[str, TierRecord]) -> None:
        """Settle tiers, by name, as another cell has settled them, at the next tick; for any thread."""
        self._elsewhere.put(tiers)

    def _settle_as_elsewhere(self) -> bool:
        changed = False
        while not self._elsewhere.empty():
            for name, record in self._elsewhere.get().items():
                if name in self._config.tiers and name not in self._settled:
                    changed = self._fix_tier(record) or changed
        return changed

    def reconfigure(self, config: TrainerConfig) -> None:
        """Take in more tiers: the plan has them from now on, and the others in it stay as they are."""
        assert config.tiers.keys() >= self._config.tiers.keys()
        self._config = self._settler.config = config
        self._look(patient=True)
        self._plan = self._next_plan()

    # --- facts ---------------------------------------------------------------------------------------

    def _recall(self) -> None:
        """Read the journal's facts, and append the settings if they are new or changed."""
        settings = SettingsRecord(
            job=self._config.job,
            task=self._config.task,
            side_network=self._config.side_network,
            learner=self._config.learner,
            method=self._config.method_plan(),
            device=self._device,
        )
        last, self._labels, self._settled = recalled(self._journal)
        check(self._config, self._journal)
        if settings != last:
            self._journal.append("settings", msgspec.json.encode(settings))

    def _look(self, *, patient: bool) -> bool:
        """Look for what tiers lack on this machine, and settle those that need no device; return for news."""
        found = self._settler.look(
            self._settled, lambda: self._build_plan(self._settled, revision=0), patient=patient
        )
        unseen = list(self._settler.unseen(self._settled))
        return bool([one for one in unseen if self._fix_tier(one)]) or found

    def _fix_labels(self, labels: Iterable[str]) -> None:
        fixed = tuple(labels)
        self._journal.append("labels", msgspec.json.encode(LabelsRecord(labels=fixed)))
        self._labels = fixed
        _log.info("labels fixed: %d, from %r to %r", len(self._labels), self._labels[0], self._labels[-1])

    def _settle(self, name: str, status: Status) -> bool:
        """Fix a tier by the first device that shows what it takes."""
        configured = self._config.tiers.get(name)
        if configured is None or name in self._settled:
            return False
        if configured.fingerprint and status.fingerprint and configured.fingerprint != status.fingerprint:
            return False
        try:
            record = self._settler.settle(name, status, self._settled)
        except UnsuitableTier as exc:
            self._refused(name, str(exc))
            return False
        return record is not None and self._fix_tier(record)

    def _fix_tier(self, record: TierRecord) -> bool:
        """Journal what is fixed of a tier, if a plan can be made with it."""
        name = record.tier
        try:
            if reference := self._config.tiers[name].codebooks:
                stages = self._config.tiers[name].stages
                taken = self.codebooks.take(reference, record, stages)
                record = msgspec.structs.replace(record, codebooks=taken)
            self._build_plan({**self._settled, name: record}, revision=0)
        except (BackboneError, WireError) as exc:
            self._refused(name, str(exc))
            return False
        self._journal.append("tier", msgspec.json.encode(record), tier=name)
        self._settled[name] = record
        _log.info(
            "tier %s settled: %d layers of width %d, backbone %s",
            *(name, record.depth, record.width, record.fingerprint[:16]),
        )
        return True

    def _refused(self, tier: str, why: str) -> None:
        told = "tier %s cannot join, its devices wait: tiers.%s: %s; correct it and restart the trainer"
        _log.error(told, tier, tier, why)

    # --- plan ----------------------------------------------------------------------------------------

    def _publishable(self, changed: bool) -> bool:
        self._stale = self._stale or changed
        if not self._stale:
            return False
        self._plan = self._next_plan()
        self._stale = False
        return True

    def _next_plan(self) -> Plan:
        self._journal.plan_revision += 1
        plan = self._build_plan(self._settled, self._journal.plan_revision)
        self._remember_policies(plan)
        return plan

    def _remember_policies(self, plan: Plan) -> None:
        today = {name: tier.policies(plan.task) for name, tier in plan.tiers.items()}
        known = {
            name: self._policies.get(name, frozenset()) | today.get(name, frozenset())
            for name in sorted({*self._policies, *today})
        }
        privacy = {name: tier.privacy for name, tier in plan.tiers.items() if tier.privacy}
        if privacy != self._journal.privacy:
            self._journal.privacy = privacy
        if known != self._policies:
            self._journal.policies = known
            self._policies = known

    def _build_plan(self, settled: dict[str, TierRecord], revision: int) -> Plan:
        return Plan(
            job=self._config.job,
            run=self._journal.run,
            revision=revision,
            task=self._config.task,
            labels=self._labels,
            tiers={name: self._tier(name, settled.get(name)) for name in self._config.tiers},
            side_network=self._config.side_network,
            flow=self._config.flow,
            method=self._config.method_plan(),
        )

    def _tier(self, name: str, record: TierRecord | None) -> TierPlan:
        plan = self._config.tier_plan(name)
        if record is None:
            return self._settler.shown(name, plan)
        split = {"layers": record.depth} if isinstance(self._config.method_plan(), Split) else {}
        return self._config.assignable(msgspec.structs.replace(plan, **record.facts(), **split))
