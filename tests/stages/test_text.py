"""Documents as rows of tokens: what is held out may be too little for one."""

import json

import numpy as np
import pytest

from instruct_jax.data.config import DataConfig
from instruct_jax.data.rows import DataError
from instruct_jax.data.sources import open_source
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.stages.text import text_rows, training_text

TOKENIZER = train_bpe(["abc"], vocab_size=257)


@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_held_out_text_that_does_not_fill_a_row_is_no_row(tmp_path, fraction):
    """And of the text to train on it is an error that says what to do."""
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(40)))
    source = open_source(
        DataConfig(source="files", documents=(str(path),), valid_fraction=fraction)
    )
    read = lambda split, length: text_rows(  # noqa: E731
        source, split, TOKENIZER, length=length, folder=tmp_path / "tokens"
    )
    for split in ("valid", "test"):
        assert read(split, 200).shape == (0, 200)
        assert read(split, 200)[:].shape == (0, 200)
    assert read("train", 200).shape[0] >= 1
    with pytest.raises(DataError, match=r"do not fill one row of 4000.*a smaller length"):
        read("train", 4000)


def test_documents_of_weights_are_rows_of_each_file_by_itself(tmp_path):
    """No row holds tokens of two files, and the rows know which they are of."""
    names = []
    for letter, count in (("a", 30), ("b", 10)):
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("".join(json.dumps({"text": letter * 30}) + "\n" for _ in range(count)))
        names.append(f"{path}*{count // 10}")
    config = DataConfig(source="files", documents=tuple(names), valid_fraction=0.0)
    form = {"length": 10, "folder": tmp_path / "tokens"}
    rows, shares = training_text(open_source(config, weighed=("documents",)), TOKENIZER, **form)
    assert shares is not None and shares.weights == (3, 1)
    assert len(rows) == len(shares.source) == rows.shape[0] == 93 + 31
    letters = [next(iter(TOKENIZER.encode(letter))) for letter in "ab"]
    for i in np.random.default_rng(0).permutation(len(rows))[:40]:
        assert letters[shares.source[i]] in rows[i]
        assert letters[1 - shares.source[i]] not in rows[i]
    np.testing.assert_array_equal(rows[np.array([[0, 100], [123, 5]])][1, 0], rows[123])
