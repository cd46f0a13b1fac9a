"""Who may do what at a fleet's broker: Mosquitto's access list, from the list of devices. Pure text.

A device is named by its certificate. It writes its own uploads, queries, status and telemetry. It reads the
plan, the trainer's status, its tier's weights, codebooks and flow, its own receipts, assignment, gradients
and predictions, and its own status, by which it notices a duplicate device, and that its words arrive. It has
an echo topic to try the broker with. What no line allows is denied.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from sidestream.contract.topics import Topics

TRAINER: Final = "@trainer"
"""The trainer's user name: no device can have it, for their names begin with a letter or a digit."""


class Member(NamedTuple):
    """A device that the broker lets in."""

    name: str
    tier: str


def access_list(job: str, members: Iterable[Member]) -> str:
    """The whole file."""
    topics = Topics(job)
    trainer = [
        f"user {TRAINER}",
        f"topic readwrite {topics.base}/#",
        "topic read $SYS/broker/#",
    ]
    blocks = [trainer, *(_device(topics, member) for member in members)]
    head = '# Written by "sidestream fleet": changes made here are lost. What no line allows is denied.\n'
    return head + "".join("\n" + "\n".join(block) + "\n" for block in blocks)


def _device(topics: Topics, member: Member) -> list[str]:
    name, tier = member
    return [
        f"user {name}",
        f"topic write {topics.activations(tier, name)}",
        f"topic write {topics.adapter(tier, name)}",
        f"topic write {topics.query(tier, name)}",
        f"topic write {topics.telemetry(tier, name)}",
        f"topic readwrite {topics.status(tier, name)}",
        f"topic readwrite {topics.echo(tier, name)}",
        f"topic read {topics.plan}",
        f"topic read {topics.trainer_status}",
        f"topic read {topics.weights(tier)}",
        f"topic read {topics.final_weights(tier)}",
        f"topic read {topics.weights_chunks_filter(tier)}",
        f"topic read {topics.codebooks_filter(tier)}",
        f"topic read {topics.flow(tier)}",
        f"topic read {topics.receipt(tier, name)}",
        f"topic read {topics.assignment(tier, name)}",
        f"topic read {topics.gradients_filter(tier, name)}",
        f"topic read {topics.predictions_filter(tier, name)}",
    ]
