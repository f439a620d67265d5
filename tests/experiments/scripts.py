"""What the tests of the scripts share: a model folder to start from, rows on disk, a launcher."""

import json
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from instruct_jax.data.tokenizer import Tokenizer, train_bpe
from instruct_jax.models.transformer import (
    TransformerConfig,
    language_model,
    scalar_from_language,
)
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "small",
    "red",
    "dog",
    "run",
    "far",
    "away",
]


def tokenizer(words: Sequence[str] = WORDS) -> Tokenizer:
    """A byte-level BPE of a few words."""
    return train_bpe([" ".join(words)] * 4, vocab_size=300)


def write_model(folder: Path, *, reads: Tokenizer | None = None) -> Path:
    """A random language model of two layers."""
    reads = tokenizer() if reads is None else reads
    shape = TransformerConfig(
        vocab_size=reads.vocab_size,
        num_layers=2,
        d_model=32,
        num_heads=2,
        max_length=128,
        scan_unroll=2,
    )
    params = language_model(shape).init(jax.random.key(0))
    return save_trained(folder, TrainedModel("language", shape, params, reads, "pretrain"))


def write_reward_model(folder: Path, start: Path) -> Path:
    """A reward model on the trunk of the model in `start`."""
    model = load_trained(start)
    params = scalar_from_language(model.params, jax.random.key(0), model.config)
    return save_trained(folder, model._replace(kind="scalar", params=params, stage="reward_model"))


def sentence(i: int, length: int = 5) -> str:
    """The i-th sentence of WORDS."""
    return " ".join(WORDS[(i * 7 + j * (1 + i % 5)) % len(WORDS)] for j in range(length))


def write_rows(folder: Path, rows: int = 60) -> dict[str, Path]:
    """Documents, demonstrations, comparisons and prompts as JSONL files."""
    contents: dict[str, list[dict[str, Any]]] = {
        "documents": [{"text": sentence(i, 40)} for i in range(rows)],
        "demonstrations": [
            {"prompt": sentence(i), "response": sentence(i + 1, 3)} for i in range(rows)
        ],
        "comparisons": [
            {
                "prompt": sentence(i),
                "completions": [sentence(i + k, 1 + k) for k in range(3)],
                "ranks": [k % 3 for k in range(i, i + 3)],
            }
            for i in range(rows)
        ],
        "prompts": [{"prompt": sentence(i)} for i in range(rows)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in contents}
    for name, path in paths.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in contents[name]))
    return paths


def environment(repository: Path) -> dict[str, str]:
    """That of a process of its own: this checkout's package, as strict as the tests are, and no
    devices but those it asks for.
    """
    return os.environ | {
        "PYTHONPATH": str(repository),
        # As in conftest.py, without its eight devices.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
    }


def launch(script: str, *argv: str) -> None:
    """The script as a user starts it, in this process."""
    path, before = EXPERIMENTS / f"{script}.py", sys.argv
    sys.argv = [str(path), *argv]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before
