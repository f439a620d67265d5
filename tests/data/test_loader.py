import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instruct_jax.data.encoding import encode_comparisons
from instruct_jax.data.loader import Batches, Mixture
from instruct_jax.data.rows import Comparison
from instruct_jax.data.tokenizer import train_bpe

# One token a byte, so lengths can be counted by hand.
TOKENIZER = train_bpe(["abc"], vocab_size=257)


def test_the_loader_never_splits_a_prompt():
    """T47: whatever the batch size, a prompt meets all its pairs in one step."""
    rows = [Comparison(f"{i:03}", tuple("abcd"), (0, 1, 2, 3)) for i in range(37)]
    arrays = encode_comparisons(rows, TOKENIZER, completions=4, prompt_length=3, response_length=2)
    batches = Batches(arrays, 8, seed=0)
    for step in range(12):
        batch = batches(step)
        prompts = [[tuple(k[:3]) for k in row] for row in batch["tokens"].tolist()]
        assert all(len(set(row)) == 1 for row in prompts)
        assert batch["where"].all() and batch["tokens"].shape == (8, 4, 5)


def test_every_row_comes_once_an_epoch_and_nothing_is_dropped():
    """T32, R7: 8 batches of 64 are a partition of 512; a new permutation every epoch."""
    batches = Batches({"x": np.arange(512)}, 64, seed=3)
    assert batches.steps_per_epoch == 8
    epochs = [np.concatenate([batches(8 * e + s)["x"] for s in range(8)]) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(512))
    assert not (epochs[0] == epochs[1]).all() and not (epochs[1] == epochs[2]).all()


@pytest.mark.parametrize(("n", "batch"), [(10, 4), (7, 7), (3, 8), (1, 1), (9, 2)])
def test_a_batch_at_the_border_joins_two_epochs(n, batch):
    batches = Batches({"x": np.arange(n)}, batch, seed=0)
    stream = np.concatenate([batches(step)["x"] for step in range(3 * n)])
    for epoch in range(3 * batch):
        assert sorted(stream[epoch * n : (epoch + 1) * n]) == list(range(n))
    assert batches.steps_per_epoch == -(-n // batch)


def digest(batches, steps):
    """sha256 of the batches of these steps."""
    total = hashlib.sha256()
    for step in steps:
        for name, array in sorted(batches(step).items()):
            total.update(f"{step} {name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


def pipeline(**processes):
    rows = {
        "tokens": np.arange(29 * 5, dtype=np.int32).reshape(29, 5),
        "mask": np.ones((29, 5), bool),
    }
    extra = {
        "tokens": -np.arange(11 * 5, dtype=np.int32).reshape(11, 5),
        "mask": np.ones((11, 5), bool),
    }
    return Mixture(Batches(rows, 6, seed=1), Batches(extra, 2, seed=2), **processes)


def test_a_batch_is_a_function_of_seed_and_step():
    """R7: every position of three epochs, in a fresh iterator and in any order."""
    batches = pipeline()
    straight = [digest(batches, [step]) for step in range(15)]
    assert len(set(straight)) == 15
    for step in reversed(range(15)):
        assert digest(batches, [step]) == straight[step]
        assert digest(pipeline(), [step]) == straight[step]


def test_a_fresh_process_gives_the_same_batches():
    """R7."""
    root = Path(__file__).resolve().parents[2]
    code = (
        "import runpy; names = runpy.run_path('tests/data/test_loader.py');"
        "print(names['digest'](names['pipeline'](), range(15)))"
    )
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env={"PYTHONPATH": str(root)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert made.stdout.strip() == digest(pipeline(), range(15))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_slices_of_all_processes_are_the_global_batch(count):
    """R7: shards 1/2/4 give the same global batch, plain and mixed."""
    x = {"x": np.arange(23)}
    for step in range(9):
        for whole, part in [
            (
                Batches(x, 8, seed=5),
                lambda i: Batches(x, 8, seed=5, process_index=i, process_count=count),
            ),
            (pipeline(), lambda i: pipeline(process_index=i, process_count=count)),
        ]:
            slices = [part(i)(step) for i in range(count)]
            for name, array in whole(step).items():
                joined = np.concatenate([s[name] for s in slices])
                assert (joined == array).all() and joined.dtype == array.dtype


def test_every_mixed_batch_holds_the_same_number_of_pretraining_rows():
    """SFT-5: 10 % of the examples of every batch."""
    batches = pipeline()
    assert (batches.batch_size, batches.steps_per_epoch) == (8, 5)
    for step in range(20):
        tokens = batches(step)["tokens"]
        assert (tokens[:6] >= 0).all() and (tokens[6:] <= 0).all()


def test_seeds_give_different_orders():
    x = {"x": np.arange(100)}
    assert (Batches(x, 10, seed=0)(0)["x"] != Batches(x, 10, seed=1)(0)["x"]).any()


def test_batches_read_a_memory_map_without_loading_it(tmp_path, rng):
    rows = rng.integers(0, 100, (50, 6), dtype=np.int32)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    batch = Batches({"tokens": mapped}, 7, seed=0)(4)["tokens"]
    assert (batch == Batches({"tokens": rows}, 7, seed=0)(4)["tokens"]).all()
    assert type(batch) is np.ndarray and not np.shares_memory(batch, mapped)


def test_batches_that_cannot_be_made_are_refused():
    x = {"x": np.arange(4)}
    for arrays, size, more, message in [
        ({"x": np.arange(4), "y": np.arange(3)}, 2, {}, "common first axis"),
        ({"x": np.arange(0)}, 2, {}, "no rows"),
        ({}, 2, {}, "no rows|common first axis"),
        (x, 0, {}, "batch_size 0"),
        (x, 3, {"process_count": 2}, "2 processes do not divide a batch of 3"),
        (x, 4, {"process_count": 2, "process_index": 2}, "process_index 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            Batches(arrays, size, seed=0, **more)
    with pytest.raises(ValueError, match="step -1"):
        Batches(x, 2, seed=0)(-1)
    with pytest.raises(ValueError, match="different shapes"):
        Mixture(Batches(x, 2, seed=0), Batches({"x": np.zeros((3, 2))}, 1, seed=0))
    with pytest.raises(ValueError, match="to the mixture"):
        Mixture(Batches(x, 2, seed=0, process_count=2))
    with pytest.raises(ValueError, match="at least one part"):
        Mixture()
