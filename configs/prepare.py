r"""Prompt preparation (spec DATA-4 to DATA-8), for experiments/prepare.py.

    python experiments/prepare.py --config=configs/prepare.py:paper --workdir=runs/prompts \
        --config.files="('data/prompts.jsonl',)"

paper          200 prompts an organisation, at most 1,000 tokens; name your files
shared_data    the Alpaca instructions
"""

from ml_collections import ConfigDict

PRESETS = {
    "paper": {"cap_key": "org_id", "cap": 200, "max_tokens": 1000},
    "shared_data": {
        "files": ("../shared/data/sft/alpaca_52k.jsonl.gz",),
        "template": "alpaca",
        "on_bad_row": "skip",
    },
}


def get_config(name: str = "paper") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
