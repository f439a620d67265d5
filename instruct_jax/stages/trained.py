"""The folder that a trained model is kept in, by which stages meet and only so:

    DIR/model.json       what it is: kind ("language" or "scalar"), the stage that made it, the
                         template of its prompts, its configuration
    DIR/tokenizer.json   the tokenizer it was trained with
    DIR/params/          the parameters, fp32

and the one of an adapter alone: adapter.json (its rank, the trunk it belongs to) and params/. The
JSON file of either is written last, and names the hashes of the others: a folder that has one is
whole, and what is read from it is what was saved.
"""

import dataclasses
import difflib
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.cli.record import ARTEFACTS
from instruct_jax.cli.record import RECORD as RUN_RECORD
from instruct_jax.cli.record import read_record as read_run
from instruct_jax.cli.replacing import is_run
from instruct_jax.data.tokenizer import Tokenizer, load_tokenizer
from instruct_jax.errors import CheckpointError, ConfigError, NonFiniteError
from instruct_jax.files import read_object, unfit_path, write_json
from instruct_jax.models.adapters import LoraConfig
from instruct_jax.models.config import ComputeConfig
from instruct_jax.models.hf import inspect_pretrained, parameter_shapes, read_pretrained
from instruct_jax.models.transformer import Model, TransformerConfig, language_model, scalar_model
from instruct_jax.stages.record import (
    RECORD,
    Base,
    Record,
    check_files,
    hashes_in,
    hashes_of,
    read_record,
)
from instruct_jax.training import hosts
from instruct_jax.training.checkpoint import load_model, save_model
from instruct_jax.training.integrity import MANIFEST
from instruct_jax.training.mesh import tree_paths

READ_OUTS = ("unembedding", "head")
ADAPTER_RECORD = "adapter.json"
PARAMS = "params"
# With their hashes: the manifest of the arrays names those of all their files.
_ARRAYS = f"{PARAMS}/{MANIFEST}"


class TrainedModel(NamedTuple):
    """A model folder in memory.

    `base` is what its weights came from, `history` the stages that it went through, its own last
    where it was loaded: a stage says `trained._replace(params=..., stage=...)` and hands both on.
    `template` names the one that it was fine-tuned on, if it was.
    """

    kind: str
    config: TransformerConfig
    params: Any
    tokenizer: Tokenizer
    stage: str
    base: Base | None = None
    history: tuple[str, ...] = ()
    template: str | None = None

    @property
    def model(self) -> Model:
        """The pure functions that `params` belong to."""
        return (language_model if self.kind == "language" else scalar_model)(self.config)


def save_trained(
    directory: Path, trained: TrainedModel, *, notes: dict[str, Any] | None = None
) -> Path:
    """Writes a model folder; `notes` (metrics, data hashes) go into model.json. Returns
    `directory`; ConfigError where its name is one below which arrays cannot be kept, NonFiniteError
    where a parameter is not finite. Then nothing is written.
    """
    _check_name(directory)
    _check_finite(directory, trained.params)
    _save_arrays(directory, RECORD, trained.params, {"stage": trained.stage, "kind": trained.kind})
    about = Record(
        kind=trained.kind,
        stage=trained.stage,
        config=trained.config,
        history=trained.history,
        base=trained.base,
        template=trained.template,
        notes=notes or {},
    )

    def describe() -> None:
        names = [*trained.tokenizer.save(directory), _ARRAYS]
        files = hashes_of(directory, names)
        write_json(directory / RECORD, about._replace(files=files).as_json())

    hosts.first_alone(describe)
    return directory


def _save_arrays(directory: Path, record: str, params: Any, about: dict[str, Any]) -> None:
    """The parameters, in a folder that has no record until all of it is there again."""
    directory.mkdir(parents=True, exist_ok=True)
    hosts.first_alone(lambda: (directory / record).unlink(missing_ok=True))
    save_model(directory / PARAMS, params, about)


def _check_finite(directory: Path, params: Any) -> None:
    if not _is_finite(params):
        raise NonFiniteError(
            f"{directory}: not written, a parameter is not finite; what was saved before stands"
            f" ({directory.parent / 'checkpoints'}): lower the learning rate"
        )


def _is_finite(params: Any) -> bool:
    floats = [x for x in jax.tree.leaves(params) if jnp.issubdtype(x.dtype, jnp.floating)]
    return bool(hosts.fetch(_all_finite(floats)))


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> jax.Array:
    """bool[], replicated whatever the sharding of the leaves."""
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in leaves]))


def check_model(directory: str | Path, *, field: str = "") -> None:
    """ConfigError where `directory`, which the command line names in `field`, is no model folder:
    neither ours nor of Hugging Face. Nothing of it is read.
    """
    directory = Path(directory)
    told = f"{field}={directory}" if field else str(directory)
    if directory.is_dir():
        if not any((directory / name).is_file() for name in (RECORD, "config.json")):
            raise ConfigError(
                f"{told}: neither model.json nor config.json here; give the `model` folder that a "
                "stage wrote, or a Hugging Face folder"
            )
        return
    if directory.parent.is_dir() and is_run(directory.parent):
        hint = f"the run in {directory.parent} has left no model yet"
    else:
        hint = "name the `model` folder of a run, or a Hugging Face folder"
        if (near := _near(directory)) is not None:
            hint = f"did you mean {near}?"
    raise ConfigError(f"{told}: no such folder; {hint}")


def _near(directory: Path) -> Path | None:
    """A folder that is there, whose name is nearly that of `directory` or of its run."""
    for missing in (directory, directory.parent):
        if missing.parent.is_dir() and not missing.exists():
            names = [path.name for path in missing.parent.iterdir() if path.is_dir()]
            close = difflib.get_close_matches(missing.name, names, n=1, cutoff=0.7)
            return missing.with_name(close[0]) / directory.relative_to(missing) if close else None
    return None


def load_trained(
    directory: str | Path,
    *,
    kind: str | None = None,
    compute: ComputeConfig | None = None,
    field: str = "",
) -> TrainedModel:
    """Reads a model folder, or a Hugging Face folder of a language model with its tokenizer; it is
    then computed as `compute` says, where that is given. `field` is where the command line names
    it, such as "config.init".

    ConfigError when `directory` is neither, does not hold the `kind` asked for, or has a tokenizer
    of another vocabulary than the model's; CheckpointError when it is damaged, or a parameter is
    not finite.
    """
    directory = Path(directory)
    check_model(directory, field=field)
    own = (directory / RECORD).is_file()
    trained = _load_own(directory) if own else _load_foreign(directory)
    if not _is_finite(trained.params):
        raise CheckpointError(f"{directory}: a parameter is not finite; take another model")
    if kind is not None and trained.kind != kind:
        raise ConfigError(
            f"{field}{'=' * bool(field)}{directory}: holds a {trained.kind} model "
            f"({trained.stage}), a {kind} model is needed"
        )
    return trained if compute is None else trained._replace(config=compute.on(trained.config))


def _load_own(directory: Path) -> TrainedModel:
    about = read_record(directory)
    if "\\" in str(directory.absolute()):  # what was written elsewhere cannot be read here either
        _check_name(directory)
    check_files(directory, RECORD, about.files)
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size != about.config.vocab_size:
        raise ConfigError(
            f"{directory}: its tokenizer has {tokenizer.vocab_size} tokens, its model "
            f"{about.config.vocab_size}: put back the tokenizer that the model was trained with"
        )
    params, _ = load_model(directory / PARAMS)
    if not about.sealed or not about.files:  # an older one, or one that was changed by hand
        _check_shapes(directory, about, params)
    history = (*about.history, about.stage)
    return TrainedModel(
        about.kind,
        about.config,
        params,
        tokenizer,
        about.stage,
        about.base,
        history,
        about.template,
    )


def _check_shapes(directory: Path, about: Record, params: Any) -> None:
    """CheckpointError where the parameters are of another model than the record's."""
    _, shapes = parameter_shapes(about.config, about.kind)
    found = {path: leaf.shape for path, leaf in tree_paths(params)}
    wanted = {path: leaf.shape for path, leaf in shapes.items()}
    if found != wanted:
        wrong = sorted(path for path in found | wanted if found.get(path) != wanted.get(path))
        raise CheckpointError(
            f"{directory}: the parameters are not those that model.json describes: "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}"
        )


def _load_foreign(directory: Path) -> TrainedModel:
    check_exported(directory)
    found = inspect_pretrained(directory)
    if found.tokenizer is None:
        raise ConfigError(
            f"{directory}: no tokenizer here; import the folder with experiments/convert.py and "
            "--config.tokenizer=FILE"
        )
    config, params = read_pretrained(found)
    base = Base(found.name, found.licence, found.raw["model_type"])
    tokenizer, history = found.tokenizer, ("imported",)
    return TrainedModel(found.kind, config, params, tokenizer, "imported", base, history)


def check_exported(directory: Path) -> None:
    """CheckpointError where `directory` is a Hugging Face folder in that of a run of ours, whose
    record names the hash of a file there that is another one. A card is for people to write on.
    """
    run = directory.absolute().parent
    if not is_run(run):
        return
    named = (read_run(run) or {}).get(ARTEFACTS, {})
    inside = {
        path.name: digest
        for path, digest in ((Path(name), digest) for name, digest in named.items())
        if path.parent == Path(directory.name) and path.name != "README.md"
    }
    check_files(directory, str(run / RUN_RECORD), inside)


class Adapter(NamedTuple):
    """An adapter folder in memory; `base` is the fingerprint of the trunk that it belongs to."""

    params: Any
    lora: LoraConfig
    base: str


def save_adapter(directory: Path, adapter: Adapter) -> None:
    """Writes adapter.json (configuration and base) and the parameters of the adapter alone."""
    _check_name(directory)
    about = {"lora": dataclasses.asdict(adapter.lora), "base": adapter.base}
    _save_arrays(directory, ADAPTER_RECORD, adapter.params, about)

    def describe() -> None:
        files = hashes_of(directory, [_ARRAYS])
        write_json(directory / ADAPTER_RECORD, about | {"files": files})

    hosts.first_alone(describe)


def _check_name(directory: Path) -> None:
    if (reason := unfit_path(directory)) is not None:
        raise ConfigError(f"{directory}: {reason}; choose another folder")


def load_adapter(directory: str | Path) -> Adapter:
    """Reads what `save_adapter` wrote. ConfigError when `directory` is no such folder,
    CheckpointError when it is damaged.
    """
    directory = Path(directory)
    path = directory / ADAPTER_RECORD
    if not path.is_file():
        raise ConfigError(f"{directory}: no adapter.json here; give the `adapter` folder of a run")
    about = read_object(path, "lora", "base")
    try:
        lora = LoraConfig(**about["lora"] | {"targets": tuple(about["lora"]["targets"])})
        files = hashes_in(about)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: lora: {error}") from error
    check_files(directory, ADAPTER_RECORD, files)
    params, _ = load_model(directory / PARAMS)
    if not _is_finite(params):
        raise CheckpointError(f"{directory}: a parameter is not finite; take another adapter")
    return Adapter(params, lora, about["base"])


def trunk_fingerprint(params: Any) -> str:
    """A hash of what language and scalar models share: tables, layers and the last norm."""
    digest = hashlib.sha256()
    trunk = {name: params[name] for name in sorted(params) if name not in READ_OUTS}
    for path, leaf in tree_paths(trunk):
        digest.update(path.encode())
        digest.update(hosts.fetch(leaf).tobytes())
    return digest.hexdigest()
