r"""Hugging Face folders in and out, for experiments/convert.py.

    python experiments/convert.py --config=configs/convert.py:from_hf --workdir=runs/pythia \
        --config.source=EleutherAI/pythia-160m
    python experiments/convert.py --config=configs/convert.py:to_hf --workdir=runs/exported \
        --config.source=runs/sft/model

from_hf    a folder or hub id -> WORKDIR/model, which every stage starts from; where tokens were
           added to its tokenizer and not to its tables, --config.resize=True adds their rows
to_hf      a stage's `model` folder -> WORKDIR/hf, which transformers loads
to_hf_bf16 the same in half the bytes
"""

from ml_collections import ConfigDict

PRESETS = {
    "from_hf": {"direction": "from_hf"},
    "to_hf": {"direction": "to_hf"},
    "to_hf_bf16": {"direction": "to_hf", "dtype": "bfloat16"},
}


def get_config(name: str = "from_hf") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
