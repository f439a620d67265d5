"""Pretraining runs (M0), for experiments/pretrain.py.

    python experiments/pretrain.py --config=configs/pretrain.py:toyworld --workdir=runs/pretrain

files                       text of yours, a small model and a byte-level BPE of its own
toyworld                    the embedded world, minutes on two cores
debug                       two layers on a handful of documents: does it run at all?
arithmetic                  sums, most of them false, of experiments/arithmetic.py
shared_data                 books, with a byte-level BPE of their own
gpt4llm_small               a small model on books, to try the GPT-4-LLM recipe at home
instructgpt_{1p3b,6b,175b}  GPT-3 XL, 6.7B and 175B: batch and learning rate of Brown et al. 2020,
                            table 2.1 (spec MODEL-2), warm-up over 375M tokens, weight decay 0.1

GPT-3's corpus was never published: put yours under data/, or name hub ids in
--config.data.documents. What a preset leaves out has the default of its dataclass.
"""

from ml_collections import ConfigDict

BOOKS = "../shared/data/pretrain/gutenberg_16books.jsonl.gz"
ALPACA = "../shared/data/sft/alpaca_52k.jsonl.gz"

# GPT-3: rows of 2,048 tokens; 1M, 2M and 3.2M tokens a batch.
GPT3 = {
    "data.source": "files",
    "data.documents": ("data/pretrain/*.jsonl",),
    "data.valid_fraction": 0.001,
    "tokenizer": "data/tokenizer/gpt2",
    "model.dtype": "bfloat16",
    "model.remat": "full",
    "pretrain.length": 2048,
    "pretrain.eval_every": 1000,
    "pretrain.save_every": 1000,
}

PRESETS = {
    "files": {
        "data.source": "files",
        "vocab_size": 4095,
        "model.preset": "mini",
        "pretrain.epochs": 3.0,
        "pretrain.batch_size": 16,
        "pretrain.length": 128,
        "pretrain.learning_rate": 2e-3,
        "pretrain.warmup": 0,
        "pretrain.eval_every": 200,
        "pretrain.save_every": 200,
    },
    "toyworld": {
        "data.toy_documents": 40_000,
        "vocab_size": 767,  # and one row for padding
        "model.preset": "mini",
        "pretrain.epochs": 1.0,
        "pretrain.batch_size": 32,
        "pretrain.length": 112,
        "pretrain.learning_rate": 3e-3,
        "pretrain.warmup": 50,
    },
    "debug": {
        "data.toy_documents": 128,
        "data.toy_valid": 16,
        "vocab_size": 511,
        "model.preset": "tiny",
        "pretrain.length": 112,
        "pretrain.batch_size": 8,
        "pretrain.warmup": 2,
        "pretrain.log_every": 1,
    },
    "arithmetic": {
        "data.source": "files",
        "data.documents": ("runs/arithmetic/documents.jsonl",),
        "vocab_size": 300,
        "model.preset": "tiny",
        "pretrain.epochs": 3.0,
        "pretrain.length": 32,
        "pretrain.batch_size": 32,
        "pretrain.learning_rate": 3e-3,
        "pretrain.warmup": 20,
    },
    "shared_data": {
        "data.source": "files",
        "data.documents": (BOOKS,),
        # The BPE also sees instructions, as a tokenizer of web text would.
        "data.demonstrations": (ALPACA,),
        "data.template": "alpaca",
        "data.on_bad_row": "skip",
        "vocab_size": 4095,
        "model.preset": "mini",
        "pretrain.epochs": 0.8,
        "pretrain.batch_size": 16,
        "pretrain.length": 256,
        "pretrain.learning_rate": 2e-3,
        "pretrain.warmup": 100,
        "pretrain.eval_every": 250,
        "pretrain.save_every": 250,
    },
    "gpt4llm_small": {
        "data.source": "files",
        "data.documents": (BOOKS,),
        "vocab_size": 8191,
        "model.preset": "small",
        "pretrain.batch_size": 32,
        "pretrain.length": 512,
        "pretrain.learning_rate": 1e-3,
        "pretrain.warmup": 100,
        "pretrain.eval_every": 500,
        "pretrain.save_every": 500,
    },
    "instructgpt_1p3b": GPT3
    | {
        "model.preset": "gpt3-1.3b",
        "pretrain.batch_size": 512,
        "pretrain.learning_rate": 2.0e-4,
        "pretrain.warmup": 358,
    },
    "instructgpt_6b": GPT3
    | {
        "model.preset": "gpt3-6.7b",
        "pretrain.batch_size": 1024,
        "pretrain.learning_rate": 1.2e-4,
        "pretrain.warmup": 179,
        "pretrain.micro_batches": 4,
    },
    "instructgpt_175b": GPT3
    | {
        "model.preset": "gpt3-175b",
        "pretrain.batch_size": 1536,
        "pretrain.learning_rate": 0.6e-4,
        "pretrain.warmup": 119,
        "pretrain.micro_batches": 3,
    },
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "model": {}, "pretrain": {"adam": {"weight_decay": 0.1}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
