import numpy as np
import pytest

from instruct_jax.data.packing import pack

PAD = 99


def rows_of(lengths, *, width=None, seed=0):
    """Right-padded rows of these lengths; the second half of each is the target."""
    rng = np.random.default_rng(seed)
    width = max([1, *lengths]) if width is None else width
    mask = np.arange(width)[None] < np.asarray(lengths).reshape(-1, 1)
    tokens = np.where(mask, rng.integers(0, PAD, mask.shape), PAD).astype(np.int32)
    loss_mask = mask & (np.arange(width)[None] >= np.asarray(lengths).reshape(-1, 1) // 2)
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


def segments(packed):
    """(tokens, targets) of every segment, in the order of the rows."""
    found = []
    for n in range(len(packed["tokens"])):
        ids = packed["segment_ids"][n]
        for segment in range(1, ids.max() + 1):
            here = ids == segment
            assert (np.diff(np.flatnonzero(here)) == 1).all(), "a segment is one piece"
            found.append((tuple(packed["tokens"][n, here]), tuple(packed["loss_mask"][n, here])))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_every_token_and_every_target_is_kept_once(seed):
    lengths = np.random.default_rng(seed).integers(1, 17, 200)
    rows = rows_of(lengths, seed=seed)
    packed = pack(rows, length=24, pad_id=PAD)
    expected = []
    for tokens, loss_mask, length in zip(rows["tokens"], rows["loss_mask"], lengths, strict=True):
        targets = loss_mask[:length].copy()
        targets[0] = False
        expected.append((tuple(tokens[:length]), tuple(targets)))
    assert sorted(segments(packed)) == sorted(expected)
    assert {name: array.dtype for name, array in packed.items()} == {
        "tokens": np.int32, "mask": np.bool_, "loss_mask": np.bool_, "segment_ids": np.int32,
    }  # fmt: skip


def test_segments_follow_one_another_and_padding_is_at_the_end():
    packed = pack(rows_of([3, 4, 2, 5, 1]), length=7, pad_id=PAD)
    for ids, mask, tokens in zip(
        packed["segment_ids"], packed["mask"], packed["tokens"], strict=True
    ):
        used = mask.sum()
        assert mask[:used].all() and (ids[used:] == 0).all() and (tokens[used:] == PAD).all()
        assert ids[0] == 1 and set(np.diff(ids[:used])) <= {0, 1}
    assert not packed["loss_mask"][~packed["mask"]].any()


def test_the_first_token_of_a_segment_is_no_target():
    """What stands before it is another row."""
    rows = rows_of([4, 3]) | {"loss_mask": rows_of([4, 3])["mask"]}
    packed = pack(rows, length=8, pad_id=PAD)
    assert packed["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 0]]
    assert packed["loss_mask"].astype(int).tolist() == [[0, 1, 1, 1, 0, 1, 1, 0]]


def test_the_same_rows_are_packed_the_same_way():
    rows = rows_of(np.random.default_rng(0).integers(1, 30, 500))
    once, twice = (pack(rows, length=64, pad_id=PAD) for _ in range(2))
    assert all(np.array_equal(once[name], twice[name]) for name in once)


def test_rows_are_nearly_full():
    """First fit, longest first, is within 11/9 of the fewest rows there can be."""
    lengths = np.random.default_rng(1).integers(5, 60, 2_000)
    packed = pack(rows_of(lengths), length=128, pad_id=PAD)
    fewest = -(-lengths.sum() // 128)
    assert len(packed["tokens"]) <= 11 / 9 * fewest + 1
    assert packed["mask"].mean() > 0.97


def test_a_row_that_fits_exactly_fills_its_row():
    packed = pack(rows_of([7, 7], width=9), length=7, pad_id=PAD)
    assert packed["segment_ids"].tolist() == [[1] * 7, [1] * 7]
    empty = pack(rows_of([]), length=7, pad_id=PAD)
    assert {array.shape for array in empty.values()} == {(0, 7)}


def test_a_row_without_tokens_takes_no_room():
    packed = pack(rows_of([7, 0, 7], width=9), length=7, pad_id=PAD)
    assert packed["segment_ids"].tolist() == [[1] * 7, [1] * 7]


def test_a_row_longer_than_the_packed_row_is_refused():
    with pytest.raises(ValueError, match="a row of 8 tokens does not fit a packed row of 7"):
        pack(rows_of([3, 8]), length=7, pad_id=PAD)


def test_packing_is_fast_enough_for_a_real_data_set():
    """52,000 rows: the search of a bin does not start from the first one each time."""
    lengths = np.random.default_rng(2).integers(20, 200, 52_000)
    mask = np.arange(200)[None] < lengths[:, None]
    rows = {"tokens": np.zeros(mask.shape, np.int32), "mask": mask, "loss_mask": mask}
    packed = pack(rows, length=512, pad_id=PAD)
    assert packed["mask"].sum() == lengths.sum()
