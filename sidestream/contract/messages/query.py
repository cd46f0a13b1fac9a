"""What a device of a split job asks that has no room for the whole model, and what the trainer answers.

Legend: K texts, N vectors in all of them together, d the backbone's hidden size, C numbers in an answer.
"""

from __future__ import annotations

from typing import Annotated, Final

import msgspec
import numpy as np
import numpy.typing as npt

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages.fields import Count, ShortText, check_stream
from sidestream.contract.messages.split import SlotNumber
from sidestream.contract.tasks import Scale
from sidestream.contract.tensors import Tensor
from sidestream.contract.wire import Message, prepared

MARK_BYTES: Final = 16
MAX_ASKED: Final = 256
"""Texts of one query."""

Mark = Annotated[bytes, msgspec.Meta(min_length=MARK_BYTES, max_length=MARK_BYTES)]


@prepared
class Query(Message, frozen=True, kw_only=True):
    """Texts as they are after the device's layers. The texts do not travel, but can be read from that."""

    run: str
    """The journal whose adapters the device computes with."""
    mark: Mark
    """Drawn by lot; the answer has the same, so it is known for this query's."""
    place: SlotNumber
    """Where the device looks for the answer."""
    fingerprint: ShortText
    """Of the device's layers."""
    adapter: Count = 0
    """The weights version that they had."""
    lengths: Annotated[bytes, msgspec.Meta(min_length=2, max_length=2 * MAX_ASKED)]
    """u16[K]: vectors of each text; they add up to N."""
    states: Tensor
    """[N, d]: text by text."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        if len(self.states.shape) != 2:
            raise DecodeError(f"states of shape {self.states.shape} are not [vectors, d]")
        if len(self.lengths) % 2 or not self.text_lengths.all():
            raise DecodeError("lengths must be u16 each, and at least 1")
        if int(self.text_lengths.sum()) != self.states.shape[0]:
            raise DecodeError(f"lengths do not add up to {self.states.shape[0]} vectors")

    @property
    def text_lengths(self) -> npt.NDArray[np.int64]:
        """[K]."""
        return np.frombuffer(self.lengths, "<u2").astype(np.int64)


@prepared
class QueryReply(Message, frozen=True, kw_only=True):
    """The trainer's answer to one query. Not retained: who asked is there, or asks again."""

    run: str
    """The trainer's journal id."""
    mark: Mark
    """The query's."""
    version: Count = 0
    """Of the weights that answered."""
    numbers: Tensor | None = None
    """[K, C]: logits, or a number each; none where there is no answer."""
    scale: Scale = Scale()
    """What a regression's numbers are measured in."""
    refused: ShortText = ""
    """Why there is no answer."""
    key_id: ShortText = ""
    """Of the key that signed it (:mod:`sidestream.contract.signing`); empty where nothing is signed."""
    signature: bytes = b""
    """Over all that is before it, for one job and device."""

    def __post_init__(self) -> None:
        check_stream(self.run)
        if self.numbers is not None and len(self.numbers.shape) != 2:
            raise DecodeError(f"numbers of shape {self.numbers.shape} are not [texts, numbers]")
        if (self.numbers is None) != bool(self.refused):
            raise DecodeError("an answer has numbers, or a reason why it has none")
