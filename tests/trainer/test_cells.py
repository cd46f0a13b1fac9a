"""Trainers of several cells learn one side-network: the same weights everywhere, whatever happens to one."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from side_trainer.cells.group import CellLost
from side_trainer.cells.steps import CellReport, decide, lacking, last_step, unlike
from side_trainer.fold.checkpoint import write_checkpoint
from side_trainer.fold.checkpointer import Checkpointer
from side_trainer.fold.fold import Fold
from side_trainer.job import Contradiction, Job, check
from side_trainer.journal.journal import FILE_NAME, Journal
from side_trainer.journal.records import IdleRecord, LearnRecord, RecordKind, StepRecord, TierRecord
from side_trainer.settings.cells import CellConfig, rank_of
from side_trainer.settings.state import cell_dirs, in_cell
from sidestream.contract.errors import ConfigError, StateError
from tests.trainer.cells import Cell, Cells, cell_settings, cells_of
from tests.trainer.conftest import config, fold_all, settle, steps


def filled(cells: Cells, batches: int = 3) -> None:
    for cell in cells.all:
        for device in cell.fleet:
            cell.send(device, batches)


def test_all_cells_end_with_the_same_weights_and_nothing_owed(tmp_path: Path) -> None:
    with cells_of(tmp_path, 3) as cells:
        filled(cells)
        cells.all[1].send(cells.all[1].fleet[0], 4)
        cells.learn()
        assert len(cells.digests) == 1 and all(cell.fold.updates > 20 for cell in cells.all)
        assert [cell.fold.samples for cell in cells.all] == [72, 104, 72]
        assert {cell.method.owed(2.0) for cell in cells.all} == {0}
        assert len({cell.fold.updates for cell in cells.all}) == 1


def test_an_update_of_two_cells_is_that_of_one_trainer_with_all_rows(tmp_path: Path) -> None:
    with cells_of(tmp_path / "two") as cells, Opened(tmp_path / "one") as journal:
        settings = cells.all[0].settings
        job = Job(msgspec.structs.replace(settings, cells=(), state_dir=str(tmp_path / "one")), journal)
        settle(job, [device for cell in cells.all for device in cell.fleet])
        for cell in cells.all:
            cell.plain()
        fold = fold_all(journal, Fold(journal))
        for cell in cells.all:
            for device in cell.fleet[:2]:
                batch = device.batch(cell.job.plan)
                for where in (cell.journal, journal):
                    from tests.trainer.conftest import append

                    assert append(where, device, batch)
        together = _updates_once(cells)
        journal.append(RecordKind.LEARN.value, msgspec.json.encode(LearnRecord(through=journal.tail)))
        one = _replay_less(fold, journal)
        assert together.keys() == one.keys()
        for name, values in one.items():
            np.testing.assert_allclose(together[name], values, atol=2e-6, err_msg=name)


def _updates_once(cells: Cells) -> dict[str, np.ndarray]:
    """After one step on all that waits, without replay."""
    for cell in cells.all:
        cell.fold.facts.settings = _without_replay(cell.fold)

    def one(cell: Cell) -> None:
        assert cell.round()
        cell.plain()
        cell.fold.apply(cell.journal.get(cell.fold.offset + 1))

    cells.do(one)
    assert len(cells.digests) == 1
    return dict(cells.all[0].fold.weights())


def _without_replay(fold: Fold):  # type: ignore[no-untyped-def]
    settings = fold.facts.settings
    return msgspec.structs.replace(settings, learner=msgspec.structs.replace(settings.learner, replay=0))


def _replay_less(fold: Fold, journal: Journal) -> dict[str, np.ndarray]:
    fold.facts.settings = _without_replay(fold)
    for record in journal.read(fold.offset):
        fold.apply(record)
    return dict(fold.weights())


class Opened:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.journal = Journal(folder / FILE_NAME)

    def __enter__(self) -> Journal:
        return self.journal

    def __exit__(self, *_: object) -> None:
        self.journal.close()


@pytest.mark.parametrize("struck", [0, 1])
def test_a_step_that_a_cell_does_not_live_to_finish_is_undone_and_made_again(
    tmp_path: Path, struck: int
) -> None:
    with cells_of(tmp_path / "whole") as cells:
        filled(cells, 8)
        cells.learn()
        (wanted,) = cells.digests
    with cells_of(tmp_path / "struck") as cells:
        filled(cells, 8)
        for act in (5, 9, 14, 19):  # a gradient, a meeting, a survey, reports
            cells.all[struck].group.fails_at = act
            cells.learn()
            assert not cells.all[1 - struck].group.formed
        cells.learn()
        assert cells.digests == {wanted}


@pytest.mark.parametrize("back", [0, 1])
def test_a_cell_that_restarts_from_an_old_checkpoint_takes_what_the_others_have(
    tmp_path: Path, back: int
) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells)
        cells.learn()
        cell = cells.all[back]
        folder = cell.journal.folder
        write_checkpoint(folder, cell.fold, cell.journal.run)
        for one in cells.all:
            one.send(one.fleet[0], 2)
        cells.learn()
        (wanted,) = cells.digests
        cell.fresh()
        _restore(cell)
        assert cell.fold.digest() != wanted and cell.method.owed(0.0) == 1
        for act in (1, 2, 3):  # where they stand, digests, weights
            cells.all[1 - back].group.fails_at = act
            cells.learn()
            assert cell.fold.digest() != wanted
        cells.learn()
        assert cells.digests == {wanted}
        assert cell.fold.updates == cells.all[1 - back].fold.updates
        filled(cells, 1)
        cells.learn()
        assert len(cells.digests) == 1 and cells.digests != {wanted}


def _restore(cell: Cell) -> None:
    from prometheus_client import CollectorRegistry

    from metrics.catalogue import TrainerMetrics

    Checkpointer(cell.journal.folder, cell.fold, cell.journal, TrainerMetrics(CollectorRegistry()))


def test_after_all_are_gone_they_fold_together_to_the_same_bits(tmp_path: Path) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells)
        cells.learn()
        write_checkpoint(cells.all[0].journal.folder, cells.all[0].fold, cells.all[0].journal.run)
        for one in cells.all:
            one.send(one.fleet[1], 2)
        cells.learn()
        (wanted,) = cells.digests
        for cell in cells.all:
            cell.fresh()
        _restore(cells.all[0])
        cells.learn()
        assert cells.digests == {wanted}


def test_a_step_that_one_has_journaled_is_the_others_too(tmp_path: Path) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells)
        cells.learn()
        first, second = cells.all
        second.send(second.fleet[0])
        second.plain()
        step = last_step(first.journal)
        assert step is not None
        more = StepRecord(
            number=step.number + 1,
            after=step.number,
            parts=(step.parts[0].__class__(), step.parts[0].__class__(through=second.journal.tail)),
        )
        first.journal.append(RecordKind.STEP.value, msgspec.json.encode(more))
        cells.learn()
        found = [last_step(cell.journal) for cell in cells.all]
        assert found[0] == found[1] and found[0] is not None and found[0].number > more.number
        assert len(cells.digests) == 1


def test_a_journal_that_was_set_back_does_without_the_steps_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells)
        cells.learn()
        cell = cells.all[1]
        backup = tmp_path / "backup.db"
        _copy(cell.journal, backup)
        for one in cells.all:
            one.send(one.fleet[0], 2)
        cells.learn()
        (wanted,) = cells.digests
        cell.journal.close()
        for path in cell.journal.folder.glob(f"{FILE_NAME}*"):
            path.unlink()
        backup.rename(cell.journal.path)
        cell.journal = Journal(cell.journal.path)
        cell.fresh()
        cells.learn()
        assert "was set back from step" in caplog.text
        assert cells.digests == {wanted}
        cell.job = Job(cell.settings, cell.journal)
        cell.send(cell.fleet[1])
        cells.learn()
        assert len(cells.digests) == 1 and cells.digests != {wanted}


def _copy(journal: Journal, path: Path) -> None:
    import sqlite3

    with sqlite3.connect(path) as other:
        journal.db.backup(other)
    other.close()


def test_cells_whose_journals_do_not_go_together_say_so_and_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells)
        cells.learn()
        first, second = cells.all
        backup = tmp_path / "backup.db"
        for cell in cells.all:
            cell.send(cell.fleet[0], 2)
        cells.learn()
        _copy(second.journal, backup)
        for _ in range(2):
            first.send(first.fleet[1])
            cells.learn()
        second.journal.close()
        for path in second.journal.folder.glob(f"{FILE_NAME}*"):
            path.unlink()
        backup.rename(second.journal.path)
        second.journal = Journal(second.journal.path)
        for cell in cells.all:  # no cell has the weights of the steps that lack
            cell.fresh()
        cells.learn()
        assert "restore the state directories of all cells" in caplog.text
        assert not first.group.formed and first.fold.updates == 0


def test_a_tier_that_one_cell_settles_is_settled_in_all(tmp_path: Path) -> None:
    settings = cell_settings(tmp_path)
    with cells_of(tmp_path / "cells") as cells:
        assert settings.tiers.keys() == cells.all[0].job.settled.keys()
    with cells_of(tmp_path / "late", 2) as cells:
        late = cells.all[1]
        late.journal.close()
        for path in late.journal.folder.glob(f"{FILE_NAME}*"):
            path.unlink()
        late.journal = Journal(late.journal.path)
        late.job = Job(late.settings, late.journal)
        late.fresh()
        assert not late.job.settled
        cells.all[0].send(cells.all[0].fleet[0], 2)
        for _ in range(3):
            cells.learn()
        assert late.job.settled == cells.all[0].job.settled
        assert len(cells.digests) == 1 and late.fold.updates > 0 and late.fold.samples == 0


def test_a_cells_journal_is_folded_with_the_others_only(tmp_path: Path) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells, 1)
        cells.learn()
        cell = cells.all[0]
        with pytest.raises(StateError, match="sidestream trainer verify --cells"):
            for _ in steps(cell.journal, Fold(cell.journal)):
                pass
        with pytest.raises(Contradiction, match="was learnt in 2 of them"):
            check(msgspec.structs.replace(cell.settings, cells=()), cell.journal)
    with Opened(tmp_path / "one") as journal:
        job = Job(config(tmp_path / "one"), journal)
        settle(job, cells.all[0].fleet)
        fold = fold_all(journal, Fold(journal))
        journal.append(
            RecordKind.IDLE.value, msgspec.json.encode(IdleRecord(phase=1, position=0, rows=1, total=1))
        )
        assert not fold.updates
        with pytest.raises(Contradiction, match="was learnt by one trainer"):
            check(cell_settings(tmp_path / "one"), journal)


def test_a_group_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    with cells_of(tmp_path) as cells:
        filled(cells, 1)
        cells.learn()
        cell = cells.all[0]
        before = cell.fold.digest()
        cell.journal.append(RecordKind.STEP.value, cells.all[0].journal.last("step").payload)  # type: ignore[union-attr]
        with pytest.raises(StateError, match="step"):
            cell.fold.apply(cell.journal.get(cell.journal.tail))
        cell.group.formed = False
        with pytest.raises(CellLost):
            cell.together.next_step(cell.settings.learner, quiet=True)
        assert cell.fold.digest() == before


# --- what is next ------------------------------------------------------------------------------------


def report(**what: object) -> CellReport:
    return CellReport(**{"settings": "s", "tiers": (), "step": 4, **what})  # type: ignore[arg-type]


def idle(rows: int) -> IdleRecord:
    return IdleRecord(phase=9, position=0, rows=rows, total=rows)


def test_what_came_goes_before_passes_and_nothing_goes_before_all_is_quiet() -> None:
    waits, owes = report(through=7), report(quiet=True, owed=40, idle=idle(40))
    step = decode_ok(decide([owes, waits]))
    assert (
        step.learns
        and [part.through for part in step.parts] == [0, 7]
        and (step.number, step.after) == (5, 4)
    )
    assert decide([owes, report()]) is None
    assert decide([report(quiet=True), report(quiet=True)]) is None


def test_cells_with_less_to_pass_over_go_slower_so_that_all_end_together() -> None:
    step = decode_ok(
        decide([report(quiet=True, owed=2000, idle=idle(512)), report(quiet=True, owed=100, idle=idle(100))])
    )
    assert not step.learns
    assert [part.idle.rows for part in step.parts if part.idle] == [488, 25]


def decode_ok(step: StepRecord | None) -> StepRecord:
    assert step is not None
    return msgspec.json.decode(msgspec.json.encode(step), type=StepRecord)


def test_cells_agree_on_settings_and_tiers_or_do_not_learn() -> None:
    def tier(fingerprint: str) -> TierRecord:
        return TierRecord(tier="pi", fingerprint=fingerprint, depth=2, width=8, taps=(1, 2), align="a")

    assert "settings differ" in unlike([report(), report(settings="t")])
    assert "tier pi" in unlike([report(tiers=(tier("f"),)), report(tiers=(tier("g"),))])
    one, other = report(tiers=(tier("f"),)), report()
    assert (
        unlike([one, other]) == ""
        and lacking(other, [one, other]).keys() == {"pi"}
        and not lacking(one, [one, other])
    )


# --- settings ----------------------------------------------------------------------------------------


def cells(*urls: str) -> tuple[CellConfig, ...]:
    from broker_config.settings import BrokerSettings

    return tuple(CellConfig(name=f"c{at}", broker=BrokerSettings(url=url)) for at, url in enumerate(urls))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"cells": cells("mqtt://a")}, "cells"),
        ({"cells": cells("mqtt://a", "mqtt://a")}, r"cells\.1\.broker\.url"),
        ({"cells": cells("mqtt://a", "http://b")}, "broker.url"),
        ({"cells": (*cells("mqtt://a"), *cells("mqtt://b"))}, r"cells\.1\.name"),
        ({"cells": (CellConfig(name="a b"), *cells("mqtt://b"))}, r"cells\.0\.name"),
        ({"cells": cells("mqtt://a", "mqtt://b"), "labels": ()}, "labels"),
        ({"cells": cells("mqtt://a", "mqtt://b"), "method": "split-lora"}, "cells"),
    ],
)
def test_cells_that_cannot_be_are_refused_by_the_field(
    tmp_path: Path, changes: dict[str, object], field: str
) -> None:
    with pytest.raises(ConfigError, match=field):
        config(tmp_path, **changes).checked()


@pytest.mark.parametrize(
    ("environ", "why"),
    [
        ({}, "torchrun --nproc-per-node 2"),
        ({"RANK": "0"}, "torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "3"}, "there are 2, and 3 processes"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "this one is 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "torchrun"),
    ],
)
def test_a_process_that_does_not_know_its_cell_is_told_how_to_start(
    environ: dict[str, str], why: str
) -> None:
    with pytest.raises(ConfigError, match=why):
        rank_of(cells("mqtt://a", "mqtt://b"), environ)


def test_many_processes_without_cells_are_refused() -> None:
    assert rank_of((), {}) is None and rank_of((), {"RANK": "0", "WORLD_SIZE": "1"}) is None
    with pytest.raises(ConfigError, match="2 processes were started"):
        rank_of((), {"RANK": "0", "WORLD_SIZE": "2"})


def test_each_cell_has_its_broker_folder_and_ports(tmp_path: Path) -> None:
    given = config(tmp_path, cells=cells("mqtt://a", "mqtt://b"), metrics_port=9464, page_port=0)
    own = in_cell(given, {"RANK": "1", "WORLD_SIZE": "2"})
    assert own.broker.url == "mqtt://b" and own.state_dir == str(tmp_path / "cells" / "c1")
    assert (own.metrics_port, own.page_port) == (9465, 0)
    elsewhere = msgspec.structs.replace(given.cells[0], state_dir="/srv/a")
    assert cell_dirs(msgspec.structs.replace(given, cells=(elsewhere, given.cells[1])))[0] == Path("/srv/a")
    assert in_cell(config(tmp_path), {}) == config(tmp_path)
