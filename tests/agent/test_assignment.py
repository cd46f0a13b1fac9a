"""What is assigned to one device changes its next batches, if the trainer says it and the plan lets it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from broker_config.testing.inprocess import InProcessBroker
from edge_agent.batches.assigned import Assigned
from edge_agent.batches.batch_maker import Ready
from edge_agent.batches.rungs import Rungs
from edge_agent.samples.sample import Sample
from edge_agent.uplink.in_flight import InFlight
from edge_agent.uplink.link_state import LinkState
from metrics.catalogue import AgentMetrics
from sidestream.backbone.backbone import Backbone
from sidestream.contract.errors import MismatchError
from sidestream.contract.messages import ActivationBatch, Assignment, Flow
from sidestream.contract.plan import Plan
from sidestream.contract.sampling import Assignable, Rung
from sidestream.contract.signing import Scope, Signer, public_pem
from sidestream.contract.tensors import Codec
from sidestream.contract.wire import pack
from sidestream.host.trace import Trace
from tests.agent.fake_trainer import JOB, RUN, TIER, FakeTrainer, plan_for
from tests.agent.fleet import Running, sentence, write_samples

OWN = Rung(sampling="segments:2", codec=Codec.INT4)
ALL = Rung(sampling="all", codec=Codec.INT8)
MEAN = Rung(sampling="mean", codec=Codec.INT8)
BOUNDS = Assignable(
    batch_size_min=1, batch_size_max=6, max_tokens_min=4, max_tokens_max=128, rungs=(ALL, OWN, MEAN)
)
SCOPE = Scope(kind="assignment", job=JOB, tier=TIER, device="pi-1")
TRUSTED, STRANGER = Signer.new(), Signer.new()
MEAN_OF_SIX = Assignment(
    run=RUN, version=7, batch_size=6, max_tokens=128, sampling="mean", codec=Codec.INT8, fence=1
)


def tuned(plan: Plan, bounds: Assignable | None = BOUNDS) -> Plan:
    """The plan with bounds."""
    tier = msgspec.structs.replace(plan.tiers[TIER], assignable=bounds)
    return msgspec.structs.replace(plan, tiers={TIER: tier})


def assignment(**changes: object) -> Assignment:
    return msgspec.structs.replace(MEAN_OF_SIX, **changes)


def in_force(trainer: FakeTrainer, version: int, refused: int = 0) -> bool:
    told = trainer.telemetry["pi-1"]
    return (told.assignment, told.assignments_refused) == (version, refused)


def more(data: Path, count: int, start: int) -> None:
    """More samples, at the end of a watched file."""
    beside = write_samples(data.with_suffix(".more"), count, start=start)
    with data.open("a") as file:
        file.write(beside.read_text())


def latest(trainer: FakeTrainer, rows: int) -> list[ActivationBatch]:
    """Those of the last so many rows, which are all there are of one phase."""
    found: list[ActivationBatch] = []
    for batch in sorted(trainer.journal.values(), key=lambda one: -one.sequence):
        if sum(len(one.sample_ids) for one in found) >= rows:
            break
        found.append(batch)
    return found


def test_the_next_batches_go_by_what_was_assigned_and_then_by_what_is_assigned_next(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.publish_plan(tiers=tuned(trainer.plan).tiers)
    topic = trainer.topics.assignment(TIER, "pi-1")
    with Running(broker, bert, tmp_path, data={"path": str(data), "watch": True}):
        trainer.wait(lambda t: t.rows() == 8)
        assert {(b.sampling, len(b.sample_ids)) for b in trainer.journal.values()} == {("segments:2", 4)}
        trainer.send(topic, MEAN_OF_SIX)
        trainer.wait(lambda t: in_force(t, 7))
        more(data, 12, start=100)
        trainer.wait(lambda t: t.rows() == 20)
        assert {(b.sampling, len(b.sample_ids)) for b in latest(trainer, 12)} == {("mean", 6)}
        trainer.send(topic, assignment(version=9, batch_size=2, max_tokens=4, sampling="all"))
        trainer.wait(lambda t: in_force(t, 9))
        more(data, 6, start=200)
        trainer.wait(lambda t: t.rows() == 26)
        last = latest(trainer, 6)
        ways = {(batch.sampling, batch.activations.codec, len(batch.sample_ids)) for batch in last}
        assert ways == {("all", Codec.INT8, 2)}
        assert {length for b in last for length in b.row_lengths.tolist()} == {4}, "longer samples are cut"


def test_a_device_that_comes_late_finds_its_assignment(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 4)
    trainer.publish_plan(tiers=tuned(trainer.plan).tiers)
    trainer.send(trainer.topics.assignment(TIER, "pi-1"), MEAN_OF_SIX)
    with Running(broker, bert, tmp_path, data={"path": str(data), "watch": True}):
        trainer.wait(lambda t: in_force(t, 7))
        trainer.wait(lambda t: t.rows() == 4)
        more(data, 12, start=100)
        trainer.wait(lambda t: t.rows() == 16)
    assert {len(batch.sample_ids) for batch in latest(trainer, 12)} == {6}


def test_a_device_that_starts_again_goes_by_its_assignment_from_its_first_batch_on(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    """Whatever has become of what the broker retained."""
    trainer.publish_plan(tiers=tuned(trainer.plan).tiers)
    topic = trainer.topics.assignment(TIER, "pi-1")
    with Running(broker, bert, tmp_path):
        trainer.send(topic, MEAN_OF_SIX)
        trainer.wait(lambda t: in_force(t, 7))
    trainer.send(topic, b"")
    data = write_samples(tmp_path / "train.jsonl", 12)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 12)
        assert {len(batch.sample_ids) for batch in trainer.journal.values()} == {6}
        trainer.send(topic, assignment(version=6, batch_size=2))
        trainer.wait(lambda t: in_force(t, 7, refused=1))


def test_what_was_kept_for_other_bounds_is_not_gone_by(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    trainer.publish_plan(tiers=tuned(trainer.plan).tiers)
    with Running(broker, bert, tmp_path):
        trainer.send(trainer.topics.assignment(TIER, "pi-1"), MEAN_OF_SIX)
        trainer.wait(lambda t: in_force(t, 7))
    trainer.send(trainer.topics.assignment(TIER, "pi-1"), b"")
    narrow = msgspec.structs.replace(BOUNDS, batch_size_max=5)
    trainer.publish_plan(revision=2, tiers=tuned(trainer.plan, narrow).tiers)
    data = write_samples(tmp_path / "train.jsonl", 8)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 8)
        trainer.wait(lambda t: in_force(t, 0))
    assert {len(batch.sample_ids) for batch in trainer.journal.values()} == {4}


def test_no_assignment_is_taken_where_the_plan_lets_nothing_be_assigned(
    broker: InProcessBroker, trainer: FakeTrainer, bert: Backbone, tmp_path: Path
) -> None:
    data = write_samples(tmp_path / "train.jsonl", 8)
    trainer.publish_plan()
    trainer.send(trainer.topics.assignment(TIER, "pi-1"), MEAN_OF_SIX)
    with Running(broker, bert, tmp_path, data={"path": str(data)}):
        trainer.wait(lambda t: t.rows() == 8)
        trainer.wait_for_telemetry("pi-1")
    assert in_force(trainer, 0)
    assert {len(batch.sample_ids) for batch in trainer.journal.values()} == {4}


def test_what_is_not_the_trainers_or_not_for_this_device_is_refused_and_counted(
    broker: InProcessBroker,
    trainer: FakeTrainer,
    bert: Backbone,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys = tmp_path / "keys.pem"
    keys.write_bytes(public_pem(TRUSTED.public))
    trainer.signer = TRUSTED
    trainer.publish_plan(tiers=tuned(trainer.plan).tiers)
    topic = trainer.topics.assignment(TIER, "pi-1")
    good = TRUSTED.sign(assignment(version=9), SCOPE)
    bad = [
        pack(assignment(version=9)),
        STRANGER.sign(assignment(version=9), SCOPE),
        good[:40] + bytes([good[40] ^ 1]) + good[41:],
        TRUSTED.sign(assignment(version=9), Scope(kind="assignment", job=JOB, tier=TIER, device="pi-2")),
        TRUSTED.sign(assignment(version=9), Scope(kind="gradient", job=JOB, tier=TIER, device="pi-1")),
        b"nonsense",
    ]
    with Running(broker, bert, tmp_path, trusted_keys_file=str(keys)):
        trainer.send(topic, TRUSTED.sign(MEAN_OF_SIX, SCOPE))
        trainer.wait(lambda t: in_force(t, 7))
        for count, payload in enumerate(bad, 1):
            trainer.send(topic, payload)
            trainer.wait(lambda t, count=count: in_force(t, 7, count))  # type: ignore[misc]
        trainer.send(topic, good)
        trainer.wait(lambda t: in_force(t, 9, len(bad)))
    assert caplog.text.count("an assignment is not taken") == len(bad)


# --- what is within the bounds ---------------------------------------------------------------------------


@pytest.fixture
def plan(bert: Backbone) -> Plan:
    return tuned(plan_for(bert))


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"batch_size": 7}, "batch_size 7 is not within 1 to 6"),
        ({"max_tokens": 129}, "max_tokens 129 is not within 4 to 128"),
        ({"codec": Codec.F32}, "none of the plan's"),
        ({"sampling": "segments:8"}, "none of the plan's"),
        ({"run": "cd" * 16}, "another journal"),
        ({"version": 6}, "older"),
        ({"fence": 0, "version": 8}, "older"),
    ],
)
def test_what_lies_outside_the_bounds_or_is_older_changes_nothing(
    plan: Plan, changes: dict[str, object], why: str
) -> None:
    assigned = Assigned(plan, TIER)
    assert assigned.take(MEAN_OF_SIX)
    before = assigned.way
    with pytest.raises(MismatchError, match=why):
        assigned.take(assignment(**changes))
    assert (assigned.way, assigned.version) == (before, 7)


def test_the_least_and_the_most_may_be_assigned(plan: Plan) -> None:
    assigned = Assigned(plan, TIER)
    for version, (size, tokens) in enumerate([(1, 4), (6, 128)], 8):
        assert assigned.take(assignment(version=version, batch_size=size, max_tokens=tokens))
        assert assigned.way[:2] == (size, tokens)


def test_the_same_one_again_is_no_news(plan: Plan) -> None:
    assigned = Assigned(plan, TIER)
    assert assigned.take(MEAN_OF_SIX)
    assert not assigned.take(MEAN_OF_SIX)


def test_a_trainer_that_was_set_back_is_followed_and_may_take_everything_back(plan: Plan) -> None:
    """Its fence is higher, whatever its journal has."""
    assigned = Assigned(plan, TIER)
    own = assigned.way
    assert assigned.take(MEAN_OF_SIX)
    assert assigned.take(assignment(fence=2, version=3, batch_size=5))
    assert assigned.way.batch_size == 5
    back = assignment(fence=3, version=0, batch_size=4, sampling=OWN.sampling, codec=OWN.codec)
    assert assigned.take(back)
    assert (assigned.way, assigned.version) == (own, 0)


# --- with the device's own budgets -----------------------------------------------------------------------


def samples(count: int) -> list[Sample]:
    return [Sample(sentence(number), "on", bytes([number])) for number in range(count)]


def rungs(
    bert: Backbone, plan: Plan, assigned: Assigned, most_bytes: int = 2**18, **budgets: object
) -> Callable[[Sequence[Sample]], tuple[str, Codec]]:
    """By what way a batch of samples would go."""
    made = Rungs(bert, plan, TIER, most_bytes, assigned=assigned, **budgets)  # type: ignore[arg-type]

    def way(given: Sequence[Sample]) -> tuple[str, Codec]:
        ready: list[Ready] = [one for sample in given for one in made.ready(sample)]
        sampled = made.compute(ready)
        tensor = made.maker.quantised(sampled.vectors)
        return made.maker._rung.sampling, tensor.codec

    return way


def test_a_budget_of_the_devices_own_is_kept_whatever_was_assigned(bert: Backbone, plan: Plan) -> None:
    assigned = Assigned(plan, TIER)
    assigned.take(assignment(sampling="all"))
    assert rungs(bert, plan, assigned)(samples(6)) == ("all", Codec.INT8)
    thrifty = rungs(bert, plan, assigned, bytes_per_sample=40)
    assert thrifty(samples(6))[0] != "all"


def test_a_device_with_a_budget_for_more_sends_no_more_than_was_assigned(bert: Backbone, plan: Plan) -> None:
    assigned = Assigned(plan, TIER)
    rich = rungs(bert, plan, assigned, bytes_per_sample=100_000)
    assert rich(samples(6))[0] == "all"
    assigned.take(MEAN_OF_SIX)
    assert rich(samples(6)) == ("mean", Codec.INT8)


def test_a_way_by_which_a_row_would_fit_no_message_is_not_taken(bert: Backbone, plan: Plan) -> None:
    """The tier's own fits, and nothing is skipped for what was assigned."""
    assigned = Assigned(plan, TIER)
    assigned.take(assignment(sampling="all"))
    small = rungs(bert, plan, assigned, most_bytes=1024 + 250)
    assert small(samples(1)) == (OWN.sampling, OWN.codec)


# --- how long something is on its way --------------------------------------------------------------------


class Flight:
    """What is under way, on a clock that is turned by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.link = LinkState()
        self.link.set_flow(Flow(window=4))
        self.it = InFlight(
            self.link, metrics=AgentMetrics(CollectorRegistry()), trace=Trace(), clock=lambda: self.now
        )

    def after(self, seconds: float) -> InFlight:
        self.now += seconds
        return self.it


def test_time_counts_while_something_is_on_its_way_and_not_between() -> None:
    flight = Flight()
    flight.after(5).begin(1, 0)
    flight.after(2).begin(2, 0)
    flight.after(1).receipted([1])
    assert flight.it.sending_s == 3
    flight.after(4).receipted([2])
    assert flight.after(50).sending_s == 7


def test_time_without_a_connection_does_not_count() -> None:
    flight = Flight()
    flight.after(0).begin(1, 0)
    flight.now += 3
    flight.link.connection(False)
    assert flight.it.heed_breaks()
    assert flight.after(100).sending_s == 3
    flight.after(0).begin(1, 0)
    flight.after(2).failed(1)
    assert flight.after(100).sending_s == 5


def test_lengths_are_those_of_the_limit(bert: Backbone, plan: Plan) -> None:
    """A longer text is cut where the assignment says, and evaluation is not touched by that."""
    assigned = Assigned(plan, TIER)
    assigned.take(assignment(sampling="all", max_tokens=5))
    made = Rungs(bert, plan, TIER, 2**18, assigned=assigned)
    ready = [one for sample in samples(4) for one in made.ready(sample)]
    assert made.compute(ready).lengths.max() == 5
    whole = made.maker.forward([one.sample.input for one in ready])
    assert whole.lengths.max() > 5
    assert isinstance(whole.lengths, np.ndarray)


def test_batches_of_a_pool_may_differ(bert: Backbone, plan: Plan) -> None:
    assigned = Assigned(plan, TIER)
    made = Rungs(bert, plan, TIER, 2**18, assigned=assigned)
    assert made.batch_size == 4
    assigned.take(MEAN_OF_SIX)
    assert made.batch_size == 6
