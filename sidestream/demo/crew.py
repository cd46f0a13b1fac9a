"""Several agents in one process, one thread each: ``python -m sidestream.demo.crew AGENT.toml…``.

They share the process and the backbone's memory and nothing else: each has its own settings, outbox, data and
connection. The demo runs one crew a tier.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from edge_agent.config import AgentConfig
from edge_agent.session.agent import Agent
from sidestream.contract.errors import SidestreamError
from sidestream.host.logs import set_up
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config


def main(paths: list[str]) -> int:
    """Run an agent for each settings file; return the worst of their exit codes."""
    configs = [load_config(AgentConfig, Path(path)) for path in paths]
    set_up(configs[0].log_level, configs[0].log_format, job=configs[0].job)
    agents = [Agent(config) for config in configs]
    codes: dict[str, int] = {}

    def run(agent: Agent, name: str) -> None:
        try:
            codes[name] = agent.run()
        except SidestreamError as exc:
            print(f"agent {name}: {exc}", file=sys.stderr, flush=True)
            codes[name] = 1

    threads = [
        threading.Thread(target=run, args=(agent, config.device), name=config.device)
        for agent, config in zip(agents, configs, strict=True)
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
