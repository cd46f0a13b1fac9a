"""Every error that a user, a peer or a machine can cause. What is not here is a bug of ours.

::

    SidestreamError
    ├── ConfigError      a setting is missing or wrong; names the field
    ├── DataError        samples cannot be read; names the file, and the line or column
    ├── StateError       a state directory cannot be used, or is not what it should be
    │   ├── StorageError     it cannot be written to for now: the disk is full, read-only or failing
    │   └── NoRoomError      what it may take of one kind is used up; the rest of it goes on
    ├── BackboneError    a backbone cannot be loaded, or is not the one the job uses
    ├── BrokerError      the broker cannot be reached, started or written to
    └── WireError        what a peer sent cannot be used
        ├── DecodeError      bytes that are not a Sidestream message or tensor
        ├── MismatchError    a well-formed message that contradicts the plan
        └── UntrustedError   a message not signed by whom the device trusts, or older than one adopted
            └── OutdatedError    signed by whom it trusts, and only older
"""


class SidestreamError(Exception):
    """The root: the command line prints its text as one line and exits 1."""


class ConfigError(SidestreamError):
    """A setting is missing or wrong.

    Args:
        field: The setting as the user writes it, such as ``broker.url`` or ``--port``.
        message: What is wrong and what to write instead.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class DataError(SidestreamError):
    """Samples cannot be read."""


class StateError(SidestreamError):
    """A state directory cannot be used, or is not what it should be."""


class StorageError(StateError):
    """A state directory cannot be written to for now. Nothing is lost by trying again later."""


class NoRoomError(StateError):
    """What a state directory may hold of one kind is used up. Everything else goes on."""


class BackboneError(SidestreamError):
    """A backbone cannot be loaded, or is not the one the job uses."""


class BrokerError(SidestreamError):
    """The broker cannot be reached, started or written to."""


class WireError(SidestreamError):
    """What a peer sent cannot be used."""


class DecodeError(WireError):
    """Bytes that are not a Sidestream message or tensor."""


class MismatchError(WireError):
    """A well-formed message that contradicts the plan."""


class UntrustedError(WireError):
    """A message that is not signed by whom the device trusts, or is older than one that was adopted."""


class OutdatedError(UntrustedError):
    """A message that is signed by whom the device trusts, and is older than one that was adopted."""
