r"""GRPO and its kin, critic-free runs of experiments/ppo.py.

    python experiments/ppo.py --config=configs/grpo.py:toyworld \
        --config.init=runs/rlhf_init/model --config.reward_model=runs/reward_model/model \
        --workdir=runs/grpo

The reward of a sample is measured against the other samples of its prompt; there is no value model.

toyworld      Shao et al. 2024 (DeepSeekMath) on the embedded world: KL in the loss
toyworld_ptx  GRPO with the pretraining mix
dr_grpo       Liu et al. 2025: no scale by the deviation, no length bias, no KL
dapo          Yu et al. 2025: a higher upper clip, token mean, no KL, dynamic sampling
gspo          Zheng et al. 2025: one ratio a response, their clip range
gspo_token    the same ratio, with the gradient of each token
cispo         MiniMax 2025: bounded weights in the place of a clip, otherwise as dapo
sapo          Gao et al. 2025: a smooth gate in the place of a clip
verifiable    sums of experiments/arithmetic.py and a reward in Python: whether the number is right
debug         two iterations of a few rows
deepseekmath  Shao et al. 2024, section 4.2: 64 samples a prompt, 1,024 a batch, KL 0.04, 1e-6; the
              number of episodes is ours

The field table in instruct_jax/stages/ppo_config.py says which fields make which algorithm.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

PPO = runpy.run_path(str(Path(__file__).with_name("ppo.py")))
GRPO = {
    "ppo.estimator": "grpo",
    "ppo.samples_per_prompt": 4,
    "ppo.whiten_advantages": "none",
    "ppo.loss_reduction": "seq_mean",
    "ppo.kl_coef": 0.0,
    "ppo.kl_loss_coef": 0.04,
}
TOYWORLD = (
    PPO["WORLD"]
    | GRPO
    # Advantages are divided by the group's deviation, about 0.25 here: this is 0.15 in the reward.
    | {"ppo.kl_loss_coef": 0.6}
)
NO_KL = {"ppo.kl_loss_coef": 0.0}
GSPO_CLIP = {"ppo.clip": 3e-4, "ppo.clip_high": 4e-4}
DYNAMIC = {"ppo.loss_reduction": "token_mean", "ppo.max_resamples": 3}

PRESETS = {
    "toyworld": TOYWORLD,
    "toyworld_ptx": TOYWORLD | {"ppo.ptx_coef": 0.5},
    "dr_grpo": TOYWORLD
    | NO_KL
    | {"ppo.group_scale": "none", "ppo.loss_reduction": "seq_sum_const"},
    "dapo": TOYWORLD | NO_KL | DYNAMIC | {"ppo.clip_high": 0.28},
    "gspo": TOYWORLD | NO_KL | GSPO_CLIP | {"ppo.ratio": "sequence_mean"},
    "gspo_token": TOYWORLD | NO_KL | GSPO_CLIP | {"ppo.ratio": "sequence_mean_token"},
    "cispo": TOYWORLD | NO_KL | DYNAMIC | {"ppo.policy_loss": "cispo"},
    "sapo": TOYWORLD | NO_KL | {"ppo.policy_loss": "sapo"},
    "debug": TOYWORLD | PPO["FEW"],
    "verifiable": GRPO
    | {
        "init": "runs/arithmetic_gpt/model",
        "reward_model": None,
        "rewards": ("python=experiments/rewards.py:number",),
        "data.source": "files",
        "data.documents": ("runs/arithmetic/documents.jsonl",),
        "data.prompts": ("runs/arithmetic/questions.jsonl",),
        "ptx_length": 32,
        "ppo.episodes": 8_192,
        "ppo.rollout_batch": 256,
        "ppo.minibatch": 64,
        "ppo.samples_per_prompt": 8,
        "ppo.prompt_length": 12,
        "ppo.response_length": 8,
        "ppo.learning_rate": 3e-4,
        "ppo.warmup_iterations": 2,
        "ppo.ema_decay": 0.9,
        "ppo.eval_every": 8,
    },
    "deepseekmath": GRPO
    | {
        "data.source": "files",
        "data.documents": ("data/pretrain/*.jsonl",),
        "data.prompts": ("data/prompts.jsonl",),
        "ptx_length": 2048,
        "ppo.episodes": 147_456,
        "ppo.rollout_batch": 1_024,
        "ppo.minibatch": 1_024,
        "ppo.samples_per_prompt": 64,
        "ppo.prompt_length": 1024,
        "ppo.response_length": 1024,
        "ppo.learning_rate": 1e-6,
        "ppo.warmup_iterations": 0,
        "ppo.ema_decay": 0.0,
        "ppo.micro_batches": 16,
        "ppo.save_every": 10,
    },
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "ppo": {"adam": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
