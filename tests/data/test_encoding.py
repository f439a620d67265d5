"""Rows to token arrays: what is learnt, what is left out and told, and what is kept in memory."""

import logging

import numpy as np
import pytest

from instruct_jax.data.encoding import (
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
    assert arrays["tokens"][:].tolist() == [
        [*ids("abcde"), EOS, PAD, PAD],
        [*ids("x"), EOS, PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert arrays["mask"].sum(-1).tolist() == [6, 2]
    assert arrays["loss_mask"][:].tolist() == [[False] * 3 + [True] * 3 + [False] * 2,
                                            [True] * 2 + [False] * 6]  # fmt: skip
    assert arrays["tokens"].dtype == np.int32
    assert arrays["mask"].dtype == arrays["loss_mask"].dtype == np.bool_


def test_a_cut_response_has_no_invented_eos_and_long_prompts_are_dropped_and_told(caplog):
    """DATA-8."""
    rows = [Demonstration("abcde", "x"), Demonstration("ab", "wxyz"), Demonstration("ab", "wxy")]
    with caplog.at_level(logging.WARNING):
        arrays = encode_demonstrations(
            rows, TOKENIZER, prompt_length=4, response_length=4, group="config.sft"
        )
    assert arrays["tokens"][:].tolist() == [
        [*ids("abwxyz"), PAD, PAD],
        [*ids("abwxy"), EOS, PAD, PAD],
    ]
    assert arrays["loss_mask"].sum(-1).tolist() == [4, 4]
    assert (
        "3 demonstrations encoded: 1 dropped, the prompt over prompt_length 4 (raise "
        "config.sft.prompt_length: 5 is enough for all); 1 responses cut to "
        "response_length 4 (raise config.sft.response_length: 5 is enough for all)"
    ) in caplog.text


def test_no_length_below_the_present_one_is_advised(caplog):
    """Where fewer rows than one in twenty are too long, what is enough for 95 % is no raise."""
    rows = [Demonstration("a", "x")] * 39 + [Demonstration("abcde", "x")]
    with caplog.at_level(logging.WARNING):
        encode_demonstrations(rows, TOKENIZER, prompt_length=4, response_length=4, group="c")
    assert "raise c.prompt_length: 5 is enough for all)" in caplog.text
    caplog.clear()
    rows = [Demonstration(text, "x") for text in ["a"] * 34 + ["abcdef"] * 5 + ["abcdefg"]]
    with caplog.at_level(logging.WARNING):
        encode_demonstrations(rows, TOKENIZER, prompt_length=4, response_length=4, group="c")
    assert "raise c.prompt_length: 6 is enough for 95 %, 7 for all)" in caplog.text


@pytest.mark.parametrize(
    ("positions", "told"),
    [
        (12, "raise c.prompt_length: 8 is enough for all); 1 responses"),
        (12, "raise c.response_length: 6 is enough for all)"),
        (9, "raise c.prompt_length: the model has 5 for it, 8 is the longest; config.measure_len"),
        (8, "the model has no position left for more; 8 is the longest); 1 responses"),
        (8, "the model has no position left for more; 6 is the longest)"),
    ],
)
def test_nothing_past_the_positions_of_the_model_is_advised(caplog, positions, told):
    rows = [Demonstration("abcdefgh", "x"), Demonstration("a", "vwxyz")]
    form = {"prompt_length": 4, "response_length": 4, "group": "c", "positions": positions}
    encode_demonstrations(rows, TOKENIZER, **form)
    assert told in caplog.text


def test_nothing_past_what_a_response_leaves_is_advised_for_prompts(caplog):
    rows = [Prompt("abcdefgh"), Prompt("a")]
    encode_prompts(rows, TOKENIZER, prompt_length=4, group="c", positions=5)
    assert "raise c.prompt_length: the model has 5 for it, 8 is the longest" in caplog.text


def test_rows_of_which_none_is_left_say_where_lengths_are_measured(caplog):
    form = {"prompt_length": 1, "response_length": 4, "group": "config.sft"}
    rows = [Demonstration("abc", "x")]
    with pytest.raises(DataError, match=r"none of 1 .*\(--config=configs/sft.py:files measures"):
        encode_demonstrations(rows, TOKENIZER, **form)
    encode_demonstrations(rows, TOKENIZER, **form, required=False)
    assert "1 held-out demonstrations encoded: 1 dropped" in caplog.text


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
    assert arrays["tokens"][:].tolist() == [
        [[*ids("pa"), EOS, PAD, PAD], [*ids("pbcd"), PAD], [*ids("p"), EOS, PAD, PAD, PAD]],
        [[*ids("qqc"), EOS, PAD], [*ids("qqd"), EOS, PAD], [PAD] * 5],
    ]
    assert arrays["mask"].sum(-1).tolist() == [[3, 4, 2], [4, 4, 0]]
    assert arrays["ranks"].tolist() == [[1, 0, 1], [0, 0, 0]]
    assert arrays["where"].tolist() == [[True] * 3, [True, True, False]]
    assert arrays["index"].tolist() == [0, 2]
    assert arrays["ranks"].dtype == arrays["index"].dtype == np.int32
    assert "1 dropped, the prompt over prompt_length 2" in caplog.text
    assert "1 completions cut to response_length 3" in caplog.text
    with pytest.raises(DataError, match="row 0 has 3 completions, over 2"):
        encode_comparisons(rows, TOKENIZER, completions=2, prompt_length=2, response_length=3)


def test_prompts_are_padded_on_the_left_and_know_their_row(caplog):
    rows = [Prompt("ab"), Prompt("abcdef"), Prompt("abcd")]
    with caplog.at_level(logging.WARNING):
        arrays = encode_prompts(rows, TOKENIZER, prompt_length=4)
    assert arrays["tokens"][:].tolist() == [[PAD, PAD, *ids("ab")], ids("abcd")]
    assert arrays["mask"][:].tolist() == [[False, False, True, True], [True] * 4]
    assert arrays["index"].tolist() == [0, 2]
    assert "3 prompts encoded: 1 dropped, the prompt over prompt_length 4" in caplog.text


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
    assert arrays["loss_mask"].sum().tolist() == [4]
    for told in (
        "1 dropped, the last question alone too long",
        "1 without their oldest turns",
        "2 prompts over prompt_length 40",
        "1 responses cut",
    ):
        assert told in caplog.text


# --- dialogues -----------------------------------------------------------------------------------


def test_a_turn_of_weight_0_is_no_target():
    """And a dialogue that has no other is not trained on."""
    turns = (
        Turn("user", "U"),
        Turn("assistant", "one", target=False),
        Turn("user", "V"),
        Turn("assistant", "two"),
    )
    lengths = {"prompt_length": 80, "response_length": 10}
    arrays = encode_dialogues([Dialogue(turns)], TOKENIZER, all_turns=True, **lengths)
    assert arrays["tokens"][0][arrays["loss_mask"][0]].tolist() == [*ids("two"), EOS]
    last = (*turns[:3], Turn("assistant", "two", target=False))
    with pytest.raises(
        DataError, match="none of 1 dialogues is left: 1 dropped, whose last answer"
    ):
        encode_dialogues([Dialogue(last)], TOKENIZER, **lengths)


class Counted:
    """TOKENIZER, with the characters that it was asked to encode."""

    eos_id, pad_id, characters = EOS, PAD, 0

    def encode_batch(self, texts):
        self.characters += sum(map(len, texts))
        return TOKENIZER.encode_batch(texts)


@pytest.mark.parametrize("turns", [40, 80])
@pytest.mark.parametrize("length", [200, 1000, 20_000])
def test_a_dialogue_is_encoded_in_time_that_grows_with_its_length(turns, length):
    """Each turn once, and those that may come first when older ones are left out once more."""
    row = Dialogue(tuple(Turn(("user", "assistant")[i % 2], "x" * 100) for i in range(turns)))
    counted = Counted()
    encode_dialogues([row], counted, prompt_length=length, response_length=200)
    text = sum(len(segment.text) for segment in CHAT.segments(row.turns))
    assert text <= counted.characters <= text + 2 * len(CHAT.first + "x" * 100)


# --- what does not fit ---------------------------------------------------------------------------


def test_completions_that_are_equal_once_cut_are_dropped_and_counted(caplog):
    """Two of one text with different ranks would teach noise."""
    rows = [
        Comparison("p", ("abcd", "abce"), (0, 1)),
        Comparison("q", ("abcd", "abce", "x", "y"), (0, 1, 2, 3)),
        Comparison("r", ("abcd", "abce", "x"), (0, 0, 1)),
    ]
    with caplog.at_level(logging.WARNING):
        arrays = encode_comparisons(
            rows, TOKENIZER, completions=4, prompt_length=2, response_length=3, group="config.dpo"
        )
    assert arrays["index"].tolist() == [1, 2]
    assert arrays["where"].tolist() == [[False, False, True, True], [True, True, True, False]]
    assert arrays["ranks"].tolist() == [[0, 0, 2, 3], [0, 0, 1, 0]]
    assert arrays["mask"].sum().tolist() == [[0, 0, 3, 3], [4, 4, 3, 0]]
    assert (
        "4 completions dropped, equal to one of another rank (raise config.dpo.response_length"
    ) in caplog.text


def test_where_nothing_is_left_the_field_to_raise_is_named():
    lengths = {"prompt_length": 2, "response_length": 2, "group": "config.sft"}
    long, told = "abcde", r"none of 3 .*raise config.sft.prompt_length: 5 is enough"
    for encode, row, more in [
        (encode_demonstrations, Demonstration(long, "x"), {}),
        (encode_comparisons, Comparison(long, ("x", "y"), (0, 1)), {"completions": 2}),
    ]:
        with pytest.raises(DataError, match=told):
            encode([row] * 3, TOKENIZER, **lengths, **more)
        left = encode([row] * 3, TOKENIZER, **lengths, **more, required=False)
        assert len(left["tokens"]) == 0 and np.asarray(left["tokens"]).shape[-1] == 4
        assert len(encode([], TOKENIZER, **lengths, **more)["tokens"]) == 0
    with pytest.raises(DataError, match=told):
        encode_prompts([Prompt(long)] * 3, TOKENIZER, prompt_length=2, group="config.sft")


# --- labels --------------------------------------------------------------------------------------


def test_single_completions_have_labels_and_ranked_ones_what_their_ranks_say():
    rows = [
        Comparison("p", ("a",), (0,), label=True),
        Comparison("q", ("a",), (0,), label=False),
        Comparison("r", ("a", "b", "c"), (1, 0, 1)),
    ]
    lengths = {"prompt_length": 2, "response_length": 3, "completions": 3}
    arrays = encode_comparisons(rows, TOKENIZER, **lengths)
    assert arrays["labels"].tolist() == [[1, 0, 0], [-1, 0, 0], [-1, 1, -1]]
    assert arrays["where"].sum(1).tolist() == [1, 1, 3]
    assert "labels" not in encode_comparisons(rows[2:], TOKENIZER, **lengths)


# --- memory --------------------------------------------------------------------------------------


def test_rows_take_the_memory_of_their_tokens_not_of_their_padding():
    """At the reward model's default lengths and nine completions: 1.84 GB for 20,000 pairs once."""
    rows = [Comparison(f"p{i:04}", ("ab", "cde"), (0, 1)) for i in range(2_000)]
    arrays = encode_comparisons(
        rows, TOKENIZER, completions=9, prompt_length=1024, response_length=1024
    )
    tokens = arrays["mask"].sum().sum()
    assert tokens == 2_000 * (5 + 3 + 5 + 4)
    assert sum(array.nbytes for array in arrays.values()) < 25 * tokens
    assert arrays["tokens"].shape == (2_000, 9, 2048)
    assert arrays["tokens"][[3, 7]].shape == (2, 9, 2048)
