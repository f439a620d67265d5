r"""PPO and PPO-ptx runs (M5, M6), for experiments/ppo.py.

    python experiments/ppo.py --config=configs/ppo.py:toyworld_ptx \
        --config.init=runs/rlhf_init/model --config.reward_model=runs/reward_model/model \
        --workdir=runs/ppo_ptx

NAME is PPO; NAME_ptx mixes pretraining text in.

files                         prompts of yours, whose length is measured
toyworld, toyworld_ptx        the embedded world
toyworld_ptx_lora             the same, an adapter of rank 4 trained instead of the whole policy
debug, debug_ptx              two iterations of a few rows
shared_data, shared_data_ptx  Alpaca prompts, books as the pretraining text
instructgpt_{1p3b,6b,175b}    Ouyang et al. 2022, C.4 (spec PPO-3)
instructgpt_*_ptx             the same with the pretraining mix
instructgpt_6b_ptx_lora       adapters on one frozen trunk for all four models; the reward model is
                              configs/reward_model.py:instructgpt_6b_lora, from the same init
lmhp_sentiment_124m           Ziegler et al. 2019: 1M episodes, four inner epochs, adaptive KL
lmhp_descriptiveness_124m     the same with the other reward model
tldr_1b                       Huang et al. 2024: 1M episodes, -1 for a summary without an end
gpt4llm_7b, gpt4llm_small     Peng et al. 2023 ran no RL; PPO-3's recipe on their prompts

InstructGPT: the policy's learning rate is not in the paper. 5e-6 without the mix (above 8e-6 every
run diverged), 9.65e-6 with it; for 175B 2.55e-6, the lower of the two tried. ptx_coef 27.8 is the
paper's number, but not how its losses were reduced: read grad_norm_ptx against grad_norm_pg, and
start from 0.5 to 5 if the reward does not move.

Ziegler et al. also decayed the learning rate linearly, put the value head on the policy's trunk and
cut a response at the first full stop after token 16; none of that is done here.

What a preset leaves out has the default of its dataclass: in the stages, the paper's value.
"""

from ml_collections import ConfigDict

# What configs/grpo.py and rloo.py share with these runs.
WORLD = {
    "data.toy_documents": 40_000,
    # Past the prompts of the demonstrations and the comparisons.
    "data.toy_offset": 14_000,
    "data.toy_prompts": 4_000,
    "ptx_length": 80,
    "ppo.episodes": 4_096,
    "ppo.rollout_batch": 128,
    "ppo.minibatch": 32,
    "ppo.prompt_length": 56,
    "ppo.response_length": 24,
    "ppo.kl_coef": 0.15,
    "ppo.learning_rate": 2e-4,
    "ppo.warmup_iterations": 4,
    "ppo.ema_decay": 0.9,
    "ppo.ptx_ratio": 1,
    # Pretraining rows rarely end; without this the mix unlearns to stop (5 % of answers).
    "ppo.missing_eos": "subtract",
    "ppo.log_every": 2,
    "ppo.eval_every": 10,
}
FEW = {
    "data.toy_documents": 128,
    "data.toy_prompts": 64,
    "data.toy_valid": 16,
    "ppo.episodes": 32,
    "ppo.rollout_batch": 16,
    "ppo.minibatch": 8,
    "ppo.warmup_iterations": 1,
    "ppo.log_every": 1,
    "ppo.eval_every": 1,
}

TOYWORLD = WORLD | {"ppo.old_log_probs": "sampler", "ppo.value_learning_rate": 5e-4}
DEBUG = TOYWORLD | FEW

SHARED_DATA = {
    "data.source": "files",
    "data.documents": ("../shared/data/pretrain/gutenberg_16books.jsonl.gz",),
    "data.prompts": ("../shared/data/sft/alpaca_52k.jsonl.gz",),
    "data.template": "alpaca",
    "data.on_bad_row": "skip",
    "ptx_length": 160,
    "ppo.episodes": 1_280,
    "ppo.rollout_batch": 64,
    "ppo.minibatch": 16,
    "ppo.prompt_length": 96,
    "ppo.response_length": 64,
    "ppo.kl_coef": 0.05,
    "ppo.learning_rate": 2e-4,
    "ppo.value_learning_rate": 3e-4,
    "ppo.warmup_iterations": 4,
    "ppo.ema_decay": 0.95,
    "ppo.ptx_ratio": 2,
    "ppo.eval_every": 8,
    "ppo.save_every": 8,
}

INSTRUCTGPT = {
    "data.source": "files",
    "data.documents": ("data/pretrain/*.jsonl",),
    "data.prompts": ("data/prompts.jsonl",),
    "ptx_length": 2048,
    "ppo.episodes": 256_000,
    "ppo.rollout_batch": 512,
    "ppo.minibatch": 64,
    "ppo.prompt_length": 1024,
    "ppo.response_length": 1024,
    "ppo.kl_coef": 0.02,
    "ppo.learning_rate": 5e-6,
    "ppo.value_learning_rate": 9e-6,
    "ppo.eval_every": 25,
    "ppo.save_every": 25,
}
INSTRUCTGPT_PTX = {"ppo.ptx_coef": 27.8, "ppo.ptx_ratio": 8, "ppo.learning_rate": 9.65e-6}
INSTRUCTGPT_175B = {"ppo.learning_rate": 2.55e-6, "ppo.value_learning_rate": 5e-6}
# No paper's: an adapter takes ten times the rate of the weights or more (Hu et al. 2021, D.4).
INSTRUCTGPT_LORA = {
    "reward_model": "runs/reward_model_lora/model",
    "reward_adapter": "runs/reward_model_lora/adapter",
    "ppo.lora.rank": 16,
    "ppo.lora.alpha": 32.0,
    "ppo.learning_rate": 1e-4,
    "ppo.value_learning_rate": 1e-4,
}

# What the 2019 code and its descendants share: one minibatch, four passes over it, no EMA.
ONE_MINIBATCH = {
    "data.source": "files",
    "ppo.episodes": 1_000_000,
    "ppo.rollout_batch": 512,
    "ppo.minibatch": 512,
    "ppo.inner_epochs": 4,
    "ppo.temperature": 0.7,
    "ppo.warmup_iterations": 0,
    "ppo.adam.b2": 0.999,
    "ppo.ema_decay": 0.0,
    "ppo.missing_eos": "replace",
    "ppo.missing_eos_penalty": 1.0,
    "ppo.save_every": 50,
}

LMHP = ONE_MINIBATCH | {
    "init": "runs/gpt2/model",
    "data.prompts": ("data/bookcorpus_queries.jsonl",),
    "data.documents": ("data/bookcorpus/*.jsonl",),
    "ppo.prompt_length": 64,
    "ppo.response_length": 24,
    "ppo.kl_coef": 0.15,
    "ppo.kl_target": 6.0,
    "ppo.kl_horizon": 10_000,
    "ppo.whiten_rewards": True,
    "ppo.whiten_advantages": "minibatch",
    "ppo.learning_rate": 1e-5,
    "ppo.value_learning_rate": 1e-5,
    "ppo.adam.clip": 0.0,
    "ppo.adam.form": "tensorflow",
}

GPT4LLM = {
    "data.source": "files",
    "data.documents": ("data/pretrain/*.jsonl",),
    "data.prompts": ("vicgalle/alpaca-gpt4",),
    "data.template": "alpaca",
    "ptx_length": 512,
    "ppo.prompt_length": 192,
    "ppo.response_length": 320,
    "ppo.save_every": 25,
}

# prompt_length is the most that is taken. With data.documents there can be a mix: ptx_coef 1.
FILES = {
    "data.source": "files",
    "measure_lengths": True,
    "ptx_length": 128,
    "ppo.episodes": 2_048,
    "ppo.rollout_batch": 64,
    "ppo.minibatch": 16,
    "ppo.response_length": 128,
    "ppo.kl_coef": 0.05,
    "ppo.learning_rate": 2e-5,
    "ppo.value_learning_rate": 5e-5,
    "ppo.warmup_iterations": 4,
    "ppo.ema_decay": 0.95,
    "ppo.ptx_ratio": 2,
    "ppo.eval_every": 8,
    "ppo.save_every": 8,
}

PRESETS = {
    "files": FILES,
    "toyworld": TOYWORLD,
    "toyworld_ptx": TOYWORLD | {"ppo.ptx_coef": 0.5},
    "toyworld_ptx_lora": TOYWORLD
    | {
        "ppo.ptx_coef": 0.5,
        "ppo.lora.rank": 4,
        "ppo.learning_rate": 2e-3,
        "ppo.value_learning_rate": 2e-3,
    },
    "debug": DEBUG,
    "debug_ptx": DEBUG | {"ppo.ptx_coef": 1.0},
    "shared_data": SHARED_DATA,
    "shared_data_ptx": SHARED_DATA | {"ppo.ptx_coef": 1.0},
    "instructgpt_1p3b": INSTRUCTGPT,
    "instructgpt_1p3b_ptx": INSTRUCTGPT | INSTRUCTGPT_PTX | {"ppo.micro_batches": 4},
    "instructgpt_6b": INSTRUCTGPT | {"ppo.micro_batches": 2},
    "instructgpt_6b_ptx": INSTRUCTGPT | INSTRUCTGPT_PTX | {"ppo.micro_batches": 8},
    "instructgpt_6b_ptx_lora": INSTRUCTGPT
    | INSTRUCTGPT_PTX
    | INSTRUCTGPT_LORA
    | {"ppo.micro_batches": 8},
    "instructgpt_175b": INSTRUCTGPT | INSTRUCTGPT_175B | {"ppo.micro_batches": 4},
    "instructgpt_175b_ptx": INSTRUCTGPT
    | INSTRUCTGPT_PTX
    | INSTRUCTGPT_175B
    | {"ppo.micro_batches": 16},
    "lmhp_sentiment_124m": LMHP | {"reward_model": "runs/reward_model_sentiment/model"},
    "lmhp_descriptiveness_124m": LMHP | {"reward_model": "runs/reward_model_descriptiveness/model"},
    "tldr_1b": ONE_MINIBATCH
    | {
        "init": "runs/sft/model",
        "data.prompts": ("trl-lib/tldr",),
        "data.documents": ("data/pretrain/*.jsonl",),
        "ppo.prompt_length": 512,
        "ppo.response_length": 53,
        "ppo.kl_coef": 0.05,
        "ppo.learning_rate": 3e-6,
        "ppo.value_learning_rate": 3e-6,
        "ppo.micro_batches": 8,
    },
    "gpt4llm_7b": GPT4LLM
    | {"ppo.learning_rate": 5e-6, "ppo.value_learning_rate": 9e-6, "ppo.micro_batches": 4},
    "gpt4llm_small": GPT4LLM | {"ppo.episodes": 25_600},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "ppo": {"adam": {}, "lora": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
