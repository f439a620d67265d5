import hashlib
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from instruct_jax.data.loader import (
    Batches,
    Mixture,
    encode_comparisons,
    encode_demonstrations,
    encode_dialogues,
    encode_documents,
    encode_prompts,
)
from instruct_jax.data.rows import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    Prompt,
    Turn,
)
from instruct_jax.data.templates import CHAT
from instruct_jax.data.tokenizer import train_bpe

# One token a byte, so lengths can be counted by hand.
TOKENIZER = train_bpe(["abc"], vocab_size=257)
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id


def ids(text):
    return TOKENIZER.encode(text)


def test_a_demonstration_ends_with_an_eos_that_counts():
    """T12, SFT-1: the stop token is a target; the prompt and padding are not."""
    rows = [Demonstration("abc", "de"), Demonstration("", "x")]
    arrays = encode_demonstrations(rows, TOKENIZER, prompt_length=4, response_length=4)
    assert arrays["tokens"].tolist() == [
        [*ids("abcde"), EOS, PAD, PAD],
        [*ids("x"), EOS, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert arrays["mask"].sum(-1).tolist() == [6, 2]
    assert arrays["loss_mask"].tolist() == [[False] * 3 + [True] * 3 + [False] * 2,
                                            [True] * 2 + [False] * 6]  # fmt: skip
    assert arrays["tokens"].dtype == np.int32
    assert arrays["mask"].dtype == arrays["loss_mask"].dtype == np.bool_


def test_a_cut_response_has_no_invented_eos_and_long_prompts_are_dropped_and_told(caplog):
    """DATA-8."""
    rows = [Demonstration("abcde", "x"), Demonstration("ab", "wxyz"), Demonstration("ab", "wxy")]
    with caplog.at_level(logging.WARNING):
        arrays = encode_demonstrations(rows, TOKENIZER, prompt_length=4, response_length=4)
    assert arrays["tokens"].tolist() == [
        [*ids("abwxyz"), PAD, PAD],
        [*ids("abwxy"), EOS, PAD, PAD],
    ]
    assert arrays["loss_mask"].sum(-1).tolist() == [4, 4]
    assert "3 demonstrations encoded: 1 prompts too long, 1 responses cut" in caplog.text


def test_documents_run_on_with_eos_between_and_without_padding(caplog):
    """T38: a pretraining row has no padding."""
    docs = [Document("abcd"), Document("ef"), Document("ghi")]
    with caplog.at_level(logging.WARNING):
        (tokens,) = encode_documents(docs, TOKENIZER, length=5).values()
    assert tokens.tolist() == [[*ids("abcd"), EOS], [*ids("ef"), EOS, *ids("gh")]]
    assert "2 tokens past the last whole row" in caplog.text
    with pytest.raises(DataError, match="3 tokens of text do not fill one row of 4"):
        encode_documents([Document("ab")], TOKENIZER, length=4)


def test_comparisons_keep_all_completions_of_a_prompt_together(caplog):
    """T47, RM-2: one prompt is one element of the first axis."""
    rows = [
        Comparison("p", ("a", "bcde", ""), (1, 0, 1)),
        Comparison("too long", ("a", "b"), (0, 1)),
        Comparison("qq", ("c", "d"), (0, 0)),
    ]
    with caplog.at_level(logging.WARNING):
        arrays = encode_comparisons(
            rows, TOKENIZER, completions=3, prompt_length=2, response_length=3
        )
    assert arrays["tokens"].tolist() == [
        [[*ids("pa"), EOS, PAD, PAD], [*ids("pbcd"), PAD], [*ids("p"), EOS, PAD, PAD, PAD]],
        [[*ids("qqc"), EOS, PAD], [*ids("qqd"), EOS, PAD], [PAD] * 5],
    ]
    assert arrays["mask"].sum(-1).tolist() == [[3, 4, 2], [4, 4, 0]]
    assert arrays["ranks"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert arrays["where"].tolist() == [[True] * 3, [True, True, False]]
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["ranks"].dtype == arrays["index"].dtype == np.int32
    assert "1 prompts too long, 1 completions cut" in caplog.text
    with pytest.raises(ValueError, match="row 0 has 3 completions, over 2"):
        encode_comparisons(rows, TOKENIZER, completions=2, prompt_length=2, response_length=3)


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


def test_prompts_are_padded_on_the_left_and_know_their_row(caplog):
    rows = [Prompt("ab"), Prompt("abcdef"), Prompt("abcd")]
    with caplog.at_level(logging.WARNING):
        arrays = encode_prompts(rows, TOKENIZER, prompt_length=4)
    assert arrays["tokens"].tolist() == [[PAD, PAD, *ids("ab")], ids("abcd")]
    assert arrays["mask"].tolist() == [[False, False, True, True], [True] * 4]
    assert arrays["index"].tolist() == [0, 2]
    assert "3 prompts encoded: 1 prompts too long" in caplog.text


@pytest.mark.parametrize("all_turns", [False, True])
def test_the_loss_of_a_chat_covers_assistant_tokens_only(all_turns):
    """EXT-1: the last assistant turn or all of them, each with its EOS."""
    turns = (
        Turn("user", "U"),
        Turn("assistant", "one"),
        Turn("user", "V"),
        Turn("assistant", "two"),
    )
    arrays = encode_dialogues(
        [Dialogue(turns)], TOKENIZER, prompt_length=80, response_length=10, all_turns=all_turns
    )
    tokens, learnt = arrays["tokens"][0], arrays["loss_mask"][0]
    pieces = [CHAT.first.format(text="U"), "one", CHAT.later.format(text="V"), "two"]
    expected = [*ids(pieces[0]), *ids("one"), EOS, *ids(pieces[2]), *ids("two"), EOS]
    assert tokens[: len(expected)].tolist() == expected
    assert (tokens[len(expected) :] == PAD).all()
    answers = [*ids("one"), EOS, *ids("two"), EOS] if all_turns else [*ids("two"), EOS]
    assert tokens[learnt].tolist() == answers
    assert arrays["mask"][0].sum() == len(expected)


def test_a_long_chat_loses_its_oldest_turns_and_is_counted(caplog):
    turns = (
        Turn("user", "U" * 50),
        Turn("assistant", "one"),
        Turn("user", "V"),
        Turn("assistant", "twotwo"),
    )
    with caplog.at_level(logging.WARNING):
        arrays = encode_dialogues(
            [Dialogue(turns), Dialogue((Turn("user", "U" * 50), turns[3]))],
            TOKENIZER,
            prompt_length=40,
            response_length=4,
            all_turns=True,
        )
    assert TOKENIZER.decode(arrays["tokens"][0]) == CHAT.render("V") + "twot"
    assert arrays["loss_mask"].sum() == 4 and len(arrays["tokens"]) == 1
    assert "1 questions too long, 1 lost old turns, 1 responses cut" in caplog.text


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
