"""Several agents in one process, one thread each: ``python -m sidestream.demo.crew AGENT.toml…``.

They share the process, the backbone's memory and the side-network's and nothing else: each has its own
settings, outbox, data and connection. The demo runs one crew a tier.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.session.agent import Agent
from sidestream.contract.errors import SidestreamError
from sidestream.host.logs import set_up
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config

_AT_ONCE: Final = 16  # agents that connect: of hundreds at once a broker and our own threads lose most


class _Turn:
    """An agent's leave to connect, one of a few.

    Args:
        turns: How many there are.
    """

    def __init__(self, turns: threading.Semaphore) -> None:
        self._turns = turns
        self._has = False

    def take(self) -> None:
        """Wait for it."""
        self._turns.acquire()
        self._has = True

    def give_back(self, metrics_url: str = "") -> None:
        """It is connected, or has ended."""
        if self._has:
            self._has = False
            self._turns.release()


def main(paths: list[str]) -> int:
    """Run an agent for each settings file; return the worst of their exit codes."""
    configs = [load_config(AgentConfig, Path(path)) for path in paths]
    set_up(configs[0].log_level, configs[0].log_format, job=configs[0].job)
    semaphore = threading.Semaphore(_AT_ONCE)
    turns = [_Turn(semaphore) for _ in configs]
    agents = [Agent(config, started=turn.give_back) for config, turn in zip(configs, turns, strict=True)]
    codes: dict[str, int] = {}

    def run(agent: Agent, name: str, turn: _Turn) -> None:
        turn.take()
        try:
            codes[name] = agent.run()
        except SidestreamError as exc:
            print(f"agent {name}: {exc}", file=sys.stderr, flush=True)
            codes[name] = 1
        finally:
            turn.give_back()

    threads = [
        threading.Thread(target=run, args=(agent, config.device, turn), name=config.device)
        for agent, config, turn in zip(agents, configs, turns, strict=True)
    ]
    with stop_event() as stop:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            if stop.wait(0.2):
                for agent in agents:
                    agent.stop()
                for thread in threads:
                    thread.join()
    return max(codes.values(), default=1) if len(codes) == len(agents) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
