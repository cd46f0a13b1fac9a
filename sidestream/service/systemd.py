"""Agent, trainer and broker as systemd services: the unit's text, and putting it in place.

A system service runs as the owner of the settings; a user service belongs to whoever installs it. The options
that are missing from the usual list are missing on purpose: torch makes code at run time
(MemoryDenyWriteExecute), and a board's accelerators are devices (PrivateDevices).
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec

from sidestream.contract.errors import ConfigError, StateError
from sidestream.contract.wire import prepared
from sidestream.host.state_dir import default_dir, write_atomically

_EVERYWHERE: Final = """\
NoNewPrivileges=yes
LockPersonality=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RestrictNamespaces=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
UMask=0077
"""
_SYSTEM_ONLY: Final = """\
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectProc=invisible
RemoveIPC=yes
"""


def system_state(part: str) -> Path:
    """The state of a machine's service whose user has no home."""
    return Path(f"/var/lib/sidestream-{part}")


@prepared
class Service(msgspec.Struct, frozen=True, kw_only=True):
    """What is installed, and where."""

    part: str
    """``agent``, ``trainer`` or ``broker``."""
    words: tuple[str, ...]
    """What stands after ``sidestream`` on its command line."""
    settings: Path
    """Its settings file, or another file or folder whose owner it runs as."""
    state: Path
    """Its state directory."""
    for_user: bool
    """A service of this user, not of the machine."""
    writes: tuple[Path, ...] = ()
    """Other folders that it writes to."""
    run_as: str = ""
    """Who a machine's service runs as; the settings' owner, if empty."""
    root: Path = Path("/")
    """The machine's root folder; another one is written to, and nothing is started."""

    @property
    def unit(self) -> str:
        """The unit's name."""
        return f"sidestream-{self.part}.service"

    @property
    def path(self) -> Path:
        """The unit file."""
        if self.for_user:
            given = Path(os.environ.get("XDG_CONFIG_HOME", ""))
            base = given if given.is_absolute() else Path.home() / ".config"
            return self.root / base.relative_to("/") / "systemd/user" / self.unit
        return self.root / "etc/systemd/system" / self.unit

    @property
    def user(self) -> str:
        """Who it runs as.

        Raises:
            ConfigError: there is no such user.
        """
        if self.for_user:
            return pwd.getpwuid(os.geteuid()).pw_name
        try:
            return pwd.getpwnam(self.run_as).pw_name if self.run_as else self.owner
        except KeyError as exc:
            raise ConfigError("--run-as", f"there is no user {self.run_as}") from exc

    @property
    def owner(self) -> str:
        """Whose the settings are.

        Raises:
            ConfigError: there is no such user.
        """
        try:
            return pwd.getpwuid(self.settings.stat().st_uid).pw_name
        except (KeyError, OSError) as exc:
            raise ConfigError("--run-as", f"the settings belong to no user here: {exc}") from exc

    def text(self) -> str:
        """The unit."""
        command = [*_program(), *self.words]
        run = " ".join(_quoted(word) for word in command)
        who = "" if self.for_user else f"User={self.user}\n"
        return f"""\
# Written by "sidestream {self.part} install"; "sidestream {self.part} uninstall" takes it away.
[Unit]
Description=Sidestream {self.part}
Wants=network-online.target
After=network-online.target
StartLimitIntervalSec=0

[Service]
Type=exec
ExecStart={run}
{who}Restart=on-failure
RestartSec=10
TimeoutStopSec=60
{self._may_write()}# One arena: a Pi's memory is better spent than on glibc's eight for each core.
Environment=MALLOC_ARENA_MAX=1

{_EVERYWHERE}{"" if self.for_user else _SYSTEM_ONLY}
[Install]
WantedBy={"default" if self.for_user else "multi-user"}.target
"""

    def _may_write(self) -> str:
        if self.for_user:
            return ""
        more = "".join(f"ReadWritePaths={_quoted(str(one), dollar='$')}\n" for one in self.writes)
        if self.state == system_state(self.part):
            return f"StateDirectory={self.state.name}\nStateDirectoryMode=0700\n{more}"
        return f"ReadWritePaths={_quoted(str(self.state), dollar='$')}\n{more}"

    def install(self) -> list[str]:
        """Write the unit and start it; return what was done, in words.

        Raises:
            StateError: it cannot be written or started, or there is no systemd.
        """
        elsewhere = self.root != Path("/")
        if not elsewhere:
            _require_systemd(self)
        if self.for_user or self.state != system_state(self.part):
            make_for(self.state, self.user, self.root)
        for folder in self.writes:
            make_for(folder, self.user, self.root)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, self.text().encode(), public=True)
        except OSError as exc:
            hint = "; run it as root, or with --user" if isinstance(exc, PermissionError) else ""
            raise StateError(f"{self.path} cannot be written: {exc.strerror or exc}{hint}") from exc
        wrote = f"wrote {self.path}; state in {self.state}"
        if elsewhere:
            return [
                wrote,
                f"start it there: {shlex.join([*self._systemctl, 'enable', '--now', self.unit])}",
            ]
        _run([*self._systemctl, "daemon-reload"])
        _run([*self._systemctl, "enable", "--now", self.unit])
        journal = f"journalctl {'--user ' if self.for_user else ''}-u {self.unit} -f"
        return [wrote, f"it runs, now and after every start; its log: {journal}"]

    def uninstall(self) -> list[str]:
        """Stop it and take the unit away; settings and state stay.

        Raises:
            StateError: it is not installed, or cannot be removed.
        """
        if not self.path.exists():
            raise StateError(
                f"{self.path} is not there: nothing is installed{'' if self.for_user else '; --user?'}"
            )
        here = self.root == Path("/") and shutil.which("systemctl") is not None
        if here:
            _run([*self._systemctl, "disable", "--now", self.unit])
        try:
            self.path.unlink()
        except OSError as exc:
            raise StateError(f"{self.path} cannot be removed: {exc.strerror or exc}") from exc
        if here:
            _run([*self._systemctl, "daemon-reload"])
        return [f"removed {self.path}; settings and state are still there"]

    @property
    def _systemctl(self) -> list[str]:
        return ["systemctl", *(["--user"] if self.for_user else [])]


def _program() -> list[str]:
    """How this very installation is started."""
    beside = Path(sys.executable).with_name("sidestream")
    return [str(beside)] if beside.exists() else [sys.executable, "-m", "sidestream.cli"]


def _quoted(word: str, *, dollar: str = "$$") -> str:
    """A word of a unit; systemd takes % for its own, and in ExecStart $ too."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", dollar)
    return f'"{word}"' if any(char in word for char in " \t;'\"\\") else word


def _require_systemd(service: Service) -> None:
    if shutil.which("systemctl") is None or not Path("/run/systemd/system").is_dir():
        command = shlex.join([*_program(), *service.words])
        raise StateError(
            "systemd does not run this machine. Have whatever does (cron's @reboot, OpenRC, runit, a "
            f"container) run: MALLOC_ARENA_MAX=1 {command}; --dry-run shows the unit, and --root DIR writes "
            "it for another machine"
        )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise StateError(f"{shlex.join(command)} failed: {said[-1] if said else done.returncode}")


def make_for(path: Path, user: str, root: Path) -> None:
    """Make the directory, and those above it that are missing, the user's own.

    Raises:
        StateError: it cannot be made.
    """
    account = pwd.getpwnam(user)
    place = below(root, path)
    missing = [one for one in (place, *place.parents) if not one.exists()]
    try:
        for one in reversed(missing):
            one.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(one, account.pw_uid, account.pw_gid)
    except OSError as exc:
        raise StateError(f"{path} cannot be made: {exc.strerror or exc}; give another --state-dir") from exc


def below(root: Path, path: Path) -> Path:
    """An absolute path on another root."""
    return root / path.relative_to("/")


def state_by_hand(part: str, given: str, job: str, service: Service) -> Path:
    """Where a process keeps its state if the service's user runs it by hand.

    Args:
        part: ``trainer`` or ``broker``.
        given: What its settings say; empty if nothing.
        job: The job's name; empty where there is none.
        service: Says who that is.

    Raises:
        ConfigError: that depends on the folder it is started in.
    """
    account = pwd.getpwnam(service.user)
    if given and not given.startswith(("~/", "/")):
        raise ConfigError("state_dir", f"{given!r} depends on where it is started; write a full path")
    if given:
        return Path(account.pw_dir) / given.removeprefix("~/") if given.startswith("~/") else Path(given)
    if account.pw_uid == os.geteuid():
        return default_dir(part, *([job] if job else []))
    home = Path(account.pw_dir)
    if not (service.for_user or below(service.root, home).is_dir()):
        return system_state(part)
    return home.joinpath(".local/state/sidestream", part, *([job] if job else []))
