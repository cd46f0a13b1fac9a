"""Agents on threads, over the in-process broker."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Transport, Will
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.session.agent import Agent
from sidestream.backbone.backbone import Backbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import Task
from tests.agent.fake_trainer import JOB, TIER
from tests.agent.tiny import WORDS


def write_samples(path: Path, count: int, *, start: int = 0) -> Path:
    """JSONL with ``count`` distinct labelled texts."""
    lines = [
        json.dumps({"text": sentence(number), "label": "on" if number % 2 else "off"})
        for number in range(start, start + count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def sentence(number: int) -> str:
    words = [WORDS[(number // len(WORDS) ** place) % len(WORDS)] for place in range(3)]
    return " ".join(["turn", *words[: 1 + number % 3], f"{number}"])


class Running:
    """An agent on a thread of its own; leaving the context stops it."""

    def __init__(
        self,
        broker: InProcessBroker,
        backbone: Backbone,
        folder: Path,
        *,
        device: str = "pi-1",
        clock: Callable[[], float] = time.monotonic,
        **config: Any,
    ) -> None:
        data = {"held_out_share": 0.0, "poll_s": 0.05, **config.pop("data", {})}
        self.device = device
        self.config = AgentConfig(
            job=JOB,
            device=device,
            tier=TIER,
            state_dir=str(folder / f"state-{device}"),
            data=DataConfig(**data),
            telemetry_every_s=0.1,
            **config,
        )
        self.stop = threading.Event()
        self.error: BaseException | None = None
        self.code: int | None = None
        self.started: list[str] = []
        self.asked: list[tuple[str, int, Precision]] = []
        """Backbones that the agent asked for."""
        self.client_id = ""
        """Of its last connection."""

        def connect(config: AgentConfig, client_id: str, will: Will | None) -> Transport:
            self.client_id = client_id
            return broker.transport(client_id, will=will)

        def load(reference: str, layers: int, precision: Precision, task: Task) -> Backbone:
            self.asked.append((reference, layers, precision))
            return backbone

        agent = Agent(
            self.config,
            stop=self.stop,
            connect=connect,
            load_backbone=load,
            started=self.started.append,
            clock=clock,
        )
        self._agent = agent
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Running:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop.set()
        self._thread.join(20.0)
        assert not self._thread.is_alive()

    def join(self, timeout_s: float = 30.0) -> int | None:
        """Wait for the agent to end by itself; raise what it raised."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the agent did not end"
        if self.error is not None:
            raise self.error
        return self.code

    def _run(self) -> None:
        with suppress(BaseException):
            try:
                self.code = self._agent.run()
            except BaseException as exc:
                self.error = exc
                raise
