"""Matrices as what has changed since they were initial, and that as a product of two narrow ones.

What a job teaches a matrix lies in few directions, and the fewer the easier the job is; the rest of what has
changed is mostly the optimiser's noise. Directions are found by a random projection (Halko, Martinsson, Tropp
2011, algorithms 4.4 and 5.1). Pure.

Legend: m × n a matrix, k how many directions of its change are kept.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final, NamedTuple, TypeAlias

import numpy as np

from sidestream.contract.errors import DecodeError
from sidestream.contract.tensors import Floats

MOST_VALUES: Final = 2**26
"""That narrow matrices may stand for, all together: a file must not grow without bound."""
_LEAST_VALUES: Final = 4096
_LEAST_GAIN: Final = 3  # of ranks above a third of the smaller side there is little to gain
_SPARE: Final = 8
_LEFT: Final = ":left"
_RIGHT: Final = ":right"

Initial: TypeAlias = Callable[[str, tuple[int, ...]], Floats]
"""A matrix before anything was learnt, by name and shape."""


class Directions(NamedTuple):
    """In which a matrix has changed, the longest first."""

    left: Floats
    """[K, m] of length 1."""
    sizes: Floats
    """[K]"""
    right: Floats
    """[K, n] of length 1."""
    square: float
    """Of all of the change, these directions and those that were not looked for."""


def directions_of(tensors: Mapping[str, Floats], initial: Initial) -> dict[str, list[Directions]]:
    """Of every matrix [m, n], and of each in a stack [B, m, n]; of none that is too small to gain by it."""
    return {
        name: [_directions(change) for change in _blocks(array - initial(name, array.shape))]
        for name, array in tensors.items()
        if array.ndim in (2, 3) and array.size >= _LEAST_VALUES and np.isfinite(array).all()
    }


def narrowed(
    tensors: Mapping[str, Floats], directions: Mapping[str, Sequence[Directions]], kept: float
) -> dict[str, Floats]:
    """Write matrices as narrow ones where that takes less.

    Args:
        tensors: All of them; of stacks the first blocks.
        directions: Of some, of whole stacks.
        kept: Which share of the square of a change is kept at least.

    Returns:
        In place of a matrix ``NAME:left`` [k, m] and ``NAME:right`` [k, n], of one in a stack
        ``NAME:BLOCK:left`` and so on; other tensors as they are.
    """
    found: dict[str, Floats] = {}
    for name, array in tensors.items():
        blocks = array.shape[0] if array.ndim == 3 else 1
        given = directions.get(name, ())[:blocks]
        pairs = [pair for one in given if (pair := _narrow(one, kept)) is not None]
        if len(pairs) < blocks or sum(left.size + right.size for left, right in pairs) >= array.size:
            found[name] = array
            continue
        for block, (left, right) in enumerate(pairs):
            place = f":{block}" if array.ndim == 3 else ""
            found[f"{name}{place}{_LEFT}"], found[f"{name}{place}{_RIGHT}"] = left, right
    return found


def restored(tensors: Mapping[str, Floats], initial: Initial) -> dict[str, Floats]:
    """The inverse, of all of a file's tensors: those that :func:`narrowed` left alone stay as they are.

    Raises:
        DecodeError: narrow matrices do not go together, or stand for more than a side-network ever has.
    """
    whole = {name: array for name, array in tensors.items() if not name.endswith((_LEFT, _RIGHT))}
    pairs: dict[str, dict[str, Floats]] = defaultdict(dict)
    values = 0
    for name, left in tensors.items():
        if not name.endswith(_LEFT):
            continue
        right = tensors.get(name.removesuffix(_LEFT) + _RIGHT)
        if right is None or left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
            raise DecodeError("a matrix is written as two narrow ones that do not go together")
        if not left.size * right.size:
            raise DecodeError("a narrow matrix is empty")
        values += left.shape[1] * right.shape[1]
        if values > MOST_VALUES:
            raise DecodeError(f"narrow matrices stand for more than {MOST_VALUES} weights")
        base, _, place = name.removesuffix(_LEFT).partition(":")
        with np.errstate(over="ignore", invalid="ignore"):
            pairs[base][place] = left.T @ right
        if not np.isfinite(pairs[base][place]).all():
            raise DecodeError("narrow matrices give infinite weights")
    if 2 * sum(map(len, pairs.values())) + len(whole) != len(tensors) or pairs.keys() & whole.keys():
        raise DecodeError("a narrow matrix lacks its other half, or stands beside what it is to give")
    for name, blocks in pairs.items():
        change = _joined(blocks)
        whole[name] = initial(name, change.shape) + change
    return whole


def _blocks(changes: Floats) -> Iterator[Floats]:
    yield from changes if changes.ndim == 3 else [changes]


def _joined(blocks: Mapping[str, Floats]) -> Floats:
    if blocks.keys() == {""}:
        return blocks[""]
    shapes = {change.shape for change in blocks.values()}
    if set(blocks) != set(map(str, range(len(blocks)))) or len(shapes) > 1:
        raise DecodeError("a stack of matrices lacks one, or they differ in shape")
    return np.stack([blocks[str(block)] for block in range(len(blocks))])


def _directions(change: Floats) -> Directions:
    rows, columns = change.shape
    most = max(1, min(rows, columns) // _LEAST_GAIN)
    probes = np.random.default_rng(0).standard_normal((columns, most + _SPARE), np.float32)
    basis, _ = np.linalg.qr(change @ (change.T @ (change @ probes)))
    left, sizes, right = np.linalg.svd(basis.T @ change, full_matrices=False)
    square = float(np.square(change, dtype=np.float64).sum())
    lefts = np.ascontiguousarray((basis @ left[:, :most]).T)
    return Directions(lefts, sizes[:most], right[:most], square)


def _narrow(found: Directions, kept: float) -> tuple[Floats, Floats] | None:
    """[k, m] and [k, n], of as few directions as keep enough; None if too few were looked for."""
    share = np.cumsum(np.square(found.sizes, dtype=np.float64))
    rank = 1 + int(np.searchsorted(share, kept * found.square))
    if rank > len(share):
        return None
    roots = np.sqrt(found.sizes[:rank])[:, None]
    return roots * found.left[:rank], roots * found.right[:rank]
