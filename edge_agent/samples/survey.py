"""What there is in the data that the settings name, before anything is done with it."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

import msgspec

from edge_agent.config import DataConfig, parse_part
from edge_agent.samples.images import holds_images
from edge_agent.samples.sample import Sample, why_unreadable
from edge_agent.samples.source import NamesIn
from edge_agent.samples.sources import open_source, read_evaluation


class Survey(NamedTuple):
    """Rows by whether an agent can use them."""

    rows: int
    """All there are now."""
    unused: Counter[str]
    """Those of no use, by reason."""
    unlabelled: int
    """Those that would wait for a label."""

    def __str__(self) -> str:
        left = [f"{count} {why}" for why, count in sorted(self.unused.items())]
        left += [f"{self.unlabelled} without a label"] if self.unlabelled else []
        return f"{self.rows} rows" + (f", of which {', '.join(left)}" if left else "")


def survey(
    config: DataConfig, names_in: NamesIn = lambda label: (), known: Collection[str] = ()
) -> Survey | None:
    """Read all of the data once; None where it can be read but once, or there is none.

    Args:
        config: Where it is.
        names_in: Takes a row's label apart.
        known: The job's labels; none if they are not fixed.

    Raises:
        DataError: it is not there, a column is missing, or no row can be used.
        ConfigError: there is no such plug-in.
    """
    if config.evaluation_path:
        read_evaluation(config, parse_part(config.evaluation_part))
    if config.path == "-":
        return None
    unused, rows, unlabelled = Counter[str](), 0, 0
    if holds_images(config.path, config.format):
        config = msgspec.structs.replace(config, watch=False)  # a watched one is given out at the second look
    with contextlib.closing(open_source(config)) as source:
        if config.plugin or not config.path:
            return None
        for sample in source.read():
            rows += 1
            if why := _unused(sample, names_in, known):
                unused[why] += 1
            elif sample.label is None:
                unlabelled += 1
    return Survey(rows, unused, unlabelled)


def _unused(sample: Sample, names_in: NamesIn, known: Collection[str]) -> str:
    if sample.broken or why_unreadable(sample.input):
        return "unreadable"
    if sample.row.is_blank:
        return "without a text"
    label = sample.label
    strange = label is not None and known and not set(names_in(label)) <= set(known)
    return "with a label that the job does not have" if strange else ""
