"""Which folder a name stands for: a path, or the snapshot of a hub id."""

import re
from pathlib import Path

from instruct_jax.data.hub import is_hub_id
from instruct_jax.errors import UserError
from instruct_jax.models.hf.container import read_json
from instruct_jax.models.hf.families import FAMILIES
from instruct_jax.models.hf.schema import Family, Raw

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LONGEST_CARD = 65_536

# What is downloaded: no pickles, no code, no other framework's weights.
PATTERNS = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "scalar_head.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template.jinja",
    "README.md",
)
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.json.gz", "vocab.json")


def find_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The folder called `source`; a hub id ("OWNER/NAME" or "hf:NAME") is downloaded first.

    Raises UserError when there is neither.
    """
    if Path(source).exists() or not is_hub_id(str(source)):
        if not Path(source).is_dir():
            raise UserError(f"{source}: neither a folder nor a hub id (OWNER/NAME or hf:NAME)")
        return Path(source)
    name = str(source).removeprefix("hf:")
    import huggingface_hub  # a quarter of a second that a local folder does not need

    try:
        snapshot = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(PATTERNS)
        )
    except Exception as error:  # a dozen kinds, of three libraries; all mean "not to be had"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: no such folder, and not to be had from the hub ({reason}); "
            "check the id and the connection, or give a folder"
        ) from error
    return Path(snapshot)


def origin_of(source: str | Path, folder: Path, raw: Raw) -> tuple[str, str | None]:
    """What a folder is called, and its licence: a hub id where one is known, never a path.

    Known from the id that was asked for, the cache of the hub, or config.json's _name_or_path; the
    licence from the front matter of README.md.
    """
    licence = _licence(folder / "README.md")
    if not Path(source).exists():
        return str(source).removeprefix("hf:"), licence
    cached = [part for part in folder.absolute().parts if part.startswith("models--")]
    ids = [part.removeprefix("models--").replace("--", "/", 1) for part in cached]
    ids.append(str(raw.get("_name_or_path")))
    return next(filter(_HUB_ID.fullmatch, ids), folder.resolve().name), licence


def _licence(card: Path) -> str | None:
    try:
        with card.open("rb") as file:
            text = file.read(_LONGEST_CARD).decode("utf-8", "replace")
    except OSError:
        return None
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    said = front and re.search(r"^license:\s*['\"]?([\w.+-]{1,60})['\"]?\s*$", front[1], re.M)
    return said[1] if said else None


def read_raw_config(directory: Path, *, ignore_code: bool = False) -> tuple[str, Family, Raw]:
    """The model_type of a folder, its family and its config.json; UserError."""
    path = directory / "config.json"
    raw = read_json(path, longest=10_000_000)
    if raw.get("auto_map") and not ignore_code:
        raise UserError(
            f"{path}: auto_map names code of the folder's own, which is never run; if the model is "
            "also a plain one of its model_type, say ignore_code"
        )
    name = raw.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(
            f"{path}: model_type={str(name)[:40]!r} is not supported; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return name, FAMILIES[name], raw
