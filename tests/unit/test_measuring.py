"""This machine's CPU is measured once; its devices share what was found."""

from __future__ import annotations

import dataclasses

import pytest

from meshlm.core.platform import device_facts
from meshlm.planning import measuring


def test_devices_share_the_processor(monkeypatch):
    monkeypatch.setattr(measuring, "_speeds", lambda dtype: (8e12, 16e9))
    facts = measuring.measured_cpu(device_facts(), "bfloat16")
    assert (facts.peak_flops, facts.bandwidth_bytes_per_s) == (1e12, 2e9)
    assert facts.kind == "cpu"


def test_devices_of_other_processes_have_no_share(monkeypatch):
    monkeypatch.setattr(measuring, "_speeds", lambda dtype: (8e12, 16e9))
    everyones = dataclasses.replace(device_facts(), count=16)
    assert measuring.measured_cpu(everyones, "bfloat16").peak_flops == 1e12


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_speeds_follow_the_seconds_that_were_taken(monkeypatch, dtype):
    monkeypatch.setattr(measuring, "_seconds", lambda run: (run(), 0.5)[1])
    assert measuring._speeds.__wrapped__(dtype) == (4.0 * 1024**3, 4.0 * (128 << 20))
