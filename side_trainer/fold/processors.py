"""How many processors the fold's arithmetic takes: by how many there are, a product's last bits change."""

from __future__ import annotations

import torch
from threadpoolctl import threadpool_limits


def set_threads(threads: int) -> None:
    """Have torch take so many, and NumPy's products one, on any machine: weights hang on both.

    NumPy's are too small to gain by more, and the threads of several processes wait for each other in loops.

    Args:
        threads: Of the trainer's settings.
    """
    torch.set_num_threads(threads)
    threadpool_limits(1, user_api="blas")
