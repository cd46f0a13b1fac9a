"""Wakes a network loop that sleeps in ``select()``, from any other thread."""

import selectors
import socket
import threading


class Wakeup:
    """A pair of sockets: what is written into one end wakes whoever waits at the other."""

    def __init__(self) -> None:
        self.receiver, self._sender = socket.socketpair()
        for one in (self.receiver, self._sender):
            one.setblocking(False)
        self._sleeper = 0

    def register(self, selector: selectors.BaseSelector) -> None:
        """The thread that calls this is the one that is woken."""
        self._sleeper = threading.get_ident()
        selector.register(self.receiver, selectors.EVENT_READ)

    def wake(self) -> None:
        """Wake the loop; on its own thread it is awake."""
        if threading.get_ident() == self._sleeper:
            return
        try:
            self._sender.send(b"\0")
        except OSError:
            return  # full, so the loop will wake anyway; or closed, so there is no loop

    def heard(self) -> None:
        """The loop woke up."""
        self.receiver.recv(4096)

    def close(self) -> None:
        """There is no loop any more."""
        self._sender.close()
        self.receiver.close()
