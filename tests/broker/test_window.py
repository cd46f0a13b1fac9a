"""The in-flight window: bounded, and nobody waits for a connection that is gone."""

import threading

import pytest

from broker_config.connection.window import InFlightWindow
from broker_config.errors import NotConnected, PublishTimeout, TooLarge


def test_a_full_window_times_out_and_takes_nothing() -> None:
    window = InFlightWindow(2)
    window.acquire(0.0)
    window.acquire(0.0)
    with pytest.raises(PublishTimeout):
        window.acquire(0.01)
    assert window.in_flight == 2


def test_an_acknowledgement_lets_the_next_one_in() -> None:
    window = InFlightWindow(1)
    window.acquire(0.0)
    waiter = threading.Thread(target=window.acquire, args=(10.0,))
    waiter.start()
    window.release()
    waiter.join(10.0)
    assert not waiter.is_alive()
    assert window.in_flight == 1


def test_an_acknowledgement_may_come_before_the_sender_knows_it_has_sent() -> None:
    window = InFlightWindow(1)
    window.acquire(0.0)
    window.release()
    assert window.drain(0.0)


def test_an_acknowledgement_that_is_heard_before_its_number_is_known_counts() -> None:
    window = InFlightWindow(9)
    window.acquire(0.0)
    window.handed(100)
    assert window.largest_unacknowledged == 100
    window.release(7)
    window.sent(7, 100)
    window.acquire(0.0)
    window.handed(50)
    window.sent(8, 50)
    assert (window.largest_acknowledged, window.largest_unacknowledged) == (100, 50)
    window.release(8)
    assert window.drain(0.0) and (window.largest_acknowledged, window.largest_unacknowledged) == (100, 0)


def test_a_packet_that_is_too_large_takes_no_place() -> None:
    window = InFlightWindow(9, max_packet_bytes=100)
    window.acquire(0.0, 100)
    with pytest.raises(TooLarge):
        window.acquire(0.0, 101)
    assert window.in_flight == 1


def test_whoever_drains_waits_for_what_is_in_flight_and_for_nothing_else() -> None:
    window = InFlightWindow(2)
    window.acquire(0.0)
    assert not window.drain(0.0)
    window.acquire(0.0)
    outcomes: list[bool] = []
    waiter = threading.Thread(target=lambda: outcomes.append(window.drain(600.0)), daemon=True)
    waiter.start()
    window.release()
    window.release()
    waiter.join(10.0)
    assert outcomes == [True]
    window.break_off()
    assert not window.drain(0.0)


def test_breaking_off_wakes_everyone() -> None:
    window = InFlightWindow(1)
    window.acquire(0.0)
    outcomes: list[object] = []

    def publish() -> None:
        try:
            window.acquire(600.0)
        except NotConnected as error:
            outcomes.append(error)

    threads = [
        threading.Thread(target=publish, daemon=True),
        threading.Thread(target=lambda: outcomes.append(window.drain(600.0)), daemon=True),
    ]
    for thread in threads:
        thread.start()
    window.break_off()
    for thread in threads:
        thread.join(10.0)
    assert len(outcomes) == 2
    assert False in outcomes
    with pytest.raises(NotConnected):
        window.acquire(0.0)


def test_a_window_is_stuck_while_something_is_in_flight_and_nothing_moves() -> None:
    now = [0.0]
    window = InFlightWindow(3, clock=lambda: now[0])
    now[0] = 50.0
    assert window.stuck_s() == 0.0
    window.acquire(0.0)
    window.acquire(0.0)
    now[0] = 57.0
    assert window.stuck_s() == 7.0
    assert window.stuck_s(256) == 7.0, "a ping says nothing of messages"
    assert window.stuck_s(9000) == 0.0
    now[0] = 58.0
    assert (window.stuck_s(9000), window.stuck_s(8000)) == (1.0, 0.0), "some of it has left this machine"
    now[0] = 60.0
    window.release()
    assert window.stuck_s() == 0.0
    now[0] = 64.0
    window.acquire(0.0)  # one more is no sign of life
    assert window.stuck_s() == 4.0
