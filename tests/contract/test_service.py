"""The systemd unit and the installer, as far as they can be judged without being process 1."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import controlplane

UNIT = Path(controlplane.__file__).with_name("meshcompute-site.service")
INSTALLER = Path(__file__).parents[2] / "scripts/install-site.sh"
WORST_EXPOSURE = 4.6  # of 10; a root service without any hardening has 9.6


@pytest.fixture
def unit(tmp_path, need):
    """The unit with a program that exists here."""
    need("systemd-analyze", shutil.which("systemd-analyze"), "apt-get install systemd")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace("/usr/local/bin/meshcompute-site", shutil.which("true")))
    return path


def analyze(*arguments):
    return subprocess.run(
        ["systemd-analyze", *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def test_systemd_understands_every_line_of_the_unit(unit):
    run = analyze("verify", "--man=no", unit)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_the_unit_leaves_little_exposed(unit):
    run = analyze("security", "--offline=true", "--no-pager", unit)
    exposure = re.search(r"exposure level for \S+: ([0-9.]+)", run.stdout)
    assert exposure, run.stderr
    assert float(exposure[1]) <= WORST_EXPOSURE


def test_every_capability_has_its_reason_beside_it():
    text = UNIT.read_text()
    [names] = re.findall(r"(?m)^CapabilityBoundingSet=(.*)$", text)
    explained = " ".join(re.findall(r"(?m)^# ((?:[A-Z_]{4,} ?)+) ", text)).split()
    assert sorted(name.removeprefix("CAP_") for name in names.split()) == sorted(explained)


def test_the_data_plane_outlives_a_restart_of_the_daemon():
    lines = UNIT.read_text().splitlines()
    assert {"KillMode=process", "RuntimeDirectoryPreserve=yes"} <= set(lines)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--help"], 0, "--remove [--purge]"),
        (["--pool"], 1, "--pool needs a value"),
        (["--colour", "red"], 1, "unknown option --colour"),
        (["--role", "boss", "--remove"], 1, "must be site, scheduler or both"),
        (["--purge"], 1, "--purge goes with --remove"),
    ],
)
def test_the_installer_says_what_it_takes_before_it_changes_anything(arguments, code, said):
    run = subprocess.run(["bash", INSTALLER, *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == code
    assert said in run.stdout + run.stderr
