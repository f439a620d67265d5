"""The only Flax code: decoders as pure functions of nested parameter dicts."""

from instruct_jax.models.adapters import LoraConfig, adapt, merge, unmerge
from instruct_jax.models.families import PRESETS, parameter_count, preset
from instruct_jax.models.hf import inspect_pretrained, load_pretrained, save_pretrained
from instruct_jax.models.llama2c import load_llama2c
from instruct_jax.models.transformer import (
    PARTITION_RULES,
    Cache,
    LanguageModel,
    Model,
    ScalarModel,
    TransformerConfig,
    final_scores,
    init_cache,
    language_model,
    response_values,
    scalar_from_language,
    scalar_model,
    token_positions,
    unstack_layers,
)
from instruct_jax.models.vocabulary import resize_vocabulary

__all__ = [
    "PARTITION_RULES",
    "PRESETS",
    "Cache",
    "LanguageModel",
    "LoraConfig",
    "Model",
    "ScalarModel",
    "TransformerConfig",
    "adapt",
    "final_scores",
    "init_cache",
    "inspect_pretrained",
    "language_model",
    "load_llama2c",
    "load_pretrained",
    "merge",
    "parameter_count",
    "preset",
    "resize_vocabulary",
    "response_values",
    "save_pretrained",
    "scalar_from_language",
    "scalar_model",
    "token_positions",
    "unmerge",
    "unstack_layers",
]
