"""One message of every kind, and the file of golden vectors.

``python -m tests.contract.examples`` appends a vector for each example that has none. Vectors are never
changed. When a type gains a field, its old vectors stay, marked ``"decode_only": true``: old bytes must be
readable for ever, but are no longer what the encoder writes.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from sidestream.contract.codebooks import ENTRIES, GROUP, Codebook, Codebooks, keep
from sidestream.contract.lora import LoraSpec
from sidestream.contract.messages import (
    ActivationBatch,
    AdapterGradient,
    AdapterUpload,
    Assignment,
    CodebooksChunk,
    Flow,
    GradientReply,
    Query,
    QueryReply,
    Receipt,
    Rejection,
    Reuse,
    SplitPart,
    StateChange,
    Status,
    Telemetry,
    TrainerClaim,
    TrainerStatus,
    WeightsChunk,
    WeightsManifest,
    to_bin,
)
from sidestream.contract.plan import (
    FlowPlan,
    Plan,
    RoundPlan,
    SideNetworkSpec,
    SplitFrozen,
    SplitLora,
    TierPlan,
)
from sidestream.contract.quality import Tally
from sidestream.contract.sampling import Assignable, Rung
from sidestream.contract.signing import Scope, Signer
from sidestream.contract.tasks import Scale, TargetForm, write_tokens
from sidestream.contract.tensors import Codec, Floats, Tensor, decode, encode
from sidestream.contract.wire import Message, pack
from sidestream.side_network.bundle import About, WeightsCodec, decode_bundle, encode_bundle

GOLDEN: Final = Path(__file__).parent / "golden"
STREAM: Final = "0123456789abcdef" * 2


SCALAR: Final = [codec for codec in Codec if not codec.stages]
"""Codecs that take no codebooks."""


def codebooks(taps: int = 2, width: int = 16, stages: int = 2) -> Codebooks:
    """Fixed ones, ready for use: rotations that swap values, and centroids on a grid."""
    places = np.arange(taps * stages * width * ENTRIES).reshape(taps, stages, width // GROUP, ENTRIES, GROUP)
    centroids = ((places * 7919) % 4093 - 2046).astype(np.float16) / np.float16(512)
    turns = [np.roll(np.eye(width, dtype=np.float16), 3 + tap, axis=1) for tap in range(taps)]
    books = (Codebook(centroids=centroids[tap], rotation=turns[tap]) for tap in range(taps))
    return keep(Codebooks(tuple(books)))


def values(shape: tuple[int, ...]) -> Floats:
    """A fixed array with both signs, zeros, and magnitudes from 1e-3 to 1e3; the same on every machine."""
    count = int(np.prod(shape))
    powers = np.array([1e-3, 1.0, 0.0, 1e3, 0.25], np.float32)
    ramp = np.array([((i * 37) % 101 - 50) / 50 for i in range(count)], np.float32)
    scaled: Floats = (ramp * powers[np.arange(count) % 5]).reshape(shape)
    return scaled


def batch(codec: Codec = Codec.INT4, **changes: Any) -> ActivationBatch:
    """Three samples of 2, 1 and 3 vectors, two taps, d = 5."""
    fields: dict[str, Any] = {
        "stream": STREAM,
        "sequence": 7,
        "floor": 5,
        "fingerprint": "f" * 16,
        "labels_id": "1" * 16,
        "taps": (2, 4),
        "sampling": "segments:3",
        "samples": to_bin([40, 41, 43], "<u4"),
        "lengths": to_bin([2, 1, 3], "<u2"),
        "targets": to_bin([0, 2, 1], "<u2"),
        "activations": encode(values((2, 6, 5)), codec),
        "previous": "c" * 32,
        "keys": bytes(range(24)),
        **changes,
    }
    return ActivationBatch(**fields)


def part(**changes: Any) -> SplitPart:
    """Of a batch of three rows, in its second pass."""
    fields: dict[str, Any] = {
        "ticket": b"ticket 1",
        "slot": 1,
        "adapter": 40,
        "pass_number": 1,
        "progress": 0.75,
        "rows": 3,
        **changes,
    }
    return SplitPart(**fields)


SENT: Final[dict[str, Any]] = {
    "stream": STREAM,
    "sequence": 8,
    "floor": 5,
    "previous": "c" * 32,
    "ticket": b"ticket 1",
}


def plan(**changes: Any) -> Plan:
    """Two tiers, one of them settled."""
    fields: dict[str, Any] = {
        "job": "assist",
        "run": STREAM,
        "revision": 3,
        "task": "text-classification",
        "labels": ("on", "off", "größer"),
        "tiers": {
            "full": TierPlan(backbone="package:m", depth=6, width=384, taps=(1, 3, 6), fingerprint="ab"),
            "half": TierPlan(
                backbone="package:m",
                layers=3,
                codec=Codec.INT8,
                sampling="all",
                ladder=(
                    Rung(sampling="all", codec=Codec.INT4),
                    Rung(sampling="random:4", codec=Codec.NF4),
                    Rung(sampling="important:2", codec=Codec.INT2),
                ),
                precision="int8",
            ),
        },
        "side_network": SideNetworkSpec(blocks=3, width=64, inner=128),
        "flow": FlowPlan(window=4, retry_s=2.5),
        **changes,
    }
    return Plan(**fields)


EXAMPLES: Final[dict[str, Message]] = {
    **{f"keyed batch of labels in {codec.value}": batch(codec) for codec in SCALAR},
    **{
        f"keyed batch of labels in {codec.value}": batch(
            activations=encode(values((2, 6, 16)), codec, codebooks().id)
        )
        for codec in (Codec.PQ1, Codec.PQ2)
    },
    "codebooks, a part": CodebooksChunk(id="0f" * 16, index=1, chunks=3, data=b"deflated"),
    "plan of a language model, unsigned": plan(
        task="causal-lm",
        labels=(),
        tiers={
            "pi": TierPlan(
                backbone="m", depth=6, width=64, taps=(1, 6), fingerprint="ab", head="cd", vocabulary=70_000
            )
        },
    ),
    "keyed batch of tokens": batch(target_form="tokens", targets=write_tokens(np.arange(6) * 11_000, 60_000)),
    "keyed batch of tokens of a large vocabulary": batch(
        target_form="tokens", targets=write_tokens(np.arange(6) * 40_000, 256_000)
    ),
    "plan, unsigned": plan(fence=8),
    "keyed batch of label sets": batch(targets=bytes([0b101, 0, 0b10]), target_form=TargetForm.LABEL_SETS),
    "keyed batch of values": batch(targets=struct.pack("<3f", 1.5, -2.0, 0.0), target_form=TargetForm.VALUES),
    "keyed batch of token labels": batch(
        sampling="all", targets=to_bin([0, 1, 2, 2, 1, 0], "<u2"), target_form=TargetForm.TOKEN_LABELS
    ),
    "receipt of a fork": Receipt(
        stream=STREAM,
        upto=12,
        fence=8,
        digest="d" * 32,
        forked_sequence=13,
        forked_digest="e" * 32,
        saved=4,
    ),
    "status online, with a certificate": Status(
        state="online",
        birth=3,
        stream=STREAM,
        software="0.1.0",
        depth=6,
        width=384,
        labels=("on", "off"),
        instance="a1",
        kept_streams=(STREAM[::-1],),
        certificate_expires_unix_s=1.75e9,
    ),
    "status offline, no certificate": Status(
        state="offline", birth=3, stream=STREAM, reason="lost", instance="a1"
    ),
    "telemetry with troubles": Telemetry(
        stream=STREAM,
        samples_read=100,
        bytes_up=2**40,
        forward_seconds=1.25,
        accuracy=0.5,
        finished=True,
        weights_bytes_down=2**31,
        final_only=True,
        outbox_max_bytes=2**28,
        messages_dropped=3,
        weights_refused=2,
        tally=Tally(
            units=20,
            correct=10,
            right=to_bin([6, 4], "<u4"),
            answered=to_bin([12, 8], "<u4"),
            actual=to_bin([10, 10], "<u4"),
            confused=to_bin([0, 1], "<u2") + to_bin([4], "<u4"),
        ),
        samples_unlabelled=40,
        unlabelled_waiting=30,
        unlabelled_dropped=4,
        weights_run=STREAM,
        streams_forked=1,
        samples_lost=6,
        samples_broken=5,
        skipped_empty=1,
        skipped_unlabelled=2,
        skipped_label=3,
        skipped_activations=4,
        unix_s=1.7e9,
        receipt_s=0.25,
        reconnects=2,
        trouble="the plan is not signed",
    ),
    "telemetry with a probe": Telemetry(
        stream=STREAM, accuracy=0.75, evaluation_samples=20, probe_accuracy=0.5
    ),
    "split batch": batch(
        Codec.INT8, taps=(2,), sampling="all", activations=encode(values((1, 6, 5)), Codec.INT8), split=part()
    ),
    "split batch of tokens with a prompt": batch(
        Codec.INT8,
        taps=(2,),
        sampling="all",
        activations=encode(values((1, 6, 5)), Codec.INT8),
        target_form="tokens",
        targets=write_tokens(np.arange(6) * 11_000, 60_000),
        split=part(context=to_bin([1, 0, 2], "<u2"), round=2),
    ),
    "plan that lets be assigned": plan(
        tiers={
            "pi": TierPlan(
                backbone="m",
                assignable=Assignable(
                    batch_size_min=2,
                    batch_size_max=16,
                    max_tokens_min=32,
                    max_tokens_max=128,
                    rungs=(
                        Rung(sampling="segments:4", codec=Codec.INT4),
                        Rung(sampling="mean", codec=Codec.INT2),
                    ),
                ),
            )
        },
    ),
    "assignment, unsigned": Assignment(
        run=STREAM, version=44, batch_size=8, max_tokens=64, sampling="mean", codec=Codec.INT2, fence=8
    ),
    "telemetry under an assignment": Telemetry(
        stream=STREAM, assignment=44, assignments_refused=1, sending_seconds=2.5, memory_free_bytes=2**28
    ),
    "adapter gradient": AdapterGradient(
        **SENT, adapter=40, samples=3, tensors={"layer.0.q.lora_A": encode(values((2, 5)), Codec.INT8)}
    ),
    "adapter upload": AdapterUpload(
        **SENT, round=2, samples=48, steps=4, tensors={"layer.0.q.lora_B": encode(values((5, 2)), Codec.F16)}
    ),
    "reuse": Reuse(**SENT, of=b"ticket 0", split=part()),
    "reuse with a change": Reuse(
        **SENT,
        of=b"ticket 0",
        split=part(),
        change=StateChange(base=b"12345678", tensor=encode(values((6, 5)), Codec.INT2)),
    ),
    "gradient reply, unsigned": GradientReply(
        run=STREAM,
        ticket=b"ticket 1",
        version=44,
        loss=0.5,
        keys=bytes(range(16)),
        gradient=encode(values((4, 5)), Codec.INT8),
    ),
    "gradient reply, settled": GradientReply(run=STREAM, ticket=b"ticket 1", applied=46),
    "gradient reply, refused": GradientReply(
        run=STREAM, ticket=b"ticket 1", version=44, refused="came before"
    ),
    "plan of split LoRA": plan(
        method=SplitLora(
            lora=LoraSpec(rank=4, alpha=8.0, targets=("query",)),
            adapters="local",
            upper="per-device",
            round=RoundPlan(batches=4),
        ),
        tiers={
            "pi": TierPlan(
                backbone="m",
                layers=2,
                sampling="all",
                codec=Codec.INT8,
                depth=2,
                width=64,
                taps=(2,),
                fingerprint="ab",
                whole_depth=6,
                whole_fingerprint="cd",
                whole_bytes=2**26,
                gradient_codec=Codec.INT8,
            )
        },
    ),
    "plan of frozen devices": plan(method=SplitFrozen()),
    "telemetry of a regression, no trouble": Telemetry(
        stream=STREAM, tally=Tally(units=2, moments=(3.0, 4.0, 5.0, 10.0, 7.0, 1.0))
    ),
    "telemetry of a language model, no trouble": Telemetry(
        stream=STREAM, tally=Tally(units=3, correct=1, nll=5.5)
    ),
    "telemetry of a newborn, no trouble": Telemetry(stream=STREAM),
    "manifest, inline, unsigned": WeightsManifest(
        run=STREAM, version=9, state_digest="aa", bundle_digest="bb", bundle_bytes=3, bundle=b"\x00\xff\x80"
    ),
    "manifest of chunks, unsigned": WeightsManifest(
        run=STREAM, version=9, state_digest="aa", bundle_digest="bb", bundle_bytes=900_000, chunks=4
    ),
    "chunk": WeightsChunk(run=STREAM, version=9, index=3, data=b"\x00\x01"),
    "flow": Flow(window=2, pause=True),
    "trainer status, unsigned": TrainerStatus(
        state="online", run=STREAM, epoch=2, version=9, samples=90, fence=8, instance="b2"
    ),
    "trainer claim": TrainerClaim(instance="b2", fence=8, take_over=True),
    "rejection": Rejection(kind="activations", reason="no tier 'x'", size_bytes=77),
    "query": Query(
        run=STREAM,
        mark=b"sixteen bytes it",
        place=5,
        fingerprint="f" * 16,
        adapter=44,
        lengths=to_bin([2, 1, 3], "<u2"),
        states=encode(values((6, 5)), Codec.INT8),
    ),
    "query reply, unsigned": QueryReply(
        run=STREAM, mark=b"sixteen bytes it", version=46, numbers=encode(values((3, 4)), Codec.F32)
    ),
    "query reply of a regression": QueryReply(
        run=STREAM,
        mark=b"sixteen bytes it",
        version=46,
        numbers=encode(values((3, 1)), Codec.F32),
        scale=Scale(mean=3.5, deviation=1.25),
    ),
    "query reply, refused": QueryReply(run=STREAM, mark=b"sixteen bytes it", refused="it does not predict"),
}

KINDS: Final[dict[str, type[Message]]] = {type(one).__name__: type(one) for one in EXAMPLES.values()}

SIGNER: Final = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))
SIGNED: Final[dict[str, tuple[Message, str, str]]] = {
    "plan": (plan(fence=8, keys=(SIGNER.public,)), "", ""),
    "weights": (EXAMPLES["manifest, inline, unsigned"], "full", ""),
    "status": (EXAMPLES["trainer status, unsigned"], "", ""),
    "assignment": (EXAMPLES["assignment, unsigned"], "full", "pi-1"),
}
"""What is signed, by kind, with its tier and device."""

SHAPES: Final = ((1,), (2, 3), (5, 13), (2, 2, 16), (1, 2, 3, 43))


def _codec_vector(codec: Codec, shape: tuple[int, ...], by: bytes = b"") -> dict[str, Any]:
    array = values(shape)
    tensor: Tensor = encode(array, codec, by)
    return {
        **({"codebooks": by.hex()} if by else {}),
        "name": f"{codec.value} {'x'.join(map(str, shape))}",
        "codec": codec.value,
        "shape": list(shape),
        "data": tensor.data.hex(),
        "scales": tensor.scales.hex(),
        "values_f32": struct.pack(f"<{array.size}f", *array.ravel().tolist()).hex(),
        "decoded": [float(value) for value in decode(tensor).ravel()],
    }


def _message_vector(name: str, message: Message) -> dict[str, Any]:
    return {
        "name": name,
        "type": type(message).__name__,
        "hex": pack(message).hex(),
        "value": msgspec.to_builtins(message),
    }


def _bundle_vector(codec: WeightsCodec, start: bool) -> dict[str, Any]:
    about = About(
        job="assist",
        run=STREAM,
        version=9,
        labels=("on", "off"),
        side_network=SideNetworkSpec(blocks=1, width=4, inner=4),
        aligns={"default": 6},
        tiers={"pi": "default"},
        starts={"default": (1,)} if start else {},
    )
    starts = {"starts.@default/1.weight": values((1, 6, 2)), "starts.@default/1.bias": values((2,))}
    state = {
        "aligns.@default.weight": values((1, 6, 4)),
        "head.weight": values((2, 4)),
        "head.bias": values((2,)),
        **(starts if start else {}),
    }
    data = encode_bundle(about, state, codec=codec)
    return {
        "name": f"{codec}, with a linear start" if start else codec,
        "hex": data.hex(),
        "about": msgspec.to_builtins(about),
        "decoded": {name: array.tolist() for name, array in decode_bundle(data).tensors.items()},
    }


def _signed_vector(kind: str) -> dict[str, Any]:
    message, tier, device = SIGNED[kind]
    sealed = SIGNER.sign(message, Scope(kind=kind, job="assist", tier=tier, device=device))
    return {
        "name": kind,
        "type": type(message).__name__,
        "tier": tier,
        **({"device": device} if device else {}),
        "public_key": SIGNER.public.hex(),
        "hex": sealed.hex(),
    }


def load(file: str) -> list[dict[str, Any]]:
    """The vectors of one file."""
    path = GOLDEN / file
    vectors: list[dict[str, Any]] = json.loads(path.read_text("utf-8")) if path.exists() else []
    return vectors


def _append(file: str, vectors: list[dict[str, Any]]) -> None:
    old = load(file)
    names = {vector["name"] for vector in old if not vector.get("decode_only")}
    fresh = [one for one in vectors if one["name"] not in names]
    lines = [json.dumps(one, ensure_ascii=False) for one in [*old, *fresh]]
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / file).write_text("[\n" + ",\n".join(lines) + "\n]\n", "utf-8")


if __name__ == "__main__":
    _append("codecs.json", [_codec_vector(codec, shape) for codec in SCALAR for shape in SHAPES])
    _append(
        "codecs.json",
        [_codec_vector(codec, (2, 3, 16), codebooks().id) for codec in (Codec.PQ1, Codec.PQ2)],
    )
    _append(
        "bundles.json",
        [_bundle_vector(codec, start) for codec in get_args(WeightsCodec) for start in (False, True)],
    )
    _append("signed.json", [_signed_vector(kind) for kind in SIGNED])
    _append("messages.json", [_message_vector(name, message) for name, message in EXAMPLES.items()])
