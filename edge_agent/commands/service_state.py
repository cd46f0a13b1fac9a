"""Where an installed agent keeps its state: where the same settings, run by hand, keep it.

In two places there would be two outboxes, and each would upload every sample once.
"""

from __future__ import annotations

import os
import pwd
from pathlib import Path
from typing import Final

from edge_agent.config import AgentConfig
from edge_agent.store.outbox_file import FILE_NAME
from sidestream.contract.errors import ConfigError
from sidestream.service.systemd import below, system_state

SYSTEM: Final = system_state("agent")
"""The state of a machine's service whose user has no home."""


def state_of(config: AgentConfig, user: str, owner: str, *, for_user: bool, root: Path = Path("/")) -> Path:
    """The service's state directory.

    Args:
        config: The settings.
        user: Who the service runs as.
        owner: Whose the settings are, and who may have run the agent by hand.
        for_user: It is a user's service, not the machine's.
        root: The root folder of the machine that it runs on.

    Raises:
        ConfigError: the agent ran by hand as somebody else, or the settings name no absolute folder.
    """
    hand = by_hand(config, user)
    home = Path(pwd.getpwnam(user).pw_dir)
    theirs = by_hand(config, owner)
    if theirs != hand and _in_use(below(root, theirs)):
        raise ConfigError(
            "--run-as",
            f"{owner} has run this agent by hand, with its state in {theirs}, and {user} would upload "
            f"everything again; chown -R {user} {theirs}, and give --state-dir {theirs}",
        )
    usable = for_user or bool(config.state_dir) or below(root, home).is_dir()
    return hand if usable else SYSTEM


def by_hand(config: AgentConfig, user: str) -> Path:
    """Where the agent keeps its state if ``user`` runs it.

    Raises:
        ConfigError: that depends on the folder it is started in.
    """
    account = pwd.getpwnam(user)
    given = config.state_dir
    if account.pw_uid == os.geteuid() and not given:
        return config.state_path
    home = Path(account.pw_dir)
    if given.startswith("~/"):
        return home / given.removeprefix("~/")
    if given and not Path(given).is_absolute():
        raise ConfigError("state_dir", f"{given!r} depends on where the agent is started; write a full path")
    return Path(given) if given else home / ".local/state/sidestream/agent" / config.job


def _in_use(folder: Path) -> bool:
    """Whether an agent has run there, as far as we may look."""
    try:
        return (folder / FILE_NAME).exists()
    except PermissionError:
        return True
