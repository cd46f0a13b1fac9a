"""``sidestream agent``: run it, and predict with what it adopted.

What takes long to import is imported by the handlers only, so that ``--help`` and a wrong setting answer at
once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import msgspec

from broker_config.connection.tls import tls_context
from edge_agent.commands import setup as setup_cli
from edge_agent.commands.generate import add_adopted, add_generate
from edge_agent.commands.predicting import predictor_of
from edge_agent.commands.samples import add_label, add_samples
from edge_agent.commands.serve import add_serve
from edge_agent.config import AgentConfig
from edge_agent.samples.survey import Survey, survey
from edge_agent.weights.trust import read_trusted
from sidestream.backbone.inputs import Text
from sidestream.contract.errors import DataError
from sidestream.contract.tasks import Modality
from sidestream.host.commands import add_command, add_group
from sidestream.host.flags import add_flags, overrides
from sidestream.host.logs import say, set_up, silent
from sidestream.host.signals import stop_event
from sidestream.host.toml import load_config

_SHORT: Final = {
    "broker.url": "--broker",
    "data.path": "--data",
    "data.format": "--format",
    "data.delimiter": "--delimiter",
    "data.encoding": "--encoding",
    "data.text_column": "--text-column",
    "data.label_column": "--label-column",
    "data.watch": "--watch",
    "data.held_out_share": "--held-out-share",
    "data.evaluation_path": "--evaluation",
    "data.plugin": "--plugin",
}
_SECRET: Final = ("broker.username", "broker.password")
_AT_ONCE: Final = 32

_RUN_HELP: Final = """\
Run the agent of this device until Ctrl-C. Settings come from CONFIG, flags, or both; a flag overrides what
the file says, and SIDESTREAM_BROKER_USERNAME and SIDESTREAM_BROKER_PASSWORD give the credentials.

A device needs four facts: the broker, its credentials, its data, and the job's name. A smallest agent.toml:

    job = "support-intents"
    [broker]
    url = "mqtt://192.168.1.10:1883"
    [data]
    path = "/home/pi/commands.csv"

The same without a file:

    sidestream agent run --job support-intents --broker mqtt://192.168.1.10:1883 --data commands.csv
    tail -F commands.jsonl | sidestream agent run agent.toml --data -
"""

_PREDICT_HELP: Final = """\
Label texts, or in a job of images image files, with the weights that this device's agent adopted last. Needs
no broker and no network, but on a device of a split job that has no room for the whole model: with --config,
and remote = true in its [predict], the trainer is asked, if it may answer.

    sidestream agent predict --state-dir ~/.local/state/sidestream/agent/support-intents "turn the lights off"
    sidestream agent predict --state-dir DIR --file texts.txt --json
    sidestream agent predict --state-dir DIR photos/*.jpg
    echo "turn the lights off" | sidestream agent predict --state-dir DIR
"""


def add_parser(subparsers: Any) -> None:
    """Add ``agent`` with its commands; the chosen handler arrives as ``args.handler``."""
    commands = add_group(
        subparsers,
        "agent",
        "run the agent of a device, predict or generate with what it adopted, label samples late",
        "Run the agent of a device, and predict or generate with the weights it adopted.",
    )
    _add_run(commands)
    _add_predict(commands)
    add_serve(commands)
    add_generate(commands)
    setup_cli.add_commands(commands, short=_SHORT, secret=_SECRET)
    add_samples(commands)
    add_label(commands)


def _add_run(commands: Any) -> None:
    parser = add_command(commands, "run", run, "run the agent", _RUN_HELP)
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="the device's settings, such as agent.toml"
    )
    add_flags(parser, AgentConfig, short=_SHORT, hidden=_SECRET)
    parser.add_argument("--check", action="store_true", help="only check the settings")


def _add_predict(commands: Any) -> None:
    parser = add_command(commands, "predict", predict, "label texts, offline", _PREDICT_HELP)
    parser.add_argument(
        "text",
        metavar="TEXT",
        nargs="*",
        help="texts or image files (default: standard input)",
    )
    add_adopted(parser)
    parser.add_argument("--file", metavar="FILE", type=Path, help="read one text or path a line from here")
    parser.add_argument("--pair", action="store_true", help="every text is two, with a tab between them")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line")


def run(args: argparse.Namespace) -> int:
    """Run the agent until SIGINT or SIGTERM."""
    config = load_config(AgentConfig, args.config, overrides(args))
    endpoint = config.broker.endpoint()
    if args.check:
        found = check(config)
        print(f"the settings are right: job {config.job!r}, broker {endpoint.address}")
        if found is not None:
            print(f"data: {found}")
        return 0
    set_up(config.log_level, config.log_format, job=config.job, device=config.device)
    from edge_agent.session.agent import Agent

    def started(metrics_url: str) -> None:
        say(f"agent {agent.name} (tier {agent.tier}) of job {config.job!r}; state in {config.state_path}")
        if metrics_url:
            say(f"metrics: {metrics_url}")

    with stop_event() as stop:
        agent = Agent(config, stop=stop, started=started)
        return agent.run()


def check(config: AgentConfig) -> Survey | None:
    """Read what the settings name, and start nothing; return what there is in the data.

    Raises:
        SidestreamError: something is not there, or not what it should be.
    """
    if config.broker.endpoint().tls:
        tls_context(config.broker)
    read_trusted(config.trusted_keys_file)
    with silent():  # what is wrong with single rows is counted
        return survey(config.data)


def predict(args: argparse.Namespace) -> int:
    """Print the answer to each text."""
    set_up("warning")
    texts, unread = texts_of(args.text, args.file), 0
    with predictor_of(args.state_dir, args.config, args.backbone) as predictor:
        at_once = _AT_ONCE if args.text or args.file else 1  # whoever pipes texts in may wait for each answer
        while batch := list(islice(texts, at_once)):
            if predictor.modality is Modality.IMAGE:
                good = _readable(batch)
                unread += len(batch) - len(good)
                _print(good, predictor.predict(good), "image", as_json=args.json)
            else:
                inputs: list[Text] = [pair_of(text) for text in batch] if args.pair else list(batch)
                _print(batch, predictor.predict(inputs), "text", as_json=args.json)
    return 1 if unread else 0


def _print(asked: Sequence[str], answers: Sequence[Any], name: str, *, as_json: bool) -> None:
    for one, answer in zip(asked, answers, strict=True):
        if as_json:
            print(json.dumps({name: one, **msgspec.to_builtins(answer)}, ensure_ascii=False))
        else:
            print(f"{answer}\t{' '.join(one.split())}")
    sys.stdout.flush()


def _readable(paths: Sequence[str]) -> list[str]:
    """Those of some image files that can be read; the others are told of, one line each."""
    from sidestream.backbone.images.decoding import check_image, image_at

    found = []
    for path in paths:
        try:
            check_image(image_at(Path(path)))
            found.append(path)
        except DataError as exc:
            print(f"sidestream: {exc}", file=sys.stderr)
    return found


def pair_of(text: str) -> Text:
    """The two texts round a tab.

    Raises:
        DataError: there is no tab, or more than one.
    """
    parts = text.split("\t")
    if len(parts) != 2:
        raise DataError(f"--pair: {text[:80]!r} is not two texts with one tab between them")
    return parts[0], parts[1]


def texts_of(given: list[str], file: Path | None) -> Iterator[str]:
    """The texts to label: those given, else a line each of the file, else of standard input.

    Raises:
        DataError: the file cannot be read.
    """
    if given:
        return iter(given)
    if file is None:
        return _lines(sys.stdin)
    try:
        return _lines(file.read_text(encoding="utf-8", errors="replace").splitlines())
    except OSError as exc:
        raise DataError(f"--file: {file} cannot be read: {exc.strerror}") from exc


def _lines(source: Iterable[str]) -> Iterator[str]:
    return (line for line in map(str.strip, source) if line)
