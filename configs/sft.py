r"""Fine-tuning runs (M1, and M3 where PPO starts), for experiments/sft.py.

    python experiments/sft.py --config=configs/sft.py:toyworld --config.init=runs/pretrain/model \
        --workdir=runs/sft

files                               rows of yours, of lengths that are measured on them
toyworld, toyworld_rlhf_init        the embedded world: M1, and M3 with a tenth of pretraining rows
debug, debug_rlhf_init              a few updates of a few rows
shared_data, shared_data_rlhf_init  8k Alpaca instructions, books mixed into M3
instructgpt_{1p3b,6b,175b}          spec SFT-2: 16 epochs, residual dropout 0.2, every epoch kept
instructgpt_*_rlhf_init             spec SFT-5: 2 epochs, a tenth of pretraining rows
tldr_1b                             Huang et al. 2024: one epoch, loss on the post as well
gpt4llm_7b, gpt4llm_small           Peng et al. 2023 on LLaMA-7B, and on a small model

The labelers' demonstrations of InstructGPT were never published: put yours under data/, or name
hub ids in --config.data.demonstrations.

--config.sft.pack_length=512 puts several demonstrations into a row of so many tokens, which train
as if each had a row of its own: the same targets in fewer, fuller rows, several times as fast. The
batch size then counts packed rows: divide it by the demonstrations that fit one. The small presets
do it; those of papers keep a demonstration a row.

What a preset leaves out has the default of its dataclass: in the stages, the paper's value.
"""

from ml_collections import ConfigDict

TOYWORLD = {
    "data.toy_documents": 40_000,
    "data.toy_demonstrations": 10_000,
    "sft.epochs": 3,
    "sft.batch_size": 16,
    "sft.prompt_length": 56,
    "sft.response_length": 24,
    "sft.pack_length": 112,
    "sft.learning_rate": 1e-3,
    "sft.residual_dropout": 0.0,
}

# One tenth of every batch is pretraining text; two epochs (SFT-5).
RLHF_INIT = {"sft.epochs": 2, "sft.pretrain_fraction": 0.1}

SHARED_DATA = {
    "data.source": "files",
    "data.documents": ("../shared/data/pretrain/gutenberg_16books.jsonl.gz",),
    "data.demonstrations": ("../shared/data/sft/alpaca_52k.jsonl.gz",),
    "data.template": "alpaca",
    "data.on_bad_row": "skip",
    "data.limit": 8_000,
    "sft.epochs": 1,
    "sft.batch_size": 16,
    "sft.prompt_length": 96,
    "sft.response_length": 96,
    "sft.pack_length": 256,
    "sft.learning_rate": 1e-3,
    "sft.residual_dropout": 0.0,
    "sft.save_every": 200,
}

INSTRUCTGPT = {
    "data.source": "files",
    "data.documents": ("data/pretrain/*.jsonl",),
    "data.demonstrations": ("data/demonstrations.jsonl",),
    "keep_epochs": True,
    "sft.epochs": 16,
    "sft.batch_size": 32,
    "sft.prompt_length": 1024,
    "sft.response_length": 1024,
    "sft.learning_rate": 9.65e-6,
    "sft.residual_dropout": 0.2,
    "sft.save_every": 200,
}
INSTRUCTGPT_175B = {"sft.batch_size": 8, "sft.learning_rate": 5.03e-6}

GPT4LLM = {
    "data.source": "files",
    "data.demonstrations": ("vicgalle/alpaca-gpt4",),
    "data.template": "alpaca",
    "data.test_fraction": 0.0,
    "sft.epochs": 3,
    "sft.batch_size": 64,
    # Stanford Alpaca cuts prompt and answer together at 512 tokens.
    "sft.prompt_length": 192,
    "sft.response_length": 320,
    "sft.learning_rate": 2e-5,
    "sft.warmup": 69,  # 3 % of 3 epochs of 95 % of 52,002 rows
    "sft.final_fraction": 0.0,
    "sft.adam.b2": 0.999,
    "sft.residual_dropout": 0.0,
    "sft.save_every": 500,
}

# prompt_length and response_length are the most that is taken.
FILES = {
    "data.source": "files",
    "measure_lengths": True,
    "sft.epochs": 3,
    "sft.batch_size": 8,
    "sft.pack_length": 512,
    "sft.learning_rate": 1e-4,
    "sft.residual_dropout": 0.0,
    "sft.save_every": 200,
}

PRESETS = {
    "files": FILES,
    "toyworld": TOYWORLD,
    # As many epochs as M1, so that PPO does not start behind the model it is compared with.
    "toyworld_rlhf_init": TOYWORLD | RLHF_INIT | {"sft.epochs": 3},
    "debug": TOYWORLD
    | {
        "data.toy_documents": 128,
        "data.toy_demonstrations": 64,
        "data.toy_valid": 16,
        "sft.epochs": 1,
        "sft.batch_size": 8,
        "sft.log_every": 1,
    },
    "debug_rlhf_init": TOYWORLD
    | {
        "data.toy_documents": 128,
        "data.toy_demonstrations": 64,
        "data.toy_valid": 16,
        "sft.epochs": 1,
        "sft.batch_size": 10,
        "sft.pretrain_fraction": 0.2,
    },
    "shared_data": SHARED_DATA,
    "shared_data_rlhf_init": SHARED_DATA | RLHF_INIT | {"sft.epochs": 1},
    "instructgpt_1p3b": INSTRUCTGPT,
    "instructgpt_6b": INSTRUCTGPT | {"sft.micro_batches": 2},
    "instructgpt_175b": INSTRUCTGPT | INSTRUCTGPT_175B,
    "instructgpt_1p3b_rlhf_init": INSTRUCTGPT | RLHF_INIT | {"sft.learning_rate": 5e-6},
    "instructgpt_6b_rlhf_init": INSTRUCTGPT
    | RLHF_INIT
    | {"sft.learning_rate": 1.04e-5, "sft.micro_batches": 2},
    "instructgpt_175b_rlhf_init": INSTRUCTGPT
    | INSTRUCTGPT_175B
    | RLHF_INIT
    | {"sft.learning_rate": 2.45e-6},
    "tldr_1b": {
        "data.source": "files",
        "data.demonstrations": ("trl-lib/tldr",),
        "sft.epochs": 1,
        "sft.batch_size": 128,
        "sft.prompt_length": 512,
        "sft.response_length": 53,
        "sft.learning_rate": 3e-6,
        "sft.final_fraction": 0.0,
        "sft.adam.b2": 0.999,
        "sft.adam.eps": 1e-5,
        "sft.residual_dropout": 0.0,
        "sft.loss_on_prompt": True,
        "sft.micro_batches": 8,
        "sft.save_every": 200,
    },
    "gpt4llm_7b": GPT4LLM | {"sft.micro_batches": 4},
    "gpt4llm_small": GPT4LLM | {"sft.learning_rate": 2e-4},
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "sft": {"adam": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
