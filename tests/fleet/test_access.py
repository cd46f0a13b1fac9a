"""Who can write and read what at a fleet's real broker: the whole matrix, on MQTT 5 and 3.1.1."""

from __future__ import annotations

import secrets

import msgspec
import pytest

from broker_config.access import TRAINER
from broker_config.authority import Authority
from broker_config.connection.backoff import Backoff
from broker_config.connection.connection import Connection
from broker_config.transport import ProtocolVersion
from sidestream.contract.topics import Topics
from tests.broker.conftest import needs_mosquitto
from tests.fleet.conftest import DEVICES, JOB, OBSERVER, Client, Guard
from tests.until import until

pytestmark = [pytest.mark.mosquitto, needs_mosquitto]
ACTORS = (TRAINER, *DEVICES)
PROTOCOLS = pytest.mark.parametrize("protocol", ["5", "3.1.1"])
END = b"that was all"


def tree(job: str) -> list[str]:
    """Every topic of a job with the fleet's devices, and some that are none."""
    topics = Topics(job)
    found = [topics.plan, topics.trainer_status, topics.trainer_claim, f"{topics.base}/other"]
    for tier in {*DEVICES.values(), "generic"}:
        found += [topics.weights(tier), topics.final_weights(tier), topics.weights_chunk(tier, 7, 0)]
        found.append(topics.flow(tier))
        for device in (*DEVICES, "stranger"):
            found += [
                topics.activations(tier, device),
                topics.adapter(tier, device),
                topics.gradient(tier, device, 0),
                topics.gradient(tier, device, 63),
                topics.query(tier, device),
                topics.prediction(tier, device, 0),
                topics.prediction(tier, device, 63),
                topics.status(tier, device),
                topics.telemetry(tier, device),
                topics.echo(tier, device),
                topics.receipt(tier, device),
                topics.assignment(tier, device),
                topics.rejected(tier, device),
                f"{topics.base}/up/{tier}/{device}/other",
                f"{topics.base}/up/{tier}/{device}/activations/below",
            ]
    return found


EVERYTHING = [*tree(JOB), *tree("another-job"), "elsewhere", "sidestream/v1", "sidestream/v2/lights/plan"]


def may_write(actor: str, topic: str) -> bool:
    if actor == TRAINER:
        return topic.startswith(f"sidestream/v1/{JOB}/")
    own = f"sidestream/v1/{JOB}/up/{DEVICES[actor]}/{actor}"
    return topic in tuple(
        f"{own}/{kind}" for kind in ("activations", "adapter", "query", "status", "telemetry", "echo")
    )


def may_read(actor: str, topic: str) -> bool:
    if actor == TRAINER:
        return topic.startswith(f"sidestream/v1/{JOB}/")
    tier, base = DEVICES[actor], f"sidestream/v1/{JOB}"
    return topic in (
        f"{base}/plan",
        f"{base}/trainer/status",
        f"{base}/down/{tier}/weights",
        f"{base}/down/{tier}/weights/final",
        f"{base}/down/{tier}/weights/7/0",
        f"{base}/down/{tier}/flow",
        f"{base}/down/{tier}/device/{actor}/receipt",
        f"{base}/down/{tier}/device/{actor}/assignment",
        f"{base}/down/{tier}/device/{actor}/gradient/0",
        f"{base}/down/{tier}/device/{actor}/gradient/63",
        f"{base}/down/{tier}/device/{actor}/prediction/0",
        f"{base}/down/{tier}/device/{actor}/prediction/63",
        f"{base}/up/{tier}/{actor}/status",
        f"{base}/up/{tier}/{actor}/echo",
    )


@PROTOCOLS
def test_everybody_writes_what_is_his_and_nothing_else(guard: Guard, protocol: ProtocolVersion) -> None:
    observer = Client(guard, OBSERVER, "5", "#").wait()
    for actor in ACTORS:
        client = Client(guard, actor, protocol).wait()
        for retain in (False, True):
            payload = f"{actor} {retain}".encode()
            before = client.connection.refused
            for topic in EVERYTHING:
                client.connection.publish(topic, payload, retain=retain)
            assert client.connection.flush(20)
            observer.connection.publish("end", END + payload)
            until(lambda payload=payload: observer.topics(END + payload), "the end")  # type: ignore[misc]
            allowed = {topic for topic in EVERYTHING if may_write(actor, topic)}
            assert observer.topics(payload) == allowed, actor
            denied = client.connection.refused - before
            assert denied == (len(EVERYTHING) - len(allowed) if protocol == "5" else 0)
        client.close()
    observer.close()


@PROTOCOLS
def test_everybody_reads_what_is_meant_for_him_and_nothing_else(
    guard: Guard, protocol: ProtocolVersion
) -> None:
    observer = Client(guard, OBSERVER, "5").wait()
    for topic in EVERYTHING:
        observer.connection.publish(topic, b"kept", retain=True)
    assert observer.connection.flush(20)
    for actor in ACTORS:
        own = Topics(JOB).plan  # which everybody may read, so that it can end the test
        greedy = Client(guard, actor, protocol, "#", "$SYS/#").wait()
        exact = Client(guard, actor, protocol, *EVERYTHING).wait()
        for topic in EVERYTHING:
            observer.connection.publish(topic, b"live")
        observer.connection.publish(own, END)
        allowed = {topic for topic in EVERYTHING if may_read(actor, topic)}
        for client in (greedy, exact):
            until(lambda client=client: client.topics(END), "the end")  # type: ignore[misc]
            assert client.topics(b"live") == allowed, actor
            assert client.topics(b"kept") == allowed, actor
            system = {event.topic for event in client.received if event.topic.startswith("$")}
            assert bool(system) == (actor == TRAINER and client is greedy)
            client.close()
    observer.close()


@PROTOCOLS
def test_who_shows_no_certificate_of_the_fleet_is_not_let_in(guard: Guard, protocol: ProtocolVersion) -> None:
    guard.identities["stranger"] = Authority.new("somebody else's fleet").client("pi-1")
    good = guard.settings("pi-1", protocol)
    bare = msgspec.structs.replace(good, cert_file="", key_file="")
    for settings in (bare, guard.settings("stranger", protocol)):
        connection = Connection(settings, client_id="stranger", backoff=Backoff(first_s=0.02, cap_s=0.1))
        connection.start(lambda _event: None)
        until(lambda connection=connection: connection.last_error, "an error")  # type: ignore[misc]
        assert not connection.connected
        connection.close()


def test_a_certificate_of_the_fleet_that_the_list_does_not_name_can_do_nothing(guard: Guard) -> None:
    guard.identities["ghost"] = guard.authority.client("ghost")
    observer = Client(guard, OBSERVER, "5", "#").wait()
    ghost = Client(guard, "ghost", "5", "#").wait()
    for topic in EVERYTHING:
        ghost.connection.publish(topic, b"boo")
    assert ghost.connection.flush(20) and ghost.connection.refused == len(EVERYTHING)
    observer.connection.publish(Topics(JOB).plan, END)
    until(lambda: observer.topics(END))
    assert not observer.topics(b"boo") and not ghost.received
    for client in (observer, ghost):
        client.close()


@PROTOCOLS
def test_a_revoked_device_loses_its_rights_on_reload_and_cannot_come_back(
    guard: Guard, protocol: ProtocolVersion
) -> None:
    status = Topics(JOB).status("pi5", "pi-1")
    observer = Client(guard, OBSERVER, "5", "#").wait()
    device = Client(guard, "pi-1", protocol).wait()
    device.connection.publish(status, b"before")
    until(lambda: observer.topics(b"before"))
    guard.folder.revoke("pi-1")
    guard.reload()

    def denied() -> bool:
        mark = secrets.token_hex(8).encode()
        device.connection.publish(status, b"after " + mark)
        assert device.connection.flush(20)
        observer.connection.publish("end", END + mark)
        until(lambda: observer.topics(END + mark))
        return not observer.topics(b"after " + mark)

    until(denied, "the list to be read again")
    device.close()
    again = Client(guard, "pi-1", protocol)
    until(lambda: again.connection.last_error, "an error")
    assert not again.up
    again.close()
    other = Client(guard, "pi-2", protocol).wait()
    for client in (observer, other):
        client.close()
