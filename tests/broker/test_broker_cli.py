"""``sidestream broker run`` and ``render``, as their parser and handlers."""

import argparse
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker_config import cli
from broker_config.embedded.probe import answers_mqtt
from sidestream.contract.errors import BrokerError
from tests.broker.conftest import PATIENCE_S

ROOT = Path(__file__).parents[2]
MAIN = """
import argparse, sys
from broker_config import cli
parser = argparse.ArgumentParser()
cli.add_parser(parser.add_subparsers(required=True))
args = parser.parse_args()
try:
    sys.exit(args.handler(args))
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(1)
"""


def parse(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_parser(parser.add_subparsers(required=True))
    return parser.parse_args(words)


def start(kind: str, data_dir: Path, *more: str) -> tuple["subprocess.Popen[str]", list[str]]:
    command = ["broker", "run", "--port", "0", "--kind", kind, "--data-dir", str(data_dir), *more]
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    return process, [process.stdout.readline() for _ in range(3)]


def port_and_pid(line: str) -> tuple[int, int]:
    words = line.replace(",", " ").split()
    return int(words[1].rpartition(":")[2]), int(words[words.index("(pid") + 1])


@pytest.mark.embedded
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_says_what_it_does_and_a_signal_ends_it_with_zero(tmp_path: Path, number: signal.Signals) -> None:
    process, (chosen, listening, hint) = start("amqtt", tmp_path)
    assert chosen == "broker: amqtt (MQTT 3.1.1), as asked for\n"
    assert listening.startswith("listening: mqtt://127.0.0.1:")
    assert "Ctrl-C" in hint
    port, _ = port_and_pid(listening)
    assert answers_mqtt("127.0.0.1", port, 1.0)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, stderr) == (0, "broker stopped\n")
    assert not answers_mqtt("127.0.0.1", port, 1.0)


@pytest.mark.embedded
def test_run_on_every_address_says_how_others_reach_it(tmp_path: Path) -> None:
    process, (_, listening, _) = start("amqtt", tmp_path, "--host", "0.0.0.0")
    here, _, elsewhere = listening.partition(" on this machine, and every address of it from others: ")
    assert here.startswith("listening: mqtt://127.0.0.1:")
    assert elsewhere.startswith("mqtt://") and not elsewhere.startswith(("mqtt://0.0.0.0", "mqtt://127."))
    process.terminate()
    process.communicate(timeout=PATIENCE_S)


@pytest.mark.embedded
def test_run_reports_a_broker_that_died(tmp_path: Path) -> None:
    process, (_, listening, _) = start("amqtt", tmp_path)
    os.kill(port_and_pid(listening)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert stderr.startswith("BrokerError: the embedded broker (amqtt) has stopped")


def test_render_writes_and_says_where(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = parse("broker", "render", "--out", str(tmp_path / "conf"))
    assert args.handler(args) == 0
    written = tmp_path / "conf" / "mosquitto.conf"
    assert written.exists()
    assert f"wrote {written}" in capsys.readouterr().out


def test_user_errors_leave_as_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    args = parse("broker", "run", "--port", "0", "--kind", "amqtt", "--data-dir", str(tmp_path / "file"))
    with pytest.raises(BrokerError, match="--data-dir"):
        args.handler(args)


def test_the_defaults_are_the_documented_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    args = parse("broker", "run")
    assert (args.host, args.port, args.kind) == ("127.0.0.1", 1883, "auto")
    assert args.data_dir == str(tmp_path / "sidestream" / "broker")
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    default = tmp_path / ".local" / "state" / "sidestream" / "broker"
    assert parse("broker", "run").data_dir == str(default)
