"""Codebooks of product quantisation: what activations are written with at one or two bits a value.

A vector is rotated, cut into groups of eight values, and each group is written as the number of the nearest
of 256 centroids: product quantisation (Jégou, Douze and Schmid 2011), with OPQ's rotation (Ge et al. 2013).
A second stage, if there is one, writes what the first has left over in the same way.
There is a codebook for each tap; :mod:`sidestream.backbone.codebook_fitting` fits them to a backbone.

Codebooks are known by their content alone: whoever has decoded or checked some by :attr:`Codebooks.id` gets
the same values from the same codes as everybody else. So a process keeps those that it has met by that id,
and a tensor that names it can be decoded wherever it turns up. NumPy only.

Legend: B taps, N vectors, d width, M = d / 8 groups, S stages, C = S·M codes a vector.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError

GROUP: Final = 8
"""Values that one code stands for."""
ENTRIES: Final = 256
"""Centroids of a group: a code is a byte."""
MAX_STAGES: Final = 2
MAX_WIDTH: Final = 16_384
ID_BYTES: Final = 16
_ENCODED: Final = 512  # vectors at once: what they are compared by stays within the processor's cache
_DECODED: Final = 64  # vectors at once, always
_LARGEST: Final = 65504.0

Floats = npt.NDArray[np.float32]
Halves = npt.NDArray[np.float16]
Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Codebook:
    """Of one tap. Immutable."""

    centroids: Halves
    """[S, M, 256, 8]."""
    rotation: Halves
    """[d, d], orthogonal but for rounding: vectors are multiplied by it, from the right, and then cut."""

    def __post_init__(self) -> None:
        _check(self.centroids, self.rotation)

    @property
    def width(self) -> int:
        """Values of a vector."""
        return int(self.rotation.shape[0])

    @property
    def stages(self) -> int:
        """S."""
        return int(self.centroids.shape[0])

    def first(self, stages: int) -> Codebook:
        """The same with its first so many stages."""
        if stages == self.stages:
            return self
        return Codebook(centroids=self.centroids[:stages], rotation=self.rotation)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes that change with any value."""
        found = hashlib.blake2b(digest_size=ID_BYTES, person=b"codebook")
        for array in (self.centroids, self.rotation):
            found.update(repr(array.shape).encode())
            found.update(np.ascontiguousarray(array, "<f2").tobytes())
        return found.digest()

    @cached_property
    def _turn(self) -> Floats:
        return self.rotation.astype(np.float32)

    @cached_property
    def _entries(self) -> Floats:
        return self.centroids.astype(np.float32)

    @cached_property
    def _half_norms(self) -> Floats:
        """[S, M, 256]: half of each centroid's squared length."""
        halves: Floats = np.square(self._entries).sum(axis=-1) / 2
        return halves

    def encode(self, vectors: Floats, stages: int) -> Codes:
        """[N, d], finite -> [N, C]: the codes of the first so many stages, one stage after the other."""
        codes = np.empty((len(vectors), stages * len(self._entries[0])), np.uint8)
        for start in range(0, len(vectors), _ENCODED):
            part = slice(start, start + _ENCODED)
            codes[part] = self._encode(np.clip(vectors[part], -_LARGEST, _LARGEST) @ self._turn, stages)
        return codes

    def _encode(self, turned: Floats, stages: int) -> Codes:
        found = []
        left = turned.reshape(len(turned), -1, GROUP).transpose(1, 0, 2).copy()  # [M, N, 8]
        for entries, halves in zip(self._entries[:stages], self._half_norms, strict=False):
            # The nearest centroid: |x - c|² = |x|² - 2·(x·c - |c|²/2), and |x|² is the same for all.
            codes = np.stack(
                [(left[m] @ entries[m].T - halves[m]).argmax(axis=1) for m in range(len(left))]
            )  # [M, N]
            left -= entries[np.arange(len(left))[:, None], codes]
            found.append(codes.T)
        return np.concatenate(found, axis=1).astype(np.uint8)

    def decode(self, codes: Codes) -> Floats:
        """[N, C] -> [N, d]. A vector's values do not hang on which others are decoded with it."""
        groups = np.arange(self.centroids.shape[1])
        stages = codes.reshape(len(codes), -1, len(groups))
        turned = np.zeros((-(-len(codes) // _DECODED) * _DECODED, self.width), np.float32)
        for entries, of_stage in zip(self._entries, stages.transpose(1, 0, 2), strict=False):
            turned[: len(codes)] += entries[groups, of_stage].reshape(len(codes), self.width)
        # Always as many at once: by a product's shape a library chooses the order in which it adds up.
        for start in range(0, len(turned), _DECODED):
            turned[start : start + _DECODED] = turned[start : start + _DECODED] @ self._turn.T
        return turned[: len(codes)]


@dataclass(frozen=True, eq=False)
class Codebooks:
    """Those of a tier's taps, in their order."""

    by_tap: tuple[Codebook, ...]
    """Of one width and as many stages each."""

    def __post_init__(self) -> None:
        if not self.by_tap or len({(one.width, one.stages) for one in self.by_tap}) != 1:
            raise DecodeError("codebooks of several taps need one width and as many stages each")

    @cached_property
    def id(self) -> bytes:
        """16 bytes by which plan, tensors and files name them."""
        joined = b"".join(one.digest for one in self.by_tap)
        return hashlib.blake2b(joined, digest_size=ID_BYTES, person=b"codebooks").digest()

    @property
    def width(self) -> int:
        """Values of a vector."""
        return self.by_tap[0].width

    @property
    def stages(self) -> int:
        """S."""
        return self.by_tap[0].stages

    def encode(self, array: Floats, stages: int) -> bytes:
        """[B, N, d], or [N, d] of one tap -> codes [B, N, C].

        Raises:
            ValueError: they are for other taps, another width or fewer stages.
        """
        taps = array[None] if array.ndim == 2 else array
        if taps.ndim != 3 or taps.shape[::2] != (len(self.by_tap), self.width) or stages > self.stages:
            raise ValueError(
                f"codebooks for {len(self.by_tap)} taps of width {self.width} with {self.stages} stages "
                f"do not suit an array of shape {array.shape} and {stages} stages"
            )
        return b"".join(
            book.encode(tap, stages).tobytes() for book, tap in zip(self.by_tap, taps, strict=True)
        )

    def decode(self, data: bytes, shape: tuple[int, ...], stages: int) -> Floats:
        """The inverse, but for what quantising loses; ``data`` is as long as the shape demands.

        Raises:
            DecodeError: as :meth:`encode`.
        """
        taps, vectors = (1, shape[0]) if len(shape) == 2 else shape[:2]
        if (taps, shape[-1]) != (len(self.by_tap), self.width) or stages > self.stages:
            raise DecodeError(f"a tensor of shape {shape} is not of its codebooks' taps, width or stages")
        codes = np.frombuffer(data, np.uint8).reshape(taps, vectors, -1)
        values = np.stack([book.decode(part) for book, part in zip(self.by_tap, codes, strict=True)])
        return values.reshape(shape)


def _check(centroids: npt.NDArray[Any], rotation: npt.NDArray[Any]) -> None:
    """Raise DecodeError unless these can be a codebook's."""
    if centroids.dtype != np.float16 or rotation.dtype != np.float16:
        raise DecodeError("a codebook's values are float16")
    if rotation.ndim != 2 or not 1 <= rotation.shape[0] == rotation.shape[1] <= MAX_WIDTH:
        raise DecodeError(f"a codebook's rotation has the shape {rotation.shape}, not [d, d]")
    wanted = (rotation.shape[0] // GROUP, ENTRIES, GROUP)
    if rotation.shape[0] % GROUP or centroids.shape[1:] != wanted or not 1 <= len(centroids) <= MAX_STAGES:
        raise DecodeError(
            f"centroids of shape {centroids.shape} do not suit a width of {rotation.shape[0]}: "
            f"1 or {MAX_STAGES} stages of [{wanted[0]}, {ENTRIES}, {GROUP}], for widths that {GROUP} divides"
        )
    if not (np.isfinite(centroids).all() and np.isfinite(rotation).all()):
        raise DecodeError("a codebook holds NaN or infinite values")


_met: Final[dict[bytes, Codebooks]] = {}


def keep(codebooks: Codebooks) -> Codebooks:
    """Keep some for :func:`codebooks_of`, as long as the process lives; return those that are kept."""
    return _met.setdefault(codebooks.id, codebooks)


def codebooks_of(id_: bytes) -> Codebooks:
    """Those with this id.

    Raises:
        DecodeError: nobody has given such to :func:`keep`.
    """
    found = _met.get(id_)
    if found is None:
        raise DecodeError(f"the codebooks {id_.hex()[:16] or 'of a tensor that names none'} are not here")
    return found
