"""A model on the disk, or on the hub, as transformers reads it.

Nothing outside this room imports transformers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.utils import logging as transformers_logging

from sidestream.contract.errors import BackboneError
from sidestream.host.model_folder import locate


def read_model(reference: str, kind: Any) -> tuple[Any, Any]:
    """A saved model as one of transformers' auto classes makes it, and its tokenizer.

    Raises:
        BackboneError: it cannot be found or loaded; the message says what to do.
    """
    return _read(reference, kind, AutoTokenizer)


def read_vision_model(reference: str, kind: Any) -> tuple[Any, Any]:
    """The same, and its image processor.

    Raises:
        BackboneError: as there.
    """
    return _read(reference, kind, AutoImageProcessor)


def _read(reference: str, kind: Any, preprocessor: Any) -> tuple[Any, Any]:
    place = locate(reference)
    with _quiet():
        try:
            model, report = kind.from_pretrained(place, output_loading_info=True, trust_remote_code=False)
            read = preprocessor.from_pretrained(place, trust_remote_code=False)
        except Exception as exc:  # transformers raises whatever its parts raise
            raise BackboneError(
                _misfit(reference, place, preprocessor) or _not_loaded(reference, place, exc)
            ) from exc
    if getattr(model, "pooler", None) is not None:
        model.pooler = _NoPooler()  # its answer is never asked for, and made up where a checkpoint has none
    missing = sorted(set(report["missing_keys"]) & {name for name, _ in model.named_parameters()})
    if missing:
        raise BackboneError(f"{reference}: the checkpoint lacks {len(missing)} weights, such as {missing[0]}")
    return model, read


class _NoPooler(nn.Module):
    """Stands where a model calls its pooler."""

    def forward(self, states: Any, *given: Any, **named: Any) -> Any:
        return states


def _misfit(reference: str, place: str, preprocessor: Any) -> str:
    """That a model is for samples of the other kind, as far as its files tell; else nothing."""
    sees = (Path(place) / "preprocessor_config.json").is_file()
    reads = (Path(place) / "tokenizer_config.json").is_file()
    if preprocessor is AutoTokenizer and sees and not reads:
        return f"{reference}: takes images, and the job's samples are texts; use a text model"
    if preprocessor is AutoImageProcessor and reads and not sees:
        return f"{reference}: takes texts, and the job's samples are images; use a vision transformer"
    return ""


def _not_loaded(reference: str, place: str, error: Exception) -> str:
    first_line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    if "trust_remote_code" in str(error):
        return (
            f"{reference}: comes with code of its own, which is never run here; "
            "use a model whose class transformers has"
        )
    if Path(place).is_dir():
        return f"{reference}: cannot be loaded: {type(error).__name__}: {first_line}"
    offline = " (HF_HUB_OFFLINE is set, so nothing is downloaded)" if os.environ.get("HF_HUB_OFFLINE") else ""
    return (
        f"{reference}: no such folder here, and it cannot be had from the Hugging Face hub{offline}: "
        f"{first_line}. Download it where there is a network and point --backbone at the folder"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading reports out of our log."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
