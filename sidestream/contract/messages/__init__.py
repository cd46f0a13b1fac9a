"""The messages between agents and trainer, other than the plan, by who speaks.

Each type checks what it promises when it is made, on either end. Arrays of numbers travel as ``bin``,
little-endian, and are read with the properties beside them.
"""

from sidestream.contract.messages.activations import (
    ActivationBatch,
    awaited_ticket,
    content_digest,
    with_floor,
)
from sidestream.contract.messages.device import COUNTERS, Status, Telemetry
from sidestream.contract.messages.fields import (
    MAX_LABEL_CHARS,
    MAX_LABELS,
    MAX_ROWS,
    MAX_STREAMS,
    Count,
    ShortText,
    check_labels,
    check_stream,
    to_bin,
)
from sidestream.contract.messages.query import MARK_BYTES, MAX_ASKED, Query, QueryReply
from sidestream.contract.messages.split import (
    MAX_SLOTS,
    NO_BASE,
    AdapterGradient,
    AdapterMessage,
    AdapterUpload,
    GradientReply,
    Reuse,
    SplitPart,
    context_of,
    derived_key,
    is_adapter_message,
    ticket_of,
    unpack_adapter,
)
from sidestream.contract.messages.trainer import (
    HIGHEST_FENCE,
    Flow,
    Receipt,
    Rejection,
    TrainerClaim,
    TrainerStatus,
    WeightsChunk,
    WeightsManifest,
)

__all__ = [
    "COUNTERS", "HIGHEST_FENCE", "MARK_BYTES", "MAX_ASKED", "MAX_LABELS", "MAX_LABEL_CHARS",
    "MAX_ROWS", "MAX_SLOTS", "MAX_STREAMS", "NO_BASE", "ActivationBatch", "AdapterGradient", "AdapterMessage",
    "AdapterUpload", "Count", "Flow", "GradientReply", "Query", "QueryReply", "Receipt", "Rejection",
    "Reuse", "ShortText", "SplitPart", "Status", "Telemetry", "TrainerClaim", "TrainerStatus",
    "WeightsChunk", "WeightsManifest", "awaited_ticket", "check_labels", "check_stream",
    "content_digest", "context_of", "derived_key", "is_adapter_message", "ticket_of", "to_bin",
    "unpack_adapter", "with_floor",
]  # fmt: skip
