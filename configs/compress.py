r"""Compression reports, for experiments/compress.py.

    python experiments/compress.py --config=configs/compress.py:toyworld \
        --config.model=runs/ppo_ptx/model --config.reward_model=runs/reward_model/model \
        --workdir=runs/compress

toyworld       every variant, 400 prompts, gold judge
quantize       the quantised ones alone, nothing is trained
debug          a handful
shared_data    Alpaca prompts and books: no gold judge
"""

from ml_collections import ConfigDict

QUANTIZED = ("int8", "int8_activations", "fp8", "int4", "nf4", "int8_cache")
ALL = (*QUANTIZED, "prune:0.3", "prune:0.5", "distill:samples", "distill:logits")

TOYWORLD = {
    "variants": ALL,
    "document_length": 112,
    "data.toy_valid": 512,
    "data.toy_prompts": 4_000,
    "distill_prompts": 4_000,
}

PRESETS = {
    "toyworld": TOYWORLD,
    "quantize": TOYWORLD | {"variants": QUANTIZED},
    "debug": TOYWORLD
    | {
        "prompts": 16,
        "batch_size": 16,
        "data.toy_valid": 16,
        "data.toy_prompts": 32,
        "distill_prompts": 32,
        "distill.batch_size": 8,
        "distill.epochs": 1.0,
        "distill.log_every": 1,
    },
    "shared_data": {
        "variants": ALL,
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
    config = ConfigDict({"data": {}, "distill": {"adam": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
