"""A language-model job on the trainer: settled with heads, checked against them, folded like any other."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from torch.nn import functional

from side_trainer.fold.checkpoint import resume, write_checkpoint
from side_trainer.fold.fold import Fold
from side_trainer.job import Job
from side_trainer.journal.journal import Journal
from side_trainer.journal.records import IdleRecord
from side_trainer.receive.inbox import Refused, examine
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.schema import TrainerConfig
from side_trainer.settings.tier import TierConfig
from side_trainer.side_tuning.token_loss import head_losses
from sidestream.contract.errors import BackboneError, ConfigError
from sidestream.contract.messages import ActivationBatch, Status, to_bin
from sidestream.contract.plan import Plan, labels_id
from sidestream.contract.tasks import TargetForm, Task, write_tokens
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.wire import pack
from sidestream.side_network.network import SideNetwork
from sidestream.side_network.output_head import HeadSpec, OutputHead
from tests.agent.tiny import WIDTH
from tests.agent.tiny_lm import VOCABULARY, save_tiny_lm
from tests.trainer import conftest
from tests.trainer.conftest import append, fold_all, learnt, steps

pytestmark = pytest.mark.slow


@dataclass
class LmDevice(conftest.FakeDevice):
    """A device whose every vector lies round a centre of the token that follows."""

    def birth(self, *, labels: tuple[str, ...] = (), birth: int = 1) -> Status:
        return Status(state="online", birth=birth, stream=self.stream, fingerprint="lm", depth=4, width=WIDTH)

    def batch(self, plan: Plan, *, rows: int = 6, label: int | None = None) -> ActivationBatch:
        taps, lengths = plan.tiers[self.tier].taps, self.rng.integers(1, 9, size=rows)
        tokens = self.rng.integers(VOCABULARY, size=int(lengths.sum()))
        centres = np.random.default_rng(7).standard_normal((VOCABULARY, WIDTH))
        noise = self.rng.standard_normal((len(taps), len(tokens), WIDTH))
        self.sequence += 1
        ids = range(self.samples, self.samples + rows)
        self.samples += rows
        return ActivationBatch(
            stream=self.stream,
            sequence=self.sequence,
            floor=1,
            fingerprint=plan.tiers[self.tier].fingerprint,
            labels_id=labels_id(()),
            taps=taps,
            sampling="all",
            samples=to_bin(list(ids), "<u4"),
            lengths=to_bin(lengths, "<u2"),
            targets=write_tokens(tokens, VOCABULARY),
            target_form=TargetForm.TOKENS,
            activations=encode(centres[tokens][None] + 0.3 * noise, Codec.INT8),
        )


def lm_config(tmp_path: Path, **changes: object) -> TrainerConfig:
    model = tmp_path / "model"
    if not model.exists():
        save_tiny_lm(model, "llama")
    tiers = {
        "full": TierConfig(backbone=str(model), sampling="all", align="m"),
        "half": TierConfig(backbone=str(model), sampling="all", align="m", layers=2),
    }
    settings = {"task": Task.CAUSAL_LM, "labels": (), "tiers": tiers, **changes}
    return conftest.config(tmp_path, **settings)


def filled(journal: Journal, tmp_path: Path, batches: int = 10, *, idle: bool = True) -> tuple[Job, LmDevice]:
    job = Job(lm_config(tmp_path), journal)
    device = LmDevice("dev", "full", "a" * 32, seed=1)
    job.on_birth("full", device.name, device.birth(), 0.0)
    for _ in range(batches):
        assert append(journal, device, device.batch(job.plan))
    rows = 6 * batches
    record = IdleRecord(phase=journal.tail, position=0, rows=rows, total=rows)
    if idle:
        journal.append("idle", msgspec.json.encode(record))
    return job, device


def test_the_losses_and_their_gradients_are_those_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidestream.side_network.output_head._CHUNK_VALUES", 3 * 11)
    generator = torch.Generator().manual_seed(0)
    head = OutputHead(
        HeadSpec(norm="rms", softcap=4.0),
        {
            "embedding": torch.randn(11, 5, generator=generator),
            "norm_weight": torch.randn(5, generator=generator),
        },
    )
    weights = torch.randn(8, generator=generator)
    given, plain = (torch.randn(8, 5, generator=generator).requires_grad_() for _ in range(2))
    with torch.no_grad():
        plain.copy_(given)
    targets = torch.arange(8)
    losses = head_losses(head, given, targets, 0.1)
    expected = functional.cross_entropy(head(plain), targets, reduction="none", label_smoothing=0.1)
    torch.testing.assert_close(losses, expected)
    (losses * weights).sum().backward()  # type: ignore[no-untyped-call]
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(given.grad, plain.grad)


@pytest.mark.slow
def test_it_starts_as_the_backbone_and_gets_better(journal: Journal, tmp_path: Path) -> None:
    job, device = filled(journal, tmp_path, batches=60, idle=False)
    fold = Fold(journal)
    served = [one for step in steps(journal, fold) for one in step.served]
    assert len(served) == 60, "one batch an update"
    _, _, first = served[0]
    head = learnt(fold).heads.get(job.plan.tiers["full"].head)
    journal.append("idle", msgspec.json.encode(fold.method.next_idle(2, 8, fold.offset)))
    fold_all(journal, fold)
    network = learnt(fold).average
    assert network is not None
    network.eval()
    batch = device.batch(job.plan, rows=40)
    taps = torch.from_numpy(decode(batch.activations))
    tokens = torch.from_numpy(batch.read_targets().astype(np.int64))
    start = SideNetwork(job.plan.side_network, labels=0, seed=0, task=Task.CAUSAL_LM)
    start.add_align("m", WIDTH)
    assert torch.equal(start.eval().refine("m", taps[:, None])[0], taps[-1])
    frozen, _ = head.judge(taps[-1], tokens)
    tuned, hits = head.judge(network.refine("m", taps[:, None])[0].detach(), tokens)
    assert first == pytest.approx(float(frozen.mean()), rel=0.5)
    assert tuned.mean() < 0.5 * frozen.mean() and hits.float().mean() > 0.8


@pytest.mark.slow
def test_a_fold_resumed_from_any_checkpoint_ends_with_the_same_bits(journal: Journal, tmp_path: Path) -> None:
    filled(journal, tmp_path)
    whole = fold_all(journal, Fold(journal)).digest()
    for stop in range(0, journal.tail, 4):
        directory = tmp_path / f"stop-{stop}"
        directory.mkdir()
        early = Fold(journal)
        for record in journal.read(0, limit=stop):
            early.apply(record)
        write_checkpoint(directory, early, journal.run)
        late = Fold(journal)
        assert resume(directory, late, journal.run, journal.tail) is not None
        assert fold_all(journal, late).digest() == whole, stop


def test_a_row_teaches_its_own_exit_beside_rows_of_a_shallower_tier(journal: Journal, tmp_path: Path) -> None:
    job = Job(lm_config(tmp_path), journal)
    for tier, depth in (("full", 4), ("half", 2)):
        device = LmDevice(tier, tier, tier[0].encode().hex() * 16, seed=depth)
        status = msgspec.structs.replace(device.birth(), depth=depth)
        assert job.on_birth(tier, device.name, status, 0.0)
        for _ in range(6):
            append(journal, device, device.batch(job.plan))
    fold = fold_all(journal, Fold(journal))
    assert [len(job.plan.tiers[name].taps) for name in ("full", "half")] == [3, 2]
    network = learnt(fold).network
    assert network is not None and network.outs.keys() == network.aligns.keys()


def test_tokens_outside_the_vocabulary_and_other_targets_are_refused(
    journal: Journal, tmp_path: Path
) -> None:
    job, device = filled(journal, tmp_path, batches=0)
    good = device.batch(job.plan)
    assert examine(pack(good), "full", job.plan).batch == good
    tokens = good.read_targets().copy()
    tokens[-1] = VOCABULARY
    outside = msgspec.structs.replace(good, targets=write_tokens(tokens, VOCABULARY))
    with pytest.raises(Refused, match=f"outside the vocabulary of {VOCABULARY}"):
        examine(pack(outside), "full", job.plan)
    wide = msgspec.structs.replace(good, targets=write_tokens(tokens * 0 + 3, 2**20))
    taken = examine(pack(wide), "full", job.plan).batch
    assert isinstance(taken, ActivationBatch) and taken.read_targets().tolist() == [3] * len(tokens)
    labels = msgspec.structs.replace(
        good, target_form="labels", targets=to_bin([0] * len(good.sample_ids), "<u2")
    )
    with pytest.raises(Refused, match="no targets for causal-lm"):
        examine(pack(labels), "full", job.plan)


def test_the_plan_names_the_head_and_a_backbone_of_another_width_cannot_join(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = Job(lm_config(tmp_path), journal)
    assert job.plan.tiers["full"].head and job.plan.tiers["full"].vocabulary == VOCABULARY
    assert not job.plan.ready_for("full") and not job.plan.lacks_labels
    status = LmDevice("dev", "full", "a" * 32).birth()
    assert not job.on_birth("full", "dev", msgspec.structs.replace(status, width=16), 0.0)
    assert "its head takes width 32, the backbone has 16" in caplog.text
    assert job.on_birth("full", "dev", status, 0.0) and job.plan.ready_for("full")


def test_a_settled_tiers_head_is_in_the_state_directory(journal: Journal, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such folder"):
        Job(lm_config(tmp_path, tiers={"far": TierConfig(backbone="/nowhere")}), journal)
    job = Job(lm_config(tmp_path), journal)
    assert job.on_birth("full", "dev", LmDevice("dev", "full", "a" * 32).birth(), 0.0)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "model").mkdir()
    again = Job(lm_config(tmp_path), journal)
    assert again.plan.tiers["full"] == job.plan.tiers["full"] and not again.plan.tiers["half"].head


def test_the_last_tap_has_to_be_the_last_layer(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = lm_config(tmp_path)
    tiers = {"full": msgspec.structs.replace(settings.tiers["full"], taps=(1, 3))}
    job = Job(msgspec.structs.replace(settings, tiers=tiers), journal)
    assert not job.on_birth("full", "dev", LmDevice("dev", "full", "a" * 32).birth(), 0.0)
    assert "taps must end with the backbone's last layer, 4" in caplog.text


def test_a_tier_whose_decoder_is_not_here_joins_once_it_is(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running, far = lm_config(tmp_path), tmp_path / "far"
    birth = msgspec.structs.replace(LmDevice("dev", "far", "a" * 32).birth(), fingerprint="far")
    job = Job(running, journal)
    more = {**running.tiers, "far": TierConfig(backbone=str(far), sampling="all", align="f")}
    updated = msgspec.structs.replace(running, tiers=more)
    job.reconfigure(updated)
    assert (
        not job.plan.ready_for("far") and "tier far waits" in caplog.text and "no such folder" in caplog.text
    )
    assert not job.on_birth("far", "dev", birth, 0.0)
    assert job.on_birth("full", "dev", LmDevice("dev", "full", "a" * 32).birth(), 0.0)
    for waiting in (job, Job(updated, journal)):
        assert not waiting.plan.tiers["far"].head
        assert not waiting.tick(1.0) and not waiting.tick(100.0)
        save_tiny_lm(far, "gpt2", seed=1)
        revision = waiting.plan.revision
        assert not waiting.tick(101.0), "it is not looked for all the time"
        assert waiting.tick(200.0) and waiting.plan.revision > revision
        assert waiting.plan.tiers["far"].head != waiting.plan.tiers["full"].head
        assert not waiting.tick(300.0)
        shutil.rmtree(far)
    assert job.on_birth("far", "dev", birth, 0.0) and job.plan.ready_for("far")


def test_a_waiting_tier_whose_head_does_not_go_with_the_others_is_left_out(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    running = lm_config(tmp_path)
    job = Job(running, journal)
    other = save_tiny_lm(tmp_path / "other", "gpt2", seed=1)
    more = {**running.tiers, "far": TierConfig(backbone=str(other), sampling="all", align="m")}
    job.reconfigure(msgspec.structs.replace(running, tiers=more))
    assert "give it an 'align' of its own" in caplog.text and not job.plan.tiers["far"].head


@pytest.mark.parametrize("sampling", ["segments:4", "mean", "pivot", "important:4"])
def test_vectors_that_are_no_tokens_do_not_suit_the_task(tmp_path: Path, sampling: str) -> None:
    tiers = {"full": TierConfig(backbone="m", sampling=sampling)}
    with pytest.raises(ConfigError, match=r"tiers\.full\.sampling.*does not suit causal-lm"):
        lm_config(tmp_path, tiers=tiers).checked()
    with pytest.raises(ConfigError, match=r"no loss on the device"):
        conftest.config(tmp_path, tiers={"big": TierConfig(sampling="hardest:0.5")}).checked()


def test_the_task_brings_its_own_defaults_and_what_is_set_stays(tmp_path: Path) -> None:
    file = tmp_path / "trainer.toml"
    file.write_text(
        'job = "a"\ntask = "causal-lm"\n[tiers.pi]\nbackbone = "m"\ncodec = "nf4"\n[learner]\nreplay = 5\n'
    )
    config = SettingsFile(file).load()
    assert (config.tiers["pi"].sampling, config.tiers["pi"].codec) == ("all", Codec.NF4)
    assert (config.learner.dropout, config.learner.label_smoothing, config.learner.replay) == (0.0, 0.0, 5)
    file.write_text('job = "a"\n[tiers.pi]\nbackbone = "m"\n')
    assert SettingsFile(file).load().learner.dropout == 0.2
