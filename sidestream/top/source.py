"""Where ``sidestream top`` looks: at the trainer's page, or at the broker, past the trainer."""

from __future__ import annotations

import http.client
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from typing import Final, Protocol

import msgspec

from broker_config.settings import BrokerSettings
from metrics.fleet_page.board import Board
from metrics.fleet_page.view import DeviceView, FleetView, Point, RefusalView, TrainerView
from sidestream.contract.errors import ConfigError, SidestreamError
from sidestream.contract.messages import Rejection, TrainerStatus
from sidestream.top.watch import FleetWatch

_TIMEOUT_S: Final = 10.0
_MOST_BYTES: Final = 64 * 2**20
_SETTLE_S: Final = 1.0


class PictureSource(Protocol):
    """Gives views: the first one whole, later ones whole or what is new after the one before."""

    def look(self) -> FleetView:
        """Look now.

        Raises:
            SidestreamError: if nothing can be seen; it may be tried again.
        """

    def close(self) -> None:
        """Leave."""


class PageSource:
    """Asks the trainer's page.

    Args:
        url: The page's address.

    Raises:
        ConfigError: if it is none.
    """

    def __init__(self, url: str) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError("--url", f"{url[:80]!r} is no address; write http://HOST:PORT/")
        self._url = url.rstrip("/")
        self._board, self._revision = "", 0

    def look(self) -> FleetView:
        query = urllib.parse.urlencode({"board": self._board, "since": self._revision})
        try:
            with urllib.request.urlopen(f"{self._url}/api/fleet?{query}", timeout=_TIMEOUT_S) as answer:
                view = msgspec.json.decode(answer.read(_MOST_BYTES), type=FleetView)
        except (OSError, ValueError, http.client.HTTPException) as exc:  # msgspec's errors are ValueErrors
            reason = getattr(exc, "reason", None) or exc
            raise SidestreamError(
                f"no fleet page at {self._url}/ ({reason}); is the trainer running there, with page = true? "
                "Or look at the broker instead, with --broker and --job"
            ) from exc
        self._board, self._revision = view.board, view.revision
        return view

    def close(self) -> None:
        """There is nothing to leave."""


class BrokerSource:
    """Listens to what devices and trainer tell the broker; so it knows no losses.

    Raises:
        BrokerError: if the broker cannot be reached.
    """

    def __init__(self, settings: BrokerSettings, job: str) -> None:
        self._board = Board(job, unix_s=time.time())
        self._revision, self._id = 0, ""
        self._refused = 0
        self._watch = FleetWatch(settings, job, None, on_rejection=self._on_rejection)
        time.sleep(_SETTLE_S)  # what is retained comes right after the subscription

    def look(self) -> FleetView:
        said = self._watch.trainer
        self._watch.show_on(self._board, _trainer(said, self._watch.connected))
        view = self._board.view(board=self._id, since=self._revision)
        self._id, self._revision = view.board, view.revision
        return view

    def close(self) -> None:
        self._watch.close()

    def _on_rejection(self, tier: str, device: str, rejection: Rejection) -> None:
        refusal = RefusalView(
            at_unix_s=time.time(), tier=tier, device=device, kind=rejection.kind, reason=rejection.reason
        )
        self._board.refuse(refusal)


def _trainer(said: TrainerStatus | None, connected: bool) -> TrainerView:
    if said is None:
        return TrainerView()
    return TrainerView(
        connected=connected and said.state == "online",
        version=said.version,
        published=said.version,
        final=said.final,
        samples=said.samples,
    )


class Picture:
    """Views put together: everything that is known now."""

    def __init__(self) -> None:
        self.view: FleetView | None = None
        """The last one."""
        self.points: list[Point] = []
        """All of them, oldest first."""
        self.refusals: Sequence[RefusalView] = ()
        """The newest first."""
        self._devices: dict[tuple[str, str], DeviceView] = {}

    @property
    def devices(self) -> list[DeviceView]:
        """All of them."""
        return list(self._devices.values())

    def take(self, view: FleetView) -> None:
        """Add what is new."""
        if view.whole:
            self._devices.clear()
            self.points, self.refusals = [], ()
        self._devices.update({(one.tier, one.name): one for one in view.devices})
        self.points += view.points
        if view.refusals is not None:
            self.refusals = view.refusals
        self.view = view

    def rate(self, field: str, over_s: float = 10.0) -> float | None:
        """Change a second of one of a point's counters, over the last seconds; None if that is not known."""
        if len(self.points) < 2:
            return None
        last = self.points[-1]
        first = next(one for one in self.points if one is last or last.at_unix_s - one.at_unix_s <= over_s)
        first = self.points[-2] if first is last else first
        grown: float = getattr(last, field) - getattr(first, field)
        return max(0.0, grown / (last.at_unix_s - first.at_unix_s))
