"""Typed messages to bytes and back: msgpack maps, bounded, growing only.

Every message is a map with the schema version under ``v``. Unknown keys are skipped and missing ones take
their default where the message type has one, so a field may be added at the end of a type, never retyped.
Nothing is believed before it is checked: sizes first, then types, then what the message itself promises.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Final, TypeVar

import msgpack
import msgspec

from sidestream.contract.errors import DecodeError

WIRE_VERSION: Final = 1
MAX_MESSAGE_BYTES: Final = 2_000_000
"""No message is larger; Mosquitto 2.1 refuses packets over this size by default."""
TARGET_MESSAGE_BYTES: Final = 256 * 1024
"""What senders aim to stay under: AWS IoT and small brokers refuse more, and paho slows down."""
_REASON_CHARS: Final = 200
_QUOTED: Final = re.compile(r"'.*'", re.DOTALL)
"""From the first quotation mark to the last one: what is quoted may hold some itself."""


S = TypeVar("S", bound=msgspec.Struct)


def prepared(kind: type[S]) -> type[S]:
    """Have msgspec get a type ready to be decoded, now, while there is one thread; decorates every Struct.

    msgspec would do so at the first decode, and shows a half-made description to whoever decodes the type
    in another thread meanwhile: the process then dies (0.22.0). Encoding reads nothing of it. The types of
    the fields have to stand above the decorated type.
    """
    msgspec.msgpack.Decoder(kind)
    return kind


@prepared
class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all messages: immutable, keyword-only. A subclass checks itself in ``__post_init__``."""


@prepared
class _Envelope(msgspec.Struct):
    """What every message has, whatever its type."""

    v: Annotated[int, msgspec.Meta(ge=1)]


M = TypeVar("M", bound=Message)


def pack(message: Message) -> bytes:
    """Encode a message as one msgpack map with its schema version under ``v``."""
    packed: bytes = msgpack.packb(to_map(message), use_bin_type=True)
    return packed


def to_map(message: Message) -> dict[str, Any]:
    """A message as the map that travels, its schema version first."""
    return {"v": WIRE_VERSION, **msgspec.to_builtins(message, builtin_types=(bytes,))}


def unpack(kind: type[M], payload: bytes) -> M:
    """Decode ``payload`` as a message of type ``kind``.

    It is read straight into the type: what the type does not ask for is stepped over, never built. (Built
    first and converted then, 2 MB of empty lists take 130 MB.)

    Raises:
        DecodeError: whatever the bytes are, if they are not such a message. Memory stays within a small
            multiple of ``len(payload)``.
    """
    if len(payload) > MAX_MESSAGE_BYTES:
        raise DecodeError(f"{len(payload)} bytes; a message holds at most {MAX_MESSAGE_BYTES}")
    try:
        msgspec.msgpack.decode(payload, type=_Envelope)
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as exc:
        raise DecodeError(f"not a {kind.__name__}: {brief(exc)}") from exc


def brief(exc: Exception) -> str:
    """What an error says, in one short line that quotes nothing: a peer's bytes may stand in it."""
    text = _QUOTED.sub("'…'", str(exc))
    return "".join(char if char.isprintable() else "?" for char in text[:_REASON_CHARS])
