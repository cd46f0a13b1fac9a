"""The output heads of the backbones that a language-model job goes by: all that a trainer needs of them.

A head is read from the backbone's safetensors file, tensor by tensor, by name; the model is never built. A
copy stays in the state directory under the head's fingerprint: what the journal was folded with can be had
again on any machine that has the directory.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from sidestream.contract.errors import BackboneError, DecodeError, StateError
from sidestream.host.model_folder import locate_here
from sidestream.host.state_dir import write_atomically
from sidestream.side_network.output_head import HeadSpec, OutputHead, find_head

FOLDER: Final = "heads"
_SINGLE: Final = "model.safetensors"
_INDEX: Final = "model.safetensors.index.json"
_KEY: Final = "sidestream"
_log = logging.getLogger(__name__)


class HeadFacts(NamedTuple):
    """What a plan says of a head."""

    fingerprint: str
    vocabulary: int
    width: int


class Heads:
    """Heads by fingerprint, each in memory once.

    Args:
        state_dir: Where copies are kept.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / FOLDER
        self._loaded: dict[str, OutputHead] = {}

    @property
    def nbytes(self) -> int:
        """Memory that the heads take."""
        return sum(head.nbytes for head in self._loaded.values())

    def take(self, reference: str) -> HeadFacts:
        """Read a backbone's head, and keep a copy.

        Args:
            reference: ``package:NAME``, a folder, or the name of a model in the hub's cache.

        Raises:
            BackboneError: there is no such model here, or its head is of no kind that is known.
            StateError: the copy cannot be written.
        """
        head = read_head(reference)
        fingerprint = head.fingerprint()
        path = self._path(fingerprint)
        if not path.exists():
            about = {_KEY: msgspec.json.encode(head.spec).decode()}
            tensors = {name: one.detach().contiguous() for name, one in head.named_parameters()}
            try:
                self._folder.mkdir(mode=0o700, exist_ok=True)
                write_atomically(path, save(tensors, metadata=about))
            except OSError as exc:
                raise StateError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
        self._loaded.setdefault(fingerprint, head)
        _log.info(
            "output head of %s: %d tokens, width %d, %s…; %.1f MiB in memory",
            *(reference, head.vocabulary, head.width, fingerprint[:8], head.nbytes / 2**20),
        )
        return HeadFacts(fingerprint, head.vocabulary, head.width)

    def get(self, fingerprint: str) -> OutputHead:
        """The head with this fingerprint, from memory or from its copy.

        Raises:
            StateError: there is none, or it is damaged.
        """
        if fingerprint not in self._loaded:
            self._loaded[fingerprint] = self._read(fingerprint)
        return self._loaded[fingerprint]

    def _read(self, fingerprint: str) -> OutputHead:
        path = self._path(fingerprint)
        try:
            with safe_open(path, framework="pt") as file:
                spec = msgspec.json.decode(file.metadata()[_KEY], type=HeadSpec)
                head = OutputHead(spec, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (OSError, SafetensorError, msgspec.MsgspecError, DecodeError, KeyError, TypeError) as exc:
            raise StateError(f"{path}: the copy of the backbone's output head cannot be read: {exc}") from exc
        if head.fingerprint() != fingerprint:
            raise StateError(f"{path}: the copy of the backbone's output head is damaged; restore it")
        return head

    def _path(self, fingerprint: str) -> Path:
        return self._folder / f"{fingerprint}.safetensors"


def read_head(reference: str) -> OutputHead:
    """Read a saved model's output head, and nothing else of it.

    Raises:
        BackboneError: there is no such model here, or no such head in it.
    """
    folder = locate_here(reference)
    try:
        config = _text_config(json.loads((folder / "config.json").read_text("utf-8")))
        files = _files(folder)
        spec, names = find_head(config, files)
        tensors: dict[str, torch.Tensor] = {}
        for part, name in names.items():
            with safe_open(files[name], framework="pt") as file:
                tensors[part] = file.get_tensor(name).float()
        return OutputHead(spec, tensors)
    except (OSError, ValueError, KeyError, SafetensorError) as exc:
        raise BackboneError(f"{reference}: its output head cannot be read: {exc}") from exc
    except DecodeError as exc:
        raise BackboneError(f"{reference}: {exc}; a language model needs a decoder with one") from exc


def _text_config(config: Any) -> Mapping[str, Any]:
    """What a ``config.json`` says of the text model."""
    if not isinstance(config, dict):
        raise ValueError("config.json is no object")
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _files(folder: Path) -> dict[str, Path]:
    """Where each tensor is, by name."""
    if (folder / _INDEX).is_file():
        shards = json.loads((folder / _INDEX).read_text("utf-8"))["weight_map"]
        return {str(name): folder / Path(shard).name for name, shard in shards.items()}
    if not (folder / _SINGLE).is_file():
        raise OSError(f"no {_SINGLE} in {folder}; save the model as safetensors, or set head = FOLDER")
    with safe_open(folder / _SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), folder / _SINGLE)
