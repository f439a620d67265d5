r"""Reward-model runs (M2), for experiments/reward_model.py.

    python experiments/reward_model.py --config=configs/reward_model.py:toyworld \
        --config.init=runs/sft/model --workdir=runs/reward_model

files                      rankings or pairs of yours, of lengths that are measured on them
toyworld                   collected rankings of the embedded world
debug                      eight updates of a few rows
shared_data                K-wise AlpacaEval rankings and HH helpful pairs, from an Alpaca model
instructgpt_6b             spec RM-3; one 6B reward model serves all policy sizes (MODEL-6)
instructgpt_6b_lora        an adapter on the policy's own start, for configs/ppo.py:..._lora
lmhp_sentiment_124m        Ziegler et al. 2019: 4,992 best-of-4 labels, scores standardised on
lmhp_descriptiveness_124m  samples of the policy (data.demonstrations holds those)
tldr_1b                    Huang et al. 2024: pairs of summaries
gpt4llm_7b, gpt4llm_small  Peng et al. 2023: three models' answers scored by GPT-4; OPT-1.3B there

Ziegler et al. took a softmax over the four answers and decayed the learning rate linearly; here the
best of four is ranked above three tied ones, and the decay is a cosine to zero.

What a preset leaves out has the default of its dataclass: in the stages, the paper's value.
"""

from ml_collections import ConfigDict

TOYWORLD = {
    "data.comparisons": ("runs/collect/comparisons.jsonl",),
    "data.valid_fraction": 0.15,
    "reward_model.batch_size": 16,
    "reward_model.completions": 4,
    "reward_model.prompt_length": 56,
    "reward_model.response_length": 24,
    "reward_model.learning_rate": 5e-4,
}

INSTRUCTGPT_6B = {
    "data.source": "files",
    "data.comparisons": ("data/comparisons.jsonl",),
    "data.demonstrations": ("data/demonstrations.jsonl",),
    "reward_model.batch_size": 64,
    "reward_model.completions": 9,
    "reward_model.prompt_length": 1024,
    "reward_model.response_length": 1024,
    "reward_model.learning_rate": 9e-6,
    "reward_model.micro_batches": 8,
    "reward_model.save_every": 100,
}

LMHP = {
    "init": "runs/gpt2/model",
    "data.source": "files",
    "reward_model.batch_size": 32,
    "reward_model.completions": 4,
    "reward_model.prompt_length": 64,
    "reward_model.response_length": 24,
    "reward_model.learning_rate": 5e-5,
    "reward_model.final_fraction": 0.0,
    "reward_model.adam.b2": 0.999,
    "reward_model.adam.eps": 1e-5,
    "reward_model.normalisation": "policy_meanstd",
}

GPT4LLM = {
    "data.source": "files",
    "data.comparisons": ("data/comparison_data_v2.json",),
    "data.demonstrations": ("vicgalle/alpaca-gpt4",),
    "data.template": "alpaca",
    "reward_model.completions": 3,
    "reward_model.prompt_length": 192,
    "reward_model.response_length": 320,
    "reward_model.save_every": 200,
}

# The lengths are the most that is taken. With data.demonstrations there can be a zero point too
# (RM-4): normalisation "demo_mean".
FILES = {
    "data.source": "files",
    "data.valid_fraction": 0.1,
    "measure_lengths": True,
    "reward_model.batch_size": 16,
    "reward_model.learning_rate": 1e-4,
    "reward_model.normalisation": "none",
    "reward_model.save_every": 100,
}

PRESETS = {
    "files": FILES,
    "toyworld": TOYWORLD,
    "debug": TOYWORLD
    | {
        "data.toy_demonstrations": 64,
        "data.toy_valid": 16,
        "data.valid_fraction": 0.3,
        "data.test_fraction": 0.0,
        "reward_model.batch_size": 8,
        "reward_model.log_every": 1,
    },
    "shared_data": {
        "data.source": "files",
        "data.comparisons": (
            "../shared/data/rm/alpacaeval_rankings_k25.jsonl.gz",
            "../shared/data/rm/hh_helpful_base_pairs.jsonl.gz",
        ),
        "data.completions": (4, 4),
        "data.tie_gap": 0.25,
        "data.valid_fraction": 0.15,
        "data.demonstrations": ("../shared/data/sft/alpaca_gpt4_demo999.jsonl.gz",),
        "data.template": "alpaca",
        "data.on_bad_row": "skip",
        "reward_model.batch_size": 16,
        "reward_model.completions": 4,
        "reward_model.prompt_length": 96,
        "reward_model.response_length": 96,
        "reward_model.learning_rate": 3e-4,
        "reward_model.save_every": 50,
    },
    "instructgpt_6b": INSTRUCTGPT_6B,
    "instructgpt_6b_lora": INSTRUCTGPT_6B
    | {
        "init": "runs/rlhf_init/model",
        "reward_model.lora.rank": 16,
        "reward_model.lora.alpha": 32.0,
        "reward_model.learning_rate": 1e-4,
    },
    "lmhp_sentiment_124m": LMHP
    | {
        "data.comparisons": ("data/lmhp_sentiment.jsonl",),
        "data.demonstrations": ("data/lmhp_samples.jsonl",),
    },
    "lmhp_descriptiveness_124m": LMHP
    | {
        "data.comparisons": ("data/lmhp_descriptiveness.jsonl",),
        "data.demonstrations": ("data/lmhp_samples.jsonl",),
    },
    "tldr_1b": {
        "data.source": "files",
        "data.comparisons": ("trl-lib/tldr-preference",),
        "data.demonstrations": ("trl-lib/tldr",),
        "reward_model.batch_size": 64,
        "reward_model.completions": 2,
        "reward_model.prompt_length": 512,
        "reward_model.response_length": 53,
        "reward_model.learning_rate": 3e-6,
        "reward_model.final_fraction": 0.0,
        "reward_model.adam.b2": 0.999,
        "reward_model.adam.eps": 1e-5,
        "reward_model.micro_batches": 8,
        "reward_model.save_every": 200,
    },
    "gpt4llm_7b": GPT4LLM | {"reward_model.learning_rate": 9e-6, "reward_model.micro_batches": 4},
    "gpt4llm_small": GPT4LLM | {"reward_model.learning_rate": 1e-4},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "reward_model": {"adam": {}, "lora": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
