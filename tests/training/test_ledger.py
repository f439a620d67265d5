"""R16: the ledger of a run is truthful over restarts."""

import itertools
import time

import jax
import jax.numpy as jnp
import pytest

from instruct_jax.errors import UserError
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.ledger import LEDGER, RUNNING, Account, Ledger, account, read
from instruct_jax.training.loop import train
from instruct_jax.training.metrics import MetricLogger


def test_the_steps_that_a_killed_process_had_done_are_known_exactly(tmp_path):
    """However it died: the last line of its ledger is written over after every step."""
    lost = 0
    for start, reached in ((0, 7), (4, 5), (4, 4), (4, 12), (12, 12)):
        ledger = Ledger(tmp_path, "sft", step=start)
        for step in range(start + 1, reached + 1):
            ledger.step(step)
        assert account(tmp_path).reason == RUNNING
        assert account(tmp_path).step == reached
    for start, reached in itertools.pairwise([(0, 7), (4, 5), (4, 4), (4, 12), (12, 12)]):
        lost += start[1] - reached[0]
    total = account(tmp_path)
    assert (total.processes, total.lost_steps, lost) == (5, 4, 4)
    events = [row for row in read(tmp_path) if row["event"] != "state"]
    assert [row["event"] for row in events] == ["start"] + ["resume"] * 4
    assert [row["lost"] for row in events] == [0, 3, 1, 0, 0]
    assert "4 restarts, 4 steps done twice" in str(total)


def test_parts_in_one_directory_have_accounts_of_their_own(tmp_path):
    for name, steps in (("a", 3), ("b", 5)):
        ledger = Ledger(tmp_path, name, step=0)
        for step in range(1, steps + 1):
            ledger.step(step)
        assert ledger.close("done").step == steps
    assert account(tmp_path, "a").step == 3
    assert account(tmp_path).step == 5 and account(tmp_path).reason == "done"
    assert account(tmp_path / "nowhere") is None


def test_the_account_is_told_of_a_run_that_was_long_or_stopped():
    """Of a short one it says that compiling takes time."""
    once = Account(step=9, processes=1, lost_steps=0, productive=1.0, wall=20.0, reason="done")
    assert not once.tells
    assert once._replace(wall=3600.0).tells and once._replace(processes=2).tells


def test_half_a_line_is_left_out(tmp_path):
    Ledger(tmp_path, "a", step=0).close("done")
    path = tmp_path / LEDGER
    path.write_text(path.read_text() + '{"event": "resu')
    assert account(tmp_path).processes == 1


def test_an_inactive_ledger_writes_nothing(tmp_path):
    ledger = Ledger(tmp_path, "a", step=0, active=False)
    ledger.step(1)
    assert ledger.close("done") is None and not list(tmp_path.iterdir())


def test_goodput_is_the_share_of_the_time_of_the_steps_that_stand(tmp_path, capsys):
    """To 2 %, over an evaluation, a failure that costs steps, a pause and a resume."""
    steps, save_every, failing = 24, 6, 16
    took: dict[int, float] = {}
    first_of: list[int] = []

    def run(stop_at=None):
        clock = {"end": None, "aside": 0.0}

        def aside(function):
            def timed(*args, **kwargs):
                began = time.perf_counter()
                result = function(*args, **kwargs)
                clock["aside"] += time.perf_counter() - began
                return result

            return timed

        def step_fn(state, batch, key):
            first = clock["end"] is None
            time.sleep(0.3 if first else 0.03)  # the first one compiles
            now = time.perf_counter()
            if first:
                first_of.append(batch)
            else:
                took[batch] = now - clock["end"] - clock["aside"]
            clock.update(end=now, aside=0.0)
            return state + 1, {"loss": jnp.float32(1.0)}

        def batch_at(i):
            if i == stop_at:
                raise UserError("row 3 is malformed")
            return i

        @aside
        def evaluate(step, state):
            time.sleep(0.1)
            return {"held_out": 1.0}

        with (
            Checkpointer(tmp_path / "checkpoints") as checkpointer,
            MetricLogger(tmp_path, "slow", total=steps) as logger,
        ):
            checkpointer.save, write = aside(checkpointer.save), logger.write
            evaluated = aside(write)
            logger.write = lambda step, row: (evaluated if "held_out" in row else write)(step, row)
            train(
                step_fn,
                jnp.int32(0),
                batch_at=batch_at,
                steps=steps,
                key=jax.random.key(0),
                logger=logger,
                checkpointer=checkpointer,
                save_every=save_every,
                evaluate=evaluate,
                eval_every=4,
            )

    began = time.perf_counter()
    with pytest.raises(UserError):
        run(stop_at=failing)
    time.sleep(0.5)
    run()
    wall = time.perf_counter() - began
    assert first_of == [0, 12]
    for first in first_of:
        # The clocks tick before and after what happens for the first time once a step is done.
        took[first] = took[first + 1] = took[first + 2]
    total = account(tmp_path)
    assert (total.processes, total.lost_steps, total.reason) == (2, failing - 12, "done")
    assert wall / 2 < total.wall < wall
    productive = sum(took.values())
    assert total.goodput == pytest.approx(productive / total.wall, abs=0.02)
    assert "slow: goodput" in capsys.readouterr().err


def test_time_aside_belongs_to_no_step(tmp_path):
    ledger = Ledger(tmp_path, "a", step=0)
    for step in (1, 2, 3):
        time.sleep(0.02)
        with ledger.aside():
            time.sleep(0.2)
        ledger.step(step)
    assert 0.06 <= ledger.productive < 0.2


def test_spoilt_lines_are_left_out_of_the_account(tmp_path):
    ledger = Ledger(tmp_path, "sft", step=0)
    ledger.step(1)
    whole = ledger.close("done")
    path = tmp_path / "ledger.log"
    spoilt = [b"\xff\xfe", b"[]", b"3", b"null", b"{}", b'{"event": "state", "name": "sft"}', b""]
    path.write_bytes(b"\n".join(spoilt) + b"\n" + path.read_bytes() + b"\n".join(spoilt))
    assert account(tmp_path) == whole
    path.write_bytes(b"")
    assert account(tmp_path) is None
    Ledger(tmp_path, "sft", step=0).close("done")
