"""The only Flax code: decoders as pure functions of nested parameter dicts."""

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

__all__ = [
    "PARTITION_RULES",
    "Cache",
    "LanguageModel",
    "Model",
    "ScalarModel",
    "TransformerConfig",
    "final_scores",
    "init_cache",
    "language_model",
    "response_values",
    "scalar_from_language",
    "scalar_model",
    "token_positions",
    "unstack_layers",
]
