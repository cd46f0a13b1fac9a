"""How soon a device that sends valid nonsense is noticed, and whether an honest one ever is.

    sidestream demo --alpha 0.1 --seed 5 --keep DIR
    python benchmarks/nonsense.py DIR/trainer/journal.db --kind noise --ratio 4

Judges the batches again in the order in which they came, as text classification. After each one of the tier
that the nonsense claims to be of, it adds that many of an intruder's: noise of the right size, true
activations with random labels, dimensions shuffled, or activations a thousand times as large.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where run as a file

from side_trainer.journal.journal import Journal, Record
from side_trainer.journal.records import LabelsRecord
from side_trainer.quarantine.agreement import Agreement
from side_trainer.quarantine.suspicion import Suspicion, row_sizes
from side_trainer.receive.inbox import row_means
from sidestream.contract.messages import ActivationBatch, to_bin
from sidestream.contract.tensors import decode, encode
from sidestream.contract.wire import pack, unpack

KINDS: Final = ("none", "noise", "labels", "shuffled", "huge")
_STREAM: Final = "f" * 32


class Intrusion:
    """Judges, and remembers who was noticed when."""

    def __init__(self, journal: Journal, kind: str, seed: int) -> None:
        self.noticed: dict[str, str] = {}
        """By device, after how many of its batches and why."""
        self.sent: Counter[str] = Counter()
        self._owners = {state.stream: state.device for state in journal.streams()}
        self._suspicion, self._agreement = Suspicion(), Agreement()
        self._labels = 0
        self._kind, self._rng = kind, np.random.default_rng(seed)

    def take(self, record: Record) -> None:
        """Take in a record of the journal."""
        if record.kind == "batch":
            self._batch(record.payload, str(record.tier), self._owners[str(record.stream)])
        elif record.kind == "labels":
            self._labels = len(msgspec.json.decode(record.payload, type=LabelsRecord).labels)

    def intrude(self, record: Record) -> None:
        """Take in a batch of the intruder's, made after one of the journal's."""
        batch = unpack(ActivationBatch, record.payload)
        changes: dict[str, Any] = {
            "targets": to_bin(self._rng.integers(self._labels, size=record.samples), "<u2")
        }
        values = np.asarray(decode(batch.activations))
        if self._kind == "noise":
            values = self._rng.standard_normal(values.shape) * np.sqrt(np.mean(values**2))
        elif self._kind == "shuffled":
            values = values[:, :, self._rng.permutation(values.shape[2])]
        elif self._kind == "huge":
            values = values * 1000
        self._batch(
            pack(
                msgspec.structs.replace(
                    batch,
                    stream=_STREAM,
                    sequence=self.sent["intruder"] + 1,
                    floor=1,
                    activations=encode(values, batch.activations.codec),
                    **changes,
                )
            ),
            str(record.tier),
            "intruder",
        )

    def _batch(self, payload: bytes, tier: str, device: str) -> None:
        batch = unpack(ActivationBatch, payload)
        self.sent[device] += 1
        means = row_means(decode(batch.activations), batch.row_lengths)
        why = self._suspicion.note_size(tier, device, row_sizes(means))
        why = why or self._agreement.note(tier, device, means, np.asarray(batch.read_targets()))
        if why:
            self.noticed.setdefault(device, f"after {self.sent[device]} batches: {why}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return 1 if an honest device was noticed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("journal", type=Path, help="of a trainer that is stopped, or a copy")
    parser.add_argument("--kind", choices=KINDS, default="noise", help="of nonsense (default: noise)")
    parser.add_argument("--ratio", type=int, default=1, help="the intruder's batches for one of its tier's")
    parser.add_argument("--tier", default="full", help="that it claims to be of (default: full)")
    parser.add_argument("--seed", type=int, default=0, help="of the nonsense")
    args = parser.parse_args(arguments)
    journal = Journal(args.journal, read_only=True)
    intrusion = Intrusion(journal, args.kind, args.seed)
    offset = 0
    while records := journal.read(offset):
        for record in records:
            offset = record.offset
            intrusion.take(record)
            if args.kind != "none" and record.kind == "batch" and record.tier == args.tier:
                for _ in range(args.ratio):
                    intrusion.intrude(record)
    journal.close()
    print(f"{sum(intrusion.sent.values())} batches of {len(intrusion.sent)} devices")
    for device, text in intrusion.noticed.items():
        print(f"{device}: {text}")
    if args.kind != "none" and "intruder" not in intrusion.noticed:
        print(f"the intruder was not noticed in {intrusion.sent['intruder']} batches")
    return 1 if set(intrusion.noticed) - {"intruder"} else 0


if __name__ == "__main__":
    sys.exit(main())
