"""Split jobs' tests start trainers by the hundred: each gets a copy of a model that is read once."""

from __future__ import annotations

import copy
import threading
from pathlib import Path
from typing import Any

import pytest

from side_trainer.split_lora import whole_model
from sidestream.backbone.backbone import Backbone
from sidestream.backbone.runtimes import load_backbone


@pytest.fixture(autouse=True)
def _read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[object, Backbone] = {}

    def load(reference: str, *how: Any, **more: Any) -> Backbone:
        files = sorted((str(path), path.stat().st_mtime_ns) for path in Path(reference).glob("*"))
        key = (tuple(files), how, tuple(more.items()))
        if not files:
            return load_backbone(reference, *how, **more)
        if key not in kept:
            kept[key] = load_backbone(reference, *how, **more)
        found = kept[key]
        return copy.deepcopy(found, {id(found._lock): threading.Lock()})

    monkeypatch.setattr(whole_model, "load_backbone", load)
