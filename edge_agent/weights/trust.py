"""Whom a device adopts from, and how far it has come: kept in ``trust.json``, across restarts.

A device that was given no key takes what the broker delivers, and nothing is kept. One that was given some
adopts only what one of them signed for its job and tier, and nothing older than it has had: plans go by
``(fence, revision)``, where the fence rises with every start of a trainer, on whatever journal; weights go by
their version, within one journal, and every journal's is remembered. A plan also says which keys are trusted
from then on.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Final

import msgspec

from sidestream.contract.errors import ConfigError, OutdatedError, StateError, UntrustedError
from sidestream.contract.messages import Assignment, GradientReply, QueryReply, WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.signing import Scope, key_id, open_signed, read_public_keys
from sidestream.contract.wire import M, prepared, unpack
from sidestream.host.state_dir import write_atomically

_FILE: Final = "trust.json"
MOST_RUNS: Final = 64
"""Journals that are remembered. One that was forgotten since still needs a plan that is newer."""
_log = logging.getLogger(__name__)


@prepared
class _TrustFile(msgspec.Struct, frozen=True, kw_only=True):
    """What is on disk."""

    given: tuple[bytes, ...]
    """The keys that the settings named then; others there now start over with those."""
    keys: tuple[bytes, ...]
    """The keys trusted now."""
    fence: int = 0
    """Of the newest plan."""
    revision: int = 0
    """Of the newest plan."""
    job: str = ""
    """Whose plan that was."""
    versions: dict[str, int] = {}
    """The newest weights of each journal, the last that was adopted from at the end."""


class Trust:
    """Opens what the trainer signs. Safe to use from several threads.

    Args:
        folder: The device's state directory.
        job: The job's name.
        tier: The device's tier.
        given: The public keys in the device's settings; none trusts whatever comes.

    Raises:
        StateError: what was kept cannot be read.
    """

    def __init__(self, folder: Path, *, job: str, tier: str, given: tuple[bytes, ...] = ()) -> None:
        self._path = folder / _FILE
        self._job = job
        self._plan_scope = Scope(kind="plan", job=job)
        self._weights_scope = Scope(kind="weights", job=job, tier=tier)
        self._checks = bool(given)
        self._lock = threading.Lock()
        self._kept = self._load(given) if given else _TrustFile(given=(), keys=(), job=job)

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The keys trusted now; none where nothing is checked."""
        return self._kept.keys

    def open_plan(self, payload: bytes) -> Plan:
        """Decode a plan, if it may be adopted.

        Raises:
            UntrustedError: it may not.
            DecodeError: it is none.
        """
        if not self._checks:
            return unpack(Plan, payload)
        plan = open_signed(Plan, payload, self._plan_scope, self._kept.keys)
        before = (self._kept.fence, self._kept.revision)
        if (plan.fence, plan.revision) < before:
            raise UntrustedError(
                f"it is older (fence {plan.fence}, revision {plan.revision}) than one this device has had "
                f"({before[0]}, {before[1]}); is the clock of the trainer's machine right?"
            )
        return plan

    def open_manifest(self, payload: bytes) -> WeightsManifest:
        """Decode a manifest, if its weights may be adopted.

        Raises:
            UntrustedError: they may not; an OutdatedError where they are older and nothing else is wrong.
            DecodeError: it is none.
        """
        if not self._checks:
            return unpack(WeightsManifest, payload)
        manifest = open_signed(WeightsManifest, payload, self._weights_scope, self._kept.keys)
        if manifest.version < (before := self._kept.versions.get(manifest.run, 0)):
            raise OutdatedError(
                f"version {manifest.version} is older than {before}, which this device has had"
            )
        return manifest

    def open_reply(self, payload: bytes, device: str) -> GradientReply:
        """Decode the answer to a batch of this device, if it is the trainer's.

        Raises:
            UntrustedError: it is not.
            DecodeError: it is none.
        """
        return self._open_own(GradientReply, "gradient", payload, device)

    def open_assignment(self, payload: bytes, device: str) -> Assignment:
        """Decode how this device is to make its batches, if the trainer says so.

        Raises:
            UntrustedError: it does not.
            DecodeError: it is none.
        """
        return self._open_own(Assignment, "assignment", payload, device)

    def open_prediction(self, payload: bytes, device: str) -> QueryReply:
        """Decode the answer to a query of this device, if it is the trainer's.

        Raises:
            UntrustedError: it is not.
            DecodeError: it is none.
        """
        return self._open_own(QueryReply, "prediction", payload, device)

    def _open_own(self, kind: type[M], purpose: str, payload: bytes, device: str) -> M:
        """A message to this device alone."""
        if not self._checks:
            return unpack(kind, payload)
        scope = Scope(kind=purpose, job=self._plan_scope.job, tier=self._weights_scope.tier, device=device)
        return open_signed(kind, payload, scope, self._kept.keys)

    def adopted_plan(self, plan: Plan) -> None:
        """A plan from :meth:`open_plan` is in force: nothing older from now on, and its keys."""
        self._keep(fence=plan.fence, revision=plan.revision, keys=plan.keys or self._kept.keys)

    def adopted_weights(self, run: str, version: int) -> None:
        """Weights from :meth:`open_manifest` are in use: nothing older from now on."""
        others = {one: newest for one, newest in self._kept.versions.items() if one != run}
        versions = {**others, run: max(version, self._kept.versions.get(run, 0))}
        self._keep(versions=dict(list(versions.items())[-MOST_RUNS:]))

    def _keep(self, **changes: object) -> None:
        if not self._checks:
            return
        with self._lock:
            kept = msgspec.structs.replace(self._kept, **changes)
            if kept == self._kept and [*kept.versions] == [*self._kept.versions]:  # dicts know no order
                return
            added = [key_id(key) for key in kept.keys if key not in self._kept.keys]
            dropped = [key_id(key) for key in self._kept.keys if key not in kept.keys]
            if added or dropped:
                _log.info(
                    "keys trusted from now on: added %s, dropped %s", added or "none", dropped or "none"
                )
            self._kept = kept
            try:
                write_atomically(self._path, msgspec.json.format(msgspec.json.encode(kept), indent=2))
            except OSError as exc:
                _log.error("%s cannot be written, a restart will go by the one before: %s", self._path, exc)

    def _load(self, given: tuple[bytes, ...]) -> _TrustFile:
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=_TrustFile)
        except FileNotFoundError:
            return _TrustFile(given=given, keys=given, job=self._job)
        except (OSError, msgspec.MsgspecError) as exc:
            raise StateError(
                f"{self._path}: cannot be read ({exc}); if you remove it, the device trusts the keys in its "
                "settings again, and takes an older plan or weights for new"
            ) from exc
        if kept.job != self._job:  # before it had made anything for that one
            return _TrustFile(given=given, keys=given, job=self._job)
        if kept.given != given:
            _log.info("the settings name other keys than before: trusting those")
            return msgspec.structs.replace(kept, given=given, keys=given)
        return kept


def read_trusted(path: str) -> tuple[bytes, ...]:
    """The public keys in the file that the settings name; none if they name none.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    if not path:
        return ()
    try:
        pem = Path(path).expanduser().read_bytes()
    except OSError as exc:
        raise ConfigError("trusted_keys_file", f"{path} cannot be read: {exc.strerror or exc}") from exc
    return read_public_keys(pem, "trusted_keys_file")
