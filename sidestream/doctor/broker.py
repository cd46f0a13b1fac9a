"""The doctor at the broker: what it lets us do, what it keeps, how quick it is.

All it writes is on echo topics, which nobody else looks at. It leaves one small retained mark on its own, by
which the next visit sees whether the broker forgets over a restart.
"""

from __future__ import annotations

import os
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509

from broker_config.connection.tls import tls_context
from broker_config.mosquitto import is_loopback
from broker_config.settings import BrokerSettings
from broker_config.transport import Connected, Event, Received, Transport
from sidestream.contract.errors import BrokerError
from sidestream.contract.wire import TARGET_MESSAGE_BYTES, prepared
from sidestream.doctor.finding import Finding, failed, ok, skipped, warning
from sidestream.doctor.machine import certificate_finding
from sidestream.host.state_dir import make_private, write_atomically

VERSION_TOPIC: Final = "$SYS/broker/version"
_ANSWER_S: Final = 5.0
_LARGE_TIMES: Final = 8  # a broker's web sockets may take 256 KiB at 40 KB/s, and back
_KEPT_S: Final = 0.2  # what the broker keeps comes before the answer to anything asked later; a little grace
_ERROR_S: Final = 3.0
_ROUNDS: Final = 9
_NAGLE_S: Final = 0.03
_TRIES: Final = 3
_REFUSAL_S: Final = 3.0
_LARGE_ROUNDS: Final = 4
_LEAST_MOSQUITTO: Final = (2, 0)
_LEAST_PACKET: Final = 32 * 1024  # a long sample of all tokens takes that
_MARK_FILE: Final = "doctor.json"
_MARKS: Final = 16

Connect = Callable[[str], Transport]


@prepared
class Visit(msgspec.Struct, frozen=True, kw_only=True):
    """Where the doctor goes."""

    connect: Connect
    """Makes a transport under a client id."""
    echo: str
    """The topic that is ours to write and read."""
    foreign: str
    """The same of another device."""
    plan: str
    """Where the plan is; empty where no job is known."""
    host: str
    """The broker's."""
    port: int
    """The broker's."""
    state_dir: Path
    """Where the mark of the last visit is remembered."""
    patience_s: float
    """How long to wait for the connection."""
    answer_s: float = _ANSWER_S
    """How long to wait for a message to come back."""
    clock: Callable[[], float] = time.perf_counter
    """Seconds, to time messages by."""


class _Listener:
    """A transport that remembers what it heard."""

    def __init__(self, transport: Transport, *topics: str) -> None:
        self.transport = transport
        self.heard: list[Received] = []
        self._connected: Connected | None = None
        self._changed = threading.Condition()
        for topic in topics:
            transport.subscribe(topic)
        transport.start(self._on_event)

    def _on_event(self, event: Event) -> None:
        with self._changed:
            if isinstance(event, Received):
                self.heard.append(event)
            elif isinstance(event, Connected):
                self._connected = event
            self._changed.notify_all()

    def wait_connected(self, timeout_s: float) -> Connected | None:
        """What the broker said on connecting; None if it has not yet.

        The transport may be up a moment before it has told us so.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._connected is not None, timeout_s)
            return self._connected

    def wait(self, topic: str, payload: bytes | None = None, *, timeout_s: float) -> Received | None:
        """The last message on a topic, with that payload if one is given."""

        def found() -> Received | None:
            fitting = (
                event
                for event in reversed(self.heard)
                if event.topic == topic and (payload is None or event.payload == payload)
            )
            return next(fitting, None)

        with self._changed:
            self._changed.wait_for(lambda: found() is not None, timeout_s)
            return found()

    def forget(self, payload: bytes) -> None:
        """Drop what was heard: large messages add up."""
        with self._changed:
            self.heard = [event for event in self.heard if event.payload != payload]


def examine(visit: Visit) -> tuple[list[Finding], bytes]:
    """Look at everything that needs the broker; return also the plan's payload, empty if none was heard."""
    name = f"sidestream-doctor-{os.urandom(4).hex()}"
    topics = [visit.echo, visit.foreign, VERSION_TOPIC, *([visit.plan] if visit.plan else [])]
    listener = _Listener(visit.connect(name), *topics)
    try:
        connected = _reached(listener, visit.patience_s)
        if connected is None:
            why = listener.transport.last_error or "no answer"
            here = is_loopback(visit.host) and "is the broker running?" in why
            remedy = (
                "sidestream broker run starts one on this machine" if here else "mend that, and ask again"
            )
            return [failed("broker", why, remedy)], b""
        access, echoes = _access(visit, listener)
        findings = [
            ok("broker", f"reached, MQTT {connected.protocol}"),
            _version(listener),
            _packet_limit(connected),
            access,
        ]
        if echoes:
            findings += [
                _persistence(visit, listener),
                *_speed(visit, listener, connected),
                _retained(visit, listener),
            ]
        plan = listener.wait(visit.plan, timeout_s=_KEPT_S) if visit.plan else None
        return findings, plan.payload if plan is not None else b""
    finally:
        listener.transport.close()


def _reached(listener: _Listener, patience_s: float) -> Connected | None:
    """Wait for the connection; once there is an error, not much longer."""
    connected = listener.wait_connected(min(_ERROR_S, patience_s))
    if connected is None and not listener.transport.last_error:
        connected = listener.wait_connected(patience_s - _ERROR_S)
    return connected


def _version(listener: _Listener) -> Finding:
    heard = listener.wait(VERSION_TOPIC, timeout_s=_KEPT_S)
    if heard is None:
        return skipped("version", "the broker does not tell this client")
    text = heard.payload.decode(errors="replace")[:80]
    words = text.split()
    if words[:1] == ["mosquitto"] and "version" in words:
        number = words[words.index("version") + 1]
        if tuple(int(part) for part in number.split(".")[:2] if part.isdigit()) < _LEAST_MOSQUITTO:
            return failed("version", text, "install Mosquitto 2.0 or later")
    return ok("version", text)


def _packet_limit(connected: Connected) -> Finding:
    told = "" if connected.protocol == "5" else ", as far as MQTT 3.1.1 tells"
    said = f"{connected.max_packet_bytes} bytes{told}"
    if connected.max_packet_bytes < _LEAST_PACKET:
        remedy = "raise max_packet_size at the broker, or broker.max_packet_bytes here"
        return failed("packet limit", f"{said}; {_LEAST_PACKET} are wanted at least", remedy)
    if connected.max_packet_bytes <= TARGET_MESSAGE_BYTES:
        remedy = "where you may: raise max_packet_size at the broker, or broker.max_packet_bytes here"
        return warning("packet limit", f"{said}: weights go in more parts, long batches are cut", remedy)
    return ok("packet limit", said)


def _access(visit: Visit, listener: _Listener) -> tuple[Finding, bool]:
    """Whether our own topic is ours, and another's is not; and whether the first is so."""
    if _round_trip_s(visit, listener, 16) is None:
        how = "refused" if listener.transport.refused else "thrown away"
        remedy = (
            "compare device and tier in the settings with the broker's access list (sidestream fleet list)"
        )
        return failed("access", f"what this machine writes on {visit.echo} is {how}", remedy), False
    mark, before = os.urandom(8).hex().encode(), listener.transport.refused
    listener.transport.publish(visit.foreign, mark)
    _round_trip_s(visit, listener, 16)  # what was written before is through by then, or never
    through = listener.wait(visit.foreign, mark, timeout_s=_KEPT_S) is not None
    if listener.transport.refused > before:
        return ok("access", "own topics are open, others' are closed"), True
    if not through:
        return ok("access", "own topics are open; others' cannot be seen"), True
    said = f"the broker lets this machine write and read others' topics, such as {visit.foreign}"
    if is_loopback(visit.host):
        return ok("access", f"{said}; on one machine that is as it should be"), True
    return warning("access", said, "give the broker an access list: sidestream fleet init"), True


def _speed(visit: Visit, listener: _Listener, connected: Connected) -> list[Finding]:
    """Round trips of small and of large messages."""
    small = [_round_trip_s(visit, listener, 1024) for _ in range(_ROUNDS)]
    # What waits for an acknowledgement is slow every time; a busy machine is quick now and then.
    for _ in range(_TRIES - 1):
        if None not in small and min(one for one in small if one is not None) > _NAGLE_S:
            small += [_round_trip_s(visit, listener, 1024) for _ in range(_ROUNDS)]
    if None in small:
        return [failed("round trip", "small messages get lost", "see the broker's log for dropped messages")]
    times = sorted(one for one in small if one is not None)
    median_s, best_s = statistics.median(times), times[0]
    findings = [
        ok(
            "round trip",
            f"{1000 * median_s:.1f} ms in the median of {len(times)}, {1000 * best_s:.1f} at best",
        )
    ]
    findings.append(_bandwidth(visit, listener, min(TARGET_MESSAGE_BYTES, connected.max_packet_bytes - 1024)))
    if findings[-1].state == "failed":
        return findings
    if is_loopback(visit.host) and best_s > _NAGLE_S:
        findings.append(
            warning(
                "nodelay",
                f"{1000 * best_s:.0f} ms for the fastest of {len(times)} small messages on this very machine",
                "set_tcp_nodelay true in mosquitto.conf",
            )
        )
    elif is_loopback(visit.host):
        findings.append(ok("nodelay", "small messages go out at once"))
    else:
        findings.append(
            skipped("nodelay", "only told apart from the network's delay on the broker's own machine")
        )
    return findings


def _bandwidth(visit: Visit, listener: _Listener, size: int) -> Finding:
    """Large messages, there and back; slow ones are waited for, and told from lost ones."""
    patient = msgspec.structs.replace(visit, answer_s=_LARGE_TIMES * visit.answer_s)
    fine: list[float] = []
    while len(fine) < _LARGE_ROUNDS and (took_s := _round_trip_s(patient, listener, size)) is not None:
        fine.append(took_s)
        if took_s > visit.answer_s:
            return warning(
                "bandwidth",
                f"a message of {size // 1024} KiB took {took_s:.0f} s there and back",
                "weights come late by that; if it is the broker's web sockets, use its other port",
            )
    if len(fine) < _LARGE_ROUNDS:
        return failed(
            "bandwidth",
            f"messages of {size // 1024} KiB get lost",
            "raise max_packet_size and max_queued_bytes at the broker",
        )
    rate = 2 * size / min(fine) / 1e6
    return ok("bandwidth", f"{rate:.1f} MB/s, there and back, with messages of {size // 1024} KiB")


def _round_trip_s(visit: Visit, listener: _Listener, size: int) -> float | None:
    """Seconds; None if the message does not come back."""
    payload = os.urandom(16) + bytes(size - 16)
    started = visit.clock()
    try:
        listener.transport.publish(visit.echo, payload)
    except BrokerError:
        return None
    heard = listener.wait(visit.echo, payload, timeout_s=visit.answer_s)
    took = visit.clock() - started
    listener.forget(payload)
    return took if heard is not None else None


def _retained(visit: Visit, listener: _Listener) -> Finding:
    """Whether the broker keeps a retained message for who comes later; leaves the mark for the next visit."""
    remedy = "the broker must keep retained messages: retain_available true in mosquitto.conf"
    mark = os.urandom(8).hex().encode()
    try:
        listener.transport.publish(visit.echo, mark, retain=True)
    except BrokerError as exc:
        return failed("retained", f"not taken: {exc}", remedy)
    listener.transport.flush(visit.answer_s)
    late = _Listener(visit.connect(f"sidestream-doctor-{os.urandom(4).hex()}"), visit.echo)
    try:
        late.transport.wait_connected(visit.patience_s)
        if late.wait(visit.echo, mark, timeout_s=visit.answer_s) is None:
            return failed("retained", "a client that came later did not get it", remedy)
    finally:
        late.transport.close()
    _remember(visit, mark)
    return ok("retained", "kept for who comes later")


def _persistence(visit: Visit, listener: _Listener) -> Finding:
    """Whether the mark of the last visit is still there.

    To be asked after a round trip: what the broker had kept came before that.
    """
    left = _remembered(visit).get(_place(visit), "").encode()
    if not left:
        return skipped("persistence", "a mark is left at the broker now: restart it, and ask again")
    if listener.wait(visit.echo, left, timeout_s=_KEPT_S) is not None:
        return ok("persistence", "the last visit's mark is still there")
    return failed(
        "persistence",
        "the broker has forgotten the mark of the last visit",
        "persistence true, and a persistence_location that it can write to; sidestream fleet init gives both",
    )


def _place(visit: Visit) -> str:
    """What a mark is remembered under."""
    return f"{visit.host}:{visit.port} {visit.echo}"


def _remember(visit: Visit, mark: bytes) -> None:
    marks = {**_remembered(visit), _place(visit): mark.decode()}
    latest = dict(list(marks.items())[-_MARKS:])
    try:
        make_private(visit.state_dir)
        write_atomically(visit.state_dir / _MARK_FILE, msgspec.json.encode(latest))
    except OSError:
        return  # the disk has a finding of its own


def _remembered(visit: Visit) -> dict[str, str]:
    try:
        return msgspec.json.decode((visit.state_dir / _MARK_FILE).read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}


def check_broker_certificate(settings: BrokerSettings, now_unix_s: float) -> Finding:
    """Whether the certificate that the broker shows stays valid for a while."""
    endpoint, check = settings.endpoint(), "certificate of the broker"
    try:
        with (
            socket.create_connection((endpoint.host, endpoint.port), settings.connect_timeout_s) as plain,
            tls_context(settings).wrap_socket(plain, server_hostname=endpoint.host) as sock,
        ):
            shown = sock.getpeercert(binary_form=True)
    except OSError as exc:
        return skipped(check, f"it is not shown: {exc}")
    assert shown is not None
    return certificate_finding(x509.load_der_x509_certificate(shown), check, now_unix_s)


def check_own_certificate(settings: BrokerSettings) -> list[Finding]:
    """Whether the broker hangs up over the certificate that this machine shows; nothing where it does not.

    It says so after the handshake is over on this side, so that whoever writes first sees a broken line only.
    """
    endpoint, check = settings.endpoint(), "certificate at the broker"
    try:
        with (
            socket.create_connection((endpoint.host, endpoint.port), settings.connect_timeout_s) as plain,
            tls_context(settings).wrap_socket(plain, server_hostname=endpoint.host) as sock,
        ):
            sock.settimeout(_REFUSAL_S)
            sock.recv(1)
    except ssl.SSLCertVerificationError:
        return []  # that is about the broker's, and said already
    except ssl.SSLError as exc:
        why = (exc.reason or str(exc)).lower().replace("_", " ").partition("alert ")[2]
        remedy = "sidestream fleet list says who is let in; fleet add-device NAME --again, and enrol anew"
        return [failed(check, f"the broker refuses this machine's: {why}", remedy)] if why else []
    except OSError:
        pass
    return []
