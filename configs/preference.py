r"""Direct preference runs, for experiments/preference.py.

    python experiments/preference.py --config=configs/preference.py:toyworld \
        --config.init=runs/sft/model --workdir=runs/dpo

files          DPO on rankings or pairs of yours, of lengths that are measured on them
toyworld       DPO on the collected rankings of the embedded world, all pairs of a prompt at once
ipo, kto, orpo, simpo, cpo, dpo_sft, robust_dpo
               the same rows with another loss
debug          a few updates of a few rows
shared_data    K-wise AlpacaEval rankings and HH helpful pairs, from an Alpaca model
hh_2p8b        Rafailov et al. 2023, appendix B: HH pairs, beta 0.1, batch 64, 1e-6
tldr_6p9b      the same on TL;DR, beta 0.5

What a preset leaves out has the default of its dataclass.
"""

from ml_collections import ConfigDict

TOYWORLD = {
    "data.comparisons": ("runs/collect/comparisons.jsonl",),
    "data.valid_fraction": 0.15,
    "preference.batch_size": 16,
    "preference.completions": 4,
    "preference.prompt_length": 56,
    "preference.response_length": 24,
    "preference.learning_rate": 2e-4,
    "preference.warmup": 20,
    "preference.final_fraction": 0.1,
    "preference.eval_every": 50,
}
RAFAILOV = {
    "data.source": "files",
    "preference.micro_batches": 4,
    "preference.save_every": 500,
}

# The lengths are the most that is taken.
FILES = {
    "data.source": "files",
    "data.valid_fraction": 0.1,
    "measure_lengths": True,
    "preference.batch_size": 16,
    "preference.completions": 9,
    "preference.prompt_length": 1024,
    "preference.response_length": 1024,
    "preference.learning_rate": 1e-5,
    "preference.warmup": 0,
    "preference.final_fraction": 0.1,
    "preference.save_every": 100,
}

PRESETS = {
    "files": FILES,
    "toyworld": TOYWORLD,
    "ipo": TOYWORLD | {"preference.loss": "ipo"},
    "kto": TOYWORLD | {"preference.loss": "kto"},
    "orpo": TOYWORLD | {"preference.loss": "orpo"},
    "simpo": TOYWORLD | {"preference.loss": "simpo", "preference.beta": 2.0},
    "cpo": TOYWORLD | {"preference.loss": "cpo"},
    "dpo_sft": TOYWORLD | {"preference.loss": "dpo_sft"},
    "robust_dpo": TOYWORLD | {"preference.loss": "robust_dpo"},
    "debug": TOYWORLD
    | {
        "data.valid_fraction": 0.3,
        "data.test_fraction": 0.0,
        "preference.batch_size": 8,
        "preference.warmup": 2,
        "preference.log_every": 1,
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
        "data.template": "alpaca",
        "data.on_bad_row": "skip",
        "preference.batch_size": 16,
        "preference.completions": 4,
        "preference.prompt_length": 96,
        "preference.response_length": 96,
        "preference.learning_rate": 1e-4,
        "preference.warmup": 20,
        "preference.save_every": 50,
    },
    "hh_2p8b": RAFAILOV
    | {"data.comparisons": ("Anthropic/hh-rlhf",), "preference.prompt_length": 256},
    "tldr_6p9b": RAFAILOV
    | {
        "data.comparisons": ("trl-lib/tldr-preference",),
        "preference.beta": 0.5,
        "preference.response_length": 64,
    },
}


def get_config(name: str = "toyworld") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    config = ConfigDict({"data": {}, "preference": {"adam": {}}})
    config.update_from_flattened_dict(PRESETS[name])
    return config
