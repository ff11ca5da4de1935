"""The door to other programs, with programs that every machine has."""

import asyncio
import logging
import time

import pytest

from controlplane.command import CommandError, run


def go(*command, **options):
    return asyncio.run(run(command, **options))


def test_what_a_program_writes_is_returned_and_hidden_from_logs():
    output = go("echo", "hello")
    assert output.stdout == "hello\n"
    assert "hello" not in repr(output)


def test_a_program_can_open_its_standard_input_by_name():
    assert go("cat", "/dev/fd/0", stdin="a secret").stdout == "a secret"


def test_more_than_a_pipe_holds_can_be_given_and_returned():
    text = "x" * 1_000_000
    assert go("cat", stdin=text).stdout == text


def test_a_program_that_does_not_read_is_no_error():
    assert go("true", stdin="x" * 1_000_000).stdout == ""


def test_a_failure_says_which_program_and_what_it_complained_about_and_not_what_it_was_given(caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(CommandError) as caught:
        go("sh", "-c", "cat; echo no such thing >&2; exit 3", stdin="secret")
    assert str(caught.value).endswith("ended with 3: no such thing")
    assert "secret" not in str(caught.value)
    assert "secret" not in caplog.text


def test_a_program_that_is_not_installed_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr("controlplane.command._PACKAGE_OF", {"no-such-program": "its-package"})
    with pytest.raises(CommandError, match=r"no-such-program is not installed \(Debian's package is its-package\)"):
        go("no-such-program")


def test_a_program_that_takes_too_long_is_ended_with_all_that_it_started():
    begun = time.monotonic()
    with pytest.raises(CommandError, match=r"was not done after 0\.2 s, and was killed"):
        go("sh", "-c", "sleep 60 & sleep 60", timeout_seconds=0.2)
    assert time.monotonic() - begun < 30, "its child had kept the pipe open"


def test_a_program_gets_nothing_of_our_environment(monkeypatch):
    monkeypatch.setenv("SOMETHING_SECRET", "secret")
    assert "secret" not in go("env").stdout
