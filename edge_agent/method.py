"""What a training method owns on the device: what is done with samples, and with the weights that come down.

A method lives in a room of its own; :mod:`edge_agent.method_registry` names them all. The session loads the
backbone, keeps the thread and hears the network; what these are for is the method's to say.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

from edge_agent.batches.patience import Patience
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.context import AgentContext
from edge_agent.samples.source import SampleSource
from edge_agent.uplink.link_state import LinkState
from edge_agent.weights.adoption import Adopter
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import DecodeError
from sidestream.contract.plan import Plan, TierPlan
from sidestream.contract.topics import Topics


class DeviceMethod(ABC):
    """One method in one session. Built once the plan is ready for the device's tier.

    Args:
        context: The agent's.
        plan: In force when it began.
        link: Woken when there is something to send; says how large it may be.
        side_tasks: Have their turns on the thread that works samples off.
        stopped: Asked often; true ends everything.
        on_adopted: Called when other weights are in use.
    """

    needs_every: ClassVar[bool] = False
    """Whether training here goes by passing versions, so that all of them must come."""

    def __init__(
        self,
        context: AgentContext,
        plan: Plan,
        link: LinkState,
        *,
        side_tasks: SideTasks,
        stopped: Callable[[], bool],
        on_adopted: Callable[[], None],
    ) -> None:
        self.context = context
        self.plan = plan
        self.link = link
        self.side_tasks = side_tasks
        self.stopped = stopped
        self.on_adopted = on_adopted
        self.adopter = self.make_adopter()
        """Takes the weights that come down."""
        side_tasks.add(self.adopter.turn)

    def patience(self) -> Patience:
        """For the thread that works samples off."""
        return Patience("computing waits", self.stopped, self.side_tasks)

    @property
    def assignment(self) -> int:
        """The version of what was assigned to this device; 0 while it goes by its tier's plan."""
        return 0

    @property
    def tier(self) -> TierPlan:
        """What the plan says of this device's tier."""
        return self.plan.tiers[self.context.tier]

    def topics(self, topics: Topics) -> Sequence[str]:
        """What the method listens to beside weights, as filters."""
        return ()

    def on_message(self, topic: str, payload: bytes) -> None:
        """A message came on one of :meth:`topics`; on the session's thread.

        Raises:
            DecodeError: it is none.
        """
        raise DecodeError(f"not a topic of this device's: {topic[:200]!r}")

    @abstractmethod
    def make_adopter(self) -> Adopter:
        """What takes the weights that come down."""

    @abstractmethod
    def work_off(self, source: SampleSource, backbone: Backbone) -> None:
        """Do with each sample of a source what the method does, until it has ended or we are stopped.

        Raises:
            DataError: the source cannot be read.
            BackboneError: the backbone does not suit the samples.
            StateError: the outbox cannot be written.
        """
