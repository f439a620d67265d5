"""Hugging Face folders in and out: config.json, safetensors, tokenizer and chat template.

`families.py` says what a family is and how to add one. No torch, no pickle, and no code of a
folder is ever run.
"""

from instruct_jax.models.hf.card import model_card
from instruct_jax.models.hf.families import FAMILIES, family_of
from instruct_jax.models.hf.layout import parameter_shapes
from instruct_jax.models.hf.reading import (
    Pretrained,
    inspect_pretrained,
    load_pretrained,
    read_pretrained,
)
from instruct_jax.models.hf.text import chat_template_of
from instruct_jax.models.hf.writing import exported_files, save_pretrained

__all__ = [
    "FAMILIES",
    "Pretrained",
    "chat_template_of",
    "exported_files",
    "family_of",
    "inspect_pretrained",
    "load_pretrained",
    "model_card",
    "parameter_shapes",
    "read_pretrained",
    "save_pretrained",
]
