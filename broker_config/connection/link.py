"""One MQTT connection, from CONNECT to its end: the paho client, and the loop that drives it.

Each link drives a fresh paho client, because a reused one keeps queues, packet ids and half-sent messages of
the connection before. It knows nothing of reconnecting; that is
:mod:`broker_config.connection.connection`.

The link runs its own network loop (paho's "external event loop"), on the caller's thread: paho's loop sits on
``select()``, which fails beyond 1,024 open files, and its callbacks may not raise. All reading, writing
and callbacks happen on that one thread; other threads only append to paho's queue and wake it.

Sessions always start clean. A broker-side session would redeliver under packet ids that a new client reuses
for other messages, and drops what overflows it without a word; our receipts and retained messages cover both,
on any broker.
"""

import logging
import os
import selectors
import socket
import ssl
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from broker_config.connection import reasons
from broker_config.connection.link_filters import LinkFilters
from broker_config.connection.link_plan import Ending, LinkPlan, unsent_bytes
from broker_config.connection.wakeup import Wakeup
from broker_config.connection.web_client import WebClient
from broker_config.connection.window import InFlightWindow
from broker_config.errors import NotConnected
from broker_config.transport import Connected, ProtocolVersion, Received, packet_overhead_bytes

log = logging.getLogger(__name__)

_TICK_S = 1.0  # how long the loop sleeps at most; less where a shorter time has to be kept
_LOOK_S = 0.1  # how often it is seen whether messages move: not at each of thousands
_DEFAULT_RECEIVE_MAXIMUM = 65535
_PROTOCOLS = {"5": MQTTProtocolVersion.MQTTv5, "3.1.1": MQTTProtocolVersion.MQTTv311}


class Link:
    """One connection to the broker.

    Args:
        plan: What it has in common with the links before and after.
        protocol: The MQTT version to speak.
        epoch: The number it will announce.
        wanted: Gives the filters to be subscribed to, and their QoS, whenever asked.
        on_up: Called once, when every filter is subscribed.
        on_received: Called for every message that matches a wanted filter. Must not raise.
        counters: Where refusals and oddities are counted.
        most_bytes: The largest packet that the broker was found to take, if it cut the line at larger ones.
    """

    def __init__(
        self,
        plan: LinkPlan,
        *,
        protocol: ProtocolVersion,
        epoch: int,
        wanted: Callable[[], Mapping[str, int]],
        on_up: Callable[["Link", Connected], None],
        on_received: Callable[[Received], None],
        counters: Counter[str],
        most_bytes: int | None = None,
    ) -> None:
        self.epoch = epoch
        limit = min(plan.settings.max_packet_bytes, most_bytes or sys.maxsize)
        self.window = InFlightWindow(plan.max_inflight, max_packet_bytes=limit, clock=plan.clock)
        """What it has sent."""
        self._plan = plan
        self._protocol: ProtocolVersion = protocol
        self._on_up = on_up
        self._on_received = on_received
        self._counters = counters
        self._filters = LinkFilters(wanted, protocol, counters)
        self._wakeup = Wakeup()
        self._accepted: Connected | None = None
        self._up = False
        self._leaving = False
        self._ending: Ending | None = None
        self._client = self._new_client()

    def run(self) -> Ending:
        """Connect, serve until the connection ends, clean up, and say how it ended."""
        started_s = time.monotonic()
        try:
            if not self._leaving:
                self._open()
            if self._leaving:  # since before there was a socket to say so on
                self._end(Ending(reason="closed"))
            self._serve(started_s + self._plan.settings.connect_timeout_s)
        except OSError as error:
            timeout_s = self._plan.settings.connect_timeout_s
            self._end(Ending(reason=reasons.why_unreachable(error, self._plan.endpoint, timeout_s)))
        finally:
            self._tear_down()
        assert self._ending is not None
        return self._ending

    # From any thread.

    def publish(
        self,
        topic: str,
        payload: bytes,
        *,
        qos: int,
        retain: bool,
        timeout_s: float,
        correlation: bytes | None = None,
    ) -> None:
        """See :meth:`broker_config.transport.Transport.publish`; an answer carries its ``correlation``."""
        size = packet_overhead_bytes(topic) + len(payload)
        self.window.acquire(timeout_s, size)
        counted = size if qos else 0  # that QoS 0 was sent shows nothing
        self.window.handed(counted)
        # From here on, on_publish gives the place back, perhaps before publish() has returned.
        handed = self._client.publish(topic, payload, qos, retain, properties=_answering(correlation))
        if handed.rc != MQTTErrorCode.MQTT_ERR_SUCCESS:
            self.window.release()
            raise NotConnected("the connection broke while a message was handed to it")
        self.window.sent(handed.mid, counted)

    def resubscribe(self) -> None:
        """The wanted filters have changed: bring the broker into step."""
        self._filters.out_of_step = True
        self._wakeup.wake()

    def leave(self) -> None:
        """Send what is queued, then a DISCONNECT, so that the will stays unspoken; ``run`` returns."""
        self._leaving = True
        self._client.disconnect()
        self._wakeup.wake()

    def cut(self) -> None:
        """End at once, queue or no queue; ``run`` returns."""
        self._end(Ending(reason="cut off"))
        self._wakeup.wake()

    # The network loop.

    def _new_client(self) -> Client:
        plan = self._plan
        kind = WebClient if plan.endpoint.web_path else Client
        client = kind(
            CallbackAPIVersion.VERSION2,
            client_id=plan.client_id,
            clean_session=True if self._protocol == "3.1.1" else None,
            protocol=_PROTOCOLS[self._protocol],
            transport="websockets" if plan.endpoint.web_path else "tcp",
            reconnect_on_failure=False,
        )
        client.connect_timeout = plan.settings.connect_timeout_s
        client.max_inflight_messages_set(0)  # the window is ours: paho ignores the broker's limit
        if plan.endpoint.web_path:
            client.ws_set_options(path=plan.endpoint.web_path)
        if plan.endpoint.username:
            client.username_pw_set(plan.endpoint.username, plan.endpoint.password or None)
        if plan.tls is not None:
            client.tls_set_context(plan.tls)
        if plan.will is not None:
            client.will_set(plan.will.topic, plan.will.payload, plan.will.qos, plan.will.retain)
        client.on_socket_open = self._tune_socket
        client.on_socket_register_write = lambda *_: self._wakeup.wake()
        client.on_connect = self._answered
        client.on_subscribe = self._subscribed
        client.on_message = self._received
        client.on_publish = self._acknowledged
        client.on_disconnect = self._disconnected
        return client

    def _open(self) -> None:
        endpoint, keepalive_s = self._plan.endpoint, self._plan.settings.keepalive_s
        if self._protocol == "5":
            self._client.connect(endpoint.host, endpoint.port, keepalive_s, clean_start=True)
        else:
            self._client.connect(endpoint.host, endpoint.port, keepalive_s)

    def _serve(self, up_by_s: float) -> None:
        heard_s = looked_s = time.monotonic()
        with selectors.DefaultSelector() as selector:
            self._wakeup.register(selector)
            while self._ending is None:
                if self._turn(selector):
                    heard_s = time.monotonic()
                now_s = time.monotonic()
                if not self._up and now_s > up_by_s:
                    self._end(self._too_late())
                silence_s = 1.5 * self._client.keepalive  # which the broker may have changed
                if 0 < silence_s < now_s - heard_s:
                    self._end(Ending(reason=f"nothing heard from the broker for {silence_s:g} s"))
                if now_s - looked_s >= _LOOK_S:
                    looked_s = now_s
                    self._see_whether_stuck()

    def _see_whether_stuck(self) -> None:
        if self.window.stuck_s(unsent_bytes(self._socket())) > self._plan.stuck_s:
            self._counters["stuck"] += 1
            under_way, seconds = self.window.in_flight, f"{self._plan.stuck_s:g} s"
            self._end(Ending(reason=f"the broker acknowledged none of {under_way} messages for {seconds}"))

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        """Wait for the socket or a wake-up, serve both; whether anything was read."""
        client, sock = self._client, self._socket()
        if sock is None:
            self._end(Ending(reason="closed" if self._leaving else "connection lost"))
            return False
        _watch(selector, sock, client.want_write())
        buffered = not isinstance(sock, socket.socket) or isinstance(sock, ssl.SSLSocket)
        buffered = buffered and sock.pending() > 0
        ready = {key.fileobj: mask for key, mask in selector.select(0 if buffered else self._tick_s())}
        readable = buffered or bool(ready.get(sock, 0) & selectors.EVENT_READ)
        woken = self._wakeup.receiver in ready
        if woken:
            self._wakeup.heard()
        if readable:
            client.loop_read()
        if self._filters.out_of_step and self._accepted is not None:
            self._filters.bring_into_step(client)
            self._announce()
        if woken or client.want_write():
            client.loop_write()
        client.loop_misc()
        return readable

    def _tick_s(self) -> float:
        settings = self._plan.settings
        return min(_TICK_S, settings.keepalive_s / 4, settings.connect_timeout_s / 4)

    def _tear_down(self) -> None:
        self.window.break_off()
        sock = self._socket()
        if sock is not None:
            sock.close()
        self._wakeup.close()

    def _socket(self) -> Any:
        """A socket, or paho's wrapper round one, through which web sockets go; None if there is none."""
        return self._client.socket()

    def _end(self, ending: Ending) -> None:
        if self._ending is None:
            self._ending = ending

    def _too_late(self) -> Ending:
        waited_for = "a subscription" if self._accepted else "the connection"
        seconds = f"{self._plan.settings.connect_timeout_s:g} s"
        return Ending(
            reason=f"{self._plan.endpoint.address} did not confirm {waited_for} within {seconds}",
            no_answer=self._accepted is None,
        )

    def _announce(self, *, at_once: bool = False) -> None:
        settled = at_once or self._filters.settled
        if settled and not self._up and self._accepted is not None:
            self._up = True
            self._on_up(self, self._accepted)

    # Paho's callbacks; all on the network loop's thread.

    def _tune_socket(self, _client: Client, _userdata: Any, sock: Any) -> None:
        with socket.socket(fileno=os.dup(sock.fileno())) as same:  # paho's wrapper has no options
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _answered(
        self, _client: Client, _userdata: Any, _flags: ConnectFlags, code: ReasonCode, said: Properties | None
    ) -> None:
        if code.is_failure:
            reason = reasons.why_refused(code.value, str(code), self._plan.endpoint)
            unsupported = code.value == reasons.UNSUPPORTED_PROTOCOL
            self._end(Ending(reason=reason, unsupported_protocol=unsupported))
            return
        if lacking := reasons.what_lacks(said, self._plan.endpoint):
            self._end(Ending(reason=lacking))
            return
        receive_maximum = getattr(said, "ReceiveMaximum", _DEFAULT_RECEIVE_MAXIMUM)
        limit = min(self.window.max_packet_bytes, getattr(said, "MaximumPacketSize", sys.maxsize))
        places = min(self._plan.max_inflight, receive_maximum)
        self.window = InFlightWindow(places, max_packet_bytes=limit, clock=self._plan.clock)
        self._accepted = Connected(
            epoch=self.epoch,
            protocol=self._protocol,
            max_packet_bytes=limit,
            receive_maximum=receive_maximum,
        )
        self._filters.out_of_step = True

    def _subscribed(
        self, _client: Client, _userdata: Any, mid: int, codes: list[ReasonCode], _said: Properties | None
    ) -> None:
        self._filters.answered(mid, codes)
        self._announce()

    def _received(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        try:
            known = self._filters.matching.match(topic := message.topic)
        except UnicodeDecodeError:
            known = False
        if not known:
            self._counters["unsolicited"] += 1
            return
        self._announce(
            at_once=True
        )  # a broker may send retained messages before it confirms the subscription
        self._on_received(
            Received(
                topic=topic,
                payload=bytes(message.payload),
                retained=message.retain,
                qos=message.qos,
                epoch=self.epoch,
                response_topic=str(getattr(message.properties, "ResponseTopic", "")),
                correlation=bytes(getattr(message.properties, "CorrelationData", b"")),
            )
        )

    def _acknowledged(
        self, _client: Client, _userdata: Any, mid: int, code: ReasonCode, _said: Properties | None
    ) -> None:
        self.window.release(mid)
        if code.is_failure:
            self._counters["publishes_refused"] += 1
            log.log(
                logging.WARNING if self._counters["publishes_refused"] == 1 else logging.DEBUG,
                "the broker refused a message: %s; check its access list",
                code,
            )

    def _disconnected(
        self,
        _client: Client,
        _userdata: Any,
        flags: DisconnectFlags,
        code: ReasonCode,
        _said: Properties | None,
    ) -> None:
        if self._leaving:
            self._end(Ending(reason="closed"))
        elif self._accepted is None:
            self._end(Ending(reason=reasons.why_hung_up(self._plan.endpoint), hung_up=True))
        else:
            from_broker = flags.is_disconnect_packet_from_server
            self._end(
                Ending(
                    reason=reasons.why_ended(code.value, str(code), from_broker),
                    cut=not from_broker or code.value == reasons.PACKET_TOO_LARGE,
                    taken_over=from_broker and code.value == reasons.TAKEN_OVER,
                )
            )


def _answering(correlation: bytes | None) -> Properties | None:
    """What makes a message an answer."""
    if correlation is None:
        return None
    properties = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
    if correlation:
        properties.CorrelationData = correlation
    return properties


def _watch(selector: selectors.BaseSelector, sock: socket.socket, writing: bool) -> None:
    events = selectors.EVENT_READ | (selectors.EVENT_WRITE if writing else 0)
    key = selector.get_map().get(sock)
    if key is None:
        selector.register(sock, events)
    elif key.events != events:
        selector.modify(sock, events)
