"""An exported backbone as it lies in a folder: graphs, weights, tokenizer, and their description. No more.

onnxruntime computes the whole of a graph, whatever is asked of it, and cannot cut one; so there is a graph
for each number of layers, and all of them read their weights from one file.
``sidestream backbone export`` writes it where torch is (:mod:`sidestream.backbone.torch_runtime.export`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from sidestream.backbone.images.scaling import Scaling
from sidestream.contract.errors import BackboneError
from sidestream.contract.tasks import Modality
from sidestream.contract.wire import prepared

INDEX: Final = "backbone.json"
WEIGHTS: Final = "weights.bin"
TOKENIZER: Final = "tokenizer.json"
PIXELS: Final = "pixel_values"
"""Of a graph that takes images, f32 [K, 3, H, W]: its only input."""
INPUTS: Final = ("input_ids", "attention_mask", "token_type_ids")
"""Of one that takes texts, int64 [K, T]; the last one only where the model tells texts apart."""
_REMEDY: Final = "export it again: sidestream backbone export"
_CHUNK_BYTES: Final = 2**20
ExportPrecision = Literal["f32", "int8"]
Positive = Annotated[int, msgspec.Meta(ge=1)]


@prepared
class TokenizerFacts(msgspec.Struct, frozen=True, kw_only=True):
    """What ``tokenizer.json`` does not say."""

    pad: int | None
    """The token that fills rows up."""
    unknown: int | None
    """What words become that it does not know."""
    special: tuple[int, ...]
    """All that are no part of a text."""
    cut: Literal["left", "right"]
    """Where long texts are cut."""


@prepared
class ExportedBackbone(msgspec.Struct, frozen=True, kw_only=True):
    """``backbone.json``."""

    format: Literal[1] = 1
    """Of the folder."""
    model: str
    """What was exported, as it was named; only for people."""
    precision: ExportPrecision
    """Of the graph's weights."""
    fingerprints: tuple[str, ...]
    """Those of the original model cut to its first 1, 2, … layers, whatever the precision here."""
    width: Positive
    """d."""
    is_decoder: bool
    """As :attr:`sidestream.backbone.backbone.Backbone.is_decoder`."""
    longest: Positive
    """Tokens that it can see at once; of images, vectors that it makes of one."""
    rows: Annotated[int, msgspec.Meta(ge=0)]
    """Tokens that it has an embedding for; 0 if that is not known."""
    segments: Annotated[int, msgspec.Meta(ge=0)]
    """Texts that it tells apart by segment ids; 0 if it takes none."""
    tokenizer: TokenizerFacts | None = None
    """Of one that takes texts."""
    scaling: Scaling | None = None
    """Of one that takes images: what is done with each."""
    digests: Mapping[str, str]
    """blake2b of every other file, by name."""
    versions: Mapping[str, str]
    """Of the packages that made it; only for people."""

    def __post_init__(self) -> None:
        if not self.fingerprints:
            raise ValueError("no layers")
        if (self.tokenizer is None) == (self.scaling is None):
            raise ValueError("it takes either texts or images")

    @property
    def modality(self) -> Modality:
        """What it takes."""
        return Modality.TEXT if self.scaling is None else Modality.IMAGE


def graph_of(layers: int) -> str:
    """The file with the graph of the first so many layers."""
    return f"first_{layers}.onnx"


def output_of(layer: int) -> str:
    """The name of a layer's states in a graph, f32 [K, T, d]; 1 is the first."""
    return f"layer_{layer}"


def place_of(reference: str) -> Path | None:
    """The exported folder that a reference means; None if it means something else."""
    folder = Path(reference).expanduser()
    return folder if reference and (folder / INDEX).is_file() else None


def read(folder: Path) -> ExportedBackbone:
    """What a folder says of itself.

    Raises:
        BackboneError: it does not say it.
    """
    try:
        return msgspec.json.decode((folder / INDEX).read_bytes(), type=ExportedBackbone)
    except OSError as exc:
        raise BackboneError(f"{folder}: {INDEX} cannot be read: {exc.strerror}; {_REMEDY}") from exc
    except msgspec.MsgspecError as exc:
        raise BackboneError(f"{folder}: {INDEX} is damaged: {exc}; {_REMEDY}") from exc


def check(folder: Path, about: ExportedBackbone, layers: int) -> None:
    """See that the files that the first so many layers take are whole.

    Raises:
        BackboneError: one is missing or damaged.
    """
    for name in (*([TOKENIZER] if about.tokenizer else []), graph_of(layers), WEIGHTS):
        try:
            found = digest(folder / name)
        except OSError as exc:
            raise BackboneError(f"{folder}: {name} cannot be read: {exc.strerror}; {_REMEDY}") from exc
        if about.digests.get(name) != found:
            raise BackboneError(f"{folder}: {name} is damaged; {_REMEDY}")


def write(folder: Path, about: ExportedBackbone) -> None:
    """Write ``backbone.json`` beside the other files."""
    (folder / INDEX).write_bytes(msgspec.json.format(msgspec.json.encode(about)) + b"\n")


def digest(path: Path) -> str:
    """blake2b of a file, which is never in memory whole."""
    found = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
    return found.hexdigest()
