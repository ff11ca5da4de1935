"""What users of the command line see of an interrupt."""

from __future__ import annotations

import _thread
import logging
import sys
import threading
import time

import pytest
from click.testing import CliRunner
from distributed.utils import LoopRunner, sync
from waiting import wait_until

from meshcompute.cli import is_news, mesh


@pytest.mark.usefixtures("can_be_interrupted")
def test_an_interrupt_before_a_call_has_begun_is_nothing_to_see(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is busy, so that the call waits; then comes Ctrl-C."""
    monkeypatch.setattr(logging.getLogger("tornado.application"), "filters", [])  # a command may have been run before
    main = threading.get_ident()

    def interrupt_when_main_waits() -> None:
        while sys._current_frames()[main].f_code.co_name != "wait":
            time.sleep(0.01)
        _thread.interrupt_main()
        while sys._current_frames()[main].f_code.co_name == "wait":
            time.sleep(0.01)

    async def nothing() -> None: ...

    runner = LoopRunner(asynchronous=False)
    runner.start()
    try:
        runner.loop.add_callback(interrupt_when_main_waits)
        with pytest.raises(KeyboardInterrupt):
            sync(runner.loop, nothing)
        found = wait_until(lambda: [r for r in caplog.records if r.exc_info], "distributed's complaint")
    finally:
        runner.stop()
    assert [(record.name, record.exc_info[0], is_news(record)) for record in found] == [
        ("tornado.application", NameError, False)
    ]


def test_other_errors_are_seen(caplog: pytest.LogCaptureFixture) -> None:
    assert CliRunner().invoke(mesh, ["demo", "--help"]).exit_code == 0
    assert is_news in logging.getLogger("tornado.application").filters
    for error in (NameError("name 'future' is not defined"), ValueError("free variable 'future'")):
        logging.getLogger("tornado.application").error("it failed", exc_info=error)
    assert len(caplog.records) == 2
