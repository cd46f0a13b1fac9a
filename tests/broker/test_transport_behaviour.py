"""What every transport promises, in-process or over MQTT: one set of tests for all of them."""

import contextlib
import threading

import pytest

from broker_config.errors import NotConnected, PublishTimeout, TooLarge
from broker_config.transport import Connected, Disconnected, Event, Received, Will, packet_overhead_bytes
from tests.broker.conftest import PATIENCE_S, Bench, Client
from tests.until import until


def test_messages_go_both_ways(bench: Bench) -> None:
    one, two = f"{bench.topic}/one", f"{bench.topic}/two"
    alice, bob = bench.client("alice", one), bench.client("bob", two)
    alice.transport.publish(two, b"to bob")
    bob.transport.publish(one, b"to alice", qos=0)
    assert bob.inbox.payloads(1) == [b"to bob"]
    assert alice.inbox.payloads(1) == [b"to alice"]


def test_messages_of_one_sender_arrive_in_order(bench: Bench) -> None:
    listener = bench.client("listener", f"{bench.topic}/#")
    sender = bench.client("sender")
    sent = [b"%d" % number for number in range(100)]
    for payload in sent:
        sender.transport.publish(f"{bench.topic}/x", payload)
    assert listener.inbox.payloads(100) == sent


def test_wildcards_select_what_is_received(bench: Bench) -> None:
    listener = bench.client("listener", f"{bench.topic}/up/+/a/#", f"{bench.topic}/end")
    sender = bench.client("sender")
    for leaf in ("up/t/a/1", "up/t/a", "up/t/b/1", "up/a/1", "down/t/a/1", "end"):
        sender.transport.publish(f"{bench.topic}/{leaf}", leaf.encode())
    listener.inbox.wait(Received, where=lambda event: event.payload == b"end")
    assert listener.inbox.payloads(3) == [b"up/t/a/1", b"up/t/a", b"end"]


def test_a_late_subscriber_gets_the_last_retained_message(bench: Bench) -> None:
    topic = f"{bench.topic}/plan"
    sender = bench.client("sender")
    for payload in (b"old", b"new"):
        sender.transport.publish(topic, payload, retain=True)
    assert sender.transport.flush(PATIENCE_S)
    late = bench.client("late", topic)
    (received,) = late.inbox.wait(Received)
    assert (received.payload, received.retained) == (b"new", True)


def test_an_empty_payload_clears_the_retained_message(bench: Bench) -> None:
    sender = bench.client("sender")
    sender.transport.publish(f"{bench.topic}/a", b"kept", retain=True)
    sender.transport.publish(f"{bench.topic}/a", b"", retain=True)
    sender.transport.publish(f"{bench.topic}/b", b"kept", retain=True)
    assert sender.transport.flush(PATIENCE_S)
    late = bench.client("late", f"{bench.topic}/#")
    (received,) = late.inbox.wait(Received)
    assert received.topic == f"{bench.topic}/b"


def test_nobody_gets_retained_messages_of_other_peoples_filters(bench: Bench) -> None:
    sender = bench.client("sender", f"{bench.topic}/secret")
    sender.transport.publish(f"{bench.topic}/secret", b"!", retain=True)
    sender.inbox.wait(Received)
    other = bench.client("other", f"{bench.topic}/open")
    sender.transport.publish(f"{bench.topic}/open", b"open")
    assert other.inbox.payloads(1) == [b"open"]


def test_a_filter_added_while_connected_takes_effect_and_a_removed_one_stops(bench: Bench) -> None:
    listener, sender = bench.client("listener"), bench.client("sender")
    sender.transport.publish(f"{bench.topic}/a", b"a", retain=True)
    sender.transport.publish(f"{bench.topic}/b", b"b", retain=True)
    assert sender.transport.flush(PATIENCE_S)
    listener.transport.subscribe(f"{bench.topic}/a")
    listener.inbox.wait(Received, where=lambda event: event.payload == b"a")
    listener.transport.unsubscribe(f"{bench.topic}/a")
    listener.transport.subscribe(f"{bench.topic}/b")
    listener.inbox.wait(Received, where=lambda event: event.payload == b"b")
    sender.transport.publish(f"{bench.topic}/a", b"unheard")
    sender.transport.publish(f"{bench.topic}/b", b"heard")
    assert listener.inbox.payloads(3) == [b"a", b"b", b"heard"]


def test_the_will_is_published_when_the_connection_is_lost(bench: Bench) -> None:
    watcher = bench.client("watcher", f"{bench.topic}/status")
    device = bench.client("device", will=Will(topic=f"{bench.topic}/status", payload=b"dead"))
    bench.cut(device)
    assert watcher.inbox.payloads(1) == [b"dead"]
    late = bench.client("late", f"{bench.topic}/status")
    assert late.inbox.wait(Received)[0].retained


def test_a_clean_close_says_the_last_words_and_not_the_will(bench: Bench) -> None:
    watcher = bench.client("watcher", f"{bench.topic}/#")
    device = bench.client("device", will=Will(topic=f"{bench.topic}/status", payload=b"dead"))
    device.transport.publish(f"{bench.topic}/status", b"alive", retain=True)
    device.transport.close(last_words=[(f"{bench.topic}/status", b"gone", 1, True)])
    assert watcher.inbox.payloads(2) == [b"alive", b"gone"]
    after = bench.client("after")
    after.transport.publish(f"{bench.topic}/x", b"later")
    assert watcher.inbox.payloads(3) == [b"alive", b"gone", b"later"]
    late = bench.client("late", f"{bench.topic}/status")
    assert late.inbox.payloads(1) == [b"gone"]


def test_a_lost_connection_comes_back_with_its_filters_and_the_next_epoch(bench: Bench) -> None:
    listener, sender = bench.client("listener", f"{bench.topic}/#"), bench.client("sender")
    bench.cut(listener)
    listener.inbox.wait(Connected, count=2)
    sender.transport.publish(f"{bench.topic}/x", b"again")
    (received,) = listener.inbox.wait(Received)
    assert received.epoch == 2
    assert [type(event) for event in listener.inbox.events] == [Connected, Disconnected, Connected, Received]
    assert [event.epoch for event in listener.inbox.events] == [1, 1, 2, 2]


def test_clients_resubscribe_after_a_broker_restart(bench: Bench) -> None:
    listener, sender = bench.client("listener", f"{bench.topic}/#"), bench.client("sender")
    bench.stop_broker()
    for client in (listener, sender):
        client.inbox.wait(Disconnected)
    bench.start_broker()
    for client in (listener, sender):
        client.inbox.wait(Connected, count=2)
    sender.transport.publish(f"{bench.topic}/x", b"after")
    assert listener.inbox.payloads(1) == [b"after"]


def test_offline_publishing_raises_and_queues_nothing(bench: Bench) -> None:
    never_started = bench.make("never-started")
    with pytest.raises(NotConnected):
        never_started.publish(f"{bench.topic}/x", b"lost")
    listener, sender = bench.client("listener", f"{bench.topic}/#"), bench.client("sender")
    bench.stop_broker()
    sender.inbox.wait(Disconnected)
    until(lambda: not sender.transport.connected)
    with pytest.raises(NotConnected):
        sender.transport.publish(f"{bench.topic}/x", b"lost")
    assert not sender.transport.flush(0.01)
    assert sender.transport.last_error
    bench.start_broker()
    for client in (listener, sender):
        client.inbox.wait(Connected, count=2)
    assert not sender.transport.last_error

    def arrived() -> bool:
        """A broker that has just started may hang up once more: say it again then."""
        with contextlib.suppress(NotConnected):
            sender.transport.publish(f"{bench.topic}/x", b"kept")
        return any(isinstance(event, Received) for event in listener.inbox.events)

    until(arrived)
    assert set(listener.inbox.payloads(1)) == {b"kept"}


def test_a_message_that_is_too_large_raises_and_the_connection_goes_on(bench: Bench) -> None:
    topic = f"{bench.topic}/x"
    listener, sender = bench.client("listener", topic), bench.client("sender")
    limit = sender.inbox.wait(Connected)[0].max_packet_bytes
    largest = limit - packet_overhead_bytes(topic)
    with pytest.raises(TooLarge) as caught:
        sender.transport.publish(topic, b"x" * (largest + 1))
    assert (caught.value.size, caught.value.limit) == (limit + 1, limit)
    sender.transport.publish(topic, b"x" * largest)
    assert len(listener.inbox.payloads(1)[0]) == largest
    assert sender.inbox.all(Disconnected) == []


def test_a_bad_topic_or_qos_is_the_callers_bug(bench: Bench) -> None:
    sender = bench.client("sender")
    for topic in ("", "a/#", "a/+/b", "a\0b", "a\ud800", "x" * 65536):
        with pytest.raises(ValueError):
            sender.transport.publish(topic, b"")
    with pytest.raises(ValueError):
        sender.transport.publish("a", b"", qos=2)
    for topic_filter in ("", "a/#/b", "a+", "a#"):
        with pytest.raises(ValueError):
            sender.transport.subscribe(topic_filter)
    sender.transport.publish(f"{bench.topic}/x", b"still fine")
    assert sender.transport.flush(PATIENCE_S)


def test_two_hundred_publishes_from_four_threads_all_arrive_once(bench: Bench) -> None:
    listener = bench.client("listener", f"{bench.topic}/#")
    sender = bench.client("sender", max_inflight=8)
    errors: list[Exception] = []

    def work(thread: int) -> None:
        try:
            for number in range(50):
                sender.transport.publish(f"{bench.topic}/{thread}", b"%d/%d" % (thread, number))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert sender.transport.flush(PATIENCE_S)
    expected = sorted(b"%d/%d" % (thread, number) for thread in range(4) for number in range(50))
    assert sorted(listener.inbox.payloads(200)) == expected


def test_what_on_event_raises_harms_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    transport = bench.make("clumsy")
    transport.subscribe(f"{bench.topic}/#")
    heard: list[bytes] = []
    twice = threading.Event()

    def clumsy(event: Event) -> None:
        if isinstance(event, Received):
            heard.append(event.payload)
            if len(heard) == 2:
                twice.set()
        raise RuntimeError("a bug in a handler")

    transport.start(clumsy)
    assert transport.wait_connected(PATIENCE_S)
    for payload in (b"1", b"2"):
        transport.publish(f"{bench.topic}/x", payload)
    assert twice.wait(PATIENCE_S)
    assert heard == [b"1", b"2"]
    assert transport.connected
    assert "a bug in a handler" in caplog.text


def test_publishing_from_on_event_is_refused_instead_of_waiting_for_itself(bench: Bench) -> None:
    transport = bench.make("reentrant")
    refused: list[Exception] = []
    done = threading.Event()

    def reentrant(_event: Event) -> None:
        for call in (
            lambda: transport.publish(f"{bench.topic}/x", b""),
            lambda: transport.flush(1.0),
            transport.close,
        ):
            try:
                call()
            except RuntimeError as error:
                refused.append(error)
        done.set()

    transport.start(reentrant)
    assert done.wait(PATIENCE_S)
    assert len(refused) == 3


def test_closing_flushes_and_may_be_repeated(bench: Bench) -> None:
    listener, sender = bench.client("listener", f"{bench.topic}/#"), bench.client("sender")
    for number in range(50):
        sender.transport.publish(f"{bench.topic}/x", b"%d" % number)
    sender.transport.close()
    sender.transport.close()
    assert len(listener.inbox.payloads(50)) == 50
    assert not sender.transport.connected
    assert isinstance(sender.inbox.events[-1], Disconnected)
    with pytest.raises(NotConnected):
        sender.transport.publish(f"{bench.topic}/x", b"too late")


def test_closing_before_starting_is_fine(bench: Bench) -> None:
    transport = bench.make("idle")
    transport.close()
    assert not transport.wait_connected(0.0)
    with pytest.raises(RuntimeError):
        transport.start(lambda _event: None)


def test_closing_while_the_broker_is_down_is_quick_and_clean(bench: Bench) -> None:
    client = bench.client("client")
    bench.stop_broker()
    client.inbox.wait(Disconnected)
    client.transport.close(last_words=[(f"{bench.topic}/x", b"unheard", 1, False)], timeout_s=0.5)
    assert not client.transport.connected


def test_a_second_client_with_the_same_id_throws_the_first_out(bench: Bench) -> None:
    first = bench.client("twin", will=Will(topic=f"{bench.topic}/w", payload=b"dead"))
    second = bench.make("twin")
    second.start(lambda _event: None)
    assert second.wait_connected(PATIENCE_S)
    until(lambda: bool(first.inbox.all(Disconnected)) or not first.transport.connected)
    second.close()


def test_three_hundred_kibibyte_messages_pass_where_settings_allow(bench: Bench) -> None:
    payload = bytes(range(256)) * 1200
    listener = bench.client("listener", f"{bench.topic}/#")
    transport = bench.make("sender", max_packet_bytes=1024 * 1024)
    sender = Client(transport, "sender")
    sender.transport.publish(f"{bench.topic}/x", payload, retain=True)
    assert listener.inbox.payloads(1) == [payload]
    late = bench.client("late", f"{bench.topic}/#")
    assert late.inbox.payloads(1) == [payload]


def test_the_window_bounds_what_is_in_flight(bench: Bench) -> None:
    """A broker that stops answering fills the window; the next publish times out and is not sent."""
    listener = bench.client("listener", f"{bench.topic}/#")
    sender = bench.client("sender", max_inflight=4)
    bench.freeze(sender)
    for number in range(4):
        sender.transport.publish(f"{bench.topic}/x", b"%d" % number)
    with pytest.raises(PublishTimeout):
        sender.transport.publish(f"{bench.topic}/x", b"one too many", timeout_s=0.05)
    assert not sender.transport.flush(0.01)
    bench.thaw(sender)
    assert sender.transport.flush(PATIENCE_S)
    sender.transport.publish(f"{bench.topic}/x", b"room again")
    assert listener.inbox.payloads(5) == [b"0", b"1", b"2", b"3", b"room again"]
