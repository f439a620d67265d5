"""GGUF files into our configuration and parameters, by way of what Hugging Face calls it all.

A file is translated into the small files of a Hugging Face folder, which lie in a temporary one,
and into tensors by their names there; `models/hf` reads those as it reads any folder. Numbers are
dequantised one tensor at a time, as they are asked for.
"""

import contextlib
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from instruct_jax.data.gguf_tokenizer import chat_template, tokenizer_files
from instruct_jax.data.tokenizer import CHAT_FILE, Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.files import write_text
from instruct_jax.models.gguf.architectures import (
    ARCHITECTURES,
    ROPE_TENSORS,
    Form,
    Translation,
    config_of,
)
from instruct_jax.models.gguf.container import Metadata, Numbers, gguf_package, read_container
from instruct_jax.models.hf.container import Source, printable
from instruct_jax.models.hf.layout import parameter_shapes, pieces
from instruct_jax.models.hf.reading import Pretrained, inspect_pretrained
from instruct_jax.models.hf.schema import Raw

_MOST_FACTORS = 65_536
_REPOSITORY = re.compile(r"(?:https://huggingface\.co/)?([\w-][\w.-]*/[\w-][\w.-]*)")


class Translated(NamedTuple):
    """A tensor of a GGUF file in the form that transformers has it in."""

    path: Path
    kind: str
    shape: tuple[int, ...]
    numbers: Numbers
    form: Form

    def open(self) -> np.ndarray:
        """f32[shape]."""
        return self.form(self.numbers.open())


@contextlib.contextmanager
def open_gguf(
    path: str | Path, *, tokenizer: Tokenizer | None = None, resize: bool = False
) -> Iterator[Pretrained]:
    """What a GGUF file holds, for `read_pretrained` within the block.

    `tokenizer` stands in for the file's own; `resize` is that of `inspect_pretrained`. Raises
    UserError for a file that is damaged or hostile, for an architecture, tokenizer or quantisation
    that is not read, and for tensors that do not fit the metadata; nothing of the size that a file
    claims is made before it is checked.
    """
    path = Path(path)
    gguf_package()
    metadata, tensors = read_container(path)
    name = metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{path}: general.architecture={printable(str(name), 40)} is not read; "
            f"read: {', '.join(ARCHITECTURES)}"
        )
    if metadata.get("split.count", 0) not in (0, 1):
        raise UserError(f"{path}: one of several files; join them with llama-gguf-split --merge")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        try:
            try:
                raw = _write_folder(folder, name, metadata, tensors, own=tokenizer is None)
                found = inspect_pretrained(folder, tokenizer=tokenizer, resize=resize)
                stored = _stored(name, raw, found, tensors)
            except ValueError as error:
                raise UserError(f"{path}: {error}") from error
            title, licence = _origin(path, metadata)
            yield found._replace(stored=stored, name=title, licence=licence)
        except UserError as error:  # it names files that nobody has
            told = re.sub(rf"{re.escape(temporary)}(/[\w.]+)?", str(path), str(error))
            raise UserError(told) from error


def _write_folder(
    folder: Path, name: str, metadata: Metadata, tensors: dict[str, Numbers], *, own: bool
) -> Raw:
    """The files of a Hugging Face folder, all but the weights; returns its config.json."""
    if "token_embd.weight" not in tensors:
        raise ValueError("token_embd.weight is missing")
    factors = {}
    for tensor in ROPE_TENSORS:
        if tensor in tensors:
            if max(tensors[tensor].shape) > _MOST_FACTORS:
                raise ValueError(f"{tensor} has the shape {list(tensors[tensor].shape)}")
            factors[tensor] = tensors[tensor].open()
    raw = config_of(name, metadata, factors) | {
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    files = {"config.json": raw}
    if own:
        files |= tokenizer_files(metadata, name)
    for file, value in files.items():
        write_text(folder / file, json.dumps(value))
    template = chat_template(metadata)
    if template is not None:
        write_text(folder / CHAT_FILE, template)
    return raw


def _stored(
    name: str, raw: Raw, found: Pretrained, tensors: dict[str, Numbers]
) -> dict[str, Source]:
    """Tensors by transformers' names; those that have none keep their own."""
    rows = raw["vocab_size"]
    if found.config.num_layers > len(tensors):
        raise ValueError(f"{name}.block_count={found.config.num_layers}, of {len(tensors)} tensors")
    translation = Translation(name, raw)
    left = {key: value for key, value in tensors.items() if key not in ROPE_TENSORS}
    _, shapes = parameter_shapes(found.config, "language")
    stored: dict[str, Source] = {}
    own = {"lm_head.weight"}
    for piece in pieces(found.config, found.family, shapes, rows=rows, kept=rows):
        if piece.name in stored:
            continue
        theirs = piece.name if piece.name in own else found.family.prefix + piece.name
        numbers = left.pop(translation.name(theirs), None)
        if numbers is not None:
            form = translation.out_of(theirs)
            shape = numbers.shape[::-1] if form is np.transpose else numbers.shape
            stored[piece.name] = Translated(numbers.path, "F32", shape, numbers, form)
    return stored | {
        key: Translated(value.path, "F32", value.shape, value, np.asarray)
        for key, value in left.items()
    }


def _origin(path: Path, metadata: Metadata) -> tuple[str, str | None]:
    """What the model is called: a hub id where the file names one, else as the file is."""
    said = [metadata.get(f"general.{key}") for key in ("source.repo_url", "repo_url")]
    said.append(metadata.get("general.source.huggingface.repository"))
    ids = [match[1] for one in said if (match := _REPOSITORY.fullmatch(str(one)))]
    licence = metadata.get("general.license")
    known = isinstance(licence, str) and re.fullmatch(r"[\w.+-]{1,60}", licence)
    return next(iter(ids), path.stem), str(licence) if known else None
