"""What a device may do to its vectors before anything of them is stored or sent, so that they reveal less.

A setting is steps, one after another, with a space between, each at most once and in this order:

============= =========================================================================================
``unit``      each vector is brought to the length of the square root of its width: its direction travels
``sketch:k``  ``unit``, and only k random directions of it, the same ones on every device (a random
              projection, Johnson and Lindenstrauss), brought to that length again
``rotate``    a rotation that a secret gives, which devices have and the trainer has not
``noise:x``   Gaussian noise, after a clip to the length of the square root of the width; x is its standard
              deviation in each of the directions that travel, where the signal's is 1 at most
============= =========================================================================================

All but the noise is done to what the device answers with, too, and to every tap alike. A vector keeps its
width, so nothing behind the device knows of any of it. NumPy only.

Legend: B taps, V vectors, d width, k directions.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import ConfigError
from sidestream.contract.tensors import Floats

MAX_DIRECTIONS: Final = 4096
_WRITTEN: Final = re.compile(
    r"(?:(?P<unit>unit)|sketch:(?P<sketch>[1-9][0-9]{0,3}))?"
    r"(?: ?(?P<rotate>rotate))?"
    r"(?: ?noise:(?P<noise>[0-9]{0,3}(?:\.[0-9]{1,4})?))?"
)


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """A parsed setting."""

    unit: bool = False
    """Whether each vector is brought to one length."""
    directions: int = 0
    """k of a sketch; 0 for all."""
    rotates: bool = False
    """Whether vectors are rotated."""
    secret: str = ""
    """What gives the rotation; no part of a plan."""
    noise: float = 0.0
    """Standard deviation a direction."""

    def __str__(self) -> str:
        steps = [
            f"sketch:{self.directions}" if self.directions else "unit" if self.unit else "",
            "rotate" if self.rotates else "",
            f"noise:{self.noise:g}" if self.noise else "",
        ]
        return " ".join(step for step in steps if step)

    def project(self, vectors: Floats) -> Floats:
        """[B, V, d] -> the same without what is random."""
        if self.unit:
            with np.errstate(invalid="ignore", over="ignore"):
                vectors = _scaled(vectors)
        if self.directions and self.directions < vectors.shape[-1]:
            base = _directions(self.directions, vectors.shape[-1])
            vectors = _scaled((vectors @ base) @ base.T)
        if self.rotates:
            vectors = vectors @ _rotation(self.secret, vectors.shape[-1])
        return vectors

    def apply(self, vectors: Floats) -> Floats:
        """[B, V, d] -> what may leave the device. Drawn anew each time: a vector is made once.

        Not finite where a vector is not, so that it is found and skipped.
        """
        return self.noisy(self.project(vectors))

    def noisy(self, vectors: Floats) -> Floats:
        """[B, V, d] of :meth:`project` -> the same clipped and with noise, if there is to be any."""
        if not self.noise:
            return vectors
        width = vectors.shape[-1]
        kept = self.directions if 0 < self.directions < width else width
        noise = self.noise * gaussian((*vectors.shape[:-1], kept))
        if kept < width:  # as much of it as there is of the signal, which lies in these directions alone
            noise = math.sqrt(width / kept) * (noise @ _directions(kept, width).T)
            if self.rotates:
                noise = noise @ _rotation(self.secret, width)
        noisy: Floats = (_clipped(vectors) + noise).astype(np.float32)
        return noisy

    def epsilon(self, width: int, vectors: int, apart: float = 2.0, delta: float = 1e-5) -> float:
        """ε of the Gaussian mechanism for two samples whose vectors are so far apart.

        Args:
            width: d.
            vectors: How many a sample sends, at all taps together.
            apart: The distance of two vectors in units of their greatest length; 2 is any two samples.
            delta: δ.

        Returns:
            The least ε with which (ε, δ) holds (Balle and Wang, arXiv 1805.06530); infinite without noise.
        """
        if not self.noise:
            return math.inf
        kept = self.directions if 0 < self.directions < width else width
        return gaussian_epsilon(apart * math.sqrt(kept * vectors) / self.noise, delta)


NO_PRIVACY: Final = Privacy()


def parse_privacy(text: str, field: str = "privacy") -> Privacy:
    """Read a setting; the empty one changes nothing.

    Raises:
        ConfigError: naming ``field``, if it is none.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None or text != text.strip():
        raise ConfigError(
            field, f"{text[:80]!r} is no such setting; write steps such as \"sketch:32 noise:1\", or \"\""
        )
    directions = int(found["sketch"] or 0)
    if directions > MAX_DIRECTIONS:
        raise ConfigError(field, f"{text[:80]!r}: sketch takes 1 to {MAX_DIRECTIONS} directions")
    noise = float(found["noise"]) if found["noise"] not in (None, "") else 0.0
    if found["noise"] is not None and not 0.01 <= noise <= 100:
        raise ConfigError(field, f"{text[:80]!r}: the number after noise is 0.01 to 100")
    return Privacy(
        unit=bool(found["unit"] or directions),
        directions=directions,
        rotates=found["rotate"] is not None,
        noise=noise,
    )


def gaussian(shape: tuple[int, ...]) -> Floats:
    """Standard normal numbers from the operating system's randomness (Box and Muller), not from a seed."""
    count = math.prod(shape)
    draws = np.frombuffer(os.urandom(16 * count), "<u8").reshape(2, count)
    uniform = ((draws >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    normal = np.sqrt(-2.0 * np.log(uniform[0])) * np.cos(2.0 * np.pi * uniform[1])
    return normal.reshape(shape).astype(np.float32)


def gaussian_epsilon(ratio: float, delta: float) -> float:
    """The least ε of Gaussian noise, given sensitivity over standard deviation (arXiv 1805.06530, theorem 8)."""
    low, high = 0.0, ratio * ratio / 2 + ratio * math.sqrt(2 * math.log(1 / delta)) + 1e-9
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if _delta(ratio, middle) <= delta else (middle, high)
    return high


def _delta(ratio: float, epsilon: float) -> float:
    """δ at ε: Φ(r/2 − ε/r) − e^ε Φ(−r/2 − ε/r)."""
    upper, lower = ratio / 2 - epsilon / ratio, -ratio / 2 - epsilon / ratio
    return _phi(upper) - math.exp(min(epsilon + _log_phi(lower), 0.0))


def _phi(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _log_phi(x: float) -> float:
    """log Φ(x); by its asymptotic form where Φ is too small for a float."""
    return math.log(_phi(x)) if x > -30 else -x * x / 2 - math.log(-x * math.sqrt(2 * math.pi))


def _length(vectors: Floats) -> Floats:
    return np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), np.float32(1e-12))


def _scaled(vectors: Floats) -> Floats:
    scaled: Floats = (vectors * (math.sqrt(vectors.shape[-1]) / _length(vectors))).astype(np.float32)
    return scaled


def _clipped(vectors: Floats) -> Floats:
    most = math.sqrt(vectors.shape[-1])
    clipped: Floats = vectors * np.minimum(np.float32(1), np.float32(most) / _length(vectors))
    return clipped


@lru_cache(maxsize=8)
def _directions(count: int, width: int) -> Floats:
    """[d, k]: orthonormal, the same on every machine but for rounding."""
    return _orthonormal(np.random.default_rng(width), width, count)


@lru_cache(maxsize=8)
def _rotation(secret: str, width: int) -> Floats:
    """[d, d]."""
    return _orthonormal(np.random.default_rng(list(secret.encode())), width, width)


def _orthonormal(rng: np.random.Generator, rows: int, columns: int) -> npt.NDArray[np.float32]:
    q, r = np.linalg.qr(rng.standard_normal((rows, columns)))
    base: npt.NDArray[np.float32] = (q * np.sign(np.diag(r))).astype(np.float32)
    return base
