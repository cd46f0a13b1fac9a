"""What the language-model benchmark adapts to: a text, its end held out, the rest dealt out to devices."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from benchmarks.lm_pretrain import read_text
from contract.errors import DataError
from edge_agent.language_model import LanguageModel
from edge_agent.windows import Window

_DOCUMENT_CHARS = 2000
_HELD_OUT = 0.1


@dataclass(frozen=True, kw_only=True)
class LmWorkload:
    """The same for every row of a table."""

    backbone: str
    """Folder of the frozen model."""
    shards: tuple[tuple[str, ...], ...]
    """By device, its documents: runs of whole lines. No two devices have a line in common."""
    held_out: tuple[str, ...]
    """Documents that nobody trains on."""
    max_tokens: int
    """Tokens of a window."""

    @property
    def train(self) -> list[str]:
        """Every device's documents."""
        return [document for shard in self.shards for document in shard]

    def windows(self, model: LanguageModel, documents: Sequence[str]) -> list[Window]:
        """Documents as every method sees them."""
        return [window for document in documents for window in model.windows(document, None, self.max_tokens)]


def read_lm_workload(
    path: Path, *, backbone: str, devices: int, max_tokens: int, share: float = 1.0
) -> LmWorkload:
    """Cut a text: the last tenth is held out, the rest falls into a run of documents for each device.

    Args:
        path: The text.
        backbone: Folder of the frozen model.
        devices: How many.
        max_tokens: Tokens of a window.
        share: Use only so much of the text, from its beginning; the held-out tenth stays the last of all.

    Raises:
        DataError: it cannot be read, or is too short.
    """
    documents = _documents(read_text(path))
    cut = len(documents) - max(1, round(len(documents) * _HELD_OUT))
    train = documents[: round(cut * share)]
    if len(train) < devices:
        raise DataError(f"{path}: {len(train)} documents are too few for {devices} devices")
    bounds = [round(index * len(train) / devices) for index in range(devices + 1)]
    return LmWorkload(
        backbone=backbone,
        shards=tuple(tuple(train[start:end]) for start, end in pairwise(bounds)),
        held_out=tuple(documents[cut:]),
        max_tokens=max_tokens,
    )


def write_documents(path: Path, documents: Sequence[str]) -> Path:
    """Write JSONL that an agent reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in documents), encoding="utf-8")
    return path


def _documents(text: str) -> list[str]:
    """Whole lines, some thousand characters of them together."""
    documents, lines = [], ""
    for line in text.splitlines(keepends=True):
        lines += line
        if len(lines) >= _DOCUMENT_CHARS:
            documents.append(lines)
            lines = ""
    return [*documents, lines] if lines.strip() else documents
