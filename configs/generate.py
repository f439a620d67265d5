r"""Answers of a model, for experiments/generate.py.

    python experiments/generate.py --config.model=runs/sft/model --config.prompt="Reverse: a b c"

sample      as people ask: temperature 0.7, at most 256 tokens
greedy      the most probable token each time
debug       short answers
"""

from ml_collections import ConfigDict

PRESETS = {
    "sample": {},
    "greedy": {"temperature": 0.0},
    "debug": {"response_length": 8, "batch_size": 4},
}


def get_config(name: str = "sample") -> ConfigDict:
    """The settings called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
