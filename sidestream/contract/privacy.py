"""What a device does to activations, before anything is stored or sent, so that they reveal less of the text.

``privacy`` in trainer.toml is a list of these, with commas between them:

============== =====================================================================================
``deep``       only the last tap travels
``deep:n``     only the last n of the job's taps travel
``mean``       one vector a tap; any policy of :mod:`sidestream.contract.sampling` may stand here
``noise:s``    each vector is scaled to length 1, and Gaussian noise of the expected length s is added
============== =====================================================================================

None of them makes an upload unreadable: ``sidestream leakage --defences`` measures what each leaves, and what it
costs. The noise is DP-Forward's (Du et al., CCS 2023, arXiv 2309.06746): a clip, and Gaussian noise calibrated to it.

Legend: B taps, V vectors, d width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from sidestream.contract.errors import ConfigError
from sidestream.contract.sampling import KINDS, parse_sampling
from sidestream.contract.tensors import Floats

DELTA: Final = 1e-5
"""The δ at which ε is told."""
MAX_NOISE: Final = 100.0


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """A parsed setting."""

    taps: int = 0
    """Keep the last so many taps; 0 for all."""
    sampling: str = ""
    """The policy by which tokens are sampled; empty: the tier's own."""
    noise: float = 0.0
    """Expected length of the noise, where vectors have length 1; 0 for neither."""

    def kept(self, taps: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a job's taps that travel."""
        return taps[-self.taps :] if self.taps else taps


def parse_privacy(text: str, field: str = "privacy") -> Privacy:
    """Read a setting; an empty one changes nothing.

    Raises:
        ConfigError: naming ``field``, if it is none.
    """
    found: dict[str, int | str | float] = {}
    for part in [part.strip() for part in text.split(",")] if text.strip() else []:
        kind, _, number = part.partition(":")
        if kind == "deep":
            name, value = "taps", _deep(part, number, field)
        elif kind == "noise":
            name, value = "noise", _noise(part, number, field)
        elif kind in KINDS:
            parse_sampling(part, field)
            name, value = "sampling", part
        else:
            raise ConfigError(
                field, f"{part[:80]!r} is none; write deep, deep:2, mean, segments:2, random:2 or noise:0.5"
            )
        if name in found:
            raise ConfigError(field, f"{text[:80]!r} says twice what {name} shall be; say it once")
        found[name] = value
    return Privacy(**found)  # type: ignore[arg-type]


def _deep(part: str, number: str, field: str) -> int:
    if part == "deep":
        return 1
    if re.fullmatch(r"[1-9][0-9]?", number):
        return int(number)
    raise ConfigError(field, f"{part[:80]!r}: the number after 'deep' is 1 to 99")


def _noise(part: str, number: str, field: str) -> float:
    value = float(number) if re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,6}", number) else 0.0
    if not 0 < value <= MAX_NOISE:
        raise ConfigError(field, f"{part[:80]!r}: the number after 'noise' is over 0 and at most 100")
    return value


def blurred(vectors: Floats, noise: float, rng: np.random.Generator) -> Floats:
    """Scale each vector to length 1, and add noise; as they are where ``noise`` is 0.

    Args:
        vectors: [B, V, d]; not changed.
        noise: Expected length of what is added to each: its standard deviation in each dimension is noise/√d.
        rng: Of the device, whose state nobody else knows.
    """
    if not noise:
        return vectors
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    clipped = vectors / np.maximum(lengths, np.float32(1e-12))
    sigma = np.float32(noise / math.sqrt(vectors.shape[-1]))
    found: Floats = clipped + sigma * rng.standard_normal(vectors.shape, np.float32)
    return found


def epsilon(noise: float, width: int, distance: float) -> float:
    """The least ε of (ε, :data:`DELTA`)-indistinguishability of two uploads that lie ``distance`` apart.

    The analytic Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8). Vectors have length 1, so the
    farthest apart of two samples with so many taps and vectors are 2·√(taps·vectors).

    Args:
        noise: As :func:`blurred` takes it, over 0.
        width: d.
        distance: L2, over all vectors of a sample together.
    """
    mu = distance * math.sqrt(width) / noise  # distance in standard deviations
    low, high = 0.0, mu * mu / 2 + 10 * mu + 50
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(mu, middle) > DELTA else (low, middle)
    return high


def _delta(mu: float, eps: float) -> float:
    """Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ), in logarithms where e^ε is large."""
    first = 0.5 * math.erfc(-(mu / 2 - eps / mu) / math.sqrt(2))
    x = mu / 2 + eps / mu
    tail = 0.5 * math.erfc(x / math.sqrt(2))
    if tail > 0:
        second = math.exp(min(700.0, eps + math.log(tail)))
    else:  # the tail's first term: the exponents nearly cancel
        second = math.exp(min(700.0, eps - x * x / 2)) / (x * math.sqrt(2 * math.pi))
    return first - second
