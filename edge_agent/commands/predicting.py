"""What answers on this device: the weights that it adopted, or, if it may be asked, the trainer."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_agent.config import AgentConfig
from edge_agent.weights.trust import Trust, read_trusted
from sidestream.host.toml import load_config

if TYPE_CHECKING:
    from edge_agent.answers.predictor import Predictor

WARNING: Final = """\
sidestream: the trainer predicts: it and the broker get what this device's layers make of each text, and the
text can be read from that (docs/security.md)"""


@contextmanager
def predictor_of(state_dir: Path, settings: Path | None, backbone: str) -> Iterator[Predictor]:
    """A predictor, for as long as it is wanted.

    Args:
        state_dir: The agent's.
        settings: Its settings; without them the trainer cannot be asked.
        backbone: Where the backbone is now, if it has moved since.

    Raises:
        SidestreamError: nothing can answer here.
    """
    from edge_agent.answers.predictor import load, needs_trainer

    config = None if settings is None else load_config(AgentConfig, settings)
    whole = "auto" if config is None else config.whole_model
    if config is None or not config.predict.remote or not needs_trainer(state_dir, whole):
        yield load(state_dir, backbone=backbone or _backbone(config), whole_model=whole)
        return
    print(WARNING, file=sys.stderr)
    with _asking(config, state_dir, backbone or _backbone(config)) as predictor:
        yield predictor


@contextmanager
def _asking(config: AgentConfig, state_dir: Path, backbone: str) -> Iterator[Predictor]:
    from broker_config.connection.connection import Connection
    from edge_agent.answers.asking import Asker
    from edge_agent.answers.predictor import load_remote, tier_of
    from edge_agent.session.machine import device_name

    folder, tier = state_dir.expanduser(), tier_of(state_dir)
    trusted = read_trusted(config.trusted_keys_file)
    connection = Connection(config.broker, client_id=f"sidestream-predict-{secrets.token_hex(8)}")
    with Asker(
        connection,
        job=config.job,
        tier=tier,
        device=config.device or device_name(folder),
        trust=Trust(folder, job=config.job, tier=tier, given=trusted),
        timeout_s=config.predict.timeout_s,
    ) as asker:
        yield load_remote(state_dir, asker, backbone=backbone, runtime=config.runtime)


def _backbone(config: AgentConfig | None) -> str:
    return "" if config is None else config.backbone
