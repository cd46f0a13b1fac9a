"""A job with frozen devices by hand: one device's batches, journaled and folded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.receive.inbox import arrived, examine
from side_trainer.settings.schema import TrainerConfig
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.messages import ActivationBatch, SplitPart, ticket_of, to_bin
from sidestream.contract.plan import labels_id
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.wire import pack


@contextmanager
def frozen_job(folder: Path, config: TrainerConfig, *, rows: int) -> Iterator[tuple[Journal, Fold]]:
    """Batches of four rows, folded; idle time is left to the test."""
    lots = np.random.default_rng(5)
    journal = Journal(folder / FILE_NAME)
    try:
        plan = Job(config, journal).plan
        tier = plan.tiers["cut1"]
        backbone = shared_backbone(tier.backbone, tier.layers)
        for number in range(rows // 4):
            texts = [" ".join(lots.choice(["turn", "on", "off", "cold"], size=5)) for _ in range(4)]
            tokens = backbone.text_input.read(texts, 32)
            keys = [lots.bytes(8) for _ in range(4)]
            batch = ActivationBatch(
                stream="ab" * 16,
                sequence=number + 1,
                floor=1,
                fingerprint=tier.fingerprint,
                labels_id=labels_id(plan.labels),
                taps=tier.taps,
                sampling="all",
                samples=to_bin(range(4 * number, 4 * number + 4), "<u4"),
                lengths=to_bin(tokens.mask.sum(axis=1), "<u2"),
                targets=to_bin(lots.integers(0, 2, 4), "<u2"),
                activations=encode(backbone.states(tokens, tier.depth)[None], Codec.INT8),
                keys=b"".join(keys),
                split=SplitPart(ticket=ticket_of(keys, 0), slot=0, rows=4),
            )
            payload = pack(batch)
            with journal.transaction():
                journal.append_batch(arrived(examine(payload, "cut1", plan).batch, payload, "cut1", "d"))
        fold = Fold(journal)
        for record in journal.read(0, limit=1000):
            fold.apply(record)
        yield journal, fold
    finally:
        journal.close()
