r"""Hugging Face folders and GGUF files in and out, for experiments/convert.py.

    python experiments/convert.py --config=configs/convert.py:from_hf --workdir=runs/pythia \
        --config.source=EleutherAI/pythia-160m
    python experiments/convert.py --config=configs/convert.py:to_hf --workdir=runs/exported \
        --config.source=runs/sft/model
    python experiments/convert.py --config=configs/convert.py:from_gguf --workdir=runs/smollm2 \
        --config.source=SmolLM2-135M-Instruct-Q4_K_M.gguf
    python experiments/convert.py --config=configs/convert.py:to_gguf --workdir=runs/exported \
        --config.source=runs/sft/model

from_hf    a folder or hub id -> WORKDIR/model, which every stage starts from; where tokens were
           added to its tokenizer and not to its tables, --config.resize=True adds their rows
to_hf      a stage's `model` folder -> WORKDIR/hf, which transformers loads
to_hf_bf16 the same in half the bytes
from_gguf  a GGUF file, its tokenizer and its template -> WORKDIR/model
to_gguf    a stage's `model` folder -> WORKDIR/model.gguf, for llama.cpp, Ollama or LM Studio, in
           float16; --config.dtype=q8_0 (bfloat16, float32) for another size
"""

from ml_collections import ConfigDict

PRESETS = {
    "from_hf": {"direction": "from_hf"},
    "to_hf": {"direction": "to_hf"},
    "to_hf_bf16": {"direction": "to_hf", "dtype": "bfloat16"},
    "from_gguf": {"direction": "from_gguf"},
    "to_gguf": {"direction": "to_gguf", "dtype": "float16"},
}


def get_config(name: str = "from_hf") -> ConfigDict:
    """The run called `name`."""
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; there are {', '.join(PRESETS)}")
    return ConfigDict(PRESETS[name])
