"""How the benchmarks' plots look."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def drawing(path: Path, panels: int = 1) -> Iterator[list[Any]]:
    """Axes above each other, over one x axis; saved as a PNG at the end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        panels, 1, sharex=True, squeeze=False, figsize=(8, 6), constrained_layout=True
    )
    for axis in axes[:, 0]:
        axis.grid(alpha=0.3)
    try:
        yield list(axes[:, 0])
        figure.savefig(path, dpi=110)
    finally:
        pyplot.close(figure)
