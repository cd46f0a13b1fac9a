"""A backbone that keeps an account of what it does for one device, and the order in which devices compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from contract.sampling import EVERY_TOKEN, Sampling
from edge_agent.backbone import Backbone
from edge_agent.samples import Text
from edge_agent.taps import Sampled

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


class MeteredBackbone(Backbone):
    """The same weights as another backbone; made on the thread that will use it.

    Args:
        inner: A loaded backbone; it is not copied.
        before: Called with the number of texts before a pass.
        after: Called with the number of texts passed so far, after a pass.
    """

    def __init__(self, inner: Backbone, before: Callable[[int], None], after: Callable[[int], None]) -> None:
        vars(self).update(vars(inner))
        self._before = before
        self._after = after
        self._cpu_started_s = time.thread_time()
        self.cpu_s = 0.0
        """CPU time of the thread from when this was made to the end of the last pass: sampling, quantising
        and the outbox are in it, but for the last batch's."""
        self.texts = 0
        """Texts passed."""

    def forward(
        self,
        texts: Sequence[Text],
        taps: Sequence[int],
        max_tokens: int,
        choose: Callable[[npt.NDArray[np.int64]], Sampling] = lambda lengths: EVERY_TOKEN,
        *,
        words: bool = False,
    ) -> Sampled:
        self._before(len(texts))
        read = super().forward(texts, taps, max_tokens, choose, words=words)
        self.cpu_s = time.thread_time() - self._cpu_started_s
        self.texts += len(texts)
        self._after(self.texts)
        return read
