"""What can go wrong with one message; the rest is :class:`sidestream.contract.errors.BrokerError` itself.

::

    BrokerError
    ├── NotConnected     no connection at the moment; publish again after the next ``Connected``
    ├── TooLarge         the message will never fit; split it
    └── PublishTimeout   the in-flight window stayed full; the broker is slow or stuck
"""

from sidestream.contract.errors import BrokerError


class NotConnected(BrokerError):  # noqa: N818  (a state, named as callers think of it)
    """There is no connection to the broker at the moment. Nothing was queued."""


class TooLarge(BrokerError):  # noqa: N818
    """A message is larger than this connection may send.

    Args:
        size: What the packet would have weighed, in bytes, header and topic included.
        limit: What the connection allows, in bytes: our own cap or the broker's, whichever is lower.
    """

    def __init__(self, size: int, limit: int) -> None:
        super().__init__(
            f"a message of {size} bytes is over the limit of {limit} bytes: split it, or raise "
            "broker.max_packet_bytes here and max_packet_size at the broker"
        )
        self.size = size
        self.limit = limit


class PublishTimeout(BrokerError):  # noqa: N818
    """The in-flight window stayed full for the whole timeout. The message was not sent."""
