"""Mutated real messages by the million, through every decoder and the check that the journal relies on.

    python benchmarks/poison.py --messages 1000000 --seed 1

Each is a message of a recorded session with bytes changed, cut, repeated, inserted or swapped with another
message's. Allowed outcomes: it is decoded (and, a batch, admitted), or refused by our own error. Anything
else is a failure and is printed. Then what was admitted is folded, and the weights must be finite.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from benchmarks.fault_bench import resident_mib
from benchmarks.result import about_this_run, write_json
from benchmarks.table import render
from side_trainer.fold.fold import Fold
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import LabelsRecord, SettingsRecord, TierRecord
from side_trainer.receive.inbox import Refused, arrived, examine
from side_trainer.settings.schema import LearnerSettings
from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import (
    ActivationBatch,
    Flow,
    Receipt,
    Status,
    Telemetry,
    TrainerClaim,
    TrainerStatus,
    WeightsManifest,
)
from sidestream.contract.plan import Plan
from sidestream.contract.wire import Message, unpack

RECORDING: Final = (
    Path(__file__).resolve().parents[1] / "tests" / "upgrade" / "recordings" / "before-0.1.json"
)
_KINDS: Final[dict[str, type[Message]]] = {
    "activations": ActivationBatch,
    "telemetry": Telemetry,
    "receipt": Receipt,
    "flow": Flow,
    "plan": Plan,
    "weights": WeightsManifest,
    "claim": TrainerClaim,
}
_FOLDED: Final = 400


def kind_of(topic: str) -> type[Message]:
    """What a message on a recorded topic is."""
    last = topic.rpartition("/")[2]
    if last == "status":
        return TrainerStatus if topic.endswith("trainer/status") else Status
    return _KINDS[last]


def mutated(payload: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    """One to four changes of some kind."""
    data = bytearray(payload)
    for _ in range(int(rng.integers(1, 5))):
        at = int(rng.integers(len(data))) if data else 0
        match int(rng.integers(6)):
            case 0:
                data[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                del data[at:]
            case 2:
                del data[at : at + int(rng.integers(1, 16))]
            case 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 16)))
            case 4:
                data[at:at] = data[at : at + int(rng.integers(1, 64))]
            case _:
                start = int(rng.integers(len(other)))
                data[at : at + 32] = other[start : start + 32]
    return bytes(data)


def poison(count: int, seed: int) -> tuple[Counter[str], list[bytes], Plan]:
    """Mutate and decode so many; return the outcomes, and some batches that were admitted."""
    rng = np.random.default_rng(seed)
    recorded = [
        (kind_of(one["topic"]), one["topic"], base64.b64decode(one["payload"]))
        for one in json.loads(RECORDING.read_text())["messages"]
    ]
    recorded = [one for one in recorded if one[2]]
    plans = [unpack(Plan, payload) for kind, _, payload in recorded if kind is Plan]
    plan, outcomes, admitted = plans[-1], Counter[str](), list[bytes]()
    picks = rng.integers(len(recorded), size=(count, 2))
    for first, second in picks.tolist():
        kind, _, payload = recorded[first]
        message = mutated(payload, recorded[second][2], rng)
        try:
            if kind is ActivationBatch:
                examine(message, "small", plan)
                if len(admitted) < _FOLDED and message != payload:
                    admitted.append(message)
            else:
                unpack(kind, message)
            outcomes[f"{kind.__name__} taken"] += 1
        except (DecodeError, Refused):
            outcomes[f"{kind.__name__} refused"] += 1
        except Exception as exc:
            outcomes[f"{kind.__name__} FAILED"] += 1
            print(f"{kind.__name__}: {exc!r} on {message.hex()[:400]}", file=sys.stderr)
    return outcomes, admitted, plan


def folds_finite(batches: Sequence[bytes], plan: Plan) -> bool:
    """Whether the weights stay finite when all of these are learnt."""
    tier = plan.tiers["small"]
    facts = (
        (
            "settings",
            SettingsRecord(
                job="poison", task=plan.task, side_network=plan.side_network, learner=LearnerSettings()
            ),
        ),
        ("labels", LabelsRecord(labels=plan.labels)),
        (
            "tier",
            TierRecord(
                tier="small",
                align=tier.align,
                depth=tier.depth,
                width=tier.width,
                taps=tier.taps,
                fingerprint=tier.fingerprint,
            ),
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder) / FILE_NAME)
        for kind, fact in facts:
            journal.append(kind, msgspec.json.encode(fact), tier="small" if kind == "tier" else None)
        for index, payload in enumerate(batches):
            batch = unpack(ActivationBatch, payload)
            with journal.transaction():
                journal.append_batch(arrived(batch, payload, "small", f"dev-{index}"))
        fold = Fold(journal)
        while records := journal.read(fold.offset):
            for record in records:
                fold.apply(record)
        journal.close()
        return all(np.isfinite(array).all() for array in fold.weights().values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--messages", type=int, default=1_000_000, help="how many (default: a million)")
    parser.add_argument("--seed", type=int, default=0, help="of the mutations")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    args = parser.parse_args(arguments)
    about, started_s = about_this_run(), time.monotonic()
    poison(1000, args.seed + 1)  # what is loaded once is loaded now
    before = resident_mib(os.getpid())
    outcomes, admitted, plan = poison(args.messages, args.seed)
    grown, finite = resident_mib(os.getpid()) - before, folds_finite(admitted, plan)
    kinds = sorted({name.rpartition(" ")[0] for name in outcomes})
    table = render(
        ("message", "taken", "refused", "failed"),
        [
            [kind, *(f"{outcomes[f'{kind} {how}']:,}" for how in ("taken", "refused", "FAILED"))]
            for kind in kinds
        ],
    )
    print(table)
    print(
        f"{args.messages:,} messages in {time.monotonic() - started_s:.0f} s; memory "
        f"grew by {grown:.1f} MiB; weights after {len(admitted)} admitted ones: "
        f"{'finite' if finite else 'NOT FINITE'}"
    )
    if args.json:
        write_json(args.json, about, {"outcomes": outcomes, "grown_mib": grown, "finite": finite})
    return 0 if finite and not any(name.endswith("FAILED") for name in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
