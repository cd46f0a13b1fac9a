"""The trainer's signature, where it has a key: under plan, weights and status; and another trainer's."""

from __future__ import annotations

import logging
import stat
from pathlib import Path

import msgspec

from side_trainer.settings.schema import SigningConfig
from sidestream.contract.errors import ConfigError, WireError
from sidestream.contract.messages import Assignment, GradientReply, QueryReply, TrainerStatus, WeightsManifest
from sidestream.contract.plan import Plan
from sidestream.contract.signing import MAX_KEYS, Scope, Signer, key_id, open_signed, read_public_keys
from sidestream.contract.wire import pack, unpack

_log = logging.getLogger(__name__)


class TrainerSigner:
    """Encodes what devices adopt, signed or not.

    Args:
        job: The job's name.
        signer: The key; None signs nothing.
        keys: Public keys that devices may trust from now on; that of ``signer`` is always among them.
    """

    def __init__(self, job: str, signer: Signer | None = None, keys: tuple[bytes, ...] = ()) -> None:
        self._job = job
        self._signer = signer
        self.keys = () if signer is None else tuple(dict.fromkeys((signer.public, *keys)))
        """What the plan names; the signing one first."""
        self._former: tuple[bytes, ...] = ()

    def succeed(self, earlier: tuple[bytes, ...]) -> tuple[bytes, ...]:
        """Know what was signed before a change of keys, without trusting it; return all keys, ours last."""
        if self._signer is None:
            return earlier
        self._former = tuple(key for key in earlier if key not in self.keys)
        return (*(key for key in earlier if key != self._signer.public), self._signer.public)[-MAX_KEYS:]

    def is_former(self, payload: bytes) -> bool:
        """Whether it is a status that this job's trainer signed with a key that is trusted no more."""
        try:
            open_signed(TrainerStatus, payload, Scope(kind="status", job=self._job), self._former)
        except WireError:
            return False
        return True

    def plan(self, plan: Plan) -> bytes:
        """A plan as it travels."""
        if self._signer is None:
            return pack(plan)
        plan = msgspec.structs.replace(plan, keys=self.keys)
        return self._signer.sign(plan, Scope(kind="plan", job=self._job))

    def manifest(self, manifest: WeightsManifest, tier: str) -> bytes:
        """A manifest as it travels to one tier."""
        if self._signer is None:
            return pack(manifest)
        return self._signer.sign(manifest, Scope(kind="weights", job=self._job, tier=tier))

    def status(self, status: TrainerStatus) -> bytes:
        """The trainer's status as it travels."""
        if self._signer is None:
            return pack(status)
        return self._signer.sign(status, Scope(kind="status", job=self._job))

    def reply(self, reply: GradientReply, tier: str, device: str) -> bytes:
        """A gradient as it travels to one device; equal ones give equal bytes."""
        if self._signer is None:
            return pack(reply)
        return self._signer.sign(reply, Scope(kind="gradient", job=self._job, tier=tier, device=device))

    def assignment(self, assignment: Assignment, tier: str, device: str) -> bytes:
        """An assignment as it travels to one device; equal ones give equal bytes."""
        if self._signer is None:
            return pack(assignment)
        scope = Scope(kind="assignment", job=self._job, tier=tier, device=device)
        return self._signer.sign(assignment, scope)

    def prediction(self, reply: QueryReply, tier: str, device: str) -> bytes:
        """The answer to a query as it travels to one device."""
        if self._signer is None:
            return pack(reply)
        return self._signer.sign(reply, Scope(kind="prediction", job=self._job, tier=tier, device=device))

    def open_manifest(self, payload: bytes, tier: str) -> WeightsManifest:
        """A manifest of this job's weights.

        Raises:
            UntrustedError: it is not signed by one of our keys, and we have some.
            DecodeError: it is none.
        """
        if self._signer is None:
            return unpack(WeightsManifest, payload)
        return open_signed(
            WeightsManifest, payload, Scope(kind="weights", job=self._job, tier=tier), self.keys
        )

    def open_status(self, payload: bytes) -> TrainerStatus:
        """A status of a trainer of this job, this one or another.

        Raises:
            UntrustedError: it is not signed by one of our keys, and we have some: whoever sent it is none.
            DecodeError: it is none.
        """
        if self._signer is None:
            return unpack(TrainerStatus, payload)
        return open_signed(TrainerStatus, payload, Scope(kind="status", job=self._job), self.keys)


def load_signer(job: str, config: SigningConfig) -> TrainerSigner:
    """Read the keys that the settings name.

    Raises:
        ConfigError: a file cannot be read, holds no such key, or lets others read the private one.
    """
    if not config.key_file:
        if config.public_keys_file:
            raise ConfigError("signing.key_file", "is empty, but public_keys_file is given; name both")
        return TrainerSigner(job)
    path = Path(config.key_file).expanduser()
    pem = _read(path, "signing.key_file")
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        raise ConfigError("signing.key_file", f"others than its owner can read {path}; run chmod 600 {path}")
    signer = Signer.from_pem(pem, "signing.key_file")
    keys: tuple[bytes, ...] = ()
    if config.public_keys_file:
        path = Path(config.public_keys_file).expanduser()
        keys = read_public_keys(_read(path, "signing.public_keys_file"), "signing.public_keys_file")
        if signer.public not in keys:
            raise ConfigError(
                "signing.public_keys_file",
                f"does not hold key {key_id(signer.public)}, that of key_file: devices would adopt nothing",
            )
    _log.info("plan and weights are signed with key %s", key_id(signer.public))
    return TrainerSigner(job, signer, keys)


def _read(path: Path, field: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise ConfigError(field, f"{path} cannot be read: {exc.strerror or exc}") from exc
