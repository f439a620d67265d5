import json
import time
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.training import metrics
from instruct_jax.training.metrics import MetricLogger, append_rows


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]


def test_every_write_is_a_line_of_json_and_a_point_in_tensorboard(tmp_path):
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        logger.write(2, {"loss": jnp.float32(0.5), "n": np.int32(3)})
        logger.write(4, {"loss": float("nan"), "rate": float("inf")})
    first, second = rows(tmp_path)
    assert (first["step"], first["loss"], first["n"]) == (2, 0.5, 3.0)
    assert (second["step"], second["loss"], second["rate"]) == (4, None, None)
    (events,) = (tmp_path / "tensorboard" / "sft").iterdir()
    assert b"loss" in events.read_bytes()


def test_a_run_taken_up_forgets_what_came_after_the_checkpoint(tmp_path):
    """Also half a line, left by a kill; the file reads as if the run had never stopped."""
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        for step in (1, 2, 3):
            logger.write(step, {"loss": step})
    with (tmp_path / "sft.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        logger.resume(2)
        logger.write(3, {"loss": 30})
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(1, 1), (2, 2), (3, 30)]


def test_files_beside_the_metrics_are_rewound_with_them(tmp_path):
    """Answers of an evaluation that is made again are not there twice; another file is left."""
    for name in ("samples.jsonl", "other.jsonl"):
        rows = [{"step": step, "response": text} for step in (2, 4, 6) for text in "ab"]
        append_rows(tmp_path / name, rows)
    whole = (tmp_path / "other.jsonl").read_bytes()
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 6, "resp')  # a kill
    with MetricLogger(tmp_path, "ppo", total=9, beside=("samples.jsonl",)) as logger:
        logger.resume(4)
        assert (tmp_path / "samples.jsonl").read_bytes() == whole[: whole.index(b'{"step": 6')]
        append_rows(tmp_path / "samples.jsonl", rows[4:])
    assert (tmp_path / "samples.jsonl").read_bytes() == whole
    assert (tmp_path / "other.jsonl").read_bytes() == whole


def test_lines_that_are_no_lines_of_ours_are_forgotten_too(tmp_path):
    good = b'{"step": 1, "loss": 1}\n'
    spoilt = [
        b"\xff\xfe",
        b"[1]",
        b"3",
        b"null",
        b"",
        b'{"loss": 1}',
        b'{"step": "2"}',
        b"[" * 10**5,
    ]
    (tmp_path / "sft.jsonl").write_bytes(good + b"\n".join(spoilt))
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        logger.resume(9)
    assert (tmp_path / "sft.jsonl").read_bytes() == good


def test_an_evaluation_without_figures_is_no_row_and_one_with_them_shows_them(tmp_path, capsys):
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        logger.write(4, {})
        logger.write(4, {"valid_loss": 2.5, "valid_accuracy": 0.5, "third": 1})
    assert [set(row) - {"time"} for row in rows(tmp_path)] == [
        {"step", "valid_loss", "valid_accuracy", "third"}
    ]
    assert capsys.readouterr().err == "sft 4/4 valid_loss 2.5 valid_accuracy 0.5\n"


def test_a_logger_that_never_wrote_leaves_no_file(tmp_path):
    with MetricLogger(tmp_path / "run", "sft", total=4):
        pass
    assert not (tmp_path / "run").exists()


def test_off_a_terminal_progress_is_plain_lines_with_the_time_left(tmp_path, monkeypatch, capsys):
    clock = iter([0.0, 10.0, 10.1, 20.0])
    fake = SimpleNamespace(monotonic=lambda: next(clock), time=time.time)
    monkeypatch.setattr(metrics, "time", fake)
    with MetricLogger(tmp_path, "sft", total=4, show=("loss", "kl")) as logger:
        for step in (1, 2, 3, 4):
            logger.write(step, {"loss": step / 3, "other": 1.0})
        logger.note("saved")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "sft 1/4 loss 0.3333",
        "sft 2/4 loss 0.6667 | 0.1 steps/s | 0m20s left",
        "sft 4/4 loss 1.333 | 0.15 steps/s",
        "sft: saved",
    ]


def test_that_a_program_is_compiled_is_told_where_there_is_a_step_to_do(tmp_path, capsys):
    for step, told in (
        (0, "sft: compiling step 1 of 4\n"),
        (3, "sft: compiling step 4 of 4\n"),
        (4, ""),
    ):
        with MetricLogger(tmp_path, "sft", total=4) as logger:
            logger.resume(step)
        assert capsys.readouterr().err == told


def test_on_a_terminal_progress_is_a_bar(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(metrics.sys.stderr, "isatty", lambda: True, raising=False)
    with MetricLogger(tmp_path, "sft", total=4) as logger:
        logger.write(2, {"loss": 0.5})
        logger.write(4, {"loss": 0.25})
    text = capsys.readouterr().err
    assert "sft: 100%" in text and "loss=0.25" in text and "4/4" in text


@pytest.mark.parametrize(("seconds", "text"), [(59.7, "1m00s"), (3725, "1h02m"), (5, "0m05s")])
def test_time_left_is_readable(seconds, text):
    assert metrics._clock(seconds) == text
