"""What ``sidestream doctor`` says of a slow broker: what slows it, and that slow is not lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from broker_config.testing.inprocess import InProcessBroker
from broker_config.transport import Transport
from sidestream.doctor.broker import examine
from tests.doctor.test_doctor import by_name, visit


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker() as running:
        yield running


def slowed(
    broker: InProcessBroker, now: list[float], takes_s: Callable[[bytes], float]
) -> Callable[[str], Transport]:
    """Transports whose messages let the clock ``now`` go on."""

    def connect(client_id: str) -> Transport:
        transport = broker.transport(client_id)
        publish = transport.publish

        def late(topic: str, payload: bytes, **how: object) -> None:
            now[0] += takes_s(payload)
            publish(topic, payload, **how)  # type: ignore[arg-type]

        transport.publish = late  # type: ignore[method-assign]
        return transport

    return connect


def test_slow_small_messages_on_one_machine_point_at_nagle(broker: InProcessBroker, tmp_path: Path) -> None:
    now, looks = [0.0], itertools.count()
    slow = slowed(broker, now, lambda payload: 0.04)
    watched = msgspec.structs.replace(visit(slow, tmp_path), clock=lambda: now[0] + 1e-5 * next(looks))
    assert by_name(examine(watched)[0])["nodelay"].state == "warning"
    quick = msgspec.structs.replace(watched, connect=broker.transport)
    assert by_name(examine(quick)[0])["nodelay"].state == "ok"


def test_a_slow_way_for_large_messages_is_not_called_a_loss(broker: InProcessBroker, tmp_path: Path) -> None:
    now = [0.0]
    slow = slowed(broker, now, lambda payload: len(payload) / 20_000)
    watched = msgspec.structs.replace(visit(slow, tmp_path, answer_s=5.0), clock=lambda: now[0])
    bandwidth = by_name(examine(watched)[0])["bandwidth"]
    assert bandwidth.state == "warning" and "took 13 s" in bandwidth.said


def test_a_busy_machine_that_is_quick_now_and_then_is_not_taken_for_nagle(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    now, sent = [0.0], itertools.count()
    busy = slowed(broker, now, lambda payload: 0.002 if next(sent) % 20 == 19 else 0.05)
    watched = msgspec.structs.replace(visit(busy, tmp_path), clock=lambda: now[0])
    assert by_name(examine(watched)[0])["nodelay"].state == "ok"
