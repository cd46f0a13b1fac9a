"""A fleet's folder: its authority, its broker's files, its trainer's, and the list of its devices.

::

    fleet.json    what the fleet is, and every certificate it issued
    ca/           the authority: whoever has its key can let anybody in
    broker/       all that Mosquitto needs; may be copied to another machine
    trainer/      settings, certificate and signing key of the trainer
    bundles/      what the devices are enrolled with

Every file can be read by its owner only. The list is written first and everything else follows from it, so
that a command that was interrupted can be given again.
"""

from __future__ import annotations

import contextlib
import datetime
import getpass
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from broker_config.access import TRAINER, Member, access_list
from broker_config.authority import Authority, Identity
from broker_config.enrolment import Enrolment
from broker_config.mosquitto import render_fleet
from side_trainer.settings.schema import TrainerConfig
from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.signing import Signer, public_pem, read_public_keys
from sidestream.contract.topics import check_name
from sidestream.contract.wire import prepared
from sidestream.host.settings_text import settings_file
from sidestream.host.state_dir import locked, write_atomically

_FILE: Final = "fleet.json"
_BATCHES_PER_S: Final = 50.0


@prepared
class Issued(msgspec.Struct, frozen=True, kw_only=True):
    """A device's certificate."""

    name: str
    tier: str
    serial: str
    """Hexadecimal."""
    issued: str
    """A date."""
    expires: str
    """A date."""
    revoked: str = ""
    """A date, or empty."""


@prepared
class FleetRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The content of fleet.json."""

    job: str
    hosts: tuple[str, ...]
    """Names and addresses of the broker; devices use the first."""
    port: int
    broker_dir: str
    """Where broker/ stands on the broker's machine."""
    user: str
    """Who owns it there."""
    devices: tuple[Issued, ...] = ()
    """Every certificate, the revoked ones included."""

    @property
    def url(self) -> str:
        """Where the broker is."""
        host = self.hosts[0]
        return f"mqtts://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def members(self) -> list[Issued]:
        """The devices that are let in."""
        return [one for one in self.devices if not one.revoked]

    def member(self, name: str) -> Issued | None:
        """A device that is let in."""
        return next((one for one in self.members if one.name == name), None)


class FleetFolder:
    """See the module. Open it with :func:`opened` or make it with :func:`create`.

    Args:
        path: The folder.
        fleet: What its fleet.json says.
    """

    def __init__(self, path: Path, fleet: FleetRecord) -> None:
        self.path = path
        self.fleet = fleet
        self._authority = Authority(Identity(self._read("ca/ca.crt"), self._read("ca/ca.key")))

    def add_device(self, name: str, tier: str, *, again: bool = False) -> Enrolment:
        """Let a device in, and return what it needs for that.

        Args:
            name: Its name.
            tier: Its tier.
            again: It has a certificate, which is revoked for the new one.

        Raises:
            ConfigError: a name cannot be one, or there is such a device.
        """
        check_name("NAME", name)
        check_name("--tier", tier)
        if self.fleet.member(name) is not None:
            if not again:
                raise ConfigError(
                    "NAME",
                    f"{name!r} has a certificate; --again revokes it for a new one, or take another name",
                )
            self._mark_revoked(name)
        identity = self._authority.client(name)
        issued = Issued(
            name=name,
            tier=tier,
            serial=f"{identity.serial:x}",
            issued=_today(),
            expires=identity.expires.date().isoformat(),
        )
        self._update(devices=(*self.fleet.devices, issued))
        return Enrolment(
            job=self.fleet.job,
            device=name,
            tier=tier,
            url=self.fleet.url,
            ca=self._authority.identity.certificate.decode(),
            certificate=identity.certificate.decode(),
            key=identity.key.decode(),
            trusted_keys=self._read("trainer/signing.pub.pem").decode(),
        )

    def revoke(self, name: str) -> None:
        """Keep a device out from now on.

        Raises:
            ConfigError: there is none of that name.
        """
        if self.fleet.member(name) is None:
            known = ", ".join(sorted(one.name for one in self.fleet.members)) or "none"
            raise ConfigError("NAME", f"no device {name!r} is let in; there are: {known}")
        self._mark_revoked(name)
        self._update()

    def announce_key(self) -> tuple[bytes, bytes]:
        """Make the next signing key and have it made known; return the old and the new public key.

        Raises:
            ConfigError: one is made known already.
        """
        if (self.path / "trainer/next.key").exists():
            raise ConfigError("rotate", "a new key is being made known already; finish with --finish")
        old, new = self._signer("signing.key"), Signer.new()
        self._write("trainer/next.key", new.to_pem())
        self._write("trainer/signing.pub.pem", public_pem(old.public) + public_pem(new.public))
        return old.public, new.public

    def change_key(self) -> tuple[bytes, bytes]:
        """Sign with the next key from now on; return the old and the new public key.

        Raises:
            ConfigError: none was made known.
        """
        path = self.path / "trainer/next.key"
        if not path.exists():
            raise ConfigError("--finish", "no new key has been made known; run it without --finish first")
        old, new = self._signer("signing.key"), self._signer("next.key")
        self._write("trainer/signing.pub.pem", public_pem(new.public) + public_pem(old.public))
        self._write("trainer/signing.key", new.to_pem())
        self._write("trainer/signing.pub.pem", public_pem(new.public))
        path.unlink()
        return old.public, new.public

    def renew_broker(self) -> str:
        """Give broker and trainer new certificates; return when they end."""
        broker = self._authority.broker(self.fleet.hosts)
        self._write("broker/broker.crt", broker.certificate)
        self._write("broker/broker.key", broker.key)
        self._renew_trainer()
        return broker.expires.date().isoformat()

    @property
    def signing_keys(self) -> tuple[bytes, ...]:
        """Public keys that devices trust, as far as they have heard."""
        return read_public_keys(self._read("trainer/signing.pub.pem"), "trainer/signing.pub.pem")

    def write_broker_files(self) -> None:
        """Everything beside the broker's own certificate."""
        fleet = self.fleet
        members = [Member(one.name, one.tier) for one in fleet.members]
        self._write("broker/acl", access_list(fleet.job, members).encode())
        revoked = [int(one.serial, 16) for one in fleet.devices if one.revoked]
        self._write("broker/crl.pem", self._authority.revocations(revoked))
        conf = render_fleet(fleet.broker_dir, port=fleet.port, user=fleet.user)
        self._write("broker/mosquitto.conf", conf.encode())

    def _renew_trainer(self) -> None:
        trainer = self._authority.client(TRAINER)
        self._write("trainer/trainer.crt", trainer.certificate)
        self._write("trainer/trainer.key", trainer.key)

    def _mark_revoked(self, name: str) -> None:
        devices = tuple(
            msgspec.structs.replace(one, revoked=_today()) if one.name == name and not one.revoked else one
            for one in self.fleet.devices
        )
        self._save(msgspec.structs.replace(self.fleet, devices=devices))

    def _update(self, **changes: Any) -> None:
        self._save(msgspec.structs.replace(self.fleet, **changes))
        self.write_broker_files()

    def _save(self, fleet: FleetRecord) -> None:
        self._write(_FILE, msgspec.json.format(msgspec.json.encode(fleet), indent=2))
        self.fleet = fleet

    def _signer(self, name: str) -> Signer:
        return Signer.from_pem(self._read(f"trainer/{name}"), f"trainer/{name}")

    def _read(self, name: str) -> bytes:
        return _read(self.path / name)

    def _write(self, name: str, data: bytes) -> None:
        _write(self.path / name, data)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[FleetFolder]:
    """A fleet's folder, for this process alone.

    Raises:
        StateError: it is none, or damaged, or another command is at work in it.
    """
    if not (path / _FILE).is_file():
        raise StateError(f"{path} is no fleet's folder; make one with: sidestream fleet init {path}")
    with locked(path, "another sidestream fleet command"):
        try:
            fleet = msgspec.json.decode(_read(path / _FILE), type=FleetRecord)
        except msgspec.MsgspecError as exc:
            raise StateError(f"{path / _FILE} cannot be read: {exc}") from exc
        yield FleetFolder(path, fleet)


def create(
    path: Path,
    *,
    job: str,
    hosts: Sequence[str],
    port: int,
    broker_dir: str = "",
    tiers: Sequence[str] = ("generic",),
    user: str = "",
) -> FleetFolder:
    """Make a fleet's folder.

    Args:
        path: Where; it must be new or empty.
        job: The job's name.
        hosts: Names and addresses of the broker.
        port: Its port.
        broker_dir: Where broker/ will stand on the broker's machine; here, if empty.
        tiers: The tiers that the trainer's settings begin with.
        user: Who owns it there; whoever runs this, if empty.

    Raises:
        ConfigError: a name cannot be used.
        StateError: the folder is in use, or cannot be written.
    """
    check_name("--job", job)
    for tier in tiers:
        check_name("--tier", tier)
    path = _made(path.absolute())
    fleet = FleetRecord(
        job=job,
        hosts=tuple(hosts),
        port=port,
        broker_dir=broker_dir or str(path / "broker"),
        user=user or getpass.getuser(),
    )
    settings = _trainer_settings(path / "trainer", fleet, tiers).encode()
    for name, data in {
        **_keys(job, hosts),
        "trainer/trainer.toml": settings,
        _FILE: msgspec.json.format(msgspec.json.encode(fleet), indent=2),
    }.items():
        _write(path / name, data)
    for name in ("broker/data", "bundles"):
        (path / name).mkdir(mode=0o700, exist_ok=True)
    folder = FleetFolder(path, fleet)
    folder._renew_trainer()
    folder.write_broker_files()
    return folder


def _keys(job: str, hosts: Sequence[str]) -> dict[str, bytes]:
    """New ones, by the file that each belongs into."""
    authority, signer = Authority.new(f"Sidestream fleet {job}"), Signer.new()
    broker = authority.broker(hosts)
    return {
        "ca/ca.crt": authority.identity.certificate,
        "ca/ca.key": authority.identity.key,
        "broker/ca.crt": authority.identity.certificate,
        "broker/broker.crt": broker.certificate,
        "broker/broker.key": broker.key,
        "trainer/ca.crt": authority.identity.certificate,
        "trainer/signing.key": signer.to_pem(),
        "trainer/signing.pub.pem": public_pem(signer.public),
    }


def _made(path: Path) -> Path:
    """The folder, which was not there, or empty."""
    if path.exists() and any(path.iterdir()):
        raise StateError(f"{path} is not empty; give the fleet a folder of its own")
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as exc:
        raise StateError(f"{path} cannot be made: {exc.strerror or exc}") from exc
    return path


def _trainer_settings(folder: Path, fleet: FleetRecord, tiers: Sequence[str]) -> str:
    backbone = TrainerConfig(job=fleet.job).tiers["generic"].backbone
    values = {
        "job": fleet.job,
        "max_batches_per_s": _BATCHES_PER_S,
        "broker.url": fleet.url,
        "broker.ca_file": str(folder / "ca.crt"),
        "broker.cert_file": str(folder / "trainer.crt"),
        "broker.key_file": str(folder / "trainer.key"),
        "signing.key_file": str(folder / "signing.key"),
        "signing.public_keys_file": str(folder / "signing.pub.pem"),
        **{f"tiers.{tier}.backbone": backbone for tier in tiers},
    }
    head = f"The trainer of the fleet {fleet.job!r}: sidestream trainer run {folder / 'trainer.toml'}"
    return settings_file(TrainerConfig, values, head)


def _today() -> str:
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as exc:
        raise StateError(f"{path} cannot be read: {exc.strerror or exc}") from exc


def _write(path: Path, data: bytes) -> None:
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomically(path, data)
    except OSError as exc:
        raise StateError(f"{path} cannot be written: {exc.strerror or exc}") from exc
