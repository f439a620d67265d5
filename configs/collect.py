r"""Comparison data from simulated labelers, for experiments/collect.py.

    python experiments/collect.py --config=configs/collect.py:toyworld \
        --config.policy=runs/sft/model --workdir=runs/collect

toyworld    four answers to each prompt of the embedded world, ranked by one of 40 labelers
debug       a handful of prompts
"""

from ml_collections import ConfigDict

PRESETS = {
    # Prompts past those of the demonstrations.
    "toyworld": {"data.toy_offset": 10_000, "data.toy_prompts": 4_000},
    "debug": {"data.toy_prompts": 48, "batch_size": 64, "labelers": 5},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
