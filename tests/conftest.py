"""What holds for every test."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import hypothesis
import pytest

from sidestream.host.logs import ROOMS

# Before torch and transformers look: for what runs here and for every process that is started.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A property holds or does not; how long an example takes on a busy machine is no part of it.
hypothesis.settings.register_profile("no deadline", deadline=None)
hypothesis.settings.load_profile("no deadline")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command sets up the logging of its process: here that is not for the tests that follow."""
    root = logging.getLogger()
    rooms = [logging.getLogger(name) for name in ("", *ROOMS)]
    levels, handlers, disabled = [room.level for room in rooms], root.handlers[:], root.manager.disable
    yield
    logging.disable(disabled)
    root.handlers[:] = handlers
    for room, level in zip(rooms, levels, strict=True):
        room.setLevel(level)
