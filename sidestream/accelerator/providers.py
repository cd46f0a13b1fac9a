"""onnxruntime's execution providers: which ones to ask for, and what came of it. Knows no onnxruntime.

CUDA goes before TensorRT: that builds an engine for every shape of batch it meets, which takes minutes on a
board, and texts differ in length from batch to batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from sidestream.accelerator.choice import AUTO, Chosen, index_of, without_cuda
from sidestream.contract.errors import ConfigError

CPU: Final = "CPUExecutionProvider"
GPU_PROVIDERS: Final = ("CUDAExecutionProvider", "TensorrtExecutionProvider")
Provider = tuple[str, dict[str, Any]]


def ask_for(wanted: str, available: Sequence[str], field: str = "compute_device") -> list[Provider]:
    """The providers to ask for, the preferred first; the processor's is always the last.

    Args:
        wanted: auto, cpu, cuda or cuda:N.
        available: Those that onnxruntime was built with.
        field: The setting, for messages.

    Raises:
        ConfigError: a GPU is asked for by name, and onnxruntime was built without.
    """
    found = next((name for name in GPU_PROVIDERS if name in available), None)
    if wanted == "cpu" or (found is None and wanted == AUTO):
        return [(CPU, {})]
    if found is None:
        raise ConfigError(field, f"{wanted}: {without_cuda('onnxruntime')}; use auto or cpu (docs/boards.md)")
    return [(found, {"device_id": index_of(wanted)}), (CPU, {})]


def what_came(wanted: str, asked: Sequence[Provider], given: Sequence[str]) -> Chosen:
    """Where a session computes: onnxruntime leaves a provider out whose libraries it cannot load."""
    first = asked[0][0]
    if first == CPU:
        return Chosen("cpu", "it is set" if wanted == "cpu" else without_cuda("onnxruntime"))
    if first in given:
        return Chosen(f"cuda:{asked[0][1]['device_id']}", first)
    return Chosen("cpu", f"onnxruntime has {first}, but cannot load it: see that CUDA's libraries are there")
