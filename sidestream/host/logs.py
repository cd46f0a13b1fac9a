"""Logging of a process: one line an event, to standard error. Never a payload, a text or a secret.

As text for people or as JSON for programs, one object a line: ``time`` (UTC), ``level``, ``logger``,
``message``, what the process is (``job``, ``device``), what the event is about (whatever is logged as
``extra``), and ``exception`` where one was raised.
"""

from __future__ import annotations

import datetime
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final, Literal, TextIO, TypeAlias

LogFormat: TypeAlias = Literal["text", "json"]
"""How a process logs."""

ROOMS: Final = ("sidestream", "edge_agent", "side_trainer", "broker_config", "metrics")
"""The loggers that are ours."""
_PLAIN: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_log = logging.getLogger("sidestream")


class TextFormatter(logging.Formatter):
    """Time, level, the room that speaks and what it says, on one line whatever a peer put into it."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(room)s: %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        record.room = record.name.rpartition(".")[0] or record.name
        line = super().formatMessage(record)
        return line if line.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)


class JsonFormatter(logging.Formatter):
    """An object a line.

    Args:
        about: What every line tells of the process.
    """

    def __init__(self, about: dict[str, str]) -> None:
        super().__init__()
        self._about = about

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._about,
            **{key: value for key, value in vars(record).items() if key not in _PLAIN},
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up(level: str, form: LogFormat = "text", **about: str) -> None:
    """Log at ``level`` and above; third parties from warning up.

    Args:
        level: debug, info, warning or error.
        form: For people or for programs.
        **about: What the process is, for every JSON line; empty ones are left out.
    """
    handler = logging.StreamHandler(sys.stderr)
    told = {key: value for key, value in about.items() if value}
    handler.setFormatter(JsonFormatter(told) if form == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    for room in ROOMS:
        logging.getLogger(room).setLevel(level.upper())
    warnings.simplefilter("ignore")


@contextmanager
def silent() -> Iterator[None]:
    """Log nothing meanwhile: whoever asked tells by other means what went wrong."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def say(line: str, *, file: TextIO | None = None) -> None:
    """Tell whoever started the process: on standard output or ``file``, or in a log that is for programs."""
    if _for_programs():
        _log.info("%s", line)
    else:
        print(line, file=file or sys.stdout, flush=True)


def fail(error: Exception) -> None:
    """Tell why the process ends, the same way."""
    if _for_programs():
        _log.error("%s", error)
    else:
        print(f"sidestream: error: {error}", file=sys.stderr)


def _for_programs() -> bool:
    return any(isinstance(one.formatter, JsonFormatter) for one in logging.getLogger().handlers)
