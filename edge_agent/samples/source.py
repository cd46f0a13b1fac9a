"""What a source of samples is, and what all of them do alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeAlias

from edge_agent.config import DataConfig
from edge_agent.samples.identities import Identities
from edge_agent.samples.rows import Format, RowParser
from edge_agent.samples.sample import Sample
from sidestream.backbone.inputs import Input
from sidestream.contract.errors import DataError
from sidestream.contract.messages import MAX_LABEL_CHARS, MAX_LABELS
from sidestream.contract.tasks import TASKS, Modality, Task

FIRST_INPUTS = 64  # by which a tokenizer is judged
log = logging.getLogger(__name__)

NamesIn: TypeAlias = Callable[[str], Sequence[str]]


class SampleSource(Protocol):
    """Yields samples; asked again and again until it has ended."""

    modality: Modality | None = Modality.TEXT
    """What the samples are; None where there are none."""
    ended: bool
    """Whether no sample can ever come again."""

    @property
    def lacking(self) -> str:
        """In words, what was looked for in vain where samples have no label; empty: nothing to say."""
        return ""

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        """Label names in the data that is there now, sorted; none where it cannot be looked at beforehand.

        Asked before reading begins, perhaps several times. ``names_in`` takes a row's label apart.
        """

    def first_inputs(self) -> Sequence[Input]:
        """A few inputs of the data that is there now; none where it cannot be looked at beforehand."""
        return ()

    def read(self) -> Iterator[Sample]:
        """The samples that are there now. Returns when there are none left for the moment.

        Raises:
            DataError: the data cannot be read.
        """

    def give_back(self, samples: Sequence[Sample]) -> None:
        """Take back samples that were read and not consumed, where they could not be read again."""
        return

    def close(self) -> None:
        """Let go of what reading took. Idempotent."""
        return


class NamingSource(SampleSource):
    """A source with rows to name.

    Args:
        config: The settings.
        identities: Names the rows; it is closed with the source.
    """

    def __init__(self, config: DataConfig, identities: Identities) -> None:
        self.ended = False
        self._config = config
        self._identities = identities

    def close(self) -> None:
        self._identities.close()


class NoSource(SampleSource):
    """No data at all."""

    modality = None
    ended = True

    def labels(self, names_in: NamesIn) -> tuple[str, ...]:
        return ()

    def read(self) -> Iterator[Sample]:
        return iter(())


def check_modality(source: SampleSource, task: Task) -> None:
    """See that a source has what a job's samples are.

    Raises:
        DataError: it has not.
    """
    wanted = TASKS[task].modality
    if source.modality in (None, wanted):
        return
    remedy = "set data.format to images" if wanted is Modality.IMAGE else "give a file of texts in data.path"
    raise DataError(f"data.path: the job is {task.value}, whose samples are {wanted.value}s; {remedy}")


def listable(labels: Iterable[str]) -> tuple[str, ...]:
    """Label names in order, as a device's status may carry them; none if there are too many for a job."""
    names = sorted(label for label in labels if len(label) <= MAX_LABEL_CHARS)
    if len(names) > MAX_LABELS:
        log.warning("the data has %d different labels, too many to announce", len(names))
        return ()
    return tuple(names)


def parser_for(name: str, kind: Format, config: DataConfig) -> RowParser:
    """A parser with the columns that the settings name."""
    return RowParser(
        name,
        kind,
        config.text_column,
        config.label_column,
        config.text_pair_column,
        delimiter={"tab": "\t"}.get(config.delimiter, config.delimiter),
        encoding=config.encoding,
    )
