"""What users and peers rely on: commands, options, topics, exported names. A change here is a decision."""

from __future__ import annotations

import argparse

import pytest

import edge_agent
import sidestream
from broker_config.settings import BrokerSettings
from sidestream.cli import build_parser
from sidestream.contract.topics import Topics

COMMANDS = {
    "agent generate": [
        *(
            "--backbone",
            "--frozen",
            "--max-tokens",
            "--seed",
            "--config",
            "--job",
            "--state-dir",
            "--stop",
            "--temperature",
        ),
        *("--top-k", "--top-p"),
    ],
    "agent enroll": ["--config-dir", "--data", "--password-file", "--replace"],
    "agent init": None,
    "agent install": ["--dry-run", "--root", "--run-as", "--state-dir", "--user"],
    "agent label": ["--config", "--file", "--job", "--state-dir"],
    "agent predict": ["--backbone", "--file", "--json", "--pair", "--config", "--job", "--state-dir"],
    "agent run": None,
    "agent samples": ["--json", "--predict", "--config", "--job", "--state-dir", "--unlabelled"],
    "agent serve": ["--backbone", "--config", "--host", "--job", "--port", "--state-dir"],
    "agent uninstall": ["--root", "--user"],
    "backbone codebooks": ["--layers", "--max-tokens", "--out", "--seed", "--stages", "--text"],
    "backbone export": ["--images", "--layers", "--out", "--precision"],
    "broker install": [
        *("--dry-run", "--host", "--port", "--root", "--run-as", "--state-dir", "--user"),
    ],
    "broker render": ["--out"],
    "broker uninstall": ["--root", "--user"],
    "broker run": ["--data-dir", "--host", "--kind", "--log-format", "--log-level", "--port"],
    "demo": [
        *("--alpha", "--broker", "--data", "--devices", "--eval", "--images", "--json", "--keep"),
        *(
            "--label-column",
            "--max-samples",
            "--method",
            "--metrics-port",
            "--seed",
            "--task",
            "--text-column",
        ),
        *("--text-pair-column", "--trace"),
    ],
    "doctor": ["--broker", "--json", "--quick", "--trainer"],
    "fleet add-device": ["--again", "--out", "--password-file", "--tier"],
    "fleet init": ["--broker-dir", "--broker-user", "--host", "--job", "--port", "--tier"],
    "fleet list": ["--json"],
    "fleet revoke": [],
    "fleet rotate": ["--certificates", "--finish"],
    "completion": [],
    "leakage": [
        *(
            "--backbone",
            "--codebooks",
            "--defences",
            "--journal",
            "--json",
            "--minutes",
            "--plot",
            "--public",
        ),
        *("--public-texts", "--seed", "--sentences", "--texts", "--threads", "--train", "--way"),
    ],
    "metrics render": ["--docs", "--out", "--target"],
    "trainer backup": ["--out", "--config", "--job", "--state-dir"],
    "trainer forget": [],
    "trainer export": ["--format", "--out", "--config", "--job", "--state-dir", "--tier"],
    "trainer quarantine exclude": ["--config", "--job", "--state-dir"],
    "trainer quarantine list": ["--json", "--config", "--job", "--state-dir"],
    "trainer quarantine release": ["--config", "--job", "--state-dir"],
    "trainer rebuild": ["--config", "--job", "--state-dir", "--without"],
    "trainer init": None,
    "trainer install": ["--dry-run", "--root", "--run-as", "--state-dir", "--user"],
    "trainer uninstall": ["--root", "--user"],
    "trainer run": None,
    "trainer status": ["--json", "--config", "--job", "--state-dir"],
    "trainer tuning": ["--config", "--device", "--job", "--json", "--state-dir"],
    "trainer verify": ["--cells", "--config", "--job", "--state-dir", "--threads"],
    "top": None,
}


def leaves(parser: argparse.ArgumentParser, path: str = "") -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found: dict[str, argparse.ArgumentParser] = {}
            for name, below in action.choices.items():
                found |= leaves(below, f"{path} {name}".strip())
            return found
    return {path: parser}


def options(parser: argparse.ArgumentParser) -> list[str]:
    named = {option for action in parser._actions for option in action.option_strings}
    return sorted(option for option in named if option.startswith("--") and option != "--help")


def test_the_commands_are_these() -> None:
    assert sorted(leaves(build_parser())) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize("command", [name for name, listed in COMMANDS.items() if listed is not None])
def test_their_options_are_these(command: str) -> None:
    assert options(leaves(build_parser())[command]) == sorted(COMMANDS[command] or ())


@pytest.mark.parametrize("command", ["agent run", "trainer run"])
def test_every_setting_but_a_secret_is_a_flag_with_help(command: str) -> None:
    parser = leaves(build_parser())[command]
    given = options(parser)
    assert {"--job", "--broker", "--broker.url", "--state-dir", "--metrics-port"} <= set(given)
    assert not any("password" in option or "username" in option for option in given)
    assert all(action.help for action in parser._actions)


def test_every_command_teaches() -> None:
    for name, parser in leaves(build_parser()).items():
        assert parser.description and len(parser.description) > 40, name


def test_secrets_never_show() -> None:
    settings = BrokerSettings(url="mqtt://u:hunter2@h:1", password="hunter2")
    assert "hunter2" not in repr(settings) + str(settings)


def test_topics_are_these() -> None:
    topics = Topics("job")
    assert [
        topics.plan,
        topics.trainer_status,
        topics.trainer_claim,
        topics.activations("t", "d"),
        topics.status("t", "d"),
        topics.telemetry("t", "d"),
        topics.weights("t"),
        topics.weights_chunk("t", 7, 0),
        topics.receipt("t", "d"),
        topics.flow("t"),
        topics.rejected("t", "d"),
        topics.question("t", "d"),
        topics.home("t", "d"),
        topics.echo("t", "d"),
        topics.trainer_echo,
    ] == [
        "sidestream/v1/job/plan",
        "sidestream/v1/job/trainer/status",
        "sidestream/v1/job/trainer/claim",
        "sidestream/v1/job/up/t/d/activations",
        "sidestream/v1/job/up/t/d/status",
        "sidestream/v1/job/up/t/d/telemetry",
        "sidestream/v1/job/down/t/weights",
        "sidestream/v1/job/down/t/weights/7/0",
        "sidestream/v1/job/down/t/device/d/receipt",
        "sidestream/v1/job/down/t/flow",
        "sidestream/v1/job/rejected/t/d",
        "sidestream/v1/job/ask/t/d",
        "sidestream/v1/job/home/t/d",
        "sidestream/v1/job/up/t/d/echo",
        "sidestream/v1/job/trainer/echo",
    ]


def test_the_python_interface_is_this() -> None:
    assert edge_agent.__all__ == ["Prediction", "Predictor", "load", "load_tuned"]


def test_a_tab_shows_of_the_library_what_it_offers() -> None:
    assert [name for name in dir(sidestream) if not name.startswith("_")] == sorted(sidestream.__all__)
