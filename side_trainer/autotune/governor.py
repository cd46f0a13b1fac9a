"""What one device is to do next, by what it measured: one step at a time, and never to and fro. Pure.

A **load** is what was measured over what is allowed: 1 is the limit. Over the limit for two windows, the
device is eased by one step of the first quantity that may move; a step that costs it more is taken after six
windows in which every load that it raises would have stayed below the limit by the margin. The prediction is
a proportion, which says too much rather than too little: memory, for one, does not double with the batch.

What keeps it from going to and fro:

- a quantity rests before it is raised, longer before a turn, and before each turn upward twice as long as
  before the one before: within T hours it turns upward at most log2(1 + T / reverse_h) times;
- a turn upward needs twice the margin, so that what is between the two stays as it is;
- windows in a row, twice as many after each turn: what alternates is judged by its worse half, at once where
  it does so every six windows, and after some turns where it does so every day or two.

All of it but the windows in a row follows from the journal's records, and so survives a restart.
"""

from __future__ import annotations

import enum
import math
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from side_trainer.autotune.choices import Choices, Setting
from side_trainer.autotune.window import Measured
from side_trainer.journal.records import AssignmentRecord, Quantity
from side_trainer.settings.tuning import TuningConfig

_HOUR_S: Final = 3600.0
_DAY_S: Final = 24 * _HOUR_S
_EASE_WINDOWS: Final = 2
_ASK_WINDOWS: Final = 6
_ADVISE_WINDOWS: Final = 24
"""To advise a move that costs the device more; six, to one that costs it less. It is made by hand."""
_MOST_TURNS: Final = 10
_WINDOW_TURNS: Final = 4
_ROOM_CELSIUS: Final = 25.0
"""What a board has that does nothing: its rise above that goes with its load."""
_FULL: Final = 0.5
"""An outbox fuller than that says that the link carries less than is computed."""


class Load(enum.Enum):
    """What a device may have too much of."""

    MEMORY = "memory"
    TIME = "time"
    HEAT = "heat"
    LINK = "link"


EASED_BY: Final[Mapping[Load, tuple[Quantity, ...]]] = {
    Load.MEMORY: (Quantity.BATCH_SIZE, Quantity.MAX_TOKENS, Quantity.TIER),
    Load.TIME: (Quantity.BATCH_SIZE, Quantity.MAX_TOKENS, Quantity.TIER),
    Load.HEAT: (Quantity.MAX_TOKENS, Quantity.TIER),
    Load.LINK: (Quantity.RUNG,),
}
"""What is lowered for each load, first things first."""
_ASKED: Final = (Quantity.MAX_TOKENS, Quantity.RUNG, Quantity.BATCH_SIZE, Quantity.TIER)
"""What is raised, first things first."""
_RAISES: Final[Mapping[Quantity, tuple[Load, ...]]] = {
    Quantity.MAX_TOKENS: (Load.MEMORY, Load.TIME, Load.HEAT, Load.LINK),
    Quantity.RUNG: (Load.LINK,),
    Quantity.BATCH_SIZE: (Load.MEMORY, Load.TIME),
    Quantity.TIER: (Load.MEMORY, Load.TIME, Load.HEAT),
}
"""What goes up with each quantity."""


class Accuracy(NamedTuple):
    """Of a tier's devices on their own samples."""

    value: float
    samples: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What is to be done."""

    what: Quantity
    up: bool
    setting: Setting
    why: str


@dataclass(kw_only=True)
class _Track:
    """When a quantity changed last."""

    changed_s: float
    up: bool
    turns: int = 0
    """How often it turned upward after having been lowered."""


class Governor:
    """One device's choices.

    Args:
        choices: What there is to choose from.
        limits: Bounds and times.
    """

    def __init__(self, choices: Choices, limits: TuningConfig) -> None:
        self.setting = choices.own
        """In force."""
        self.choices = choices
        """What there is to choose from; may be replaced by others of the same tier."""
        self._limits = limits
        self._tracks: dict[Quantity, _Track] = {}
        self._lately: deque[float] = deque(maxlen=100)
        self._over: Counter[Load] = Counter()
        self._able: Counter[Quantity] = Counter()
        self._too_deep = 0  # windows in a row in which it could not have carried the tier that is advised

    def apply(self, record: AssignmentRecord) -> None:
        """Take a choice that is journaled, one just made or one of an earlier start."""
        self.setting = Setting.of_record(record)
        self.forget_windows()
        if record.what is Quantity.BOUNDS:  # the operator's, not ours
            return
        self._lately.append(record.unix_s)
        before = self._tracks.get(record.what)
        turned = before is not None and record.up and not before.up
        turns = (before.turns if before is not None else 0) + turned
        self._tracks[record.what] = _Track(changed_s=record.unix_s, up=record.up, turns=turns)

    def forget_windows(self) -> None:
        """Begin to count windows in a row anew."""
        self._over.clear()
        self._able.clear()
        self._too_deep = 0

    def misfit(self) -> Choice | None:
        """What has to change because the bounds are others than they were."""
        fitted = self.choices.fitted(self.setting)
        if fitted == self.setting:
            return None
        return Choice(what=Quantity.BOUNDS, up=False, setting=fitted, why="it lay outside today's bounds")

    def decide(self, measured: Measured, unix_s: float, accuracies: Mapping[str, Accuracy]) -> Choice | None:
        """What a window leads to: one choice at most.

        Args:
            measured: The window. One in which the device did next to nothing leads to nothing.
            unix_s: The time.
            accuracies: By tier, where its devices have measured any.
        """
        self._heed_clock(unix_s)
        if measured.sample_s is None:
            return None
        loads = self._loads(measured)
        for load in Load:
            self._over[load] = self._over[load] + 1 if loads.get(load, 0.0) > 1 else 0
        for what in _ASKED:
            able = self._may_rise(what, loads, accuracies)
            self._able[what] = self._able[what] + 1 if able else 0
        self._too_deep = self._too_deep + 1 if self._at_advised(loads) > 1 else 0
        if sum(unix_s - then < _DAY_S for then in self._lately) >= self._limits.changes_a_day:
            return None
        return self._eased(loads, unix_s) or self._asked(loads, unix_s)

    def _heed_clock(self, unix_s: float) -> None:
        """A clock that was ahead, and was set right, must not hold everything up until then."""
        for track in self._tracks.values():
            track.changed_s = min(track.changed_s, unix_s)
        self._lately = deque((min(then, unix_s) for then in self._lately), maxlen=100)

    # --- loads ---------------------------------------------------------------------------------------

    def _loads(self, measured: Measured) -> dict[Load, float]:
        """Those that are known."""
        limits, found = self._limits, {}
        if measured.memory is not None:
            found[Load.MEMORY] = measured.memory / limits.memory_share
        if measured.sample_s is not None:
            found[Load.TIME] = measured.sample_s * self.setting.batch_size / limits.batch_seconds
        if measured.celsius is not None:
            allowed = limits.temperature_celsius - _ROOM_CELSIUS
            found[Load.HEAT] = max(0.0, measured.celsius - _ROOM_CELSIUS) / allowed
        if measured.sending is not None:
            found[Load.LINK] = max(measured.sending / limits.link_share, (measured.outbox or 0.0) / _FULL)
        return found

    def _factor(self, load: Load, then: Setting) -> float:
        """By what a load is multiplied under another setting."""
        now, choices = self.setting, self.choices
        if load is Load.LINK:
            return choices.bytes_of(then) / choices.bytes_of(now)
        if then.advised != now.advised:  # measured where the device is, whatever is advised
            return choices.depth_of(then) / choices.depth_of(choices.own)
        return then.max_tokens * then.batch_size / (now.max_tokens * now.batch_size)

    def _may_rise(
        self, what: Quantity, loads: Mapping[Load, float], accuracies: Mapping[str, Accuracy]
    ) -> bool:
        """Whether the next step up of a quantity would stay below every limit by the margin."""
        then = self.choices.step(self.setting, what, up=True)
        if then is None:
            return False
        track = self._tracks.get(what)
        turns = track is not None and not track.up
        room = 1 / (1 + (2 if turns else 1) * self._limits.margin)
        for load in _RAISES[what]:
            known = loads.get(load)
            if known is None:  # a board that tells no temperature is not held back by it
                if load is Load.HEAT:
                    continue
                return False
            if known * self._factor(load, then) > room:
                return False
        return what is not Quantity.TIER or self._gains(then, accuracies)

    def _gains(self, then: Setting, accuracies: Mapping[str, Accuracy]) -> bool:
        """Whether a deeper tier answers better, by more than chance; one may always return to one's own."""
        tier = self.choices.own
        here = tier.advised
        if then.advised == here:
            return True
        if then.batch_size < tier.batch_size or then.max_tokens < tier.max_tokens:
            return False  # it has to be spared even here
        own, other = accuracies.get(here), accuracies.get(then.advised)
        if own is None or other is None or not own.samples or not other.samples:
            return False
        variance = sum(one.value * (1 - one.value) / one.samples for one in (own, other))
        return other.value - own.value >= self._limits.accuracy_gain + 2 * math.sqrt(variance)

    # --- choosing ------------------------------------------------------------------------------------

    def _eased(self, loads: Mapping[Load, float], unix_s: float) -> Choice | None:
        """One step down for the load that is furthest over its limit, of what may move."""
        over = [load for load in loads if self._over[load]]
        for load in sorted(over, key=lambda one: -loads[one]):
            for what in self._lowerable(load):
                if self._rested(what, up=False, unix_s=unix_s) and self._lasts(load, what):
                    then = self.choices.step(self.setting, what, up=False)
                    assert then is not None, "it could not be lowered"
                    why = f"{load.value} at {loads[load]:.0%} of what is allowed"
                    return Choice(what=what, up=False, setting=then, why=why)
        return self._less_advised(loads, unix_s)

    def _lowerable(self, load: Load) -> list[Quantity]:
        """What can be lowered for a load; a move is advised only once nothing else can."""
        found = [what for what in EASED_BY[load] if self.choices.step(self.setting, what, up=False)]
        if Quantity.TIER in found and (len(found) > 1 or self.setting.advised != self.choices.own.advised):
            found.remove(Quantity.TIER)
        return found

    def _less_advised(self, loads: Mapping[Load, float], unix_s: float) -> Choice | None:
        """Take back the advice to move to a deeper tier, if the device could not carry it any more."""
        if self._too_deep < _ASK_WINDOWS or not self._rested(Quantity.TIER, up=False, unix_s=unix_s):
            return None
        then = self.choices.step(self.setting, Quantity.TIER, up=False)
        assert then is not None, "its own tier is less deep"
        why = f"tier {self.setting.advised} would take {self._at_advised(loads):.0%} of what is allowed"
        return Choice(what=Quantity.TIER, up=False, setting=then, why=why)

    def _at_advised(self, loads: Mapping[Load, float]) -> float:
        """The worst load in the tier that is advised; 0 where that is no deeper than the device's own."""
        choices = self.choices
        ratio = choices.depth_of(self.setting) / choices.depth_of(choices.own)
        worst = max((loads[load] for load in _RAISES[Quantity.TIER] if load in loads), default=0.0)
        return worst * ratio if ratio > 1 else 0.0

    def _asked(self, loads: Mapping[Load, float], unix_s: float) -> Choice | None:
        """One step up of what has had room for long enough, while nothing is too much."""
        if any(self._over.values()):
            return None
        for what in _ASKED:
            if self._able[what] < self._asking(what) or not self._rested(what, up=True, unix_s=unix_s):
                continue
            then = self.choices.step(self.setting, what, up=True)
            assert then is not None, "it would not be able"
            raised = {load: loads[load] * self._factor(load, then) for load in _RAISES[what] if load in loads}
            load = max(raised, key=raised.__getitem__)
            why = f"{load.value} would be at {raised[load]:.0%} of what is allowed"
            return Choice(what=what, up=True, setting=then, why=why)
        return None

    def _asking(self, what: Quantity) -> int:
        """Windows in a row with room until a quantity is raised: twice as many after each turn, bounded."""
        track = self._tracks.get(what)
        turns = min(track.turns, _WINDOW_TURNS) if track is not None and not track.up else 0
        windows = _ADVISE_WINDOWS if what is Quantity.TIER else _ASK_WINDOWS
        return windows << turns

    def _lasts(self, load: Load, what: Quantity) -> bool:
        """Whether a load has been too much for long enough: longer, where that takes something back."""
        windows = _ASK_WINDOWS if what is Quantity.TIER else _EASE_WINDOWS
        return self._over[load] >= windows * (2 if self._is_turn(what, up=False) else 1)

    def _is_turn(self, what: Quantity, *, up: bool) -> bool:
        track = self._tracks.get(what)
        return track is not None and track.up is not up

    def _rested(self, what: Quantity, *, up: bool, unix_s: float) -> bool:
        """Whether a quantity may change again."""
        track = self._tracks.get(what)
        if track is None:
            return True
        dwell_h, turns = self._limits.dwell_h, min(track.turns, _MOST_TURNS)
        if up:
            hours = (
                max(dwell_h, self._limits.reverse_h * 2**turns) if self._is_turn(what, up=True) else dwell_h
            )
        else:  # easing further waits for windows only
            hours = 2 * dwell_h if self._is_turn(what, up=False) else 0.0
        return unix_s - track.changed_s >= hours * _HOUR_S
