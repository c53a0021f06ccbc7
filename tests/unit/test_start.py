"""Every process of a run must see the folder that process 0 holds."""

from __future__ import annotations

import logging

import pytest

from meshlm.core.errors import UsageError
from meshlm.training import start
from meshlm.training.lock import LOCK_NAME


def test_a_folder_that_process_0_holds_is_found(tmp_path, caplog):
    (tmp_path / LOCK_NAME).write_text("holder")
    start._find_folder(tmp_path, "holder")
    assert not caplog.records


def test_another_folder_is_waited_for_told_and_refused(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(start, "_FOLDER_TIMEOUT_S", 1.2)
    monkeypatch.setattr(start, "_TELL_AFTER_S", 0.2)
    (tmp_path / LOCK_NAME).write_text("another")
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(UsageError, match="is not the folder that process 0 has"),
    ):
        start._find_folder(tmp_path, "holder")
    (told,) = caplog.messages
    assert "waiting to see" in told
