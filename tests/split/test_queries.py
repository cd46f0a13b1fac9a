"""A device without room for the whole model is answered as that would answer; and learning goes on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from broker_config.transport import Received
from edge_agent.answers.remote_predictor import RemotePredictor
from edge_agent.weights.adopted import Adopted, AdoptedWeights
from edge_agent.weights.trust import Trust
from metrics.catalogue import Asked, TrainerMetrics
from side_trainer.broadcast.leader_transport import LeaderTransport
from side_trainer.broadcast.signing import TrainerSigner
from side_trainer.fold.fold import Fold
from side_trainer.queries.answering import MOST_OF_ONE, NOT_ALLOWED, Queries
from side_trainer.settings.split import PredictConfig
from sidestream.backbone.runtimes import shared_backbone
from sidestream.contract.errors import DecodeError, MismatchError, StateError, UntrustedError
from sidestream.contract.messages import Query, QueryReply, to_bin
from sidestream.contract.plan import Plan
from sidestream.contract.signing import Signer
from sidestream.contract.tasks import Task
from sidestream.contract.tensors import Codec, encode
from sidestream.contract.topics import Uplink
from sidestream.contract.wire import pack, unpack
from tests.agent.tiny import save_tiny
from tests.split.fleet import JOB, LABELS, TOPICS, SplitTrainer, _Link, config, fleet
from tests.split.frozen import frozen_job

DEVICE = Uplink(tier="cut1", device="d0", kind="query")
TEXTS = ["turn the lights on please", "off", "heat up the cold end", "switch down", "warm warm warm the on"]
KEY = Signer(Ed25519PrivateKey.from_private_bytes(bytes(range(32))))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "bert", "bert")


class Desk:
    """A trainer's queries, by hand.

    Args:
        fold: Has the method.
        plan: The job.
        options: Of ``[predict]``.
    """

    def __init__(self, fold: Fold, plan: Plan, *, clock: Any = None, **options: Any) -> None:
        self.fold, self.plan, self.link = fold, plan, _Link()
        self.metrics = TrainerMetrics(CollectorRegistry())
        self.metrics.set_tiers(plan.tiers)
        self.queries = Queries(
            PredictConfig(**{"remote": True, **options}),
            *(cast(LeaderTransport, self.link), TOPICS, TrainerSigner(JOB, KEY), self.metrics, plan.run),
            **({} if clock is None else {"clock": clock}),
        )

    def put(self, payload: bytes, uplink: Uplink = DEVICE, *, retained: bool = False) -> None:
        topic = TOPICS.query(uplink.tier, uplink.device)
        self.queries.put(
            uplink, Received(topic=topic, payload=payload, retained=retained, qos=1, epoch=1), self.plan
        )

    def answer(self, *, learning: bool = False) -> bool:
        return self.queries.answer(self.fold.method, self.fold.offset, learning=learning)

    def counted(self, outcome: Asked) -> float:
        return float(self.metrics.queries.labels(outcome)._value.get())


class Asker:
    """Asks a desk at once.

    Args:
        desk: Which.
        trust: Opens what it says.
        max_bytes: Of a query.
    """

    place = 7

    def __init__(self, desk: Desk, trust: Trust, max_bytes: int = 2**18) -> None:
        self.desk, self.trust, self.max_bytes = desk, trust, max_bytes
        self.sent: list[Query] = []

    def ask(self, query: Query) -> QueryReply:
        self.sent.append(query)
        self.desk.put(pack(query))
        assert self.desk.answer()
        topic, payload = self.desk.link.sent.pop()
        assert topic == TOPICS.prediction("cut1", "d0", 7)
        reply = self.trust.open_prediction(payload, "d0")
        assert reply.mark == query.mark
        if reply.refused:
            raise StateError(reply.refused)
        return reply


def trust(folder: Path) -> Trust:
    return Trust(folder, job=JOB, tier="cut1", given=(KEY.public,))


def adopted(plan: Plan, version: int, bundle: bytes) -> AdoptedWeights:
    """What a device keeps of a bundle."""
    tier = plan.tiers["cut1"]
    kept = Adopted(
        run=plan.run,
        version=version,
        bundle_digest="",
        state_digest="",
        tier="cut1",
        tier_plan=tier,
        backbone=tier.backbone,
        method=plan.method,
    )
    return AdoptedWeights(kept, bundle)


@contextmanager
def trained(
    folder: Path, backbone: Path, *, frozen: bool = False, **changes: Any
) -> Iterator[tuple[Fold, Plan, Callable[..., AdoptedWeights]]]:
    """A fold that something was learnt into, and what a device may have adopted of it."""
    if frozen:
        made = config(folder, backbone, method="split-frozen", codec=Codec.INT8, **changes)
        with frozen_job(folder, made, rows=16) as (journal, fold):
            plan = SplitPlan.of(made, folder)

            def bundle(*, final: bool = True) -> AdoptedWeights:
                found = fold.method.bundles(journal.run, fold.offset, "f32", final=final)
                return adopted(plan, fold.offset, found["cut1"])

            yield fold, plan, bundle
        return
    with fleet(folder, config(folder, backbone, **changes), {"cut1": 12}) as made_fleet:
        made_fleet.run()
        trainer = made_fleet.trainer

        def of(*, final: bool = False) -> AdoptedWeights:
            return adopted(trainer.plan, *trainer.bundle("cut1", final=final))

        yield trainer.fold, trainer.plan, of


class SplitPlan:
    """The plan of a frozen job, read again."""

    @staticmethod
    def of(made: Any, folder: Path) -> Plan:
        again = SplitTrainer(msgspec.structs.replace(made, state_dir=str(folder)))
        try:
            return again.plan
        finally:
            again.close()


def whole_answers(fold: Fold, texts: list[str], *, lower: bool = True) -> np.ndarray[Any, Any]:
    """By all layers, on the trainer."""
    model = cast(Any, fold.method).model
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model.whole(model.view.text_input.read(texts, 128)).numpy()
    return found


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("adapters", ["held", "local"])
def test_it_is_answered_as_the_whole_model_would(
    tmp_path: Path, backbone: Path, adapters: str, final: bool
) -> None:
    split = {"adapters": adapters, "window": 1}
    with trained(tmp_path, backbone, split=split) as (fold, plan, bundle):
        before = {name: array.tobytes() for name, array in fold.method.state().items()}
        asker = Asker(Desk(fold, plan), trust(tmp_path))
        predictor = RemotePredictor(bundle(final=final), asker)
        assert len(asker.sent) == 0
        numbers = predictor.forward(TEXTS)
        assert np.allclose(numbers, whole_answers(fold, TEXTS), atol=1e-5)
        found = predictor.predict(TEXTS)
        assert [one.label for one in found] == [LABELS[at] for at in numbers.argmax(axis=1)]
        assert max(len(query.text_lengths) for query in asker.sent) == plan.tiers["cut1"].batch_size
        assert {name: array.tobytes() for name, array in fold.method.state().items()} == before


def test_frozen_devices_are_answered_too(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone, frozen=True) as (fold, plan, bundle):
        predictor = RemotePredictor(bundle(), Asker(Desk(fold, plan), trust(tmp_path)))
        model, tokens = (
            cast(Any, fold.method).model,
            shared_backbone(str(backbone)).text_input.read(TEXTS, 128),
        )
        states = shared_backbone(str(backbone), 1).states(tokens, 1)
        with torch.no_grad():
            wanted = model.answers(1, torch.from_numpy(states), tokens.mask.sum(axis=1)).numpy()
        assert np.allclose(predictor.forward(TEXTS), wanted, atol=0.02)  # int8


def test_a_regressions_numbers_are_in_the_measure_of_its_targets(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone) as (fold, plan, bundle):
        desk = Desk(fold, plan)
        asker = Asker(desk, trust(tmp_path))
        predictor = RemotePredictor(bundle(), asker)
        predictor.task, predictor.labels = Task.REGRESSION, ()
        reply = QueryReply(
            run=plan.run,
            mark=bytes(16),
            numbers=encode(np.ones((1, 1), np.float32), Codec.F32),
            scale={"mean": 3.0, "deviation": 2.0},  # type: ignore[arg-type]
        )
        asker.ask = lambda query: unpack(QueryReply, pack(reply))  # type: ignore[method-assign]
        assert predictor.predict(["on"])[0].value == 5.0
        asker.ask = lambda query: msgspec.structs.replace(  # type: ignore[method-assign]
            reply, numbers=encode(np.ones((2, 1), np.float32), Codec.F32)
        )
        with pytest.raises(MismatchError, match="has shape"):
            predictor.predict(["on"])


def test_no_query_is_larger_than_a_message_may_be(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone) as (fold, plan, bundle):
        asker = Asker(Desk(fold, plan), trust(tmp_path), max_bytes=3000)
        numbers = RemotePredictor(bundle(), asker).forward(TEXTS)
        assert np.allclose(numbers, whole_answers(fold, TEXTS), atol=1e-5)
        assert len(asker.sent) > 2 and all(len(pack(one)) <= 3000 for one in asker.sent)


def query(plan: Plan, **changes: Any) -> Query:
    """Of two texts."""
    tier = plan.tiers["cut1"]
    fields: dict[str, Any] = {
        "run": plan.run,
        "mark": b"m" * 16,
        "place": 7,
        "fingerprint": tier.fingerprint,
        "lengths": to_bin([2, 3], "<u2"),
        "states": encode(np.full((5, tier.width), 0.5, np.float32), Codec.INT8),
        **changes,
    }
    return Query(**fields)


def refusal(desk: Desk, asked: Query) -> str:
    desk.put(pack(asked))
    assert desk.answer()
    reply = unpack(QueryReply, desk.link.sent.pop()[1])
    assert (reply.numbers is None) == bool(reply.refused)
    return reply.refused


def test_what_cannot_be_answered_is_refused_with_the_reason(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        desk, width = Desk(fold, plan), plan.tiers["cut1"].width
        assert refusal(desk, query(plan)) == ""
        assert refusal(Desk(fold, plan, remote=False), query(plan)) == NOT_ALLOWED
        assert "another journal" in refusal(desk, query(plan, run="ab" * 16))
        assert "not those of its tier" in refusal(desk, query(plan, fingerprint="other"))
        narrow = encode(np.ones((5, 3), np.float32), Codec.INT8)
        assert "of width 3" in refusal(desk, query(plan, states=narrow))
        many = encode(np.ones((5, width), np.float32), Codec.INT8)
        assert "4 texts at most" in refusal(desk, query(plan, lengths=to_bin([1] * 5, "<u2"), states=many))
        long = encode(np.ones((129, width), np.float32), Codec.INT8)
        assert "128 at most" in refusal(desk, query(plan, lengths=to_bin([129], "<u2"), states=long))
        endless = msgspec.structs.replace(many, codec=Codec.F32, data=b"\0\0\x80\x7f" * 5 * width, scales=b"")
        assert "infinite" in refusal(desk, query(plan, states=endless))
        unsettled = msgspec.structs.replace(plan, labels=())
        assert "not settled" in refusal(Desk(fold, unsettled), query(plan))
        desk.put(pack(query(plan)), Uplink(tier="cut9", device="d0", kind="query"))
        assert desk.answer() and "no tier" in unpack(QueryReply, desk.link.sent.pop()[1]).refused
        assert desk.queries.answer(None, 0, learning=False) is False
        desk.put(pack(query(plan)))
        assert desk.queries.answer(None, 0, learning=False)
        assert "learnt nothing" in unpack(QueryReply, desk.link.sent.pop()[1]).refused


def test_a_tier_that_sees_more_than_the_model_is_refused_what_the_model_does_not_see(
    tmp_path: Path, backbone: Path
) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        longest = cast(Any, fold.method).model.view.text_input.longest
        width = plan.tiers["cut1"].width
        with pytest.raises(StateError, match="sees"):
            fold.method.answers("cut1", np.ones((longest + 1, width), np.float32), np.array([longest + 1]))


def test_an_answer_is_the_trainers_and_for_one_device(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        desk = Desk(fold, plan)
        desk.put(pack(query(plan)))
        desk.answer()
        (payload,) = (one for _, one in desk.link.sent)
        opener = trust(tmp_path)
        assert opener.open_prediction(payload, "d0").numbers is not None
        unsigned = msgspec.structs.replace(unpack(QueryReply, payload), key_id="", signature=b"")
        for forged in (payload[:-1] + bytes([payload[-1] ^ 1]), pack(unsigned)):
            with pytest.raises(UntrustedError):
                opener.open_prediction(forged, "d0")
        with pytest.raises(UntrustedError):
            opener.open_prediction(payload, "d1")
        assert not desk.link.retained or desk.link.sent  # the fake keeps everything


def test_devices_take_turns_and_who_asks_too_much_is_not_heard(tmp_path: Path, backbone: Path) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        desk = Desk(fold, plan)
        modest = Uplink(tier="cut1", device="d1", kind="query")
        for number in range(50):
            desk.put(pack(query(plan, mark=bytes([number]) * 16)))
        desk.put(pack(query(plan, mark=bytes(16))))  # waits already
        desk.put(pack(query(plan)), modest)
        desk.put(pack(query(plan)), modest, retained=True)
        assert len(desk.queries) == MOST_OF_ONE + 1
        assert desk.counted(Asked.DROPPED) == 50 - MOST_OF_ONE
        while desk.answer():
            pass
        asked = [topic.split("/")[6] for topic, _ in desk.link.sent]
        assert asked == ["d0", "d1", *["d0"] * (MOST_OF_ONE - 1)]
        assert desk.counted(Asked.ANSWERED) == MOST_OF_ONE + 1


def test_all_that_waits_is_bounded(tmp_path: Path, backbone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        payload = pack(query(plan))
        monkeypatch.setattr("side_trainer.queries.answering.MOST_BYTES", 5 * len(payload))
        desk = Desk(fold, plan)
        for number in range(100):
            desk.put(payload, Uplink(tier="cut1", device=f"x{number}", kind="query"))
        assert len(desk.queries) == 5 and desk.counted(Asked.DROPPED) == 95


def test_answers_take_a_share_of_the_time_while_there_is_something_to_learn(
    tmp_path: Path, backbone: Path
) -> None:
    with trained(tmp_path, backbone) as (fold, plan, _):
        ticks = itertools.count()
        desk = Desk(fold, plan, share=0.25, clock=lambda: float(next(ticks)))
        for number in range(3):
            desk.put(pack(query(plan, mark=bytes([number]) * 16)))
        assert desk.answer(learning=True)  # from 1 to 2 by its clock: so not before 5
        assert [desk.answer(learning=True) for _ in range(4)] == [False, False, True, False]
        assert desk.answer(learning=False)


@settings(max_examples=150)
@given(payload=st.binary(max_size=300))
def test_whatever_is_sent_is_read_or_refused(payload: bytes) -> None:
    plan = msgspec.structs.replace(_PLAN)
    desk = Desk(cast(Fold, None), plan)
    try:
        desk.put(payload)
    except DecodeError:
        assert not len(desk.queries)


_PLAN = Plan(job=JOB, run="ab" * 16, revision=1, task=Task.TEXT_CLASSIFICATION, labels=LABELS, tiers={})
