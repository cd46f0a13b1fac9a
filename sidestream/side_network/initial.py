"""What a side-network's matrices are before anything is learnt: a function of the seed and their names.

Computed without torch, from a counter-based generator's raw bits (Philox, Salmon et al. 2011), so that every
machine gets the same values and weights can travel as what has changed since. In their distribution they are
PyTorch's own: uniform, as wide as the number of values that an output sums over asks for.
"""

from __future__ import annotations

import hashlib

import numpy as np

from sidestream.contract.tensors import Floats


def initial(seed: int, name: str, shape: tuple[int, ...]) -> Floats:
    """A matrix, float32.

    Args:
        seed: The learner's.
        name: Of the parameter, as in :func:`sidestream.side_network.form.shapes_of`.
        shape: [B, d, r] of alignment maps, [out, in] of others. The first blocks of more are the same.

    Returns:
        Zeros for what starts at zero: all but alignment maps and the way into an adapter.
    """
    if name.startswith("aligns.") and len(shape) == 3:
        blocks, width, _ = shape
        bound = (3 / width) ** 0.5
        return np.stack([_uniform(f"{seed} {name} {block}", shape[1:], bound) for block in range(blocks)])
    if name.startswith("adapters.") and name.endswith(".down.weight") and len(shape) == 2:
        return _uniform(f"{seed} {name}", shape, shape[1] ** -0.5)
    return np.zeros(shape, np.float32)


def _uniform(salt: str, shape: tuple[int, ...], bound: float) -> Floats:
    """Between -bound and bound, in steps of 2⁻²³ of it."""
    key = int.from_bytes(hashlib.sha256(salt.encode()).digest()[:16], "little")
    drawn = np.random.Philox(key=key).random_raw(int(np.prod(shape))) >> np.uint64(40)
    values: Floats = (drawn.astype(np.float32) * np.float32(2**-23) - np.float32(1)) * np.float32(bound)
    return values.reshape(shape)
