"""mosquitto.conf, for the embedded broker and for a broker of one's own. Pure text but for writing it out.

Every setting is explained where it is set, so the file can be read without the manual. Valid for Mosquitto
2.0 and later.
"""

import ipaddress
from pathlib import Path

from sidestream.contract.errors import BrokerError

MAX_PACKET_BYTES = 4 * 1024 * 1024
"""The broker's fence. Our own messages stay under 272 KiB; what is between the two reaches the trainer, which
rejects and counts it, where a broker would only cut the sender off."""

_COMMON = """\
# Small messages go out at once: Nagle's algorithm costs up to 40 ms a message.
set_tcp_nodelay true

# Larger packets are refused. Clients that speak MQTT 5 are told this limit when they connect.
max_packet_size {max_packet_bytes}

# Unacknowledged messages a client may have under way, in each direction.
max_inflight_messages 64

# What may wait for one slow client, in bytes and in messages, whichever is reached first. Beyond it the
# broker drops messages that it has acknowledged. Sidestream notices and sends them again; others may not.
# A trainer that starts is told of every device at once: two messages for each of 20,000 find room.
max_queued_bytes {max_queued_bytes}
max_queued_messages 40000

# Seconds between the broker's figures of itself ($SYS topics), which the trainer's metrics show.
sys_interval 5
"""

_PERSISTENCE = """\
# Retained messages (plan, weights, receipts, status) survive a restart. Saved this often, in seconds: the
# default of 30 minutes would lose them all to a power cut.
persistence true
persistence_location {directory}/
autosave_interval 30
autosave_on_changes false
"""
_LASTING = f"""\
# Sessions of clients that never came back are forgotten. (Sidestream's own clients keep no session.)
persistent_client_expiration 14d

{_PERSISTENCE}
# Errors, warnings and starts, to the system's journal. Connections are left out: a fleet makes many.
log_dest stderr
log_type error
log_type warning
log_type notice
{{more}}connection_messages false
"""
_DEPLOYMENT = """\
# Mosquitto for a Sidestream fleet; written by "sidestream broker render". For Mosquitto 2.0 and later.
# Try it:     mosquitto -c mosquitto.conf
# Install it: as {config_dir}/mosquitto.conf, then restart the service.

# Who may do what is decided for each listener on its own. Must come before the listeners.
per_listener_settings true

# ---- This machine only: plain, without passwords. The trainer connects here if it runs beside the broker.
listener {port} 127.0.0.1
allow_anonymous true

# ---- The fleet: encrypted, each device known by its certificate. Uncomment once the files are there.
# listener {tls_port}
# cafile {config_dir}/certs/ca.crt
# certfile {config_dir}/certs/broker.crt
# keyfile {config_dir}/certs/broker.key
# tls_version tlsv1.2
# Devices show a certificate that the CA signed; its common name is their user name.
# require_certificate true
# use_identity_as_username true
# allow_anonymous false
# For clients without a certificate instead: passwords made with mosquitto_passwd.
# password_file {config_dir}/passwords
# A device writes under its own name only, and reads what is meant for it.
# acl_file {config_dir}/acl

# ---- All listeners.
{common}
"""

_MAX_QUEUED_BYTES = 64 * 1024 * 1024
FLEET_PACKET_BYTES = 1024 * 1024
"""Of one device's packet in a fleet with certificates: four times what an agent sends."""
_FLEET_QUEUED_BYTES = 16 * 1024 * 1024


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def render_embedded(host: str, port: int, data_dir: Path) -> str:
    """The configuration of the broker that ``sidestream broker run`` and the demo start.

    Args:
        host: The one address to listen on. Clients are anonymous, wherever it is.
        port: TCP port.
        data_dir: Where the retained messages are kept.
    """
    common = _COMMON.format(max_packet_bytes=MAX_PACKET_BYTES, max_queued_bytes=_MAX_QUEUED_BYTES)
    reach = "only this machine can connect." if is_loopback(host) else "ANYONE who reaches it can connect."
    return f"""\
# Written by Sidestream at every start of its embedded broker: changes made here are lost.

listener {port} {host}
# No passwords: {reach}
allow_anonymous true
# Started by root, it would change to a user of its own, who cannot write here.
user root

{common}
{_PERSISTENCE.format(directory=data_dir)}
# Errors and warnings, to the log file beside this one.
log_dest stderr
log_type error
log_type warning
log_type notice
connection_messages false
"""


def render_deployment(
    out_dir: Path,
    *,
    port: int = 1883,
    tls_port: int = 8883,
    data_dir: str = "/var/lib/mosquitto",
    config_dir: str = "/etc/mosquitto",
    max_packet_bytes: int = MAX_PACKET_BYTES,
    max_queued_bytes: int = _MAX_QUEUED_BYTES,
) -> list[Path]:
    """Write the configuration of a broker that serves a fleet, to be reviewed and installed by its operator.

    Args:
        out_dir: Made if need be; an earlier rendering in it is replaced.
        port: Of the plain listener, which is on the loopback interface only.
        tls_port: Of the listener for the fleet, which is commented out until there are certificates.
        data_dir: Where that broker keeps its data.
        config_dir: Where that broker finds certificates, passwords and the access list.
        max_packet_bytes: The largest packet it takes.
        max_queued_bytes: What may wait for one slow client.

    Returns:
        The files written.

    Raises:
        BrokerError: The directory cannot be written to.
    """
    common = _COMMON.format(max_packet_bytes=max_packet_bytes, max_queued_bytes=max_queued_bytes)
    text = _DEPLOYMENT.format(port=port, tls_port=tls_port, config_dir=config_dir, common=common)
    return [_write(out_dir / "mosquitto.conf", text + _LASTING.format(directory=data_dir, more=""))]


def render_fleet(folder: str, *, port: int, user: str) -> str:
    """The configuration of a fleet's broker: encrypted, everybody known by a certificate, nobody else let in.

    Args:
        folder: Where it stands on the broker's machine, with certificates and access list beside it.
        port: TCP port, on all interfaces.
        user: Who owns that folder.
    """
    common = _COMMON.format(max_packet_bytes=FLEET_PACKET_BYTES, max_queued_bytes=_FLEET_QUEUED_BYTES)
    return f"""\
# Mosquitto for a Sidestream fleet; written by "sidestream fleet". For Mosquitto 2.0 and later.
#   mosquitto -c {folder}/mosquitto.conf

# The fleet: encrypted, each client known by its certificate.
listener {port}
cafile {folder}/ca.crt
certfile {folder}/broker.crt
keyfile {folder}/broker.key
tls_version tlsv1.2
# Whoever shows no certificate of the fleet's authority, or a revoked one, is not let in.
require_certificate true
crlfile {folder}/crl.pem
# The certificate's common name is the user name,
use_identity_as_username true
allow_anonymous false
# by which this list says who may read and write what.
acl_file {folder}/acl
# Started by root, Mosquitto becomes this user, who owns these files.
user {user}

# ---- What one client may have: packets, messages under way, messages that wait for it.
{common}
{_LASTING.format(directory=folder + "/data", more="log_type information" + chr(10))}"""


def _write(path: Path, text: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        reason = error.strerror or error
        raise BrokerError(f"cannot write {path}: {reason}; choose another directory with --out") from error
    return path
