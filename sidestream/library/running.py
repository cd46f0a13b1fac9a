"""A broker, a trainer or an agent inside a program: each a context manager, on threads of its own.

with sidestream.broker() as broker, sidestream.trainer(job="home", broker=broker.url, tiers=…) as trainer: …
"""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from broker_config.embedded.broker import EmbeddedBroker
from edge_agent.config import AgentConfig, DataConfig
from edge_agent.samples.sources import register
from side_trainer.settings.implied import with_implied
from side_trainer.settings.schema import TrainerConfig
from sidestream.host.toml import load_config

_START_S: Final = 60.0
_JOIN_S: Final = 60.0
Rows = Callable[[DataConfig], Iterable[Any]]
Complete = Callable[[dict[str, Any]], dict[str, Any]]
F = TypeVar("F", bound=Rows)


@dataclass(frozen=True, kw_only=True)
class RunningTrainer:
    """A trainer that runs."""

    job: str
    """The job's name."""
    state_dir: Path
    """Where its journal is."""
    page: str
    """The address of its fleet page; empty if it has none."""
    metrics: str
    """Where Prometheus finds its figures; empty if nowhere."""


@contextmanager
def broker(
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    data_dir: str | Path = "",
    kind: Literal["auto", "mosquitto", "amqtt"] = "auto",
) -> Iterator[EmbeddedBroker]:
    """Run the embedded broker; its ``url`` says where.

    Args:
        host: The address to listen on.
        port: 0 takes a free one.
        data_dir: Where it keeps retained messages and its log; a folder that goes with it, if not given.
        kind: Which broker; auto takes Mosquitto if it is installed.
    """
    with ExitStack() as stack:
        folder = Path(data_dir) if data_dir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield stack.enter_context(EmbeddedBroker(host=host, port=port, data_dir=folder, kind=kind))


@contextmanager
def trainer(settings: str | Path | None = None, **changes: Any) -> Iterator[RunningTrainer]:
    """Run the trainer of a job until the block is left.

    Args:
        settings: A trainer.toml; without one, ``changes`` say everything.
        changes: Settings by name, over the file's; tables are mappings, and ``broker`` may be its URL alone.

    Raises:
        SidestreamError: it cannot start.
    """
    from side_trainer.settings.state import state_dir_of
    from side_trainer.trainer import run_trainer

    given = _settings(changes)
    given.setdefault("page_port", 0)
    given.setdefault("metrics_port", -1)
    complete: Complete = lambda own: with_implied(_over(own, given))  # noqa: E731
    config = load_config(TrainerConfig, _path(settings), {}, complete=complete)
    stop, urls = threading.Event(), queue.SimpleQueue[tuple[str, str]]()
    running = _Thread(lambda: run_trainer(config, stop, started=lambda *told: urls.put(told)))
    try:
        metrics, page = running.first(urls)
        yield RunningTrainer(job=config.job, state_dir=state_dir_of(config), page=page, metrics=metrics)
    finally:
        stop.set()
        running.join()


@contextmanager
def agent(settings: str | Path | None = None, **changes: Any) -> Iterator[RunningAgent]:
    """Run an agent until the block is left, or take part to the end with ``.wait()``.

    Args:
        settings: An agent.toml; without one, ``changes`` say everything.
        changes: Settings by name, over the file's; ``broker`` may be its URL alone, ``data`` a path.

    Raises:
        SidestreamError: it cannot start.
    """
    from edge_agent.session.agent import Agent

    given = _settings(changes)
    config = load_config(AgentConfig, _path(settings), {}, complete=lambda own: _over(own, given))
    connected = queue.SimpleQueue[tuple[str, str]]()
    one = Agent(config, started=lambda metrics_url: connected.put((metrics_url, "")))
    running = _Thread(one.run)
    try:
        running.first(connected)
        yield RunningAgent(one.name, one.tier, config.state_path, running)
    finally:
        one.stop()
        running.join()


class RunningAgent:
    """An agent that runs."""

    def __init__(self, name: str, tier: str, state_dir: Path, thread: _Thread) -> None:
        self.name = name
        """The device's, in the fleet."""
        self.tier = tier
        """Its hardware tier."""
        self.state_dir = state_dir
        """Where ``sidestream.load`` finds what it adopted."""
        self._thread = thread

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until it has ended: with ``exit_when_done=True``, once all is learnt and adopted.

        Returns:
            Whether it has.

        Raises:
            SidestreamError: it has failed.
        """
        return self._thread.wait(timeout_s)


def source(name: str) -> Callable[[F], F]:
    """Make a function a source of samples: ``data={"plugin": name}`` reads what it yields.

    It is given the agent's data settings, and yields ``(text, label)`` or mappings by column::

        @sidestream.source("sensor")
        def rows(config):
            yield "too warm in here", "cool"
    """

    def take(rows: F) -> F:
        register(name, rows)
        return rows

    return take


class _Thread:
    """Runs a function, and hands on what it raises."""

    def __init__(self, work: Callable[[], object]) -> None:
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()

    def first(self, told: queue.SimpleQueue[tuple[str, str]]) -> tuple[str, str]:
        """What it tells first."""
        for _ in range(int(_START_S * 10)):
            try:
                return told.get(timeout=0.1)
            except queue.Empty:
                if not self._thread.is_alive():
                    break
        self._raise()
        return "", ""

    def wait(self, timeout_s: float | None) -> bool:
        self._thread.join(timeout_s)
        self._raise()
        return not self._thread.is_alive()

    def join(self) -> None:
        self._thread.join(_JOIN_S)

    def _run(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as exc:
            self._failure = exc

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


def _settings(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file has them."""
    given = {name: str(value) if isinstance(value, Path) else value for name, value in changes.items()}
    if isinstance(given.get("broker"), str):
        given["broker"] = {"url": given["broker"]}
    if isinstance(given.get("data"), str):
        given["data"] = {"path": given["data"]}
    return given


def _over(own: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """A file's settings with others over them, table by table."""
    merged = dict(own)
    for name, value in given.items():
        both = isinstance(value, Mapping) and isinstance(own.get(name), dict)
        merged[name] = _over(own[name], value) if both else _plain(value)
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(one) for name, one in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _path(settings: str | Path | None) -> Path | None:
    return None if settings is None else Path(settings).expanduser()
