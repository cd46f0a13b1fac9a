"""What a broker acknowledges and throws away is noticed by what is missing."""

from __future__ import annotations

from side_trainer.receive.absence import NO_BATCHES_S, NO_TELEMETRY_S, Absences


def test_telemetry_that_tells_of_batches_while_none_comes_is_noticed_once() -> None:
    absences, said = Absences(), []
    for step in range(20):
        said.append(absences.on_telemetry("t", "pi-1", step, step * NO_BATCHES_S / 10))
    assert [bool(text) for text in said].count(True) == 1 and not any(said[:11])
    assert "none has come for" in "".join(said) and "have the broker read its list again" in "".join(said)


def test_a_device_that_has_nothing_to_send_misses_nothing() -> None:
    absences = Absences()
    assert not absences.on_batch("t", "pi-1", 0.0)
    for step in range(50):
        assert not absences.on_telemetry("t", "pi-1", 7, 60.0 * step)


def test_a_device_that_takes_long_to_begin_is_given_the_same_time() -> None:
    absences = Absences()
    assert not absences.on_telemetry("t", "pi-1", 0, 0.0)
    for step in range(1, 9):
        assert not absences.on_telemetry("t", "pi-1", step, 10 * NO_BATCHES_S + step * NO_BATCHES_S / 10)
    assert not absences.on_batch("t", "pi-1", 11 * NO_BATCHES_S)


def test_batches_without_telemetry_are_noticed_once_and_after_long() -> None:
    absences = Absences()
    said = [absences.on_batch("t", "pi-1", step * NO_TELEMETRY_S / 10) for step in range(20)]
    assert [bool(text) for text in said].count(True) == 1 and not any(said[:11])
    assert "no telemetry of it has come for" in "".join(said)


def test_batches_and_telemetry_that_come_in_turn_are_all_that_is_wanted() -> None:
    absences = Absences()
    for step in range(200):
        assert not absences.on_batch("t", "pi-1", 100.0 * step)
        assert not absences.on_telemetry("t", "pi-1", step, 100.0 * step + 50)


def test_an_outage_of_the_trainers_own_connection_is_no_devices_fault() -> None:
    absences = Absences()
    for step in range(5):
        assert not absences.on_telemetry("t", "pi-1", step, step)
    absences.disconnected()
    assert not absences.on_telemetry("t", "pi-1", 99, 5 * NO_BATCHES_S)
