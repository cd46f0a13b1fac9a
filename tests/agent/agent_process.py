"""A producer in a process of its own, for killing: ``agent_process.py STATE_DIR DATA BACKBONE``.

Labels that come later are taken up between its batches; it ends once there is nothing left to do.

No network: batches pile up in the outbox, so that a test can look at what every life left behind.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
import torch
from prometheus_client import CollectorRegistry

from edge_agent.batches.late_labels import LateLabels
from edge_agent.batches.patience import Patience
from edge_agent.batches.producer import Producer
from edge_agent.batches.rungs import Rungs
from edge_agent.batches.side_tasks import SideTasks
from edge_agent.config import DataConfig
from edge_agent.samples.sources import open_source
from edge_agent.store.outbox import Outbox
from metrics.catalogue import AgentMetrics
from sidestream.backbone.runtimes import load_backbone
from sidestream.host.state_dir import locked, prepare
from sidestream.host.trace import Trace
from tests.agent.fake_trainer import JOB, TIER, plan_for


def main(state_dir: str, data: str, reference: str) -> None:
    torch.set_num_threads(1)
    backbone = load_backbone(reference)
    plan = plan_for(backbone)
    small = {TIER: msgspec.structs.replace(plan.tiers[TIER], batch_size=2)}
    plan = msgspec.structs.replace(plan, tiers=small)
    folder = prepare(Path(state_dir))
    with locked(folder, "an agent"):
        outbox = Outbox(folder, job=JOB, device="pi", tier=TIER, max_bytes=10**9)
        late = LateLabels(outbox, plan, TIER, max_message_bytes=100_000, on_batch=lambda: None)
        side_tasks = SideTasks()
        side_tasks.add(late.turn)
        print("ready", flush=True)
        Producer(
            open_source(DataConfig(path=data), folder),
            outbox,
            Rungs(backbone, plan, TIER, 100_000),
            held_out_share=0.2,
            poll_s=1.0,
            patience=Patience("computing waits", lambda: False, side_tasks),
            on_batch=lambda: None,
            metrics=AgentMetrics(CollectorRegistry()),
            trace=Trace(),
        ).run()
        while late.take_up():
            pass
        outbox.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
