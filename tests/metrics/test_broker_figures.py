"""The broker's own figures: taken from a closed set of topics, whatever is published there."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from metrics.broker_figures import BROKER_FIGURES, BrokerFigures, read_figure

DROPPED = "$SYS/broker/publish/messages/dropped"
UPTIME = "$SYS/broker/uptime"


def test_figures_are_shown_once_the_broker_has_told_them_and_not_before() -> None:
    figures, registry = BrokerFigures(), CollectorRegistry()
    registry.register(figures)
    assert b"sidestream" not in generate_latest(registry)
    assert figures.take(DROPPED, b"3") and figures.take(UPTIME, b"86 seconds")
    assert registry.get_sample_value("sidestream_broker_publishes_dropped_total") == 3
    assert registry.get_sample_value("sidestream_broker_uptime_seconds") == 86
    assert registry.get_sample_value("sidestream_broker_clients_connected") is None
    assert figures[DROPPED] == 3 and math.isnan(figures["$SYS/broker/clients/connected"])


def test_a_broker_out_of_reach_has_no_figures() -> None:
    figures = BrokerFigures()
    figures.take(DROPPED, b"3")
    figures.clear()
    assert list(figures.collect()) == []


def test_other_topics_are_not_taken() -> None:
    figures = BrokerFigures()
    assert not figures.take("$SYS/broker/version", b"3")
    assert not figures.take(f"{DROPPED}/x", b"3")
    assert not list(figures.collect())


@given(st.binary(max_size=64))
def test_whatever_is_published_there_a_figure_is_finite_and_not_negative(payload: bytes) -> None:
    figure = read_figure(payload)
    assert figure is None or (math.isfinite(figure) and figure >= 0)


@given(st.integers(0, 10**18 - 1))
def test_every_count_is_read_as_it_was_written(number: int) -> None:
    assert read_figure(str(number).encode()) == float(number)
    assert read_figure(f"{number} seconds".encode()) == float(number)


def test_the_topics_are_plain_names_below_the_brokers_tree() -> None:
    for topic in BROKER_FIGURES:
        assert topic.startswith("$SYS/broker/") and not set("+#") & set(topic)
