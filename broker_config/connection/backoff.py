"""How long to wait before trying again: exponential backoff with full jitter.

Full jitter spreads a fleet that lost the same broker at the same moment evenly over the waiting time, see
Marc Brooker, "Exponential Backoff And Jitter" (AWS Architecture Blog, 2015). Knows no clock and never sleeps.
"""

import random


class Backoff:
    """A sequence of waiting times: uniform between 0 and a ceiling that doubles up to a cap.

    Args:
        first_s: The ceiling of the first wait, so a first retry is quick.
        cap_s: No ceiling is higher than this.
        rng: Where the jitter comes from.
    """

    def __init__(self, first_s: float = 1.0, cap_s: float = 60.0, rng: random.Random | None = None) -> None:
        if not 0 < first_s <= cap_s:
            raise ValueError(f"0 < first_s <= cap_s, not {first_s} and {cap_s}")
        self._first_s = first_s
        self._cap_s = cap_s
        self._rng = rng if rng is not None else random.Random()
        self._ceiling_s = first_s

    def next_s(self) -> float:
        """The next wait, in seconds; the ceiling doubles."""
        wait_s = self._rng.uniform(0.0, self._ceiling_s)
        self._ceiling_s = min(2 * self._ceiling_s, self._cap_s)
        return wait_s

    def reset(self) -> None:
        """Start over with quick retries: things went well for a while."""
        self._ceiling_s = self._first_s
