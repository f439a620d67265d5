r"""The choice of the SFT epoch by reward-model score (spec SFT-4), for experiments/select_sft.py.

    python experiments/select_sft.py --config=configs/select_sft.py:toyworld \
        --workdir=runs/select_sft

toyworld    256 validation prompts
debug       a handful
"""

from ml_collections import ConfigDict

PRESETS = {
    "toyworld": {"prompts": 256},
    "debug": {"prompts": 16, "batch_size": 16, "data.toy_valid": 16},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
