"""Benchmarks, for experiments/benchmark.py.

    python experiments/benchmark.py --config=configs/benchmark.py:mini --workdir=runs/benchmark

debug                     every phase of a tiny model: does it run at all?
mini, mini_skewed         7M parameters (6 layers, 256 wide, vocabulary 8,192), 32 x (64 + 64);
                          responses of 64 tokens, or of 16 in the mean
alpaca, alpaca_k          real rows in the GPT-2 vocabulary: Alpaca demonstrations and HH pairs, and
                          four AlpacaEval answers a prompt, which is read once or four times
gpt2_124m                 GPT-2 in fp32, 16 x (64 + 64)
gpt2_124m_bf16, 1p3b      one accelerator, bfloat16: 124M and 1.3B
deepspeed_chat            1.3B actor, 350M reward and value, 256 + 256, no mix: decode-heavy
paper_ptx                 1.3B with 8 rows of text for each episode: nearly all is ptx
sweep                     throughput against batch size, length and model size
startup                   seconds to the first step of every stage, with an empty compilation cache
                          and with a full one

With a peer (TRL 1.16 and transformers 5; for PPO TRL 1.12.0, the last that had it), named by
--config.peer_python; the default is the interpreter at hand:
generate_trl              GPT-2 124M, 16 x (64 + 64)
generate_{1m,7m}_trl      smaller ones, 32 and 64 rows
sft_trl, reward_model_trl Alpaca rows and HH pairs, 6 layers x 256, GPT-2 vocabulary, batch 16
ppo_trl, ppo_skewed_trl   the shape of mini and mini_skewed

With Tunix 0.1.7, which is in JAX, named in the same way:
ppo_tunix                 the shape of mini in the form of Qwen 2; Tunix has a Python reward where
                          we have a reward model of the policy's size

What a preset leaves out has the default of its dataclass.
"""

from ml_collections import ConfigDict

SHARED = "../shared/data/"
GPT2_TOKENIZER = SHARED + "tokenizer/gpt2"

TRL = {"peer": "trl"}
# What one micro-batch makes is made again in the same memory by the next: fewer pages to clear.
MINI = {"shape.micro_batches": 4}
SKEWED = MINI | {"shape.mean_response": 16, "shape.length_buckets": 4}

GPT2 = {
    "shape.model": "gpt2-small",
    "shape.rows": 16,
    "shape.minibatch": 16,
    "shape.text_rows": 8,
    "shape.text_length": 256,
    "repeats": 3,
}

ALPACA = {
    "shape.vocab_size": 50_257,
    "shape.rows": 16,
    "shape.minibatch": 16,
    "shape.prompt": 192,
    "shape.response": 320,
    "shape.ranked": 16,
    "shape.completions": 2,
    "tokenizer": GPT2_TOKENIZER,
    "data.source": "files",
    "data.demonstrations": (SHARED + "sft/alpaca_52k.jsonl.gz",),
    "data.prompts": (SHARED + "sft/alpaca_52k.jsonl.gz",),
    "data.template": "alpaca",
    "data.limit": 1_000,
    "data.on_bad_row": "skip",
}
HH_PAIRS = {
    "data.comparisons": (SHARED + "rm/hh_helpful_base_pairs.jsonl.gz",),
}

H200 = {
    "shape.dtype": "bfloat16",
    "shape.model": "gpt3-1.3b",
    "shape.remat": "full",
    "shape.rows": 64,
    "shape.minibatch": 64,
    "shape.micro_batches": 4,
    "shape.prompt": 256,
    "shape.response": 256,
    "shape.text_length": 2048,
    "shape.text_rows": 16,
    "shape.pack_length": 2048,
    "shape.ranked": 16,
}

PRESETS = {
    "debug": {
        "shape.model": "tiny",
        "shape.rows": 4,
        "shape.minibatch": 4,
        "shape.prompt": 8,
        "shape.response": 8,
        "shape.text_rows": 4,
        "shape.text_length": 16,
        "shape.pack_length": 32,
        "shape.ranked": 2,
        "shape.ptx_ratio": 1,
        "repeats": 2,
    },
    "mini": MINI,
    "mini_skewed": SKEWED,
    "alpaca": ALPACA | HH_PAIRS | {"phases": ("sft", "reward_model")},
    "alpaca_k": ALPACA
    | {
        "data.comparisons": (SHARED + "rm/alpacaeval_rankings_k25.jsonl.gz",),
        "data.completions": (4, 4),
        "shape.completions": 4,
        "phases": ("reward_model", "reward_model_separate"),
    },
    "gpt2_124m": GPT2,
    "gpt2_124m_bf16": H200
    | {
        "shape.model": "gpt2-small",
        "shape.max_length": 2048,
        "shape.rows": 256,
        "shape.minibatch": 256,
    },
    "1p3b": H200 | {"phases": ("pretrain", "sft", "rollout", "engine", "score", "ptx")},
    "deepspeed_chat": H200
    | {
        "shape.scalar": "gpt3-350m",
        "phases": ("rollout", "score", "ppo_update", "iteration"),
    },
    "paper_ptx": H200
    | {
        "shape.scalar": "gpt3-350m",
        "shape.ptx_ratio": 8,
        "shape.micro_batches": 16,
        "phases": ("rollout", "score", "ppo_update", "ptx", "iteration"),
        "repeats": 2,
    },
    "sweep": {
        "shape.rows": 16,
        "shape.text_rows": 16,
        "shape.minibatch": 16,
        "phases": ("pretrain", "rollout", "iteration"),
        "repeats": 3,
        "sweep": (
            ("rows", (8, 16, 32)),
            ("text_length", (64, 128, 256)),
            ("d_model", (128, 256, 512)),
        ),
    },
    "startup": {"startup.preset": "toyworld", "repeats": 3},
    "generate_trl": GPT2 | TRL | {"phases": ("rollout",)},
    "generate_1m_trl": TRL
    | {"shape.num_layers": 4, "shape.d_model": 128, "shape.num_heads": 4, "phases": ("rollout",)},
    "generate_7m_trl": TRL | {"shape.rows": 64, "shape.minibatch": 64, "phases": ("rollout",)},
    "sft_trl": ALPACA | TRL | {"phases": ("sft",)},
    "reward_model_trl": ALPACA
    | HH_PAIRS
    | TRL
    | {
        "data.demonstrations": (),
        "data.prompts": (),
        "shape.prompt": 384,
        "shape.response": 128,
        "phases": ("reward_model",),
    },
    "ppo_trl": TRL | MINI | {"phases": ("iteration",)},
    "ppo_skewed_trl": TRL | SKEWED | {"phases": ("iteration",)},
    "ppo_tunix": MINI | {"peer": "tunix", "shape.model": "small-qwen2", "phases": ("iteration",)},
}


def get_config(name: str = "mini") -> ConfigDict:
    """The benchmark called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    values = PRESETS[name]
    groups = {name.partition(".")[0] for name in values if "." in name}
    config = ConfigDict({group: {} for group in sorted(groups)})
    config.update_from_flattened_dict(values)
    return config
