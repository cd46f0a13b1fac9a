"""Backbones that onnxruntime computes: read from an exported folder, cut to the plan's layers, tapped.

Nothing is tried here as :mod:`sidestream.backbone.torch_runtime.trial` tries a model: whoever exported the
folder has, and its files are whole or refused. Its precision is the export's, whatever the plan's tier says:
the fingerprint is the original weights', so a fleet may mix both, as it may mix precisions of torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from sidestream.accelerator.providers import Provider, ask_for, what_came
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.images.image_input import ImageInput, Pixels
from sidestream.backbone.onnx_runtime.folder import (
    INPUTS,
    PIXELS,
    TOKENIZER,
    ExportedBackbone,
    check,
    graph_of,
    output_of,
    read,
)
from sidestream.backbone.onnx_runtime.tokenizer import ExportedTokenizer
from sidestream.backbone.preprocessor import Prepared, Preprocessor
from sidestream.backbone.text_input import TextInput
from sidestream.contract.errors import BackboneError
from sidestream.contract.plan import Precision
from sidestream.contract.tensors import Floats

log = logging.getLogger(__name__)


class OnnxBackbone(Backbone):
    """An exported model.

    Args:
        folder: Where it lies.
        layers: Use only the first so many layers; 0 for all that were exported.
        threads: Processor threads that its passes take; 0 leaves it to onnxruntime.
        device: Where they are computed: auto, cpu, cuda or cuda:N.

    Raises:
        BackboneError: a file is missing or damaged, or there are fewer layers.
    """

    def __init__(self, folder: Path, *, layers: int = 0, threads: int = 0, device: str = "cpu") -> None:
        about, name = read(folder), str(folder)
        exported = len(about.fingerprints)
        if layers > exported:
            raise BackboneError(
                f"{name}: has {exported} layers of {about.model}, {layers} are asked for; "
                f"export it with --layers {layers}"
            )
        self.depth = layers or exported
        check(folder, about, self.depth)
        super().__init__(name, _preprocessor(folder, about))
        self.width = about.width
        self.is_decoder = about.is_decoder
        self._fingerprints = about.fingerprints
        self.fingerprint = self.fingerprint_of_first(self.depth)
        self.precision = about.precision
        """Of its weights."""
        self._has_segments = about.segments > 0
        asked = ask_for(device, onnxruntime.get_available_providers())
        self._session = _session(folder / graph_of(self.depth), threads, asked)
        self.chosen = what_came(device, asked, self._session.get_providers())
        """Where it is computed."""

    @classmethod
    def load(
        cls, folder: Path, layers: int, precision: Precision, threads: int, device: str = "cpu"
    ) -> OnnxBackbone:
        """As the constructor; says in the log what was found.

        Args:
            folder: As there.
            layers: As there.
            precision: What the plan's tier says; another one is used all the same.
            threads: As there.
            device: As there.

        Raises:
            BackboneError: as there.
        """
        started = time.perf_counter()
        found = cls(folder, layers=layers, threads=threads, device=device)
        log.info(
            "backbone %s: %d layers of width %d in %s, fingerprint %s…, loaded in %.1f s",
            *(found.name, found.depth, found.width, found.precision, found.fingerprint[:8]),
            time.perf_counter() - started,
        )
        log.info("backbone %s: computed on %s", found.name, found.chosen)
        if found.precision != precision:
            log.info("%s: is in %s, the plan's tier in %s", found.name, found.precision, precision)
        return found

    def fingerprint_of_first(self, layers: int) -> str:
        return self._fingerprints[layers - 1]

    def _run(self, tokens: Prepared, taps: Sequence[int], take: Callable[[Floats], None]) -> None:
        for tap in self._session.run([output_of(tap) for tap in taps], self._feeds(tokens)):
            take(tap)

    def _feeds(self, tokens: Prepared) -> dict[str, Any]:
        if isinstance(tokens, Pixels):
            return {PIXELS: tokens.values}
        given = [tokens.ids, tokens.mask.astype(np.int64)]
        if self._has_segments:
            given.append(np.zeros_like(tokens.ids) if tokens.segments is None else tokens.segments)
        return dict(zip(INPUTS, given, strict=False))


def _preprocessor(folder: Path, about: ExportedBackbone) -> Preprocessor:
    name = str(folder)
    if about.scaling is not None:
        return ImageInput(about.scaling, name, tokens=about.longest)
    assert about.tokenizer is not None
    tokenizer = ExportedTokenizer(folder / TOKENIZER, about.tokenizer)
    return TextInput(tokenizer, name, rows=about.rows, longest=about.longest, segments=about.segments)


def _session(graph: Path, threads: int, asked: Sequence[Provider]) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # errors
    options.enable_mem_pattern = False  # batches differ in shape: plans of memory for each would only be kept
    # Threads that wait for the next pass by spinning would take a small board's processor for nothing.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=list(asked))
    except Exception as exc:  # onnxruntime's errors have no root of their own
        first = next(iter(str(exc).strip().splitlines()), type(exc).__name__)[:300]
        raise BackboneError(f"{graph.parent}: onnxruntime cannot load {graph.name}: {first}") from exc
