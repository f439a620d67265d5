"""Hugging Face folders into our configuration and parameters.

Nothing is unpickled and no code of the folder is run. config.json, names, dtypes and shapes are
checked against the headers before any number is read; then the parameters are filled one shard of
one stacked parameter at a time, straight onto the devices when shardings are given.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from instruct_jax.data.tokenizer import Tokenizer, load_tokenizer
from instruct_jax.errors import UserError
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.families import parameter_count
from instruct_jax.models.hf.container import FLOATS, Source, open_weights, printable, read_header
from instruct_jax.models.hf.folder import (
    TOKENIZER_FILES,
    find_folder,
    origin_of,
    read_raw_config,
)
from instruct_jax.models.hf.layout import Piece, clip, parameter_shapes, pieces, sizes
from instruct_jax.models.hf.schema import Family, Raw, read_config, shown
from instruct_jax.models.transformer import Params

HEAD_FILE = "scalar_head.safetensors"
"""Written beside a scalar model for what transformers has no place for; see writing.py."""

DTYPES = ("float32", "bfloat16", "float16")


class Pretrained(NamedTuple):
    """What a folder says it holds, before any of its numbers is read."""

    folder: Path
    kind: str
    config: TransformerConfig
    family: Family
    raw: Raw
    tokenizer: Tokenizer | None
    """The folder's own, or the one it was inspected with."""
    name: str
    """A hub id where one is known, else the bare name of the folder."""
    licence: str | None
    """What its README.md says."""
    stored: Mapping[str, Source] | None = None
    """Tensors without the family's prefix, where they are not in files of the folder."""


def inspect_pretrained(
    source: str | Path,
    *,
    revision: str | None = None,
    ignore_code: bool = False,
    tokenizer: Tokenizer | None = None,
    resize: bool = False,
) -> Pretrained:
    """The kind ("language" or "scalar") and configuration of a folder or hub id.

    The vocabulary ends where that of the tokenizer does (`tokenizer`, or else the folder's): rows
    past it are padding. Raises UserError for a folder that cannot be read, and for a tokenizer
    with tokens that the tables have no row for, unless the caller will `resize` them.
    """
    folder = find_folder(source, revision=revision)
    _, family, raw = read_raw_config(folder, ignore_code=ignore_code)
    path = folder / "config.json"
    if tokenizer is None and any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = load_tokenizer(folder)
    try:
        vocab_size = _vocab_size(path, raw, tokenizer, resize=resize)
        config = read_config(family, {**raw, "vocab_size": vocab_size})
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing") from error
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: {error}") from error
    names = raw.get("architectures")
    scalar = isinstance(names, list) and family.scalar in names
    kind = "scalar" if scalar else "language"
    name, licence = origin_of(source, folder, raw)
    return Pretrained(folder, kind, config, family, raw, tokenizer, name, licence)


def load_pretrained(
    source: str | Path,
    *,
    dtype: str = "float32",
    shardings: Callable[[Params], Any] | None = None,
    revision: str | None = None,
    ignore_code: bool = False,
) -> tuple[TransformerConfig, Params]:
    """`read_pretrained` of what `inspect_pretrained` finds in a folder or hub id."""
    found = inspect_pretrained(source, revision=revision, ignore_code=ignore_code)
    return read_pretrained(found, dtype=dtype, shardings=shardings)


def read_pretrained(
    found: Pretrained,
    *,
    dtype: str = "float32",
    shardings: Callable[[Params], Any] | None = None,
) -> tuple[TransformerConfig, Params]:
    """The model of an inspected folder, its vocabulary padded to our rule.

    A folder of a *ForSequenceClassification gives the parameters of a scalar model. They are
    NumPy arrays of `dtype`; with `shardings`, which maps the abstract parameters to a tree of
    shardings, they are device arrays, and the host never holds more than one shard. Raises
    UserError for a folder, a family or an option that cannot be read, and lists the names of
    tensors that are missing or unexpected.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}")
    kind = FLOATS[{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]]
    stored = found.stored
    if stored is None:
        stored = _strip(found.family, open_weights(found.folder))
    extra = _read_head(found)
    _check_size(found, stored)
    tree, shapes = parameter_shapes(found.config, found.kind)
    rows, kept = found.raw["vocab_size"], found.config.vocab_size
    plan = list(pieces(found.config, found.family, shapes, rows=rows, kept=kept))
    _check(found, plan, stored)

    placed: dict[str, Any] = dict.fromkeys(shapes)
    if shardings is not None:
        placed = flatten_dict(shardings(tree), sep="/")
    by_path: dict[str, list[Piece]] = {}
    for piece in plan:
        by_path.setdefault(piece.path, []).append(piece)
    params = {}
    for path, leaf in shapes.items():

        def read(window: tuple[slice, ...], path: str = path) -> np.ndarray:
            if path in extra or path not in by_path:
                value = extra.get(path, np.zeros(shapes[path].shape))
                return value[window].astype(kind)
            return _read_window(by_path[path], stored, window, shapes[path].shape, kind)

        params[path] = _place(read, leaf.shape, placed[path])
    return found.config, unflatten_dict(params, sep="/")


def _vocab_size(path: Path, raw: Raw, tokenizer: Tokenizer | None, *, resize: bool) -> int:
    stored = raw.get("vocab_size")
    if stored is None:
        raise KeyError("vocab_size")
    if type(stored) is not int or stored < 1:
        raise ValueError(f"vocab_size={shown(stored)} is not a size")
    own = raw.get("instruct_jax")
    own = own.get("vocab_size") if isinstance(own, dict) else None
    # An export of ours has PAD behind its vocabulary, where an added token would come to lie.
    ours = type(own) is int and 0 < own <= stored
    rows = own if ours else stored
    tokens = rows if tokenizer is None else tokenizer.vocab_size
    if tokens > rows and not resize:
        raise UserError(
            f"{path}: the model has {rows} tokens, its tokenizer {tokens}: tokens were added and "
            "the tables not resized; give the tokenizer that belongs to it, or import it with "
            "experiments/convert.py --config.resize=True, which adds the rows"
        )
    if tokens < rows and ours:
        raise UserError(
            f"{path}: the model has {rows} tokens, its tokenizer {tokens}: put back the tokenizer "
            "that it was exported with"
        )
    return min(rows, tokens)


def _strip(family: Family, stored: Mapping[str, Source]) -> dict[str, Source]:
    """Tensors by their name without the family's prefix, under its usual alias."""
    parts = family.prefix.split(".")[:-1]
    prefixes = [".".join(parts[i:]) + "." for i in range(len(parts))]
    short: dict[str, Source] = {}
    for name, tensor in stored.items():
        prefix = next((p for p in prefixes if name.startswith(p)), "")
        bare = name.removeprefix(prefix)
        bare = family.aliases.get(bare, bare)
        if bare in short:
            raise UserError(f"{tensor.path}: the tensor {name!r} is there twice")
        short[bare] = tensor
    return short


def _check_size(found: Pretrained, stored: Mapping[str, Source]) -> None:
    """Refuses absurd sizes while they are still only numbers in a JSON file."""
    held = sum(int(np.prod(tensor.shape, dtype=object)) for tensor in stored.values())
    described = parameter_count(found.config)
    if found.config.num_layers > len(stored) or described > 2 * held + 1_000:
        raise UserError(
            f"{found.folder}: config.json describes {found.config.num_layers} layers and "
            f"{described} parameters, the files hold {len(stored)} tensors and {held}"
        )


def _read_head(found: Pretrained) -> dict[str, np.ndarray]:
    """The head bias and the final norm's own bias that writing.py kept."""
    path = found.folder / HEAD_FILE
    if found.kind != "scalar" or not path.is_file():
        return {}
    tensors = read_header(path)
    wanted = {"head/bias": (1,), "final_norm/bias": (found.config.d_model,)}
    for name, tensor in tensors.items():
        if wanted.get(name) != tensor.shape or tensor.kind not in FLOATS:
            raise UserError(f"{path}: {name[:80]!r} is {tensor.kind}{list(tensor.shape)}")
    return {name: tensor.open() for name, tensor in tensors.items()}


def _read_window(
    of_layers: list[Piece],
    stored: Mapping[str, Source],
    window: tuple[slice, ...],
    shape: tuple[int, ...],
    dtype: np.dtype,
) -> np.ndarray:
    """One window of one stacked parameter."""
    full = clip(window, shape)
    out = np.zeros(sizes(full), dtype)
    stacked = of_layers[0].layer is not None
    for piece in of_layers[full[0]] if stacked else of_layers:
        inner = full[1:] if stacked else full
        target = out[piece.layer - full[0].start] if piece.layer is not None else out
        inside = sizes(clip(inner, piece.limits))
        value = piece.oriented(stored[piece.name].open())[piece.place(inner)]
        target[tuple(slice(size) for size in inside)] = value  # the rest is vocabulary padding
    return out


def _place(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Any
) -> np.ndarray | jax.Array:
    """The whole parameter in host memory, or shard after shard on its devices."""
    if sharding is None:
        return read(tuple(slice(size) for size in shape))
    devices: dict[tuple[tuple[int | None, int | None], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        devices.setdefault(tuple((part.start, part.stop) for part in index), []).append(device)
    shards = []
    for bounds, copies in devices.items():
        value = read(tuple(slice(*bound) for bound in bounds))
        # Copies, so that the host's array is free before the next one is made.
        placed = [jax.device_put(value, device, may_alias=False) for device in copies]
        shards += jax.block_until_ready(placed)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _check(found: Pretrained, plan: list[Piece], stored: Mapping[str, Source]) -> None:
    known = {piece.name for piece in plan}
    allowed = set(known)
    if found.config.tie_embeddings and found.kind == "language":
        allowed.add(found.family.tensors["unembedding/kernel"].name)  # a copy of the table
    problems = {
        "missing": known - stored.keys(),
        "unexpected": {
            name for name in stored.keys() - allowed if not re.fullmatch(found.family.ignored, name)
        },
    }
    for piece in plan:
        if piece.name in stored:
            kind, shape = stored[piece.name].kind, stored[piece.name].shape
            if kind not in FLOATS or shape != piece.shape:
                problems.setdefault(f"not float{list(piece.shape)}", set()).add(
                    f"{piece.name} is {kind}{list(shape)}"
                )
    told = [
        f"{len(names)} {problem}: {', '.join(map(printable, sorted(names)[:8]))}"
        f"{', ...' if len(names) > 8 else ''}"
        for problem, names in problems.items()
        if names
    ]
    if told:
        raise UserError(f"{found.folder}: the tensors do not fit config.json; {'; '.join(told)}")
