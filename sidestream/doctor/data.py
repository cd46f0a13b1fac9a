"""The doctor at the device's data: whether it is there, can be read, and is the job's."""

from __future__ import annotations

from functools import partial

from edge_agent.batches.targets import names_in
from edge_agent.config import DataConfig
from edge_agent.samples.survey import survey
from sidestream.contract.errors import SidestreamError
from sidestream.contract.plan import Plan
from sidestream.contract.tasks import TASKS
from sidestream.doctor.finding import Finding, failed, ok, skipped, warning


def check_data(config: DataConfig, plan: Plan | None) -> Finding:
    """Whether an agent can use what the settings name, held against the job's labels where they are known."""
    named = plan is not None and TASKS[plan.task].named
    try:
        if plan is not None and named:
            found = survey(config, partial(names_in, plan.task), plan.labels)
        else:
            found = survey(config)
    except SidestreamError as exc:
        return failed("data", str(exc), "mend the file, or [data] in the settings")
    if found is None:
        what = "it is read as it comes" if config.path or config.plugin else "the settings name none"
        return skipped("data", what)
    if found.unused:
        remedy = (
            "save the file as UTF-8, and give the job's labels; the agent's log names the first such rows"
        )
        say = failed if found.unused.total() == found.rows else warning
        return say("data", str(found), remedy)
    return ok("data", str(found))
