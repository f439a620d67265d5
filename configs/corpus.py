"""Tokenising ahead of a run, for experiments/corpus.py.

    python experiments/corpus.py --config=configs/corpus.py:shared_data --workdir=runs/corpus

gpt3            the text and tokenizer of configs/pretrain.py:instructgpt_*
shared_data     books, GPT-2's tokenizer
synthetic_10gb  10 GB of text made of the books' paragraphs: what loading costs on this machine
debug           a handful of documents
"""

from ml_collections import ConfigDict

BOOKS = "../shared/data/pretrain/gutenberg_16books.jsonl.gz"
GPT2 = "../shared/data/tokenizer/gpt2"

SHARED_DATA = {
    "data.source": "files",
    "data.documents": (BOOKS,),
    "data.on_bad_row": "skip",
    "data.valid_fraction": 0.001,
    "tokenizer": GPT2,
}

PRESETS = {
    "gpt3": {
        "data.source": "files",
        "data.documents": ("data/pretrain/*.jsonl",),
        "data.valid_fraction": 0.001,
        "tokenizer": "data/tokenizer/gpt2",
    },
    "shared_data": SHARED_DATA | {"data.valid_fraction": 0.05, "length": 256},
    "synthetic_10gb": SHARED_DATA | {"synthetic_bytes": 10_000_000_000},
    "debug": {
        "data.toy_documents": 128,
        "data.toy_valid": 16,
        "vocab_size": 511,
        "length": 64,
        "batch_size": 4,
        "batches": 10,
    },
}


def get_config(name: str = "gpt3") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
