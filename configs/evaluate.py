r"""Comparisons of models, for experiments/evaluate.py.

    python experiments/evaluate.py --config=configs/evaluate.py:toyworld --workdir=runs/evaluate \
        --config.models="('gpt=runs/pretrain/model', 'sft=runs/sft/model', 'ppo=runs/ppo/model')"

files          prompts of yours: reward, lengths, samples, and of documents the loss
toyworld       400 prompts, gold judge, few-shot tasks
debug          a handful
shared_data    Alpaca prompts and books: held-out loss, reward, lengths, samples
"""

from ml_collections import ConfigDict

PRESETS = {
    "files": {
        "data.source": "files",
        "measure_lengths": True,
        "prompts": 256,
        "document_length": 128,
        "prompt_length": 1024,
        "response_length": 128,
        "batch_size": 64,
    },
    "toyworld": {"prompts": 400, "tasks": 256, "document_length": 112, "data.toy_valid": 512},
    "debug": {
        "prompts": 16,
        "prefix_prompts": 8,
        "tasks": 8,
        "document_length": 112,
        "batch_size": 16,
        "data.toy_valid": 16,
    },
    "shared_data": {
        "data.source": "files",
        "data.documents": ("../shared/data/pretrain/gutenberg_16books.jsonl.gz",),
        "data.prompts": ("../shared/data/sft/alpaca_52k.jsonl.gz",),
        "data.template": "alpaca",
        "data.on_bad_row": "skip",
        "prompts": 256,
        "document_length": 256,
        "prompt_length": 96,
        "response_length": 64,
        "batch_size": 64,
    },
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
