"""Rows, templates, tokenizers and batches: everything between a file and the first device array.

`formats` reads rows from files and hub ids, `prompts` prepares prompts as the paper did,
`templates` makes prompt text, `tokenizer` makes ids, `encoding` makes arrays, `loader` batches,
`corpus` keeps text of any size as files of tokens, `toyworld` is a world of its own that needs no
file.
NumPy only: nothing here knows jax.
"""

from instruct_jax.data.corpus import Corpus, Text
from instruct_jax.data.encoding import (
    encode_comparisons,
    encode_demonstrations,
    encode_dialogues,
    encode_documents,
    encode_prompts,
)
from instruct_jax.data.formats import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    FileReport,
    Prompt,
    Rows,
    Turn,
    hash_files,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
    stream_documents,
    write_rows,
)
from instruct_jax.data.loader import Batches, Mixture
from instruct_jax.data.pii import find_pii
from instruct_jax.data.prompts import Prepared, expand_few_shot, prepare_prompts
from instruct_jax.data.rows import PromptText, Segment, plain_text
from instruct_jax.data.templates import (
    ALPACA,
    CHAT,
    HH,
    PLAIN,
    Template,
    encode_texts,
    template_named,
)
from instruct_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from instruct_jax.data.tokens import TokenRows

__all__ = [
    "ALPACA",
    "CHAT",
    "HH",
    "PLAIN",
    "Batches",
    "Comparison",
    "Corpus",
    "DataError",
    "Demonstration",
    "Dialogue",
    "Document",
    "FileReport",
    "Mixture",
    "Prepared",
    "Prompt",
    "PromptText",
    "Rows",
    "Segment",
    "Template",
    "Text",
    "TokenRows",
    "Tokenizer",
    "Turn",
    "encode_comparisons",
    "encode_demonstrations",
    "encode_dialogues",
    "encode_documents",
    "encode_prompts",
    "encode_texts",
    "expand_few_shot",
    "find_pii",
    "hash_files",
    "load_tokenizer",
    "plain_text",
    "prepare_prompts",
    "read_comparisons",
    "read_demonstrations",
    "read_dialogues",
    "read_documents",
    "read_prompts",
    "stream_documents",
    "template_named",
    "train_bpe",
    "write_rows",
]
