"""A backbone that keeps an account of what it does for one device, and the order in which devices compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from sidestream.backbone.backbone import Backbone, Choose
from sidestream.backbone.inputs import Input
from sidestream.backbone.preprocessor import Prepared
from sidestream.backbone.sampled import Sampled
from sidestream.backbone.torch_runtime.language_model import TorchLanguageModel
from sidestream.backbone.windows import Window
from sidestream.contract.sampling import EVERY_TOKEN
from sidestream.contract.tasks import NO_TARGET
from sidestream.contract.tensors import Floats

_STALL_S = 3.0  # a device whose turn it is may be busy elsewhere; the others wait no longer than this


class Turns:
    """Devices of unequal speed on one machine: each computes when its simulated clock is the furthest behind.

    So messages come in the order in which devices of those speeds would send them, whatever the machine's
    scheduler does.

    Args:
        names: Devices that are there from the beginning.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._clocks = dict.fromkeys(names, 0.0)
        self._changed = threading.Condition()

    def join(self, name: str) -> None:
        """A device starts now."""
        with self._changed:
            self._clocks[name] = min(self._clocks.values(), default=0.0)

    def leave(self, name: str) -> None:
        """A device will not compute any more."""
        with self._changed:
            self._clocks.pop(name, None)
            self._changed.notify_all()

    def take(self, name: str, duration: float) -> None:
        """Wait for the device's turn, then put its clock forward."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_next(name), timeout=_STALL_S)
            if name in self._clocks:
                self._clocks[name] += duration
            self._changed.notify_all()

    def _is_next(self, name: str) -> bool:
        return name not in self._clocks or self._clocks[name] <= min(self._clocks.values())


class Meter:
    """Counts what a backbone does for one device; made on the thread that will use it.

    Args:
        before: Called with the number of rows, texts or windows, before a pass.
        after: Called with the number of rows passed so far, after a pass.
    """

    def __init__(self, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        self._before = before
        self._after = after
        self._cpu_started_s = time.thread_time()
        self.cpu_s = 0.0
        """CPU time of the thread from when this was made to the end of the last pass: sampling, quantising
        and the outbox are in it, but for the last batch's."""
        self.rows = 0
        """Rows passed."""
        self.tokens = 0
        """Of windows: the tokens predicted in them."""

    @contextmanager
    def passing(self, rows: int) -> Iterator[None]:
        """Around a pass."""
        self._before(rows)
        yield
        self.cpu_s = time.thread_time() - self._cpu_started_s
        self.rows += rows
        self._after(self.rows)


class MeteredBackbone(Backbone):
    """The same weights as another backbone, which is not copied."""

    def __init__(self, inner: Backbone, meter: Meter) -> None:
        vars(self).update(vars(inner))
        self._inner = inner
        self._meter = meter

    def fingerprint_of_first(self, layers: int) -> str:
        return self._inner.fingerprint_of_first(layers)

    def _run(self, tokens: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        self._inner._run(tokens, taps, take)

    def forward(
        self,
        inputs: Sequence[Input],
        taps: Sequence[int],
        max_tokens: int,
        choose: Choose = lambda lengths: EVERY_TOKEN,
        *,
        words: bool = False,
    ) -> Sampled:
        with self._meter.passing(len(inputs)):
            return super().forward(inputs, taps, max_tokens, choose, words=words)


class MeteredModel(TorchLanguageModel):
    """The same for a language model."""

    def __init__(self, inner: TorchLanguageModel, meter: Meter) -> None:
        vars(self).update(vars(inner))
        self._meter = meter

    def forward_windows(
        self,
        windows: Sequence[Window],
        taps: Sequence[int],
        choose: Choose,
    ) -> Sampled:
        with self._meter.passing(len(windows)):
            self._meter.tokens += sum(map(count_targets, windows))
            return super().forward_windows(windows, taps, choose)


def count_targets(window: Window) -> int:
    """Tokens of it that are predicted."""
    return sum(target != NO_TARGET for target in window.targets)
