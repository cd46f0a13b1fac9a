"""docs/configuration.md, from the settings' own docstrings.

python -m sidestream.configuration_page > docs/configuration.md
"""

from __future__ import annotations

import sys

from edge_agent.config import AgentConfig
from side_trainer.settings.schema import TrainerConfig
from sidestream.host.settings_text import reference

_HEAD = """\
# Every setting

Written by `python -m sidestream.configuration_page > docs/configuration.md`; a test holds it to the code.

A settings file is TOML. These write one with every setting in it, explained, and commented out but for what
you give:

```console
$ sidestream agent init agent.toml --job support-intents --broker mqtt://192.168.1.10:1883
$ sidestream trainer init trainer.toml --job support-intents --broker mqtt://192.168.1.10:1883
```

and these say whether one is right, without starting anything:

```console
$ sidestream agent run agent.toml --check
$ sidestream trainer run trainer.toml --check
```

A setting that does not exist is refused with the nearest one that does. Every setting below that is a text,
a number or a yes-or-no is a flag too: `data.text_column` is `--data.text-column`, and a flag overrides the
file. The user name and the password at the broker are no flags: the environment gives them, as
`SIDESTREAM_BROKER_USERNAME` and `SIDESTREAM_BROKER_PASSWORD`, and wins over the file.
"""


def page() -> str:
    """The whole page."""
    agent, trainer = reference(AgentConfig), reference(TrainerConfig)
    return f"{_HEAD}\n## agent.toml\n\n{agent}\n## trainer.toml\n\n{trainer}"


if __name__ == "__main__":
    sys.stdout.write(page())
