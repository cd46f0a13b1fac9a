"""Split jobs as real processes on real Mosquitto: each form learns; killed, all is served once."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from broker_config.embedded.broker import EmbeddedBroker
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import ServeRecord
from sidestream.contract.messages import ActivationBatch, unpack_adapter
from sidestream.contract.tasks import TASKS, Task
from sidestream.contract.wire import unpack
from tests.broker.conftest import needs_mosquitto
from tests.e2e.processes import LABELS, Processes
from tests.until import until

pytestmark = [pytest.mark.mosquitto, needs_mosquitto, pytest.mark.slow]
FORMS = {
    "held": ("split-lora", "[split]\npasses = 2\n"),
    "local": ("split-lora", '[split]\npasses = 2\nadapters = "local"\n[split.round]\nbatches = 4\n'),
    "paper": (
        "split-lora",
        '[split]\npasses = 2\nadapters = "local"\nupper = "per-device"\n'
        "[split.round]\nbatches = 4\ndevices = 2\ndeadline_s = 2.0\n",
    ),
    "frozen": ("split-frozen", ""),
    "auto": ("split-lora", 'cut = "auto"\n[split]\npasses = 1\n'),
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker(data_dir=tmp_path / "broker", kind="mosquitto") as running:
        yield running


@contextlib.contextmanager
def fleet(tmp_path: Path, url: str, form: str, task: Task = Task.TEXT_CLASSIFICATION) -> Iterator[Processes]:
    method, more = FORMS[form]
    processes = Processes(tmp_path, url, task=task, method=method, more=more)
    try:
        yield processes
    finally:
        processes.close()


def counted(state: Path) -> dict[str, Counter[bytes]]:
    """By kind of record, how often each batch of the journal is in one."""
    found: dict[str, Counter[bytes]] = {
        kind: Counter() for kind in ("sent", "batch", "reuse", "serve", "update")
    }
    sent: dict[int, bytes] = {}
    with contextlib.closing(Journal(state / FILE_NAME, read_only=True)) as journal:
        for record in journal.read(0, limit=100_000):
            if record.kind == "batch":
                part = unpack(ActivationBatch, record.payload).part
                assert part is not None
                sent[record.offset] = part.ticket
                found["batch"][part.ticket] += 1
            elif record.kind == "reuse":
                sent[record.offset] = unpack_adapter(record.payload).ticket
                found["reuse"][sent[record.offset]] += 1
            elif record.kind == "serve":
                for offset in msgspec.json.decode(record.payload, type=ServeRecord).offsets:
                    found["serve"][sent[offset]] += 1
            elif record.kind == "update":
                found["update"][unpack_adapter(record.payload).ticket] += 1
    found["sent"].update(sent.values())
    return found


def assert_served_once(fleet: Processes, *, held: bool) -> None:
    counts = counted(fleet.trainer_state)
    assert counts["sent"] and set(counts["sent"].values()) == {1}
    assert counts["serve"] == counts["sent"]
    if held:
        assert counts["update"] == counts["sent"]
    said = fleet.run("trainer", "verify", "--state-dir", str(fleet.trainer_state))
    assert "the digest matches" in said


@pytest.mark.parametrize(
    ("form", "task"),
    [
        ("held", Task.TEXT_CLASSIFICATION),
        ("held", Task.CAUSAL_LM),
        ("local", Task.TEXT_CLASSIFICATION),
        ("paper", Task.TEXT_CLASSIFICATION),
        ("frozen", Task.TEXT_CLASSIFICATION),
        ("auto", Task.TEXT_CLASSIFICATION),
        ("frozen", Task.CAUSAL_LM),
    ],
)
def test_each_form_trains_adopts_answers_and_exports(
    broker: EmbeddedBroker, tmp_path: Path, form: str, task: Task
) -> None:
    with fleet(tmp_path, broker.url, form, task) as job:
        trainer = job.trainer()
        agents = {name: job.agent(name, 40) for name in ("one", "two")}
        for name, agent in agents.items():
            job.expect_exit(agent, name)
        job.stop(trainer, "trainer")
        if form != "frozen":
            assert_served_once(job, held=form in ("held", "auto"))
        answer = job.answer("one", "switch the lights on")
        assert answer if TASKS[task].generates else answer in LABELS
        said = job.run(
            "trainer", "export", "--state-dir", str(job.trainer_state), "--out", str(tmp_path / "out")
        )
        assert "PeftModel" in said
        about = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert about["r"] == 8


def test_killed_on_either_side_every_batch_is_served_and_answered_once(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    moments = random.Random(7)
    with fleet(tmp_path, broker.url, "held") as job:
        trainer = job.trainer()
        agents = {name: job.agent(name, 60) for name in ("one", "two")}
        for strike in range(6):
            seen = sum(counted_records(job))
            until(lambda before=seen: sum(counted_records(job)) > before + 2, "something is journaled")  # type: ignore[misc]
            if strike % 2:
                trainer.kill()
                trainer.wait()
                trainer = job.trainer()
            else:
                name = moments.choice(sorted(agents))
                agents[name].kill()
                agents[name].wait()
                agents[name] = job.agent(name, 60)
        for name, agent in agents.items():
            job.expect_exit(agent, name)
        job.stop(trainer, "trainer")
        assert_served_once(job, held=True)


def counted_records(job: Processes) -> list[int]:
    """Records in the journal, as far as it can be read now."""
    try:
        with contextlib.closing(Journal(job.trainer_state / FILE_NAME, read_only=True)) as journal:
            return [journal.tail]
    except Exception:
        return [0]


def test_a_device_and_a_trainer_that_are_set_back_go_on_and_nothing_counts_twice(
    broker: EmbeddedBroker, tmp_path: Path
) -> None:
    with fleet(tmp_path, broker.url, "held") as job:
        trainer = job.trainer()
        one = job.agent("one", 60)
        until(lambda: sum(counted_records(job)) > 12, "it has begun")
        one.send_signal(signal.SIGTERM)
        one.wait(60)
        shutil.copytree(tmp_path / "one", tmp_path / "one-before")
        one = job.agent("one", 60)
        before = sum(counted_records(job))
        until(lambda: sum(counted_records(job)) > before + 8, "it goes on")
        job.run("trainer", "backup", "--state-dir", str(job.trainer_state), "--out", str(tmp_path / "saved"))
        one.kill()
        one.wait()
        shutil.rmtree(tmp_path / "one")
        (tmp_path / "one-before").rename(tmp_path / "one")
        one = job.agent("one", 60)
        before = sum(counted_records(job))
        until(lambda: sum(counted_records(job)) > before + 4, "it goes on from its earlier state")
        trainer.kill()
        trainer.wait()
        shutil.rmtree(job.trainer_state)
        shutil.copytree(tmp_path / "saved", job.trainer_state)
        trainer = job.trainer()
        job.expect_exit(one, "one")
        job.stop(trainer, "trainer")
        counts = counted(job.trainer_state)
        assert set(counts["serve"].values()) == {1} == set(counts["batch"].values())
        assert set(counts["reuse"].values()) <= {1}, "refused where its base is not here, and then sent whole"
        assert counts["serve"].keys() == counts["sent"].keys()
        assert not counts["update"] or set(counts["update"].values()) == {1}
        state = job.state()
        assert state is not None and state.samples_unique == state.samples == 60
        assert "the digest matches" in job.run("trainer", "verify", "--state-dir", str(job.trainer_state))


@pytest.mark.parametrize("form", ["held", "local", "frozen"])
def test_a_device_without_room_for_the_model_predicts_through_the_trainer(
    broker: EmbeddedBroker, tmp_path: Path, form: str
) -> None:
    """If it may; else both say so, and what is learnt stays what the journal gives."""
    settings = tmp_path / "one.toml"
    with fleet(tmp_path, broker.url, form) as job:
        trainer = job.trainer()
        job.expect_exit(job.agent("one", 40, "--whole-model", "never"), "one")
        ask = ("agent", "predict", "--config", str(settings), "--json", "switch the lights on", "colder")
        settings.write_text(f'whole_model = "never"\n{settings.read_text()}')
        said = job.run(*ask, code=1)
        assert "no room for the whole model" in said and "[predict]" in said and said.count("\n") == 1
        settings.write_text(f"{settings.read_text()}[predict]\nremote = true\ntimeout_s = 20\n")
        said = job.run(*ask, code=1)
        assert "can be read from that" in said and "trainer does not predict for devices" in said
        job.stop(trainer, "trainer")
        settings.write_text(settings.read_text().replace("timeout_s = 20", "timeout_s = 0.5"))
        assert "no answer from the trainer of job 'e2e' within 0.5 s" in job.run(*ask, code=1)
        settings.write_text(settings.read_text().replace("timeout_s = 0.5", "timeout_s = 60"))
        trainer = job.trainer("--predict.remote")
        said = job.run(*ask)
        found = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
        job.stop(trainer, "trainer")
        settings.write_text(settings.read_text().replace('whole_model = "never"', 'whole_model = "always"'))
        own = [json.loads(line) for line in job.run(*ask).splitlines()]
        assert [one["label"] for one in found] == [one["label"] for one in own]
        assert [one["probability"] for one in found] == pytest.approx(
            [one["probability"] for one in own], abs=0.02
        )
        assert "the digest matches" in job.run("trainer", "verify", "--state-dir", str(job.trainer_state))


def test_a_trainer_generates_no_text_for_devices(broker: EmbeddedBroker, tmp_path: Path) -> None:
    settings = tmp_path / "one.toml"
    with fleet(tmp_path, broker.url, "frozen", Task.CAUSAL_LM) as job:
        trainer = job.trainer("--predict.remote")
        job.expect_exit(job.agent("one", 12, "--whole-model", "never"), "one")
        settings.write_text(
            f'whole_model = "never"\n{settings.read_text()}[predict]\nremote = true\ntimeout_s = 60\n'
        )
        assert "generates no text for devices" in job.run(
            "agent", "predict", "--config", str(settings), "on", code=1
        )
        assert "no room for the whole model" in job.run(
            "agent", "generate", "--config", str(settings), "on", code=1
        )
        job.stop(trainer, "trainer")
