"""Another agent under this device's name: recognised by its status, and waited for until it has left.

Each hears, on its own status topic, the other's birth, and says its own again if it ranks above. One that
hears the birth of one that ranks above it, or finds its birth or will there when it comes back, gives way: it
sends nothing more, and looks now and then, under another client id, whether the name is free again. The
other one stays. Where the state directory was copied, both have one client id too: the broker throws one out
when the other connects.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from typing import Final

from broker_config.transport import Event, Received, Transport
from sidestream.contract.errors import WireError
from sidestream.contract.messages import Status
from sidestream.contract.wire import unpack

LOOK_EVERY_S: Final = 30.0
_ANSWER_S: Final = 5.0
_TELL_EVERY_S: Final = 600.0
log = logging.getLogger(__name__)


def ranks_above(other: Status, *, birth: int, instance: str) -> bool:
    """Whether a status on our topic is that of another agent to which we give way.

    Any order does, as long as both agree: births first, so that what an earlier life of ours left behind, or
    a broker brought back from an old save, never does.
    """
    return bool(other.instance) and (other.birth, other.instance) > (birth, instance)


def await_departure(
    look: Callable[[], Transport], topic: str, stop: threading.Event, every_s: float = LOOK_EVERY_S
) -> None:
    """Return once the duplicate device's status says offline, or ``stop`` is set.

    Args:
        look: Makes a transport under another client id.
        topic: Of the status.
        stop: Ends the waiting.
        every_s: Between two looks.
    """
    told_s = float("-inf")
    while True:
        if time.monotonic() - told_s >= _TELL_EVERY_S:
            told_s = time.monotonic()
            log.error(
                "another agent has this device's name and has taken over: this one sends nothing until that "
                "one leaves. Give every device a name of its own (device = ...), and a state directory too"
            )
        if stop.wait(every_s * random.uniform(0.5, 1.5)) or _is_free(look(), topic, stop):
            return


def _is_free(transport: Transport, topic: str, stop: threading.Event) -> bool:
    """Whether the retained status on ``topic`` says offline, or there is none."""
    heard: list[Received] = []
    came = threading.Event()

    def note(event: Event) -> None:
        if isinstance(event, Received):
            heard.append(event)
            came.set()

    transport.subscribe(topic)
    try:
        transport.start(note)
        deadline_s = time.monotonic() + _ANSWER_S
        while not (came.wait(0.1) or stop.is_set() or time.monotonic() > deadline_s):
            continue
        if not heard:
            return transport.connected
        return not heard[-1].payload or unpack(Status, heard[-1].payload).state == "offline"
    except WireError:
        return False
    finally:
        transport.close()
