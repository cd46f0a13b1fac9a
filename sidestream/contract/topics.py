"""The topic tree of a job: ``sidestream/v1/<job>/…``.

Direction stands before tier and device, so that an access list can fence a device in, topic by topic
(:mod:`broker_config.access`): it writes only its own below ``up/``, and reads the plan, the trainer's status,
its tier's weights and flow, and its own receipts, assignment, gradients, predictions, status and echo.
``down/<its tier>/#`` would show it its neighbours' gradients and predictions, too: an access list never has
that.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from sidestream.contract.errors import ConfigError, DecodeError

ROOT: Final = "sidestream/v1"
MAX_NAME_CHARS: Final = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_UP_KINDS: Final = ("activations", "adapter", "query", "status", "telemetry")


def check_name(field: str, name: str) -> str:
    """Return ``name`` if it can be one level of a topic.

    Raises:
        ConfigError: naming ``field``, if it is empty, over 64 characters, or holds anything but
            letters, digits, ``.``, ``_`` and ``-`` (MQTT reserves ``/``, ``+``, ``#`` and ``$``).
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            field,
            f"{name[:80]!r} cannot be part of a topic; use 1 to {MAX_NAME_CHARS} letters, digits, '.', '_' "
            "or '-', starting with a letter or digit",
        )
    return name


def plans_filter() -> str:
    """The filter for the plans of all jobs on a broker."""
    return f"{ROOT}/+/plan"


@dataclass(frozen=True, kw_only=True)
class Uplink:
    """Where a message from a device came from."""

    tier: str
    """The device's hardware tier."""
    device: str
    """The device's id."""
    kind: str
    """``activations``, ``adapter``, ``query``, ``status`` or ``telemetry``."""


@dataclass(frozen=True)
class Topics:
    """Builds and reads the topics of one job."""

    job: str

    def __post_init__(self) -> None:
        check_name("job", self.job)

    @property
    def base(self) -> str:
        return f"{ROOT}/{self.job}"

    @property
    def plan(self) -> str:
        return f"{self.base}/plan"

    @property
    def trainer_status(self) -> str:
        return f"{self.base}/trainer/status"

    @property
    def trainer_claim(self) -> str:
        return f"{self.base}/trainer/claim"

    def activations(self, tier: str, device: str) -> str:
        return f"{self.base}/up/{tier}/{device}/activations"

    def adapter(self, tier: str, device: str) -> str:
        """Where a device of a split job sends what goes into its outbox beside activations."""
        return f"{self.base}/up/{tier}/{device}/adapter"

    def gradient(self, tier: str, device: str, slot: int) -> str:
        """Where a device finds the answer to a batch."""
        return f"{self.base}/down/{tier}/device/{device}/gradient/{slot}"

    def gradients_filter(self, tier: str, device: str) -> str:
        """The filter for all answers to one device."""
        return f"{self.base}/down/{tier}/device/{device}/gradient/+"

    def query(self, tier: str, device: str) -> str:
        """Where a device without room for the whole model has the trainer predict."""
        return f"{self.base}/up/{tier}/{device}/query"

    def prediction(self, tier: str, device: str, place: int) -> str:
        """Where it is answered."""
        return f"{self.base}/down/{tier}/device/{device}/prediction/{place}"

    def predictions_filter(self, tier: str, device: str) -> str:
        """The filter for all such answers to one device."""
        return f"{self.base}/down/{tier}/device/{device}/prediction/+"

    def status(self, tier: str, device: str) -> str:
        return f"{self.base}/up/{tier}/{device}/status"

    def telemetry(self, tier: str, device: str) -> str:
        return f"{self.base}/up/{tier}/{device}/telemetry"

    def echo(self, tier: str, device: str) -> str:
        """Where a device hears only itself: what ``sidestream doctor`` tries a broker with."""
        return f"{self.base}/up/{tier}/{device}/echo"

    @property
    def trainer_echo(self) -> str:
        return f"{self.base}/trainer/echo"

    def question(self, tier: str, device: str) -> str:
        """Where a device that answers over MQTT is asked."""
        return f"{self.base}/ask/{tier}/{device}"

    def home(self, tier: str, device: str) -> str:
        """What Home Assistant reads of a device: JSON, retained."""
        return f"{self.base}/home/{tier}/{device}"

    def uplink(self, tier: str, device: str, kind: str) -> str:
        """Where a device sends one kind of message."""
        assert kind in _UP_KINDS
        return f"{self.base}/up/{tier}/{device}/{kind}"

    def uplink_filter(self, kind: str) -> str:
        """The filter for one kind of message from every device."""
        assert kind in _UP_KINDS
        return f"{self.base}/up/+/+/{kind}"

    def weights(self, tier: str) -> str:
        """Where every version stands until the next one."""
        return f"{self.base}/down/{tier}/weights"

    def final_weights(self, tier: str) -> str:
        """Where finished versions stand, and the first good one until there is one."""
        return f"{self.base}/down/{tier}/weights/final"

    def weights_chunk(self, tier: str, version: int, index: int) -> str:
        return f"{self.base}/down/{tier}/weights/{version}/{index}"

    def weights_chunks_filter(self, tier: str) -> str:
        return f"{self.base}/down/{tier}/weights/+/+"

    def codebooks(self, tier: str, index: int) -> str:
        """Where a tier's devices find codebooks that they lack, part by part."""
        return f"{self.base}/down/{tier}/codebooks/{index}"

    def codebooks_filter(self, tier: str) -> str:
        return f"{self.base}/down/{tier}/codebooks/+"

    @property
    def all_weights_filters(self) -> tuple[str, str, str, str]:
        """Filters for every tier's manifests and chunks, and for codebooks."""
        down = f"{self.base}/down/+/weights"
        return down, f"{down}/final", f"{down}/+/+", f"{self.base}/down/+/codebooks/+"

    def receipt(self, tier: str, device: str) -> str:
        return f"{self.base}/down/{tier}/device/{device}/receipt"

    def assignment(self, tier: str, device: str) -> str:
        """Where a device finds how it is to make its batches, where the trainer chooses that."""
        return f"{self.base}/down/{tier}/device/{device}/assignment"

    def flow(self, tier: str) -> str:
        return f"{self.base}/down/{tier}/flow"

    def rejected(self, tier: str, device: str) -> str:
        return f"{self.base}/rejected/{tier}/{device}"

    def parse_uplink(self, topic: str) -> Uplink:
        """Read the topic of a message that a device sent.

        Raises:
            DecodeError: if it is no ``up/<tier>/<device>/<kind>`` topic of this job.
        """
        prefix = f"{self.base}/up/"
        levels = topic[len(prefix) :].split("/") if topic.startswith(prefix) else []
        if len(levels) != 3 or levels[2] not in _UP_KINDS:
            raise DecodeError(f"not a device topic of job {self.job!r}: {topic[:200]!r}")
        tier, device, kind = levels
        if not (_NAME.fullmatch(tier) and _NAME.fullmatch(device)):
            raise DecodeError(f"bad tier or device name in topic {topic[:200]!r}")
        return Uplink(tier=tier, device=device, kind=kind)

    def parse_weights_chunk(self, topic: str) -> tuple[int, int]:
        """Return ``(version, index)`` of a chunk's topic.

        Raises:
            DecodeError: if it is no ``down/<tier>/weights/<version>/<n>`` topic of this job.
        """
        match = re.fullmatch(
            re.escape(self.base) + r"/down/[^/+#]{1,64}/weights/([0-9]{1,18})/([0-9]{1,9})", topic
        )
        if match is None:
            raise DecodeError(f"not a weights chunk topic: {topic[:200]!r}")
        return int(match[1]), int(match[2])
