"""onnxruntime, as :mod:`sidestream.backbone.runtimes` knows it."""

from __future__ import annotations

import onnxruntime

from sidestream.accelerator.providers import ask_for
from sidestream.backbone.onnx_runtime.backbone import OnnxBackbone
from sidestream.backbone.onnx_runtime.folder import INDEX, place_of, read
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import TASKS, Task


class OnnxRuntime:
    """Runs what ``sidestream backbone export`` wrote."""

    def __init__(self) -> None:
        self._threads = 0
        self._device = "cpu"

    def load(self, reference: str, layers: int, precision: Precision, task: Task) -> OnnxBackbone:
        """See :func:`sidestream.backbone.runtimes.load_backbone`."""
        if TASKS[task].generates:
            raise BackboneError(
                f"{reference}: a language model takes torch; set runtime to auto and name the model itself"
            )
        folder = place_of(reference)
        if folder is None:
            raise BackboneError(
                f"{reference}: is no exported backbone (there is no {INDEX} in it); "
                f"write one where torch is with: sidestream backbone export"
            )
        found, wanted = read(folder).modality, TASKS[task].modality
        if found is not wanted:
            raise BackboneError(
                f"{reference}: takes {found.value}s, and the job's samples are {wanted.value}s"
            )
        return OnnxBackbone.load(folder, layers, precision, self._threads, self._device)

    def set_device(self, wanted: str) -> None:
        """For what is loaded from now on."""
        ask_for(wanted, onnxruntime.get_available_providers())
        self._device = wanted

    def set_threads(self, count: int) -> None:
        """For what is loaded from now on."""
        self._threads = count
