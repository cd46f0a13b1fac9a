"""A device that publishes junk on its topic as fast as it can, in a process of its own."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from broker_config.connection.connection import Connection
from broker_config.errors import NotConnected, PublishTimeout
from broker_config.settings import BrokerSettings


def main(arguments: Sequence[str]) -> int:
    """Publish; leave in the last argument's file how much it was so far."""
    url, topic, qos, kib, seconds, note = arguments
    junk = random.Random(0).randbytes(int(kib) * 1024)
    connection = Connection(BrokerSettings(url=url), client_id="vandal", max_inflight=64)
    connection.start(lambda event: None)
    connection.wait_connected(30.0)
    sent, end_s = 0, time.monotonic() + float(seconds)
    while time.monotonic() < end_s:
        try:
            connection.publish(topic, junk, qos=int(qos), timeout_s=1.0)
            sent += 1
        except (NotConnected, PublishTimeout):
            time.sleep(0.01)
        if sent % 50 == 1:
            Path(note).write_text(str(sent))
    Path(note).write_text(str(sent))
    connection.close(timeout_s=1.0)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
