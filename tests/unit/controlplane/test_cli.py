"""The command line: exit codes, and what people read."""

import json

import pytest
from click.testing import CliRunner

from controlplane.cli import site
from controlplane.openapi import ROUTES


@pytest.mark.parametrize("command", ["serve", "check", "drain"])
def test_a_site_toml_that_is_wrong_is_told_in_one_line(command, tmp_path):
    config = tmp_path / "site.toml"
    config.write_text('pool = "a"\n[limits]\nworkers = "many"\n')
    run = CliRunner().invoke(site, [command, "--config", str(config)])
    assert run.exit_code == 1
    assert run.stderr.splitlines() == [f"Error: {config}: limits.workers: 'many' is not a whole number from 0 to 4096"]


def test_a_site_toml_that_is_missing_is_told_with_the_option_that_names_one(tmp_path):
    run = CliRunner().invoke(site, ["serve", "--config", str(tmp_path / "none.toml")])
    assert run.exit_code == 1
    assert "give another one with --config" in run.stderr


def test_the_document_can_be_had_without_a_daemon():
    run = CliRunner().invoke(site, ["openapi"])
    assert len(json.loads(run.stdout)["paths"]) == len({route.path for route in ROUTES})
