"""A fleet that sends codes: codebooks are fitted once, handed out to who lacks them, and learnt with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from broker_config.testing.inprocess import InProcessBroker
from side_trainer.operator.audit import verify
from sidestream.backbone.codebook_file import FILE_NAME
from sidestream.backbone.codebook_fitting import make
from tests.agent.fleet import sentence
from tests.e2e.in_process import Kind, accuracies, agent, plan_of, settings, table
from tests.trainer.test_trainer import Listener, trainer

KIND = Kind("roberta", 3, 32)


@pytest.fixture
def broker() -> Iterator[InProcessBroker]:
    with InProcessBroker(max_packet_bytes=30_000) as running:
        yield running


def test_a_device_is_handed_codebooks_and_what_it_sends_is_learnt_beside_plain_values(
    broker: InProcessBroker, tmp_path: Path
) -> None:
    plain, coded = table(tmp_path, "plain", KIND), table(tmp_path, "coded", KIND)
    backbone = tmp_path / f"{KIND.family}-{KIND.layers}-{KIND.width}"
    text = tmp_path / "public.txt"
    text.write_text("\n".join(map(sentence, range(200))))
    make(
        *(str(backbone), [text], tmp_path / "books"),
        layers=(),
        stages=2,
        max_tokens=32,
        seed=0,
        tell=lambda line: None,
    )
    file = settings(tmp_path, passes=1, tiers=f'{plain}{coded}codebooks = "{tmp_path / "books"}"\n')
    trained = {"plain": 24, "coded": 24}
    with ExitStack() as stack:
        stack.enter_context(trainer(broker, file.load()))
        listener = Listener(broker.transport("watch"))
        for tier in trained:
            stack.enter_context(agent(broker, tmp_path, tier, samples=24))
        reached = accuracies(listener, trained)
        tiers = plan_of(listener).tiers
    assert (tiers["coded"].codec.value, tiers["plain"].codec.value) == ("pq2", "int4")
    assert reached.keys() == trained.keys()
    assert (tmp_path / "state-coded" / FILE_NAME).exists()
    assert not (tmp_path / "state-plain" / FILE_NAME).exists()
    assert verify(tmp_path / "trainer").matches
