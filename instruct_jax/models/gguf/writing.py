"""Our configuration and parameters into one GGUF file, by way of what Hugging Face calls it all.

The table has the tokenizer's tokens and no PAD: nothing in GGUF gives a row no logit. Norms,
biases and positions stay float32 whatever the rest is, as llama.cpp has them, and so does a matrix
whose rows are no multiple of a block (float16 then, in a file of Q8_0).
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from instruct_jax.data.gguf_tokenizer import tokenizer_metadata
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.gguf.architectures import ARCHITECTURES, Translation, metadata_of
from instruct_jax.models.gguf.container import Metadata, gguf_package
from instruct_jax.models.hf.container import ToWrite
from instruct_jax.models.hf.families import FAMILIES, family_of
from instruct_jax.models.hf.schema import write_config
from instruct_jax.models.hf.writing import tensors_to_write
from instruct_jax.models.transformer import Params

# Our names, and what a file of them is called in general.file_type.
GGUF_DTYPES = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16",
               "q8_0": "MOSTLY_Q8_0"}  # fmt: skip
_TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
_BLOCK = 32


def save_gguf(
    path: str | Path,
    config: TransformerConfig,
    params: Params,
    *,
    tokenizer: Tokenizer,
    chat_template: str | None = None,
    family: str | None = None,
    dtype: str = "float16",
    name: str | None = None,
    licence: str | None = None,
) -> Path:
    """Writes a new GGUF file of a language model, which appears whole or not at all; returns it.

    `params` are read one tensor at a time. `family` is a model_type, by default the first that can
    hold `config`; `dtype` one of `GGUF_DTYPES`. Raises UserError for a scalar model, for a model or
    tokenizer that llama.cpp would compute or split otherwise, for a number past float16's range,
    and where `path` exists.
    """
    path = Path(path)
    package = gguf_package()
    if path.exists():
        raise UserError(f"{path}: is there already; choose another file")
    if dtype not in GGUF_DTYPES:
        raise UserError(f"dtype={dtype!r} is not one of {', '.join(GGUF_DTYPES)}")
    if "head" in params:
        raise UserError("a reward or value model has no place in GGUF; export it with to_hf")
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "export the model with the tokenizer it was trained with"
        )
    architecture, model_type = _architecture(config, family)
    raw = write_config(FAMILIES[model_type], config)
    try:
        keys, further = metadata_of(architecture, raw)
        words = tokenizer_metadata(*_tokenizer_files(tokenizer), ends=tokenizer.stop_ids)
        translation = Translation(architecture, raw)
        flat: dict[str, Any] = flatten_dict(params, sep="/")
        tensors = tensors_to_write(config, model_type, flat, rows=config.vocab_size)
        plan = [(translation.name(tensor.name), tensor) for tensor in tensors]
    except ValueError as error:
        raise UserError(f"not to be written as GGUF: {error}") from error
    about: Metadata = {
        "general.type": "model",
        "general.name": name,
        "general.license": licence,
        "general.quantization_version": package.GGML_QUANT_VERSION,
        "general.file_type": int(package.LlamaFileType[GGUF_DTYPES[dtype]]),
        **{f"{architecture}.{key}": value for key, value in keys.items()},
        **words,
        "tokenizer.chat_template": chat_template,
    }
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = package.GGUFWriter(partial, architecture)
    try:
        _add_keys(writer, about)
        plan += [(key, ToWrite(key, x.shape, lambda x=x: x)) for key, x in further.items()]
        _write_tensors(writer, plan, translation, dtype)
    except BaseException:
        writer.close()
        partial.unlink(missing_ok=True)
        raise
    writer.close()
    partial.replace(path)
    return path


def _architecture(config: TransformerConfig, family: str | None) -> tuple[str, str]:
    """The architecture and the model_type that can hold `config`: the one asked for, else the
    first; UserError.
    """
    known = {form.model_type: name for name, form in ARCHITECTURES.items()}
    if family is not None and family not in known:
        raise UserError(f"no architecture of GGUF is written for {family!r}: {', '.join(known)}")
    reasons = []
    for model_type in [family] if family else known:
        if family is None and model_type == "phi3" and any(config.local_layers):
            reasons.append("llama.cpp leaves the window of phi3 out")
            continue
        try:
            family_of(config, model_type)
            return known[model_type], model_type
        except ValueError as error:
            reasons.append(str(error))
    # That of the nearest, which has the least to say.
    raise UserError(f"no architecture of GGUF has this configuration: {min(reasons, key=len)}")


def _tokenizer_files(tokenizer: Tokenizer) -> tuple[dict[str, Any], dict[str, Any]]:
    with tempfile.TemporaryDirectory() as temporary:
        tokenizer.save(temporary)
        return tuple(
            json.loads((Path(temporary) / file).read_text(encoding="utf-8"))
            for file in ("tokenizer.json", "tokenizer_config.json")
        )


def _add_keys(writer: Any, about: Metadata) -> None:
    for key, value in about.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)


def _write_tensors(
    writer: Any, plan: list[tuple[str, ToWrite]], translation: Translation, dtype: str
) -> None:
    package = gguf_package()
    kinds = []
    for key, tensor in plan:
        shape = tensor.shape
        if key == tensor.name:  # one that only GGUF has
            form = np.asarray
        else:
            form = translation.into(tensor.name)
            shape = shape[::-1] if form is np.transpose else shape
        kind = package.GGMLQuantizationType[_type_of(key, shape, dtype)]
        kinds.append((form, kind))
        stored = shape
        if kind.name == "Q8_0":
            stored = package.quants.quant_shape_to_byte_shape(shape, kind)
        elif kind.name == "BF16":
            stored = (*shape[:-1], 2 * shape[-1])
        number = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
        size = int(np.prod(stored, dtype=np.int64)) * np.dtype(number).itemsize
        writer.add_tensor_info(key, stored, np.dtype(number), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for (key, tensor), (form, kind) in zip(plan, kinds, strict=True):
        value = np.ascontiguousarray(form(tensor.make()), np.float32)
        if kind.name in ("F16", "Q8_0") and not np.abs(value).max(initial=0.0) < 65_504:
            raise UserError(f"{key} has a number past float16's range; write bfloat16 or float32")
        writer.write_tensor_data(package.quants.quantize(value, kind))


def _type_of(key: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) < 2 or key.startswith("position_embd"):
        return "F32"
    if dtype == "q8_0" and shape[-1] % _BLOCK:
        return "F16"
    return _TYPES[dtype]
