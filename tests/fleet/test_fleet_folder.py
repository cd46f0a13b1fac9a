"""``sidestream fleet`` and ``agent enroll``, as an operator uses them."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from cryptography import x509

from edge_agent.config import AgentConfig
from edge_agent.weights.trust import read_trusted
from side_trainer.broadcast.signing import load_signer
from side_trainer.settings.schema import TrainerConfig
from sidestream.cli import main
from sidestream.contract.signing import read_public_keys
from sidestream.host.passwords import VARIABLE
from sidestream.host.toml import load_config

PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def _password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, PASSWORD)


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    path = tmp_path / "fleet"
    assert (
        main(
            ["fleet", "init", str(path), *["--job", "lights", "--host", "broker.local", "--host", "10.0.0.1"]]
        )
        == 0
    )
    return path


def enrolled(fleet: Path, name: str, tier: str = "generic", *more: str) -> Path:
    """A device's settings."""
    assert main(["fleet", "add-device", str(fleet), name, "--tier", tier, *more]) == 0
    folder = fleet.parent / f"at-{name}"
    bundle = fleet / "bundles" / f"{name}.enrol"
    assert main(["agent", "enroll", str(bundle), "--config-dir", str(folder), "--replace"]) == 0
    return folder / "agent.toml"


def error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(list(arguments)) == 1
    return capsys.readouterr().err


def test_nobody_but_the_owner_can_read_a_file_of_fleet_or_device(fleet: Path) -> None:
    device = enrolled(fleet, "pi-1").parent
    for root in (fleet, device):
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        for path in root.rglob("*"):
            allowed = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == allowed or path.name == "lock", path


def test_the_trainers_settings_work_as_they_are(fleet: Path) -> None:
    config = load_config(TrainerConfig, fleet / "trainer/trainer.toml").checked()
    endpoint = config.broker.endpoint({})
    assert (config.job, endpoint.tls, endpoint.address) == ("lights", True, "broker.local:8883")
    load_signer("lights", config.signing)


def test_an_enrolled_device_has_all_it_needs(fleet: Path) -> None:
    config = load_config(AgentConfig, enrolled(fleet, "pi-1", "generic"))
    assert (config.job, config.device, config.tier) == ("lights", "pi-1", "generic")
    assert read_trusted(config.trusted_keys_file) == read_public_keys(
        (fleet / "trainer/signing.pub.pem").read_bytes(), "keys"
    )
    certificate = x509.load_pem_x509_certificate(Path(config.broker.cert_file).read_bytes())
    assert certificate.subject.rfc4514_string() == "CN=pi-1"


def test_certificates_are_for_what_they_are_used_for(fleet: Path) -> None:
    ca = x509.load_pem_x509_certificate((fleet / "ca/ca.crt").read_bytes())
    broker = x509.load_pem_x509_certificate((fleet / "broker/broker.crt").read_bytes())
    device = x509.load_pem_x509_certificate((enrolled(fleet, "pi-1").parent / "device.crt").read_bytes())
    names = broker.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["broker.local"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]
    for certificate, use in ((broker, "serverAuth"), (device, "clientAuth")):
        certificate.verify_directly_issued_by(ca)
        uses = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        assert [one._name for one in uses] == [use]
        assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_password_is_made_up_where_none_is_given_and_shown_once(
    fleet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(VARIABLE)
    assert main(["fleet", "add-device", str(fleet), "pi-1", "--tier", "generic"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if "shown this once" in line)
    file = tmp_path / "password"
    file.write_text(line.rpartition(" ")[2] + "\n")
    bundle, folder = str(fleet / "bundles/pi-1.enrol"), str(tmp_path / "at")
    assert "password: there is none" in error(capsys, "agent", "enroll", bundle, "--config-dir", folder)
    assert main(["agent", "enroll", bundle, "--config-dir", folder, "--password-file", str(file)]) == 0


def test_a_password_can_be_typed(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("getpass.getpass", lambda prompt: PASSWORD)
    assert main(["fleet", "add-device", str(fleet), "pi-1", "--tier", "generic"]) == 0
    bundle = str(fleet / "bundles/pi-1.enrol")
    assert main(["agent", "enroll", bundle, "--config-dir", str(tmp_path / "at")]) == 0
    assert PASSWORD not in capsys.readouterr().out
    typed = iter([PASSWORD, PASSWORD + "!"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(typed))
    assert "passwords differ" in error(capsys, "fleet", "add-device", str(fleet), "pi-2", "--tier", "generic")


def test_what_is_wrong_is_said_in_one_line(
    fleet: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = ("fleet", "add-device", str(fleet))
    enrolled(fleet, "pi-1")
    bundle = str(fleet / "bundles/pi-1.enrol")
    other = str(tmp_path / "other")
    junk = tmp_path / "junk"
    junk.write_bytes(b"\xff\xfe{")
    assert "is not empty" in error(capsys, "fleet", "init", str(fleet), "--job", "a", "--host", "h")
    assert "--host" in error(capsys, "fleet", "init", other, "--job", "a", "--host", "a..b" * 40)
    assert "--port" in error(capsys, "fleet", "init", other, "--job", "a", "--host", "h", "--port", "0")
    assert "no fleet's folder" in error(capsys, "fleet", "list", other)
    assert "'pi-1' has a certificate" in error(capsys, *add, "pi-1", "--tier", "generic")
    assert "cannot be part of a topic" in error(capsys, *add, "a/b", "--tier", "generic")
    assert "cannot be part of a topic" in error(capsys, *add, "@trainer", "--tier", "generic")
    assert "there are: pi-1" in error(capsys, "fleet", "revoke", str(fleet), "pi-9")
    assert "--finish" in error(capsys, "fleet", "rotate", str(fleet), "--finish")
    assert "is there already" in error(
        capsys, "agent", "enroll", bundle, "--config-dir", str(tmp_path / "at-pi-1")
    )
    assert "not an enrolment bundle" in error(capsys, "agent", "enroll", str(junk), "--config-dir", other)
    assert "BUNDLE" in error(capsys, "agent", "enroll", str(tmp_path / "none"), "--config-dir", other)
    monkeypatch.setenv(VARIABLE, "another password")
    assert "password is wrong" in error(capsys, "agent", "enroll", bundle, "--config-dir", other)
    monkeypatch.setenv(VARIABLE, "short")
    assert "at least 10" in error(capsys, *add, "pi-7", "--tier", "generic")
    (fleet / "fleet.json").write_text("{")
    assert "fleet.json cannot be read" in error(capsys, "fleet", "list", str(fleet))


def test_a_refused_password_lets_nobody_in(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, "short")
    error(capsys, "fleet", "add-device", str(fleet), "pi-7", "--tier", "generic")
    assert main(["fleet", "list", str(fleet)]) == 0
    assert "pi-7" not in capsys.readouterr().out


def test_revoking_takes_a_device_off_the_access_list_and_onto_the_list_of_revoked(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = x509.load_pem_x509_certificate((enrolled(fleet, "pi-1").parent / "device.crt").read_bytes())
    enrolled(fleet, "pi-2")
    assert main(["fleet", "revoke", str(fleet), "pi-1"]) == 0
    assert "read its files again" in capsys.readouterr().out
    crl = x509.load_pem_x509_crl((fleet / "broker/crl.pem").read_bytes())
    assert [one.serial_number for one in crl] == [first.serial_number]
    acl = (fleet / "broker/acl").read_text()
    assert "user pi-2" in acl and "user pi-1" not in acl
    second = x509.load_pem_x509_certificate((enrolled(fleet, "pi-1").parent / "device.crt").read_bytes())
    assert second.serial_number != first.serial_number and "user pi-1" in (fleet / "broker/acl").read_text()
    enrolled(fleet, "pi-1", "generic", "--again")
    crl = x509.load_pem_x509_crl((fleet / "broker/crl.pem").read_bytes())
    assert {one.serial_number for one in crl} == {first.serial_number, second.serial_number}
    capsys.readouterr()
    assert main(["fleet", "list", str(fleet), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["devices"]
    assert [(one["name"], bool(one["revoked"])) for one in listed] == [
        ("pi-1", True),
        ("pi-2", False),
        ("pi-1", True),
        ("pi-1", False),
    ]


def test_a_new_signing_key_is_made_known_then_used_then_alone(fleet: Path) -> None:
    def keys() -> tuple[bytes, ...]:
        config = load_config(TrainerConfig, fleet / "trainer/trainer.toml")
        return load_signer("lights", config.signing).keys

    old = keys()
    assert main(["fleet", "rotate", str(fleet)]) == 0
    both = keys()
    assert both[0] == old[0] and len(both) == 2, "the old one signs"
    config = load_config(AgentConfig, enrolled(fleet, "pi-1"))
    assert set(read_trusted(config.trusted_keys_file)) == set(both), "who is enrolled now trusts both"
    assert main(["fleet", "rotate", str(fleet), "--finish"]) == 0
    assert keys() == both[1:]


def test_broker_and_trainer_get_new_certificates(fleet: Path) -> None:
    names = ("broker/broker.crt", "trainer/trainer.crt")
    before = [(fleet / name).read_bytes() for name in names]
    assert main(["fleet", "rotate", str(fleet), "--certificates"]) == 0
    assert all((fleet / name).read_bytes() != old for name, old in zip(names, before, strict=True))


def test_a_tier_that_the_trainer_does_not_know_is_pointed_out(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    enrolled(fleet, "pi-1", "pi5")
    assert "no [tiers.pi5] yet" in capsys.readouterr().err
