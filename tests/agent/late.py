"""Samples without labels, and an agent's state directory as the command line sees it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_agent.commands.samples import _unlabelled_store
from edge_agent.store.unlabelled import Listed
from tests.agent.fleet import sentence


def write_unlabelled(path: Path, count: int, *, start: int = 0) -> Path:
    """JSONL with ``count`` distinct texts."""
    rows = [json.dumps({"text": sentence(number)}) for number in range(start, start + count)]
    path.write_text("\n".join(rows) + "\n")
    return path


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(state: Path) -> list[Listed]:
    """What the agent has on its unlabelled store."""
    with _unlabelled_store(state) as store:
        return store.list(unlabelled=False)


def give(state: Path, labels: dict[str, str]) -> None:
    """Give labels by the samples' texts, unchecked."""
    names = {one.row.text: one.id for one in listed(state)}
    with _unlabelled_store(state, writes=True) as store:
        for text, label in labels.items():
            store.label(names[text], label)


def tables(state: Path) -> tuple[int, int]:
    """Samples that wait, and activations that are kept."""
    with sqlite3.connect(state / "agent.db") as db:
        return tuple(
            db.execute(f"SELECT COUNT(*) FROM {what}").fetchone()[0]
            for what in ("unlabelled WHERE state = 'waiting'", "kept")
        )
