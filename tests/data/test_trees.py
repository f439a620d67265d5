"""Trees of prompts and completions in rows: nothing is lost, and batches are alike."""

from itertools import pairwise

import numpy as np
import pytest

from instruct_jax.data.loader import Batches, stratified_permutation
from instruct_jax.data.trees import (
    RowShape,
    TreeBatches,
    completion_sizes,
    pack_trees,
    row_shape,
    tree_sizes,
)

PAD = 99


def comparisons(count, *, k=3, longest=12, seed=0):
    """Prompts of 0 to 5 tokens with completions of 1 to `longest`; some are not there.

    Every token is a number of its own: what is read at a place can be told from all else.
    """
    rng = np.random.default_rng(seed)
    prompts, sizes = rng.integers(0, 6, count), rng.integers(1, longest + 1, (count, k))
    width = 5 + longest
    tokens = PAD + 1 + np.arange(count * k * width, dtype=np.int32).reshape(count, k, width)
    prompt = np.arange(width) < prompts[:, None, None]
    tokens = np.where(prompt, tokens[:, :1], tokens)
    where = rng.random((count, k)) < 0.8
    where[:, 0] |= ~where.any(1)
    return {
        "tokens": tokens,
        "mask": np.arange(width) < (prompts[:, None] + sizes)[..., None],
        "where": where,
        "ranks": np.tile(np.arange(k, dtype=np.int32), (count, 1)),
        "prompt_lengths": prompts.astype(np.int32),
        "index": np.arange(count, dtype=np.int32),
    }


def read_back(batch, m, micro_batches):
    """The rows that the branches of micro-batch m stand for: tokens by (prompt, branch)."""
    part = {name: x[m::micro_batches] for name, x in batch.items()}
    found = {}
    flat = part["ends"].reshape(-1)
    row, at = np.divmod(flat, part["tokens"].shape[1])
    for i, (r, t) in enumerate(zip(row, at, strict=True)):
        n, k = divmod(i, part["ends"].shape[1])
        if not part["where"][n, k]:
            continue
        sees = (
            (np.arange(part["tokens"].shape[1]) <= t)
            & (part["segment_ids"][r] == part["segment_ids"][r, t])
            & np.isin(part["branches"][r], (0, part["branches"][r, t]))
        )
        assert part["segment_ids"][r, t] == n + 1 and part["branches"][r, t] == k + 1
        assert (part["positions"][r, sees] == np.arange(sees.sum())).all()
        found[n, k] = part["tokens"][r, sees].tolist()
        # The token before every token of a branch, as the loss reads it.
        places = np.flatnonzero(sees)
        for before, after in pairwise(places):
            assert part["previous"][r, after] == before
    return found


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_every_branch_is_the_row_it_stands_for(micro_batches):
    rows = comparisons(12)
    batch = pack_trees(rows, pad_id=PAD, micro_batches=micro_batches)
    for m in range(micro_batches):
        found = read_back(batch, m, micro_batches)
        own = {name: x[m::micro_batches] for name, x in rows.items()}
        wanted = {
            (n, k): own["tokens"][n, k][own["mask"][n, k]].tolist()
            for n, k in np.argwhere(own["where"])
        }
        assert found == wanted
    assert batch["mask"].sum() == tree_sizes(rows).sum()
    assert (batch["tokens"][~batch["mask"]] == PAD).all()
    assert (batch["segment_ids"] == 0).sum() == (~batch["mask"]).sum()
    assert (batch["ranks"] == rows["ranks"]).all() and "index" not in batch


def test_a_tree_has_its_prompt_once_and_what_is_there():
    rows = comparisons(20)
    sizes = completion_sizes(rows)
    assert (sizes[~rows["where"]] == 0).all() and (sizes[rows["where"]] > 0).all()
    assert (tree_sizes(rows) == rows["prompt_lengths"] + sizes.sum(1)).all()


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("seed", range(5))
def test_the_rows_chosen_hold_every_group(multiple, seed):
    """In no more slots than one tree a row."""
    rng = np.random.default_rng(seed)
    groups = [rng.integers(1, 300, rng.integers(1, 20)) for _ in range(6)]
    shape = row_shape(groups, multiple=multiple)
    longest, most = max(g.max() for g in groups), max(len(g) for g in groups)
    assert shape.rows % multiple == 0 and shape.width % 8 == 0 and shape.width >= longest
    assert shape.rows * shape.width <= -(-most // multiple) * multiple * (longest + 7)
    for group in groups:
        ones = np.ones((len(group), 1), bool)
        mask = (np.arange(300) < group[:, None])[:, None]
        trees = {"tokens": mask.astype(np.int32), "mask": mask, "where": ones}
        trees["prompt_lengths"] = np.zeros(len(group), np.int32)
        assert pack_trees(trees, pad_id=PAD, shape=shape)["mask"].sum() == group.sum()


def test_trees_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit RowShape"):
        pack_trees(comparisons(6), pad_id=PAD, shape=RowShape(1, 64))


# --- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "batch"), [(64, 16), (100, 16), (7, 16), (50, 1)])
def test_an_epoch_meets_every_prompt_once(count, batch):
    sizes = np.random.default_rng(1).integers(1, 500, count)
    batches = Batches({"x": np.arange(count)}, batch, seed=3, sizes=sizes)
    stream = np.concatenate([batches.rows(step) for step in range(3 * count)])
    for epoch in range(3):
        assert sorted(stream[epoch * count : (epoch + 1) * count]) == list(range(count))
    if count > batch:  # else every batch is all of them
        assert (stream[:count] != stream[count : 2 * count]).any()


def test_stratified_batches_have_nearly_one_size():
    """Wherever a batch starts, also where it reaches into the next epoch."""
    sizes = np.random.default_rng(2).gamma(2.0, 100.0, 1000).astype(int)
    plain, even = (Batches({"x": sizes}, 16, seed=0, sizes=s) for s in (None, sizes))
    spread = [
        np.std([sizes[batches.rows(step)].sum() for step in range(200)])
        for batches in (plain, even)
    ]
    assert spread[1] < 0.3 * spread[0]


def test_rows_of_one_size_are_drawn_as_without_strata():
    """Any two may meet in a batch: over many draws each pair does about as often."""
    rng, together = np.random.default_rng(0), np.zeros((8, 8))
    for _ in range(2000):
        first = stratified_permutation(np.full(8, 5), 4, rng)[:4]
        together[np.ix_(first, first)] += 1
    pairs = together[~np.eye(8, dtype=bool)] / 2000
    assert np.abs(pairs - 4 / 8 * 3 / 7).max() < 0.05


def test_a_batch_is_a_function_of_seed_and_step():
    """So a run that resumes goes on with the batches it would have had."""
    rows = comparisons(40)
    make = lambda: TreeBatches(rows, 8, pad_id=PAD, seed=5, steps=12)  # noqa: E731
    one, other = make(), make()
    for step in range(7):
        one(step)
    for step in (7, 11):
        for name, x in one(step).items():
            np.testing.assert_array_equal(x, other(step)[name])


def test_micro_batches_are_of_one_shape_and_nearly_one_size():
    rows = comparisons(60, longest=40)
    batches = TreeBatches(rows, 20, pad_id=PAD, micro_batches=4, devices=2, steps=9)
    assert batches.shape.rows % 2 == 0
    for step in range(9):
        batch = batches(step)
        assert batch["tokens"].shape == (4 * batches.shape.rows, batches.shape.width)
        sums = [batch["mask"][m::4].sum() for m in range(4)]
        assert max(sums) - min(sums) < 0.25 * np.mean(sums)
        numbers = batches.prompts(step)
        assert (batch["ranks"] == rows["ranks"][numbers]).all()
        for m in range(4):
            read_back(batch, m, 4)


def test_batches_are_nearly_full():
    """Of comparisons as varied as those of HH: over 0.9 at the paper's batch."""
    rows = comparisons(640, k=2, longest=200)
    batches = TreeBatches(rows, 64, pad_id=PAD)
    fill = np.mean([batches(step)["mask"].mean() for step in range(batches.steps)])
    assert fill > 0.9


def test_a_step_past_the_run_is_refused():
    batches = TreeBatches(comparisons(16), 8, pad_id=PAD)
    with pytest.raises(ValueError, match=r"step 2 is outside 0\.\.1"):
        batches(2)
    with pytest.raises(ValueError, match="3 micro-batches do not divide 8 prompts"):
        TreeBatches(comparisons(16), 8, pad_id=PAD, micro_batches=3)
