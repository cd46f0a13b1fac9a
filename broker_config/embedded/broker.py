"""A broker as a child process: Mosquitto where it is installed, else amqtt, and never outliving us.

Both get a configuration generated into the data directory and a standard input that closes when this process
ends, however it ends; see :mod:`broker_config.embedded.parent_watch` and
:mod:`broker_config.embedded.amqtt_child`.
"""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, TypeAlias

import msgspec

from broker_config.embedded.probe import answers_mqtt
from broker_config.mosquitto import MAX_PACKET_BYTES, is_loopback, render_embedded
from sidestream.contract.errors import BrokerError
from sidestream.host.state_dir import make_private, private, write_atomically

log = logging.getLogger(__name__)

Kind: TypeAlias = Literal["mosquitto", "amqtt"]

_SEARCHED = ("/usr/sbin", "/usr/local/sbin", "/opt/homebrew/sbin", "/usr/local/bin")
_STOP_S = 8.0
_LOG_TAIL_LINES = 5


def find_mosquitto() -> str | None:
    """The path of a Mosquitto binary: on PATH, or where systems put it that leave it off an ordinary PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *_SEARCHED])
    return shutil.which("mosquitto", path=path)


class EmbeddedBroker:
    """A broker of our own. A context manager: entered when ready, stopped on leaving.

    Args:
        host: The address to listen on. Anything but loopback is open to the whole network, see :attr:`why`.
        port: 0 for a free one; it is kept over restarts.
        data_dir: For the configuration, the log and what Mosquitto retains. Made if need be.
        kind: Which broker; ``auto`` takes Mosquitto when its binary is found.

    Raises:
        BrokerError: Mosquitto was asked for and is not there.
    """

    def __init__(
        self,
        *,
        data_dir: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        kind: Literal["auto", "mosquitto", "amqtt"] = "auto",
    ) -> None:
        self.host = host
        self.port = port
        self.data_dir = data_dir
        self.pid = 0
        """The broker's own process id, while it runs."""
        self._binary = None if kind == "amqtt" else find_mosquitto()
        if kind == "mosquitto" and self._binary is None:
            raise BrokerError("no mosquitto binary on PATH or in /usr/sbin; install it, or use --kind amqtt")
        self.kind: Kind = "amqtt" if self._binary is None else "mosquitto"
        self.why = _why(kind, self._binary, host)
        self._child: subprocess.Popen[str] | None = None

    def __enter__(self) -> "EmbeddedBroker":
        try:
            self.start()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where clients on this machine connect."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"mqtt://[{host}]:{self.port}" if ":" in host else f"mqtt://{host}:{self.port}"

    @property
    def log_file(self) -> Path:
        """What the broker itself has to say."""
        return self.data_dir / f"{self.kind}.log"

    @property
    def running(self) -> bool:
        """Whether the child lives."""
        return self._child is not None and self._child.poll() is None

    def start(self) -> None:
        """Start the child. Returns before it takes connections: see :meth:`wait_ready`.

        Raises:
            BrokerError: The port is in use, the data directory unusable, or the broker ended at once.
        """
        if self.running:
            return
        self.stop()
        if not is_loopback(self.host):
            log.warning("%s", self.why)
        self.port = _check_port(self.host, self.port)
        try:
            with _lock(self.data_dir) as lock:
                self._child = self._launch(self._command(), lock)
        except OSError as error:
            reason = error.strerror or error
            raise BrokerError(
                f"cannot use the data directory {self.data_dir}: {reason}; choose another with --data-dir"
            ) from error
        self.pid = self._announced_pid()

    def wait_ready(self, timeout_s: float = 15.0) -> None:
        """Wait until the broker answers.

        Raises:
            BrokerError: It ended instead (with the last lines of its log), or did not answer in time.
        """
        deadline_s = time.monotonic() + timeout_s
        host = self.url.rpartition(":")[0].removeprefix("mqtt://").strip("[]")
        while not answers_mqtt(host, self.port, timeout_s=1.0):
            self.check_alive()
            if time.monotonic() > deadline_s:
                raise BrokerError(f"{self.kind} did not answer on {self.url} within {timeout_s:g} s")
            time.sleep(0.01)
        self.check_alive()

    def check_alive(self) -> None:
        """Raise ``BrokerError``, with the last lines of its log, if the child has ended."""
        if not self.running:
            raise BrokerError(f"the embedded broker ({self.kind}) has stopped; {self._last_words()}")

    def stop(self) -> None:
        """End the child and wait for it. Idempotent."""
        child, self._child = self._child, None
        self.pid = 0
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            if pipe is not None:
                pipe.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_S)
        if child.poll() is None:
            child.kill()
            child.wait()

    def _command(self) -> list[str]:
        python = [sys.executable, "-m"]
        if self._binary is None:
            settings = {"host": self.host, "port": self.port, "max_packet_bytes": MAX_PACKET_BYTES}
            config = self._write("amqtt.json", msgspec.json.encode(settings).decode())
            return [*python, "broker_config.embedded.amqtt_child", config]
        config = self._write(
            "mosquitto.conf", render_embedded(self.host, self.port, self.data_dir.absolute())
        )
        return [*python, "broker_config.embedded.parent_watch", self._binary, "-c", config]

    def _launch(self, command: list[str], lock: IO[str]) -> "subprocess.Popen[str]":
        package_root = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
        with open(self.log_file, "w", opener=private) as log_file:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                text=True,
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=(lock.fileno(),),  # the lock is the child's: it lasts as long as the child does
                umask=0o077,
                start_new_session=True,  # a Ctrl-C reaches us only, and we stop the child in order
            )

    def _announced_pid(self) -> int:
        assert self._child is not None and self._child.stdout is not None
        word, _, number = self._child.stdout.readline().partition(" ")
        if word == "pid":
            return int(number)
        self._child.wait()
        if "ddress already in use" in self._log_tail():
            raise _port_in_use(self.port)
        raise BrokerError(f"the embedded broker ({self.kind}) did not start; {self._last_words()}")

    def _write(self, name: str, text: str) -> str:
        path = self.data_dir / name
        write_atomically(path, text.encode())
        return str(path.absolute())

    def _log_tail(self) -> str:
        try:
            lines = self.log_file.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return " | ".join(line.strip() for line in lines[-_LOG_TAIL_LINES:])

    def _last_words(self) -> str:
        tail = self._log_tail()
        return f"its log ends: {tail}" if tail else f"its log is empty: {self.log_file}"


def _why(wanted: str, binary: str | None, host: str) -> str:
    if binary is not None:
        why = f"mosquitto {_version(binary)} found at {binary}"
    elif wanted == "amqtt":
        why = "amqtt (MQTT 3.1.1), as asked for"
    else:
        why = "no mosquitto binary on PATH or in /usr/sbin; using the built-in amqtt (MQTT 3.1.1)"
    if not is_loopback(host):
        why += f". WARNING: no passwords on {host}, which is not loopback: anyone who reaches it can connect"
    return why


def _version(binary: str) -> str:
    """The version Mosquitto prints in the first line of its help, such as ``2.0.11``."""
    printed = subprocess.run([binary, "-h"], capture_output=True, text=True, check=False).stdout
    words = printed.partition("\n")[0].split()
    return words[-1] if words else "of unknown version"


def _lock(data_dir: Path) -> IO[str]:
    """Two brokers on one data directory would overwrite each other's retained messages."""
    make_private(data_dir)  # what waits for a subscriber is kept there
    lock = open(data_dir / "lock", "w", opener=private)  # noqa: SIM115
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise BrokerError(
            f"another broker is using the data directory {data_dir}; choose another with --data-dir"
        ) from error
    return lock


def _check_port(host: str, port: int) -> int:
    """Make sure that ``port`` is free, and choose one if it is 0."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except OSError as error:
            raise _cannot_listen(host, port, error) from error
        except OverflowError as error:
            raise BrokerError(f"port {port} is not a port; choose one from 1 to 65535 with --port") from error
        chosen: int = sock.getsockname()[1]
        return chosen


def _cannot_listen(host: str, port: int, error: OSError) -> BrokerError:
    if error.errno == errno.EADDRINUSE:
        return _port_in_use(port)
    if error.errno == errno.EACCES:
        return BrokerError(f"port {port} needs more rights than we have; choose one over 1023 with --port")
    return BrokerError(f"cannot listen on {host}: {error.strerror or error}; choose another with --host")


def _port_in_use(port: int) -> BrokerError:
    return BrokerError(f"port {port} is in use; choose another with --port, or --port 0 for a free one")
