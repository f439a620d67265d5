"""Arithmetic tasks whose answers can be checked, for experiments/arithmetic.py.

    python experiments/arithmetic.py --config=configs/arithmetic.py:digits --workdir=runs/arithmetic

digits     sums of two digits, six in ten of the texts false
debug      a few of them
"""

from ml_collections import ConfigDict

PRESETS = {
    "digits": {},
    "debug": {"documents": 400, "questions": 64},
}


def get_config(name: str = "digits") -> ConfigDict:
    """The task called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
