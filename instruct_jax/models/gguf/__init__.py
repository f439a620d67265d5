"""GGUF files in and out: the format of llama.cpp, Ollama and LM Studio.

Needs the package `gguf` (pip install -e '.[gguf]'), which the functions say where it is missing.
"""

from instruct_jax.models.gguf.architectures import ARCHITECTURES
from instruct_jax.models.gguf.container import gguf_package
from instruct_jax.models.gguf.reading import open_gguf
from instruct_jax.models.gguf.writing import GGUF_DTYPES, save_gguf

__all__ = ["ARCHITECTURES", "GGUF_DTYPES", "gguf_package", "open_gguf", "save_gguf"]
