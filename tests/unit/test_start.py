"""Every process of a run must see the folder that process 0 holds."""

from __future__ import annotations

import logging
import time

import pytest

from meshlm.core import waiting
from meshlm.core.errors import UsageError
from meshlm.training import start
from meshlm.training.config import TrainConfig
from meshlm.training.lock import LOCK_NAME


def test_a_folder_that_process_0_holds_is_found(tmp_path, caplog):
    (tmp_path / LOCK_NAME).write_text("holder")
    start._find_folder(tmp_path, "holder")
    assert not caplog.records


def test_another_folder_is_waited_for_and_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "_FOLDER_TIMEOUT_S", 0.6)
    (tmp_path / LOCK_NAME).write_text("another")
    with pytest.raises(UsageError, match="is not the folder that process 0 has"):
        start._find_folder(tmp_path, "holder")


def test_a_folder_that_is_waited_for_is_named(tmp_path, caplog, monkeypatch):
    """A file system that is stuck, such as NFS without its server, is named."""
    monkeypatch.setattr(waiting, "_FIRST_S", 0.1)
    config = TrainConfig(run=tmp_path / "run")
    monkeypatch.setattr(start, "_take_folder", lambda *_: time.sleep(0.5) or "holder")
    monkeypatch.setattr(start, "_find_folder", lambda *_: None)
    with caplog.at_level(logging.WARNING), start.held_folder(config):
        pass
    assert f"still opening the run's folder {config.run}" in caplog.text
