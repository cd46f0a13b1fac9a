"""How large a packet may be where the broker does not say: learnt from where it cuts the line. Pure.

MQTT 3.1.1 tells no limit in its CONNACK, and some brokers and load balancers of MQTT 5 leave theirs out. They
all do the same with a packet that is too large: they close the connection, without a word. A line that is cut
twice in a row with the same size of message unacknowledged, and never carried one so large, has such a limit.
"""

from typing import Final

_LEAST_BYTES: Final = 4096  # any broker takes that much: a smaller message is not what the line was cut for
_SAME: Final = 1 / 16  # two sizes are the same message's, give or take a changed header


class PacketLimit:
    """What one broker takes, over all links to it. Belongs to one thread."""

    def __init__(self) -> None:
        self.found_bytes: int | None = None
        """The largest packet to send from now on; None as long as there is no reason to think of any."""
        self._passed_bytes = 0
        self._suspect_bytes = 0

    def lost(self, *, cut: bool, unacknowledged_bytes: int, acknowledged_bytes: int) -> bool:
        """Learn from a link that ended.

        Args:
            cut: The other end closed it, and not for a reason that it gave.
            unacknowledged_bytes: The largest packet that was not acknowledged by then; 0 for none.
            acknowledged_bytes: The largest one that was; 0 for none.

        Returns:
            Whether a limit, or a lower one, was found.
        """
        self._passed_bytes = max(self._passed_bytes, acknowledged_bytes)
        size, before = unacknowledged_bytes, self._suspect_bytes
        if not cut:
            return False
        if size <= max(self._passed_bytes, _LEAST_BYTES):
            self._suspect_bytes = 0
            return False
        if abs(size - before) > _SAME * before:
            self._suspect_bytes = size
            return False
        self._suspect_bytes = 0
        self.found_bytes = power_of_two_below(size)
        return True


def power_of_two_below(size: int) -> int:
    """The largest power of two below ``size``, which is over 1: limits mostly are one."""
    return 1 << ((size - 1).bit_length() - 1)
