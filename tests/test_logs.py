"""Logs: a line an event whatever a peer puts into it, for people as text, for programs as JSON."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidestream.contract.errors import DecodeError
from sidestream.contract.messages import Status
from sidestream.contract.wire import pack, unpack
from sidestream.host.logs import JsonFormatter, TextFormatter, silent


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("side_trainer.ingest", logging.WARNING, "file.py", 1, message, arguments, None)
    vars(made).update(extra)
    return made


@given(st.text())
def test_an_event_is_one_line_in_both_formats(text: str) -> None:
    for formatter in (TextFormatter(), JsonFormatter({"job": "j"})):
        assert len(formatter.format(record("peer said %s", text)).splitlines()) == 1


@given(st.text(), st.text())
def test_a_json_line_gives_everything_back(text: str, device: str) -> None:
    line = json.loads(JsonFormatter({"job": "j"}).format(record("said %s", text, device=device)))
    assert (line["message"], line["job"], line["device"]) == (f"said {text}", "j", device)
    assert (line["level"], line["logger"]) == ("warning", "side_trainer.ingest")
    assert line["time"].endswith("Z") and "exception" not in line


def test_an_exception_goes_with_its_event() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        failed = record("it failed")
        failed.exc_info = sys.exc_info()
    line = json.loads(JsonFormatter({}).format(failed))
    assert "ValueError: why" in line["exception"]


def test_an_error_of_decoding_quotes_nothing_of_the_message() -> None:
    body = pack(Status(state="online", birth=1, stream="a" * 32)).replace(b"\xa6online", b"\xa6'hush'")
    try:
        unpack(Status, body)
    except DecodeError as error:
        assert "hush" not in str(error) and "$.state" in str(error)
    else:
        raise AssertionError("it was taken")


def test_silence_ends_with_the_block_that_wanted_it(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError), silent():
        logging.getLogger("side_trainer").critical("unheard")
        raise ValueError
    logging.getLogger("side_trainer").critical("heard")
    assert [line.getMessage() for line in caplog.records] == ["heard"]


@pytest.mark.slow
def test_an_error_that_ends_a_process_is_a_json_line_too(tmp_path: Path) -> None:
    config = tmp_path / "trainer.toml"
    config.write_text('job = "j"\nbroker_wait_s = 0.1\nmetrics_port = -1\npage = false\nstate_dir = "s"\n')
    done = subprocess.run(
        [
            *(sys.executable, "-m", "sidestream.cli", "trainer", "run", str(config)),
            *("--log-format", "json", "--broker", "mqtt://127.0.0.1:9"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 1 and done.stdout == ""
    assert lines[-1]["level"] == "error" and "no broker within" in lines[-1]["message"]
    assert {line["job"] for line in lines} == {"j"}
