"""Our configuration and parameters into a folder that transformers loads.

A language model becomes a *ForCausalLM, a reward or value model a *ForSequenceClassification with
one label; `families.py` finds the model_type.

Vocabulary: our tables have `vocab_size` real rows, then PAD, then rows that only round up. The
folder has the first `vocab_size + 1`: PAD is a token there (`pad_token_id`), and because our logit
mask does not exist in transformers, generation_config.json suppresses it.

Head bias: the score head of transformers has none. Where the last norm has a bias, ours is folded
into it (w . (y + b w / |w|^2) = w . y + b), so scores are equal; where it has not (RMSNorm), scores
there are lower by the bias, which config.json and the model card name. In both cases
scalar_head.safetensors keeps what was changed, and `load_pretrained` gives it back to the bit.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from instruct_jax import __version__
from instruct_jax.data.tokenizer import GENERATION_FILE, Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.files import PARTIAL, json_text, write_text
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.hf.container import (
    FLOATS,
    INDEX,
    WEIGHTS,
    ToWrite,
    write_file,
    write_weights,
)
from instruct_jax.models.hf.families import FAMILIES, family_of
from instruct_jax.models.hf.layout import Piece, pieces
from instruct_jax.models.hf.reading import DTYPES, HEAD_FILE
from instruct_jax.models.hf.schema import write_config
from instruct_jax.models.hf.text import CHAT_FILE, write_tokenizer
from instruct_jax.models.transformer import Params

SHARD_BYTES = 5_000_000_000
# All that may be in a folder that is written here; "*" is any part of a name.
_FILES = (
    "config.json", "generation_config.json", WEIGHTS, INDEX, "model-*-of-*.safetensors", HEAD_FILE,
    "tokenizer.json", "tokenizer_config.json", CHAT_FILE, "README.md",
)  # fmt: skip


def exported_files(directory: str) -> tuple[str, ...]:
    """The names of what `save_pretrained` writes for `directory`, before it is whole as well."""
    folders = (directory, str(_partial(Path(directory))))
    return tuple(f"{folder}/{name}" for folder in folders for name in _FILES)


def save_pretrained(
    directory: str | Path,
    config: TransformerConfig,
    params: Params,
    *,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    card: str | None = None,
    family: str | None = None,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
    again: bool = False,
) -> Path:
    """Writes a new folder, which appears whole or not at all; returns it. With `again` an earlier
    export there is replaced.

    `params` are those of a language or a scalar model, on the host or on devices; they are read
    one tensor at a time. `family` is a model_type, by default the first that can hold `config`.
    Raises UserError where none can, where `directory` exists, and where the folder beside it in
    which it is made (`.NAME.partial`) holds anything but what a killed export has left.
    """
    directory = Path(directory)
    if again and directory.exists():
        _exported(directory)
    elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory}: is there already; choose another folder")
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    if shard_bytes < 1:
        raise UserError(f"shard_bytes={shard_bytes}: expected 1 or more")
    try:
        model_type = family_of(config, family)
    except ValueError as error:
        raise UserError(str(error)) from error
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    kind = "scalar" if "head/kernel" in flat else "language"
    kept: dict[str, np.ndarray] = {}
    if kind == "scalar":
        flat, kept = _fold_bias(flat)

    partial = _partial(directory)
    _empty(partial)
    numbers = FLOATS[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]]
    tensors = tensors_to_write(config, model_type, flat, rows=config.vocab_size + 1)
    write_weights(partial, tensors, numbers, max_bytes=shard_bytes)
    if kept:
        tensors = [ToWrite(name, x.shape, lambda x=x: x) for name, x in kept.items()]
        write_file(partial / HEAD_FILE, tensors, FLOATS["F32"])
    raw = _config_json(config, model_type, kind, dtype, tokenizer)
    if kind == "scalar":
        folded = "final_norm/bias" in flat
        raw["instruct_jax"] |= {"head_bias": float(kept["head/bias"][0]), "bias_is_folded": folded}
    write_text(partial / "config.json", json_text(raw))
    if tokenizer is not None:
        write_tokenizer(partial, tokenizer, config, chat_template)
    if kind == "language":
        write_text(partial / GENERATION_FILE, json_text(_generation(config, tokenizer)))
    if card is not None:
        write_text(partial / "README.md", card)
    if directory.exists():
        _empty(directory)
        directory.rmdir()
    partial.replace(directory)
    return directory


def _partial(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.partial")


def _empty(folder: Path) -> None:
    """Makes the folder, and deletes in it what another export has left."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in _exported(folder):
        path.unlink()


def _exported(folder: Path) -> list[Path]:
    """The files in a folder of an export. UserError where anything else is in it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise UserError(f"{folder}: no folder of an export; move it away")
    found = sorted(folder.iterdir())
    for path in found:
        known = any(fnmatchcase(path.name.removesuffix(PARTIAL), name) for name in _FILES)
        if not known or path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: not of an export; move it away")
    return found


def _generation(config: TransformerConfig, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The defaults that came in with the weights, where they did; PAD is ours and never drawn."""
    own = {"pad_token_id": config.pad_id, "suppress_tokens": [config.pad_id]}
    if tokenizer is None:
        return own
    ends = tokenizer.stop_ids
    return {**tokenizer.generation, "eos_token_id": list(ends) if len(ends) > 1 else ends[0], **own}


def _config_json(
    config: TransformerConfig, model_type: str, kind: str, dtype: str, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    family = FAMILIES[model_type]
    named = {} if tokenizer is None else tokenizer.named
    bos = tokenizer.id_of(named["bos_token"]) if tokenizer and "bos_token" in named else None
    raw = {
        "architectures": [family.language if kind == "language" else family.scalar],
        "model_type": model_type,
        **write_config(family, config),
        "vocab_size": config.vocab_size + 1,
        "pad_token_id": config.pad_id,
        "bos_token_id": bos,
        "eos_token_id": None if tokenizer is None else tokenizer.eos_id,
        "dtype": dtype,
        "instruct_jax": {"version": __version__, "vocab_size": config.vocab_size},
    }
    if kind == "scalar":
        raw |= {"num_labels": 1, "id2label": {"0": "score"}, "label2id": {"score": 0}}
    return raw


def _fold_bias(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The parameters with the head's bias in the last norm's, and what was changed."""
    kept = {"head/bias": _host(flat["head/bias"])}
    if "final_norm/bias" not in flat:
        return flat, kept
    own = kept["final_norm/bias"] = _host(flat["final_norm/bias"])
    w = _host(flat["head/kernel"])[:, 0].astype(np.float64)
    norm = float(w @ w)
    if norm == 0.0:
        raise UserError(
            "the head's kernel is zero, so its bias cannot be folded into the last norm; "
            "this model scores every text alike"
        )
    shifted = own + w * (float(kept["head/bias"][0]) / norm)
    return {**flat, "final_norm/bias": shifted.astype(np.float32)}, kept


def tensors_to_write(
    config: TransformerConfig, model_type: str, flat: dict[str, Any], *, rows: int
) -> list[ToWrite]:
    """Every stored tensor by transformers' name, made of its pieces when it is written.

    `flat` are parameters by their path; of the vocabulary tables the first `rows` are stored.
    """
    family = FAMILIES[model_type]
    by_name: dict[str, list[Piece]] = {}
    for piece in pieces(config, family, flat, rows=rows, kept=rows):
        by_name.setdefault(piece.name, []).append(piece)

    def make(parts: list[Piece]) -> np.ndarray:
        stored = np.zeros(parts[0].shape, np.float32)
        for piece in parts:
            value = flat[piece.path] if piece.layer is None else flat[piece.path][piece.layer]
            window = tuple(slice(limit) for limit in piece.limits)
            piece.oriented(stored)[piece.place(window)] = _host(value)[window]
        return stored

    own = {"lm_head.weight", "score.weight", "embed_out.weight"}
    return [
        ToWrite(name if name in own else family.prefix + name, parts[0].shape,
                lambda parts=parts: make(parts))
        for name, parts in by_name.items()
    ]  # fmt: skip


def _host(x: Any) -> np.ndarray:
    return np.asarray(jax.device_get(x)).astype(np.float32)
