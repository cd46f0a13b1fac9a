"""Who an agent is and what it works with; the same in every session."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from broker_config.transport import Transport, Will
from edge_agent.config import AgentConfig
from edge_agent.samples.sample import Row
from edge_agent.samples.source import SampleSource
from edge_agent.store.outbox import Outbox
from edge_agent.uplink.budget import LinkBudget
from edge_agent.weights.trust import Trust
from metrics.catalogue import AgentMetrics
from sidestream.backbone.backbone import Backbone
from sidestream.contract.plan import Precision
from sidestream.contract.tasks import Task
from sidestream.host.trace import Trace

Connect = Callable[[AgentConfig, str, Will | None], Transport]
"""Makes a transport: for these settings, under this client id, with this will."""
LoadBackbone = Callable[[str, int, Precision, Task], Backbone]
"""Loads a backbone: from here, so many layers, in this precision, for this task."""


@dataclass(frozen=True, kw_only=True)
class AgentContext:
    """See the module."""

    config: AgentConfig
    """Its settings, with its name and tier in them."""
    instance: str
    """The process's random name, which its status tells."""
    client_id: str
    """Of its connections to the broker: a secret of the state directory, told to nobody else."""
    outbox: Outbox
    evaluation_rows: Sequence[Row] | None
    """Of the evaluation file; None to hold samples out."""
    stream: SampleSource | None
    """Standard input, which all sessions read on; None where each session opens its source."""
    connect: Connect
    load_backbone: LoadBackbone
    metrics: AgentMetrics
    stop: threading.Event
    trace: Trace
    trust: Trust
    """Whose plans and weights it adopts."""
    clock: Callable[[], float] = time.monotonic
    """Seconds, for all that is waited for."""
    budget: LinkBudget | None = None
    """The device's for its link, if it has one; it outlives a session."""

    @property
    def name(self) -> str:
        """The device's, in the fleet."""
        return self.config.device

    @property
    def tier(self) -> str:
        """Its hardware tier."""
        return self.config.tier

    @property
    def held_out_share(self) -> float:
        """Share of the samples that is kept for evaluation."""
        return 0.0 if self.evaluation_rows is not None else self.config.data.held_out_share
