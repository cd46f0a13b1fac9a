"""``sidestream agent serve``: predictions without the start of a process for each."""

from __future__ import annotations

import argparse
import secrets
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from edge_agent.config import AgentConfig
from sidestream.contract.errors import ConfigError
from sidestream.contract.topics import Topics
from sidestream.host.commands import add_command
from sidestream.host.logs import say, set_up
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config
from sidestream.service.state_choice import add_state_dir

_HELP: Final = """\
Answer texts over HTTP, on this machine, with the weights that this device's agent adopted last, and with
newer ones as soon as it adopts them. The agent may run beside it. Questions that come at once are answered in
one pass.

    sidestream agent serve --job support-intents
    curl -s 127.0.0.1:9470/predict -d '{"texts": ["turn the lights off"]}'

With --config and serve_mqtt = true in it, also over MQTT 5, as request and response.
"""


def add_serve(commands: Any) -> None:
    """Add ``serve``."""
    parser = add_command(commands, "serve", serve, "answer texts over HTTP, and stay", _HELP)
    add_state_dir(parser, "agent")
    text = "where the backbone is now, if it has moved"
    parser.add_argument("--backbone", metavar="REF", default="", help=text)
    parser.add_argument("--port", type=int, help="port; 0 takes a free one (default: 9470)")
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1)")


def serve(args: argparse.Namespace) -> int:
    """Answer until SIGINT or SIGTERM."""
    set_up("info")
    config = _settings(args.config)
    from edge_agent.answers.predictor import load
    from edge_agent.serving.http import PredictionServer
    from edge_agent.serving.predictions import Predictions

    port = args.port if args.port is not None else config.serve_port if config else 9470
    host = args.host or (config.serve_host if config else "127.0.0.1")
    if not 0 <= port <= 65535:
        raise ConfigError("--port", f"is {port}; it must be from 0 to 65535")
    whole = "auto" if config is None else config.whole_model
    with stop_event() as stop, ExitStack() as stack:
        predictions = stack.enter_context(
            Predictions(
                args.state_dir.expanduser(),
                lambda folder: load(folder, backbone=args.backbone, whole_model=whole),
            )
        )
        served = stack.enter_context(PredictionServer(predictions, port, host))
        say(f"answering at {served.url}/predict with version {predictions.predictor.version}")
        if config is not None and config.serve_mqtt:
            topic = _over_mqtt(config, predictions, stack)
            say(f"and over MQTT 5 on {topic}")
        stop.wait()
    return 0


def _over_mqtt(config: AgentConfig, predictions: Any, stack: ExitStack) -> str:
    from broker_config.connection.connection import Connection
    from edge_agent.serving.mqtt import MqttAnswers
    from edge_agent.session.machine import detect_tier, device_name

    tier, device = config.tier or detect_tier(), config.device or device_name(config.state_path)
    topic = Topics(config.job).question(tier, device)
    connection = Connection(config.broker, client_id=f"sidestream-serve-{secrets.token_hex(8)}")
    stack.enter_context(MqttAnswers(predictions, connection, topic))
    return topic


def _settings(path: Path | None) -> AgentConfig | None:
    return None if path is None else load_config(AgentConfig, path)
