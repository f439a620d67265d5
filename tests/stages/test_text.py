"""Documents as rows of tokens: what is held out may be too little for one."""

import json

import pytest

from instruct_jax.data.config import DataConfig
from instruct_jax.data.rows import DataError
from instruct_jax.data.sources import open_source
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.stages.text import text_rows

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
