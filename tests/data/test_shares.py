"""Sources with weights: exact shares at every prefix, whole epochs of each, and what is refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from instruct_jax.data.config import DataConfig
from instruct_jax.data.loader import Batches
from instruct_jax.data.rows import DataError
from instruct_jax.data.shares import Shares, Turns, read_weights, schedule
from instruct_jax.data.sources import open_source
from instruct_jax.data.trees import TreeBatches
from instruct_jax.errors import ConfigError

ROWS = {"tokens": np.arange(130)}
# 100 rows of one file, 30 of another that is to be 7 of 10 rows.
SHARES = Shares(np.repeat([0, 1], [100, 30]), (3, 7), ("a.jsonl", "b.jsonl"))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_after_any_number_of_rows_a_source_is_within_one_row_of_its_share(weights):
    places = schedule(weights)
    came = np.cumsum(places[:, None] == np.arange(len(weights)), axis=0)
    share = np.arange(1, len(places) + 1)[:, None] * np.array(weights) / sum(weights)
    assert (np.abs(came - share) < 1).all()
    np.testing.assert_array_equal(came[-1], weights)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 10**12))
def test_the_turn_at_a_position_needs_none_of_the_positions_before_it(weights, start):
    places = schedule(weights)
    source, before = Turns(weights).at(np.arange(start, start + 50))
    for i, position in enumerate(range(start, start + 50)):
        period, place = divmod(position, len(places))
        assert source[i] == places[place]
        own = (places[:place] == source[i]).sum()
        assert before[i] == period * weights[source[i]] + own


def test_each_source_walks_through_its_own_epochs():
    batches = Batches(ROWS, 20, seed=3, shares=SHARES)
    drawn = np.concatenate([batches(step)["tokens"] for step in range(50)])
    own = [drawn[drawn < 100], drawn[drawn >= 100]]
    assert [len(x) for x in own] == [300, 700]
    for rows, size in zip(own, (100, 30), strict=True):
        whole = rows[: len(rows) // size * size].reshape(-1, size)
        assert (np.sort(whole) == np.sort(whole[:1])).all()
        assert not (whole[0] == whole[1]).all()
    assert all((batches(step)["tokens"] < 100).sum() == 6 for step in range(50))
    assert batches.steps_per_epoch == Batches(ROWS, 20, seed=3).steps_per_epoch == 7


def test_a_batch_is_a_function_of_seed_and_step_and_the_processes_share_it():
    inorder = [Batches(ROWS, 12, seed=5, shares=SHARES).rows(step) for step in range(40)]
    for step in (39, 0, 17, 3):
        np.testing.assert_array_equal(
            Batches(ROWS, 12, seed=5, shares=SHARES).rows(step), inorder[step]
        )
    assert (Batches(ROWS, 12, seed=6, shares=SHARES).rows(0) != inorder[0]).any()
    parts = [
        Batches(ROWS, 12, seed=5, shares=SHARES, process_index=i, process_count=3)(8)["tokens"]
        for i in range(3)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), ROWS["tokens"][inorder[8]])


def test_rows_without_weights_come_as_they_always_did():
    drawn = np.concatenate([Batches(ROWS, 13, seed=4).rows(step) for step in range(20)])
    for epoch in range(2):
        order = np.random.Generator(np.random.Philox(key=[4, epoch])).permutation(130)
        np.testing.assert_array_equal(drawn[130 * epoch : 130 * (epoch + 1)], order)


def test_rankings_are_drawn_by_weights_too():
    counts = np.random.default_rng(0).integers(1, 9, (130, 2))
    mask = np.arange(20)[None, None] < counts[..., None] + 3
    rows = {
        "tokens": np.ones((130, 2, 20), np.int32), "mask": mask,
        "ranks": np.tile(np.arange(2, dtype=np.int32), (130, 1)),
        "where": np.ones((130, 2), bool), "prompt_lengths": np.full(130, 3, np.int32),
        "index": np.arange(130, dtype=np.int32),
    }  # fmt: skip
    batches = TreeBatches(rows, 10, pad_id=0, steps=12, shares=SHARES)
    for step in range(12):
        assert (batches.prompts(step) < 100).sum() == 3
        assert len(batches(step)["ranks"]) == 10


def test_weights_are_read_off_what_is_named():
    assert read_weights(("a*0.7", "b*0.3"), "x") == (7, 3)
    assert read_weights(("part*.jsonl*2", "org/set*1e-1"), "x") == (20, 1)
    assert read_weights(("part*.jsonl", "b.jsonl"), "x") is None
    assert DataConfig(source="files", prompts=("a*3", "b*1")).files("prompts") == ("a", "b")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a*0", "b*1"), "prompts: 'a\\*0': expected a weight above 0"),
        (("a*-0.5", "b*1"), "prompts: 'a\\*-0.5': expected a weight above 0"),
        (("a*0.5", "b"), "prompts: 'b' has no weight and others have one"),
        (("a*0.12345678", "b*1"), "at most 10,000: give them fewer digits"),
    ],
)
def test_weights_that_say_no_shares_are_refused(names, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(source="files", prompts=names)


def test_weights_that_nothing_reads_are_refused():
    with pytest.raises(ConfigError, match="held-out files are read whole"):
        DataConfig(source="files").valid.__class__(prompts=("a*1",))
    config = DataConfig(source="files", prompts=("a*1", "b*2"))
    with pytest.raises(ConfigError, match=r"config.data.prompts: nothing here is drawn by weights"):
        open_source(config)


def written(folder, name, count):
    rows = [{"prompt": f"{name} {i}?", "chosen": "yes", "rejected": "no"} for i in range(count)]
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_training_rows_of_files_know_where_they_are_from(tmp_path):
    """Held-out rows are as without weights, and every training row is of its file."""
    a, b = written(tmp_path, "first", 60), written(tmp_path, "other", 20)
    plain = open_source(DataConfig(source="files", comparisons=(a, b)))
    config = DataConfig(source="files", comparisons=(f"{a}*1", f"{b}*3"))
    source = open_source(config, weighed=("comparisons",))
    for split in ("train", "valid", "train"):
        assert source.comparisons(split) == plain.comparisons(split)
    assert plain.shares("comparisons") is None
    rows, shares = source.comparisons("train"), source.shares("comparisons")
    assert shares.weights == (1, 3)
    for row, number in zip(rows, shares.source, strict=True):
        assert ("first", "other")[number] in str(row.prompt)
    left = source.shares("comparisons", np.array([0, len(rows) - 1]))
    np.testing.assert_array_equal(left.source, [0, 1])
    with pytest.raises(DataError, match="no row is left to train on, and it has a weight"):
        source.shares("comparisons", np.array([0]))
