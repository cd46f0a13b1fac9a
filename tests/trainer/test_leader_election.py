"""Two trainers of one job: one publishes, the other says why it does not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.broadcast.leader_election import ANSWER_S, ECHO_S, LeaderElection
from sidestream.contract.errors import StateError
from sidestream.contract.messages import HIGHEST_FENCE, TrainerClaim, TrainerStatus
from sidestream.contract.wire import pack, unpack
from tests.trainer.conftest import config, devices
from tests.trainer.test_trainer import TOPICS, Listener, born, final, send, trainer
from tests.until import until

RUN = "0" * 32


def other(fence: int = 5, state: str = "online", instance: str = "other") -> TrainerStatus:
    return TrainerStatus(
        state="online" if state == "online" else "offline", run=RUN, epoch=1, fence=fence, instance=instance
    )


def test_alone_it_starts_when_it_hears_itself() -> None:
    election = LeaderElection(instance="us", fence=1)
    claim = election.connected(0.0)
    assert not election.tick(0.1) and not election.active
    election.on_claim(claim)
    assert election.tick(0.1) and election.active and not election.tick(0.2)


def test_a_claim_that_never_comes_back_does_not_hold_it_up_for_ever() -> None:
    election = LeaderElection(instance="us", fence=1)
    election.connected(0.0)
    assert not election.tick(ECHO_S) and election.tick(ECHO_S + 0.1)


def test_a_trainer_that_answers_is_not_disturbed() -> None:
    election = LeaderElection(instance="us", fence=9)
    election.on_claim(election.connected(0.0))
    election.on_status(other(), retained=False)
    with pytest.raises(StateError, match="--take-over"):
        election.tick(0.1)
    assert not election.active


def test_a_status_that_nobody_stands_behind_any_more_holds_it_up_for_seconds_only() -> None:
    election = LeaderElection(instance="us", fence=1)
    election.on_claim(election.connected(0.0))
    election.on_status(other(fence=5), retained=True)
    assert not election.tick(ANSWER_S - 0.1)
    assert election.tick(ANSWER_S) and election.fence == 6


def test_whoever_takes_over_raises_its_fence_above_the_other() -> None:
    election = LeaderElection(instance="us", fence=1, take_over=True)
    assert election.connected(0.0).take_over
    election.on_claim(election.connected(0.0))
    election.on_status(other(fence=5), retained=False)
    assert election.tick(0.1) and election.fence == 6


def test_a_deposed_trainer_stops_also_when_it_was_away_at_that_time() -> None:
    for retained in (False, True):
        election = LeaderElection(instance="us", fence=5)
        election.on_claim(election.connected(0.0))
        assert election.tick(0.0)
        if retained:
            election.disconnected()
            election.connected(10.0)
        with pytest.raises(StateError, match=r"has taken over.*somebody who can write.*signing key"):
            election.on_status(other(fence=6), retained=retained)
        assert not election.active


def test_of_two_with_the_same_fence_exactly_one_stays() -> None:
    stopped = []
    for us, them in (("a", "b"), ("b", "a")):
        election = LeaderElection(instance=us, fence=5)
        election.on_claim(election.connected(0.0))
        election.tick(0.0)
        try:
            assert election.on_status(other(fence=5, instance=them), retained=False)
        except StateError:
            stopped.append(us)
    assert stopped == ["a"]


def test_a_late_will_of_a_deposed_trainer_is_written_over() -> None:
    election = LeaderElection(instance="us", fence=5)
    election.on_claim(election.connected(0.0))
    election.tick(0.0)
    assert election.on_status(other(fence=4, state="offline"), retained=False)


@pytest.mark.parametrize("state", ["online", "offline"])
def test_a_fence_that_no_trainer_can_have_leaves_room_for_those_to_come(state: str) -> None:
    election = LeaderElection(instance="us", fence=5)
    election.on_claim(election.connected(0.0))
    election.on_status(other(fence=2**62, state=state), retained=True)
    assert election.tick(0.1) and election.fence == 5
    assert election.on_status(other(fence=2**62, state=state), retained=False) and election.active


def running(fence: int = 5) -> LeaderElection:
    election = LeaderElection(instance="us", fence=fence)
    election.on_claim(election.connected(0.0))
    assert election.tick(0.0)
    return election


def test_before_the_first_connection_nothing_is_decided() -> None:
    election = LeaderElection(instance="us", fence=5)
    election.on_claim(TrainerClaim(instance="us", fence=5))
    assert not election.tick(1e9) and not election.active


def test_a_claim_is_answered_by_the_one_that_rules_and_by_no_other() -> None:
    election, theirs = LeaderElection(instance="us", fence=5), TrainerClaim(instance="other", fence=6)
    ours = election.connected(0.0)
    assert (ours.instance, ours.fence, ours.take_over) == ("us", 5, False)
    assert not election.on_claim(theirs) and not election.tick(0.1), "it is not ours that was heard"
    assert not election.on_claim(ours) and election.tick(0.1)
    assert election.on_claim(theirs) and not election.on_claim(ours)


def test_after_a_break_it_asks_anew_before_anything_is_published() -> None:
    election = running()
    election.disconnected()
    assert not election.active and not election.on_claim(TrainerClaim(instance="other", fence=6))
    claim = election.connected(10.0)
    assert not election.tick(10.0 + ECHO_S), "what was heard before the break does not count"
    election.on_claim(claim)
    assert election.tick(10.1) and election.fence == 5


def test_a_new_connection_alone_stops_what_is_published() -> None:
    election = running()
    election.connected(10.0)
    assert not election.active


def test_its_own_status_is_no_rivals() -> None:
    election = LeaderElection(instance="us", fence=5)
    election.on_claim(election.connected(0.0))
    assert not election.on_status(other(fence=9, instance="us"), retained=False)
    assert election.tick(0.1) and election.fence == 5
    assert not election.on_status(other(fence=9, instance="us"), retained=False) and election.active


def test_one_that_has_left_holds_nobody_up_and_its_fence_is_passed() -> None:
    for fence, ours in ((5, 6), (9, 10), (HIGHEST_FENCE, HIGHEST_FENCE + 1), (3, 5)):
        election = LeaderElection(instance="us", fence=5)
        election.on_claim(election.connected(0.0))
        assert not election.on_status(other(fence=fence, state="offline"), retained=True)
        assert election.tick(0.0) and election.fence == ours


def test_a_rival_is_forgotten_with_the_connection_on_which_it_was_heard() -> None:
    election = LeaderElection(instance="us", fence=5)
    election.connected(0.0)
    election.on_status(other(), retained=False)
    election.on_claim(election.connected(1.0))
    assert election.tick(1.1)


def test_one_answer_suffices_though_the_retained_status_comes_after_it() -> None:
    election = LeaderElection(instance="us", fence=9)
    election.on_claim(election.connected(0.0))
    for retained in (True, False, True):
        election.on_status(other(), retained=retained)
    with pytest.raises(StateError, match=f"run {RUN[:8]}, epoch 1"):
        election.tick(0.1)


def test_one_that_rules_stays_and_says_so_over_the_status_of_a_lower_fence() -> None:
    election = running(fence=5)
    assert election.on_status(other(fence=4), retained=False) and election.active
    election.on_claim(election.connected(10.0))
    assert not election.on_status(other(fence=4), retained=True)
    assert election.tick(10.0), "that one was deposed: nobody waits for it"


def test_a_second_trainer_with_a_state_directory_of_its_own_is_refused(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with trainer(broker, config(tmp_path / "one")):
        listener, fleet = Listener(broker.transport("watch")), devices()[:1]
        plan = born(listener, fleet)
        with (
            pytest.raises(StateError, match="another trainer of this job is running"),
            trainer(broker, config(tmp_path / "two")) as stop,
        ):
            stop.wait(30.0)
        send(listener, fleet[0], fleet[0].batch(plan))
        final(listener, 8)
        latest = listener.plan()
        assert latest is not None and latest.run == plan.run


def test_a_trainer_that_is_taken_over_from_stops_and_the_plan_is_the_others(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    over = threading.Event()
    with pytest.raises(StateError, match="has taken over"), trainer(broker, config(tmp_path / "one")):
        listener = Listener(broker.transport("watch"))
        until(listener.plan, "the first runs")
        first = listener.plan()
        with trainer(broker, config(tmp_path / "two"), take_over=True):
            until(lambda: listener.plan() != first, "the second runs")
            second = listener.plan()
            assert first is not None and second is not None
            assert second.run != first.run and second.fence > first.fence
            over.wait(0.3)
            status = unpack(TrainerStatus, broker.retained[TOPICS.trainer_status])
            assert (status.run, status.state) == (second.run, "online")
            listener.transport.publish(TOPICS.trainer_status, pack(other(fence=0)), retain=True)
            until(
                lambda: (
                    unpack(TrainerStatus, broker.retained[TOPICS.trainer_status]).instance == status.instance
                ),
                "its status is put back",
            )
