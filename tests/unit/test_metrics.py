import json
import logging
import os
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from meshlm.core.errors import MeshLMError
from meshlm.training import metrics
from meshlm.training.metrics import (
    MetricsLog,
    NoiseScale,
    read_metrics,
    update_noise_scale,
)


def raw_lines(folder):
    return (folder / "metrics.jsonl").read_text().splitlines()


def tensorboard_events(folder):
    """Events of all files in TensorBoard's order, read by the record format alone."""
    events = []
    for path in sorted((folder / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return events


def shown_in_tensorboard(folder, tag):
    """{step: value} after purging as TensorBoard does: a START drops its step and later ones."""
    shown = {}
    for event in tensorboard_events(folder):
        if event.session_log.status == SessionLog.START:
            shown = {step: value for step, value in shown.items() if step < event.step}
        for value in event.summary.value:
            if value.tag == tag:
                shown[event.step] = value.simple_value
    return shown


class TestMetricsLog:
    def test_each_line_is_on_disk_at_once(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=2.5, note="warm-up", skipped=False)
            assert raw_lines(tmp_path) == [
                '{"step": 1, "loss": 2.5, "note": "warm-up", "skipped": false}'
            ]
            log.write(2, loss=2.25)
            assert len(raw_lines(tmp_path)) == 2

    def test_numpy_and_jax_scalars(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(
                np.int64(3),
                f32=np.float32(0.1),
                bf16=jnp.bfloat16(1.5),
                jax=jnp.float32(-2.0),
                count=jnp.int32(7),
                flag=np.bool_(True),
            )
        [line] = raw_lines(tmp_path)
        # float32 values survive exactly: equality of losses can be read off the file.
        assert np.float32(json.loads(line)["f32"]) == np.float32(0.1)
        assert line.endswith('"bf16": 1.5, "jax": -2.0, "count": 7, "flag": true}')
        assert line.startswith('{"step": 3, ')

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, jnp.float32("nan"), None])
    def test_not_a_number_becomes_null(self, tmp_path, bad):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=bad)
        assert raw_lines(tmp_path) == ['{"step": 1, "loss": null}']

    def test_an_array_is_refused_by_name(self, tmp_path):
        with (
            MetricsLog(tmp_path, resume_step=None) as log,
            pytest.raises(TypeError, match=r"grad_norm has shape \(2,\)"),
        ):
            log.write(1, grad_norm=np.zeros(2))

    def test_resume_drops_only_what_lies_beyond(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            for step in range(1, 8):
                log.write(step, loss=float(step))
        with MetricsLog(tmp_path, resume_step=5) as log:
            log.write(6, loss=60.0)
        assert [line["loss"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 60]

    def test_a_new_history_drops_the_old(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(0, val_loss=9.0)
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=1.0)
        assert [line["step"] for line in read_metrics(tmp_path)] == [1]

    def test_resuming_at_the_end_does_not_touch_the_file(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=1.0)
        inode = os.stat(tmp_path / "metrics.jsonl").st_ino
        MetricsLog(tmp_path, resume_step=1).close()
        assert os.stat(tmp_path / "metrics.jsonl").st_ino == inode

    def test_a_kill_while_repairing_loses_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "metrics.jsonl"
        path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
        before = path.read_bytes()
        monkeypatch.setattr(os, "fsync", lambda _fd: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            MetricsLog(tmp_path, resume_step=1)
        assert path.read_bytes() == before
        monkeypatch.undo()
        MetricsLog(tmp_path, resume_step=1).close()
        assert path.read_bytes() == b'{"step": 1}\n'

    def test_an_unwritable_metrics_file_is_an_error_with_a_remedy(self, tmp_path):
        (tmp_path / "metrics.jsonl").mkdir()
        with pytest.raises(MeshLMError, match=r"cannot write .*metrics\.jsonl: Is a directory"):
            MetricsLog(tmp_path, resume_step=None)

    def test_a_full_disk_is_an_error_with_a_remedy(self, tmp_path):
        log = MetricsLog(tmp_path, resume_step=None)
        log._file.close()
        log._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115
        with pytest.raises(MeshLMError, match="No space left on device; make room"), log:
            log.write(1, loss=1.0)


# What a killed process can leave behind a run of whole lines.
tails = st.one_of(
    st.just(b""),
    st.binary(max_size=30).filter(lambda b: b"\n" not in b and b"{" not in b),
    st.sampled_from([b'{"step": 9, "loss": 1', b'{"step": 9, "note": "\xc3', b"\0" * 40, b"[]"]),
)


@given(steps=st.lists(st.integers(0, 20), max_size=12), tail=tails, resume=st.integers(0, 20))
def test_no_good_line_is_lost(tmp_path_factory, steps, tail, resume):
    folder = tmp_path_factory.mktemp("run")
    good = [json.dumps({"step": step, "n": n}) for n, step in enumerate(steps)]
    text = "".join(line + "\n" for line in good)
    (folder / "metrics.jsonl").write_bytes(text.encode() + tail)
    assert read_metrics(folder) == [json.loads(line) for line in good]

    metrics._drop_lines_from(folder / "metrics.jsonl", resume + 1)
    kept = [line for line in good if json.loads(line)["step"] <= resume]
    assert (folder / "metrics.jsonl").read_text() == "".join(line + "\n" for line in kept)


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}')
    with MetricsLog(tmp_path, resume_step=2) as log:
        log.write(3)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_reading_a_run_without_metrics(tmp_path):
    assert read_metrics(tmp_path) == []


def test_reading_takes_nan_written_by_others_as_null(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": None}]


class TestTensorBoard:
    def test_scalars_beside_the_file(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            log.write(1, loss=2.5, mfu=None, note="text")
            log.write(2, loss=2.25, val_loss=2.0)
        assert shown_in_tensorboard(tmp_path, "train/loss") == {1: 2.5, 2: 2.25}
        assert shown_in_tensorboard(tmp_path, "validation/loss") == {2: 2.0}
        tags = {v.tag for e in tensorboard_events(tmp_path) for v in e.summary.value}
        assert tags == {"train/loss", "validation/loss"}

    def test_resume_hides_events_beyond_the_step(self, tmp_path):
        with MetricsLog(tmp_path, resume_step=None) as log:
            for step in range(1, 6):
                log.write(step, loss=1.0)
        with MetricsLog(tmp_path, resume_step=3) as log:
            log.write(4, loss=0.5)
        shown = shown_in_tensorboard(tmp_path, "train/loss")
        assert shown == {1: 1.0, 2: 1.0, 3: 1.0, 4: 0.5}

    def test_unusable_folder_warns_once_and_the_file_is_complete(self, tmp_path, caplog):
        (tmp_path / "tensorboard").write_text("in the way")
        with caplog.at_level(logging.WARNING), MetricsLog(tmp_path, resume_step=None) as log:
            for step in range(30):
                log.write(step, loss=1.0)
        assert len(read_metrics(tmp_path)) == 30
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "TensorBoard events stop here" in caplog.text

    def test_failing_in_the_middle_warns_once(self, tmp_path, caplog, monkeypatch):
        log = MetricsLog(tmp_path, resume_step=None)
        log.write(0, loss=1.0)

        def fail(*_args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(RecordWriter, "write", fail)
        with caplog.at_level(logging.WARNING):
            for step in range(1, 30):
                log.write(step, loss=1.0)
            log.close()
        assert len(read_metrics(tmp_path)) == 30
        assert len(caplog.records) == 1


class TestNoiseScale:
    def test_recovers_a_known_noise(self):
        """Per-sequence gradients g + e with |g|^2 = 4 and tr cov(e) = 600: B_simple = 150."""
        rng = np.random.default_rng(0)
        dim, batch, accumulate = 200, 64, 8
        gradient = np.full(dim, 2 / np.sqrt(dim))
        state = NoiseScale()
        for _ in range(600):
            samples = gradient + rng.normal(scale=np.sqrt(600 / dim), size=(batch, dim))
            micro = samples.reshape(accumulate, batch // accumulate, dim).mean(1)
            state = update_noise_scale(
                state,
                micro_norm_squared=float((micro**2).sum(1).mean()),
                macro_norm_squared=float((samples.mean(0) ** 2).sum()),
                batch_size=batch,
                accumulate=accumulate,
            )
        assert state.value == pytest.approx(150, rel=0.05)

    def test_exact_in_expectation(self):
        # E|G_B|^2 = |G|^2 + tr(S) / B. With |G|^2 = 3, tr(S) = 40: B = 10 gives 7, B = 2 gives 23.
        state = update_noise_scale(
            NoiseScale(),
            micro_norm_squared=23.0,
            macro_norm_squared=7.0,
            batch_size=10,
            accumulate=5,
            rate=1.0,
        )
        assert state == NoiseScale(gradient_squared=3.0, noise=40.0)

    def test_one_micro_batch_says_nothing(self):
        state = update_noise_scale(
            NoiseScale(), micro_norm_squared=2.0, macro_norm_squared=2.0, batch_size=8, accumulate=1
        )
        assert state == NoiseScale()
        assert state.value is None

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_a_step_that_is_not_finite_leaves_no_trace(self, bad):
        state = NoiseScale(gradient_squared=1.0, noise=2.0)
        norms = {"micro_norm_squared": bad, "macro_norm_squared": 1.0}
        assert update_noise_scale(state, **norms, batch_size=8, accumulate=4) is state

    def test_no_value_from_a_negative_estimate(self):
        # More micro than B_big / B_small times the macro norm: the estimate of |G|^2 is negative.
        assert NoiseScale(gradient_squared=-0.1, noise=5.0).value is None
        assert NoiseScale(gradient_squared=1.0, noise=-5.0).value is None
