"""Labels that have nothing to do with their samples are noticed, at any rate; skewed ones never."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.status import quarantined
from side_trainer.quarantine import agreement
from side_trainer.quarantine.agreement import LEAST_BATCHES, LEAST_DEVICES, Agreement
from tests.trainer.conftest import FakeDevice, config
from tests.trainer.test_trainer import Listener, born, receipted, send, trainer
from tests.until import until
from tests.work import work

LABELS, WIDTH, ROWS = 6, 24, 12
CENTRES = np.random.default_rng(7).standard_normal((2, LABELS, WIDTH)).astype(np.float32)


class Board:
    """A device whose samples lie around their label's centre, and which has some labels more than others."""

    def __init__(self, name: str, rng: np.random.Generator, alpha: float = 0.5) -> None:
        self.name, self.rng, self.mix = name, rng, rng.dirichlet([alpha] * LABELS)

    def send(self, judge: Agreement, *, random: bool = False, noise: float = 1.5) -> str:
        labels = self.rng.choice(LABELS, size=ROWS, p=self.mix)
        scatter = self.rng.standard_normal((2, ROWS, WIDTH)).astype(np.float32) * np.float32(noise)
        said = self.rng.integers(LABELS, size=ROWS) if random else labels
        return judge.note("t", self.name, CENTRES[:, labels] + scatter, said)


def fleet(seed: int, count: int = 5, alpha: float = 0.5) -> list[Board]:
    return [Board(f"dev-{index}", np.random.default_rng([seed, index]), alpha) for index in range(count)]


@pytest.mark.slow
@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.5]))
@settings(max_examples=25)
def test_devices_with_skewed_labels_and_hard_samples_are_never_suspect(seed: int, alpha: float) -> None:
    judge, boards = Agreement(), fleet(seed, alpha=alpha)
    for _ in range(30):
        assert [board.send(judge, noise=2.5) for board in boards] == [""] * len(boards)


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1, 4, 20])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_random_labels_are_noticed_at_any_rate_and_nobody_else_is(rate: int, seed: int) -> None:
    judge, (odd, *boards) = Agreement(), fleet(seed)
    said: list[str] = []
    for _ in range(24):
        said += [odd.send(judge, random=True) for _ in range(rate)]
        assert [board.send(judge) for board in boards] == [""] * len(boards)
    assert any("in another order" in why for why in said)


def test_activations_that_mean_nothing_are_noticed_too() -> None:
    judge, (odd, *boards) = Agreement(), fleet(1)
    said = []
    for _ in range(3 * LEAST_BATCHES):
        said.append(odd.send(judge, noise=1e3))
        assert not any(board.send(judge) for board in boards)
    assert any(said)


def test_a_device_with_one_label_and_one_among_too_few_are_not_judged() -> None:
    judge, (single, *boards) = Agreement(), fleet(3)
    single.mix = np.eye(LABELS)[2]
    for _ in range(2 * LEAST_BATCHES):
        assert not any(board.send(judge) for board in (single, *boards))
    judge, (odd, *boards) = Agreement(), fleet(4)
    for _ in range(3 * LEAST_BATCHES):
        assert not any(board.send(judge) for board in boards[: LEAST_DEVICES - 1])
        assert not odd.send(judge, random=True)


def test_where_nobody_knows_better_than_chance_nobody_is_suspect() -> None:
    judge, boards = Agreement(), fleet(5)
    for _ in range(3 * LEAST_BATCHES):
        assert not any(board.send(judge, random=True) for board in boards)


@pytest.mark.parametrize("forgotten", [False, True])
def test_whoever_is_quarantined_is_no_measure_for_others_any_more(forgotten: bool) -> None:
    judge, (odd, another, *boards) = Agreement(), fleet(6)
    said = []
    for step in range(3 * LEAST_BATCHES):
        if step < LEAST_BATCHES:
            odd.send(judge, random=True)
        elif forgotten:
            judge.forget(odd.name)
        said.append(another.send(judge, random=True))
        for board in boards[: LEAST_DEVICES - 1]:
            board.send(judge)
    assert any(said) is not forgotten


def test_what_it_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "MOST_SUMS", 40)
    judge = Agreement()
    for board in fleet(7, count=60, alpha=5.0):
        board.send(judge)
    assert 0 < judge.sums <= 40


def test_a_running_trainer_quarantines_whoever_sends_random_labels(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    with trainer(broker, config(tmp_path)):
        listener = Listener(broker.transport("watch"))
        boards = [FakeDevice(name=f"dev-{n}", tier="big", stream=f"{n:032x}", seed=n) for n in range(5)]
        plan = born(listener, boards)
        odd, rng = boards[-1], np.random.default_rng(0)
        for _ in range(2 * LEAST_BATCHES):
            for board in boards[:-1]:
                send(listener, board, board.batch(plan))
            until(lambda: all(receipted(listener, one) == one.sequence for one in boards[:-1]), "receipts")
            batch = odd.batch(plan)
            labels = rng.integers(len(plan.labels), size=8).astype("<u2").tobytes()
            send(listener, odd, msgspec.structs.replace(batch, targets=labels))
            if quarantined(tmp_path):
                break
        until(lambda: quarantined(tmp_path), "it is quarantined")
        assert [one.device for one in quarantined(tmp_path)] == [odd.name]
        assert "in another order" in quarantined(tmp_path)[0].reason


def test_a_batch_is_held_against_those_that_have_sent_something_and_the_others_cost_nothing() -> None:
    means, labels = CENTRES[:, :1], np.array([0])

    def taken(others: int) -> int:
        judge, (asked, *boards) = Agreement(), fleet(0)
        for board in boards:
            board.send(judge)
            board.send(judge)
        for number in range(others):
            judge.note("t", f"new-{number}", means, labels)
        return work(lambda: judge.note("t", asked.name, means, labels))

    assert taken(300) == taken(100)
