"""Adapters as bytes: what devices of a split job get, in a safetensors file that says what it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import msgspec

from sidestream.contract.errors import DecodeError
from sidestream.contract.lora import LoraSpec
from sidestream.contract.messages import MAX_LABELS, Count, ShortText, check_labels, check_stream
from sidestream.contract.tasks import Scale, Task
from sidestream.contract.tensors import Floats
from sidestream.contract.wire import Message, prepared
from sidestream.side_network.bundle import WeightsCodec, decode_weights, encode_bundle


@prepared
class AboutAdapters(Message, frozen=True, kw_only=True):
    """What the adapters are; kept as JSON in the file's metadata."""

    job: str
    """The job's name."""
    run: str
    """The trainer's journal id."""
    version: Count
    """Journal records folded in."""
    task: Task
    """What was learnt."""
    labels: Annotated[tuple[str, ...], msgspec.Meta(max_length=MAX_LABELS)]
    """Label names in index order; none where the task has none."""
    lora: LoraSpec
    """Their form."""
    tier: ShortText
    """Whose they are."""
    cut: Annotated[int, msgspec.Meta(ge=1, le=4096)]
    """Layers that the tier's devices hold."""
    whole: bool = False
    """Whether all is here that answers take: the adapters of every layer that has any, and the head."""
    round: Count = 0
    """Rounds of averaging that are in them, in the local form."""
    scale: Scale = Scale()
    """What answers are measured in, where the task is regression."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        check_labels(self.labels)


class AdapterBundle(NamedTuple):
    """Adapters with their description."""

    about: AboutAdapters
    """What they are."""
    tensors: dict[str, Floats]
    """By wire name, float32."""


def encode_adapters(
    about: AboutAdapters, tensors: Mapping[str, Floats], *, codec: WeightsCodec = "f32"
) -> bytes:
    """Write adapters. Equal input gives equal bytes."""
    return encode_bundle(about, tensors, codec=codec)


def decode_adapters(data: bytes) -> AdapterBundle:
    """Read adapters.

    Raises:
        DecodeError: whatever the bytes are, if they are none or hold NaN or infinite values.
    """
    about, tensors = decode_weights(data, AboutAdapters)
    if not tensors:
        raise DecodeError("the bundle holds no adapters")
    return AdapterBundle(about, tensors)
