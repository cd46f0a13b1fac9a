"""The search attack on what a trainer has received: nobody knows the texts here, so it says how sure it is.

An upload without noise whose candidate gives it again, value for value, is of that text: no other attack is
needed.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from side_trainer.codebook_store import CodebookStore
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import RecordKind
from side_trainer.operator.status import open_journal
from sidestream.contract.errors import ConfigError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.privacy import parse_privacy
from sidestream.contract.tensors import Floats, decode
from sidestream.contract.wire import unpack
from sidestream.leakage.measure import Meter
from sidestream.leakage.way import Seen, Way

_NONE: Final = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What was made of one upload."""

    tier: str
    text: str
    """The likeliest text."""
    verified: bool
    """Whether it gives the upload again, value for value, but for case and spaces."""


def uploads_of(
    state_dir: Path, most: int, seed: int, fingerprint: str
) -> dict[tuple[str, Way], list[Floats]]:
    """Uploads by tier and way to send, each [B, N, d], drawn at random from all of a job's.

    Raises:
        ConfigError: there are none of a backbone with this fingerprint.
        StateError: there is no journal.
    """
    journal = open_journal(state_dir)
    CodebookStore(state_dir).load()
    try:
        found = _drawn(journal, most, seed, fingerprint)
    finally:
        journal.close()
    if not found:
        raise ConfigError(
            "--journal", f"{state_dir} holds no upload of --backbone with its {fingerprint[:8]}…"
        )
    return found


def _drawn(journal: Journal, most: int, seed: int, fingerprint: str) -> dict[tuple[str, Way], list[Floats]]:
    rng, found = np.random.default_rng(seed), dict[tuple[str, Way], list[Floats]]()
    batches = journal.batches(journal.tail)
    for number in rng.permutation(len(batches)):
        record = journal.get(batches[number][0])
        assert record.kind == RecordKind.BATCH.value
        batch = unpack(ActivationBatch, record.payload)
        if batch.fingerprint != fingerprint:
            continue
        codec, books = batch.activations.codec, batch.activations.codebooks
        privacy = parse_privacy(journal.privacy.get(record.tier or "", ""))
        way = Way(taps=batch.taps, sampling=batch.sampling, codec=codec, privacy=privacy)
        way = replace(way, codebooks=books if isinstance(books, bytes) else b"")
        ends = np.cumsum(batch.row_lengths)[:-1]
        found.setdefault((record.tier or "", way), []).extend(
            np.split(decode(batch.activations), ends, axis=1)
        )
        if sum(map(len, found.values())) >= most:
            break
    return {key: rows[: max(1, most // len(found))] for key, rows in found.items()}


def attack(meter: Meter, uploads: dict[tuple[str, Way], list[Floats]], seconds: float) -> list[Recovered]:
    """Search for the texts of uploads, for so long at most."""
    until, found = time.monotonic() + seconds, list[Recovered]()
    for number, ((tier, way), rows) in enumerate(uploads.items()):
        search, _ = meter.search_of(way)
        share = time.monotonic() + max(1.0, (until - time.monotonic()) / (len(uploads) - number))
        seen = [Seen(_NONE, _NONE, row, row) for row in rows]
        for guess in meter.searched(search, seen, share, f"{tier}: {way}"):
            found.append(Recovered(tier=tier, text=meter.text_of(guess.tokens), verified=guess.verified))
        if meter.interrupted:
            break
    return found


def told(found: Sequence[Recovered], *, noise: bool) -> str:
    """The texts, and three sentences."""
    lines = [f"{'certain' if one.verified else 'likely '}  {one.tier}  {one.text}" for one in found]
    sure = Counter(one.tier for one in found if one.verified)
    certain = sum(sure.values())
    lines += [
        "",
        f"Of {len(found)} uploads that were attacked, {certain} came back for certain: the text found gives "
        "the upload again, value for value.",
        "The others are the likeliest texts that were found, of which many words are right as a rule: attack "
        "texts that you know with --texts, sent the same way, to see how many."
        if not noise
        else "With noise nobody can tell for certain: attack texts that you know, with --texts and --way.",
        "Whoever has these uploads, the trainer and the broker among them, can do the same or better.",
    ]
    return "\n".join(lines)


def write_json(path: Path, found: Sequence[Recovered]) -> None:
    """Everything that was found."""
    rows: list[dict[str, Any]] = [asdict(one) for one in found]
    path.write_text(json.dumps({"uploads": rows}, indent=2) + "\n", encoding="utf-8")
