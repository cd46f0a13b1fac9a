"""The adopted weights on disk: what a restart and ``predict`` go by. Replaced as a whole or not at all.

``weights/adopted.json`` names the bundle file beside it and holds all it takes to predict; it is written
last.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from sidestream.contract.errors import StateError, StorageError, WireError
from sidestream.contract.plan import FedMobiLLM, MethodPlan, TierPlan
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import write_atomically
from sidestream.side_network.bundle import Bundle, decode_bundle, digest

_FOLDER = "weights"
_INDEX = "adopted.json"


@prepared
class Adopted(msgspec.Struct, frozen=True, kw_only=True):
    """What a device adopted, and for which backbone."""

    run: str
    """The trainer's journal id."""
    version: int
    """The version, comparable within one run."""
    bundle_digest: str
    """sha256 of the bundle; its file is named by it."""
    state_digest: str
    """sha256 of the trainer's whole side-network at this version."""
    tier: str
    """The device's tier."""
    tier_plan: TierPlan
    """What the job's plan said of the tier."""
    backbone: str
    """Where this device has the backbone."""
    method: MethodPlan = FedMobiLLM()
    """How the job learns."""


class AdoptedWeights(NamedTuple):
    """Adopted weights as read from disk."""

    adopted: Adopted
    data: bytes
    """The bundle, as its method reads it."""

    @property
    def bundle(self) -> Bundle:
        """A side-network's.

        Raises:
            StateError: it is none.
        """
        try:
            return decode_bundle(self.data)
        except WireError as exc:
            raise StateError(f"the adopted weights cannot be used: {exc}") from exc


def save_adopted(state_dir: Path, adopted: Adopted, bundle: bytes) -> None:
    """Replace what was adopted before; a crash at any moment leaves the old or the new, whole.

    Raises:
        StorageError: it cannot be written.
    """
    folder = state_dir / _FOLDER
    name = _bundle_name(adopted)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        write_atomically(folder / name, bundle)
        write_atomically(folder / _INDEX, msgspec.json.format(msgspec.json.encode(adopted), indent=2))
        for old in folder.glob("*.safetensors"):
            if old.name != name:
                old.unlink()
    except OSError as exc:
        raise StorageError(f"{folder}: adopted weights cannot be saved: {exc.strerror}") from exc


def load_adopted(state_dir: Path) -> AdoptedWeights | None:
    """What was adopted last, or None.

    Raises:
        StateError: there is something, but it is damaged.
    """
    folder = state_dir / _FOLDER
    for attempt in range(3):
        try:
            adopted = msgspec.json.decode((folder / _INDEX).read_bytes(), type=Adopted)
            data = (folder / _bundle_name(adopted)).read_bytes()
        except FileNotFoundError as exc:
            if not (folder / _INDEX).exists():
                return None
            if attempt == 2:  # an agent may replace the files while we read; three times is no coincidence
                raise StateError(
                    f"{folder}: the adopted bundle is missing; let the agent adopt anew"
                ) from exc
            continue
        except (OSError, msgspec.MsgspecError, ValueError, WireError) as exc:
            raise StateError(f"{folder / _INDEX}: cannot be read: {exc}") from exc
        break
    if digest(data) != adopted.bundle_digest:
        raise StateError(
            f"{folder}: the adopted bundle is damaged; remove the folder and let the agent adopt anew"
        )
    return AdoptedWeights(adopted, data)


def _bundle_name(adopted: Adopted) -> str:
    return f"{adopted.bundle_digest[:32]}.safetensors"
