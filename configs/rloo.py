r"""RLOO and REINFORCE++, critic-free runs of experiments/ppo.py.

    python experiments/ppo.py --config=configs/rloo.py:toyworld \
        --config.init=runs/rlhf_init/model --config.reward_model=runs/reward_model/model \
        --workdir=runs/rloo

The baseline of a sample is the mean reward of the other samples of its prompt (Ahmadian et al.
2024), the KL penalty is part of the reward as in PPO, and a response is one action: one log-prob,
one ratio.

toyworld        RLOO, k = 4, on the embedded world
toyworld_ptx    the same with the pretraining mix
reinforce_pp    REINFORCE++ (Hu et al. 2025) with the group's mean taken off: token rewards to go,
                normalised over the batch
debug           two iterations of a few rows
tldr_6p9b       after Ahmadian et al. 2024 on TL;DR: k = 4, KL 0.03, 1e-6; the lengths, batch and
                number of episodes are those of Huang et al. 2024

The field table in instruct_jax/stages/ppo_config.py says which fields make which algorithm.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PPO = runpy.run_path(str(Path(__file__).with_name("ppo.py")))
RLOO = {
    "ppo.estimator": "rloo",
    "ppo.ratio": "sequence",
    "ppo.samples_per_prompt": 4,
    "ppo.whiten_advantages": "none",
}
WORLD = PPO["WORLD"] | {"ppo.samples_per_prompt": 4}

PRESETS = {
    "toyworld": WORLD | RLOO,
    "toyworld_ptx": WORLD | RLOO | {"ppo.ptx_coef": 0.5},
    "reinforce_pp": WORLD | {"ppo.estimator": "reinforce++", "ppo.whiten_advantages": "none"},
    "debug": WORLD | RLOO | PPO["FEW"],
    "tldr_6p9b": RLOO
    | {
        "data.source": "files",
        "data.prompts": ("trl-lib/tldr",),
        "data.documents": ("data/pretrain/*.jsonl",),
        "ptx_length": 512,
        "ppo.episodes": 1_000_000,
        "ppo.rollout_batch": 512,
        "ppo.minibatch": 512,
        "ppo.prompt_length": 512,
        "ppo.response_length": 53,
        "ppo.kl_coef": 0.03,
        "ppo.learning_rate": 1e-6,
        "ppo.warmup_iterations": 0,
        "ppo.ema_decay": 0.0,
        "ppo.micro_batches": 8,
        "ppo.save_every": 50,
    },
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "ppo": {"adam": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
