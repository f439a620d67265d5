r"""The whole pipeline on the embedded world, for experiments/quickstart.py.

    python experiments/quickstart.py --config=configs/quickstart.py:toyworld \
        --workdir=runs/quickstart

toyworld    minutes on two cores
debug       a handful of rows in every part: does all of it run?

The parts have their own configs; `preset` names the preset taken of each.
"""

from ml_collections import ConfigDict

PRESETS = {
    "toyworld": {"preset": "toyworld"},
    "debug": {"preset": "debug"},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name] | {"seed": 0})
