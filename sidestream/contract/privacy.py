"""What a device does to activations, before anything is stored or sent, so that they reveal less of the text.

``privacy`` in trainer.toml is a list of these, with commas between them:

============== =====================================================================================
``deep``       only the last tap travels
``deep:n``     only the last n of the job's taps travel
``mean``       one vector a tap; any policy of :mod:`sidestream.contract.sampling` may stand here
``sketch:k``   of each vector only its share in k random directions, the same on every device (a random
               projection, Johnson and Lindenstrauss, 1984)
``noise:s``    Gaussian noise of the expected length s, where each vector has length 1
============== =====================================================================================

With a sketch or noise all vectors are brought to one length. The noise is DP-Forward's (Du et al., CCS
2023, arXiv 2309.06746): a bound on each vector's length, and Gaussian noise calibrated to it, here in those
directions alone that travel. A vector keeps its width, so whoever learns from it need know nothing of this.
All but the noise is done to what a device answers with, too. None of it makes an upload unreadable:
``sidestream leakage --defences`` measures what each leaves, and what it costs. NumPy only.

Legend: B taps, V vectors, d width, k directions.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np

from sidestream.contract.errors import ConfigError
from sidestream.contract.sampling import KINDS, parse_sampling
from sidestream.contract.tensors import Floats

DELTA: Final = 1e-5
"""The δ at which ε is told."""
MAX_NOISE: Final = 100.0
MAX_DIRECTIONS: Final = 9999
_KNOWN: Final = "deep, deep:2, mean, segments:2, random:2, sketch:32 or noise:0.5"


def gaussian(shape: tuple[int, ...]) -> Floats:
    """Standard normal numbers of the system's own randomness (Box and Muller), which no seed gives again."""
    count = math.prod(shape)
    draws = np.frombuffer(os.urandom(16 * count), "<u8").reshape(2, count)
    uniform = ((draws >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal = np.sqrt(-2.0 * np.log(uniform[0])) * np.cos(2.0 * np.pi * uniform[1])
    found: Floats = normal.reshape(shape).astype(np.float32)
    return found


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """A parsed setting."""

    taps: int = 0
    """Keep the last so many taps; 0 for all."""
    sampling: str = ""
    """The policy by which tokens are sampled; empty: the tier's own."""
    directions: int = 0
    """k of a sketch; 0 for all directions."""
    noise: float = 0.0
    """Expected length of the noise, where vectors have length 1; 0 for none."""

    def __str__(self) -> str:
        """As :func:`parse_privacy` reads it; without taps and sampling, which a plan has elsewhere."""
        sketch = [f"sketch:{self.directions}"] if self.directions else []
        return ", ".join([*sketch, *([f"noise:{self.noise:g}"] if self.noise else [])])

    def kept(self, taps: tuple[int, ...]) -> tuple[int, ...]:
        """Those of a job's taps that travel."""
        return taps[-self.taps :] if self.taps else taps

    def project(self, vectors: Floats) -> Floats:
        """[B, V, d] -> what of them travels, without noise; of length √d where there is noise or a sketch.

        Not finite where a vector is not, so that its sample is found and skipped.
        """
        if not (self.directions or self.noise):
            return vectors
        with np.errstate(invalid="ignore", over="ignore"):
            if self._are_fewer(vectors):
                base = _directions(self.directions, vectors.shape[-1])
                vectors = (vectors @ base) @ base.T
            length = np.linalg.norm(vectors, axis=-1, keepdims=True)
            scale = math.sqrt(vectors.shape[-1]) / np.maximum(length, np.float32(1e-12))
            return np.asarray(vectors * scale, np.float32)

    def noisy(self, vectors: Floats, draw: Callable[[tuple[int, ...]], Floats] = gaussian) -> Floats:
        """[B, V, d] of :meth:`project` -> what may be stored and sent.

        Args:
            vectors: Not changed.
            draw: Gives standard normal numbers.
        """
        if not self.noise:
            return vectors
        width = vectors.shape[-1]
        if not self._are_fewer(vectors):
            return np.asarray(vectors + np.float32(self.noise) * draw(vectors.shape), np.float32)
        noise = draw((*vectors.shape[:-1], self.directions)) @ _directions(self.directions, width).T
        scale = np.float32(self.noise * math.sqrt(width / self.directions))
        return np.asarray(vectors + scale * noise, np.float32)

    def _are_fewer(self, vectors: Floats) -> bool:
        return 0 < self.directions < int(vectors.shape[-1])

    def epsilon(self, width: int, distance: float) -> float | None:
        """The least ε of (ε, :data:`DELTA`)-indistinguishability of two uploads; None without noise.

        The analytic Gaussian mechanism (Balle and Wang, ICML 2018, theorem 8).

        Args:
            width: d.
            distance: L2 of the two, over all vectors of a sample together, where a vector has length 1. The
                farthest apart of two samples with so many vectors at all taps are 2·√vectors.
        """
        if not self.noise:
            return None
        directions = min(self.directions or width, width)
        mu = distance * math.sqrt(directions) / self.noise  # distance in standard deviations
        low, high = 0.0, mu * mu / 2 + 10 * mu + 50
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if _delta(mu, middle) > DELTA else (low, middle)
        return high


NO_PRIVACY: Final = Privacy()


def parse_privacy(text: str, field: str = "privacy") -> Privacy:
    """Read a setting; an empty one changes nothing.

    Raises:
        ConfigError: naming ``field``, if it is none.
    """
    found: dict[str, int | str | float] = {}
    for part in [part.strip() for part in text.split(",")] if text.strip() else []:
        name, value = _part(part, field)
        if name in found:
            raise ConfigError(field, f"{text[:80]!r} says twice what {name} shall be; say it once")
        found[name] = value
    return Privacy(**found)  # type: ignore[arg-type]


def _part(part: str, field: str) -> tuple[str, int | str | float]:
    kind, _, number = part.partition(":")
    if part == "deep":
        return "taps", 1
    if kind in ("deep", "sketch"):
        name, most = ("taps", 256) if kind == "deep" else ("directions", MAX_DIRECTIONS)
        if not re.fullmatch(r"[1-9][0-9]{0,3}", number) or int(number) > most:
            raise ConfigError(field, f"{part[:80]!r}: the number after {kind!r} is 1 to {most}")
        return name, int(number)
    if kind == "noise":
        value = float(number) if re.fullmatch(r"[0-9]{0,3}\.?[0-9]{1,4}", number) else 0.0
        if not 0.01 <= value <= MAX_NOISE:
            raise ConfigError(field, f"{part[:80]!r}: the number after 'noise' is 0.01 to {MAX_NOISE:g}")
        return "noise", value
    if kind in KINDS:
        parse_sampling(part, field)
        return "sampling", part
    raise ConfigError(field, f"{part[:80]!r} is none; write {_KNOWN}")


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


@lru_cache(maxsize=8)
def _directions(count: int, width: int) -> Floats:
    """[d, k]: orthonormal, drawn evenly; on every machine the same but for rounding."""
    drawn = np.random.default_rng(width).standard_normal((width, count))
    q, r = np.linalg.qr(drawn)
    return np.asarray(q * np.sign(np.diag(r)), np.float32)
