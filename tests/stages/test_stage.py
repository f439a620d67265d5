"""The folder that a stage hands on, and what else the stages share."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import CheckpointError, ConfigError, NonFiniteError
from instruct_jax.files import write_json
from instruct_jax.models.config import ComputeConfig
from instruct_jax.models.families import preset
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.stages.record import Base, read_record
from instruct_jax.stages.stage import (
    FitConfig,
    ModelConfig,
    in_batches,
    make_optimizer,
    make_step,
    place_params,
)
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from instruct_jax.training.checkpoint import save_model
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.state import init_state
from tests.edits import edit
from tests.stages import lab as labs

TOKENIZER = train_bpe(["hello world"], vocab_size=260)


SHAPE = dataclasses.replace(labs.SHAPE, vocab_size=TOKENIZER.vocab_size)


def parameters(make=language_model, seed=0):
    return make(SHAPE).init(jax.random.key(seed))


@pytest.fixture
def trained():
    """A language model in memory."""
    return TrainedModel("language", SHAPE, parameters(), TOKENIZER, "sft")


def test_a_model_folder_gives_back_what_it_was_given(tmp_path, trained):
    reward = trained._replace(kind="scalar", params=parameters(scalar_model), stage="reward_model")
    for model, make in ((trained, language_model), (reward, scalar_model)):
        folder = save_trained(tmp_path / model.kind, model, notes={"valid_loss": 1.5})
        loaded = load_trained(folder, kind=model.kind)
        assert labs.same_bits(loaded.params, model.params)
        assert (loaded.kind, loaded.stage, loaded.config) == (model.kind, model.stage, model.config)
        assert loaded.tokenizer.fingerprint == TOKENIZER.fingerprint
        assert loaded.model is make(SHAPE)
        about = json.loads((folder / "model.json").read_text())
        assert about["notes"] == {"valid_loss": 1.5} and about["stage"] == model.stage


def test_a_model_on_a_mesh_is_saved_whole_and_a_folder_is_replaced(tmp_path, trained):
    save_trained(tmp_path, trained._replace(params=parameters(seed=1)))
    spread = place_params(trained.params, make_mesh("fsdp:4,tensor:2"))
    assert not all(x.is_fully_replicated for x in jax.tree.leaves(spread))
    save_trained(tmp_path, trained._replace(params=spread))
    assert labs.same_bits(load_trained(tmp_path).params, trained.params)


@pytest.mark.parametrize("mesh", [None, "fsdp:4,tensor:2"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_not_saved_and_nothing_is_written(
    tmp_path, trained, mesh, value
):
    leaves, tree = jax.tree.flatten(trained.params)
    leaves[-1] = leaves[-1].at[-1].set(value)
    params = jax.tree.unflatten(tree, leaves)
    if mesh is not None:
        params = place_params(params, make_mesh(mesh))
    with pytest.raises(NonFiniteError, match=r"a parameter is not finite; .*checkpoints") as error:
        save_trained(tmp_path / "run/model", trained._replace(params=params))
    assert error.value.exit_code == 3 and not (tmp_path / "run").exists()


def test_a_figure_that_is_not_finite_is_null_in_json(tmp_path, trained):
    notes = {"valid_loss": float("nan"), "by": [{"x": float("inf")}, (1.5,)]}
    folder = save_trained(tmp_path / "model", trained, notes=notes)

    def never(name):
        raise AssertionError(name)

    about = json.loads((folder / "model.json").read_text(), parse_constant=never)
    assert about["notes"] == {"valid_loss": None, "by": [{"x": None}, [1.5]]}


def test_a_folder_that_is_no_model_or_the_wrong_one_is_refused(tmp_path, trained):
    with pytest.raises(ConfigError, match="nowhere: no such folder"):
        load_trained(tmp_path / "nowhere")
    save_trained(tmp_path, trained)
    with pytest.raises(
        ConfigError, match=r"holds a language model \(sft\), a scalar model is need"
    ):
        load_trained(tmp_path, kind="scalar")
    for file in sorted((tmp_path / "params").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (tmp_path / "params").rmdir()
    with pytest.raises(CheckpointError, match=r"params/manifest\.json cannot be read"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"remat": True}, "remat=.True. is not of type str"),
        ({"remat": "all"}, "remat='all' is not one of none, products, full"),
        ({"d_model": "32"}, "d_model='32' is not of type int"),
        ({"norm": None}, "norm='None' is not of type str"),
        ({"num_heads": 3}, "d_model=32 is not a multiple of num_heads=3"),
    ],
)
def test_a_value_that_no_version_writes_is_damage(tmp_path, trained, changes, message):
    record = save_trained(tmp_path, trained) / "model.json"
    about = json.loads(record.read_text())
    edit(record, {"config": about["config"] | changes})
    with pytest.raises(CheckpointError, match=rf"model\.json: damaged: config: .*{message}"):
        load_trained(tmp_path)


def test_a_template_that_there_is_not_is_damage(tmp_path, trained):
    record = save_trained(tmp_path, trained) / "model.json"
    edit(record, {"template": "no_such"})
    with pytest.raises(CheckpointError, match=r"model\.json: damaged: .*no_such"):
        load_trained(tmp_path)


def test_a_configuration_of_a_later_version_is_no_damage(tmp_path, trained):
    record = save_trained(tmp_path, trained) / "model.json"
    about = json.loads(record.read_text())
    edit(record, {"config": about["config"] | {"experts": 8}})
    with pytest.raises(ConfigError, match="unknown experts; it was written by another version"):
        load_trained(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"kind": "language"}',
        b'{"kind": 3, "stage": "sft", "config": {}}',
        b'{"kind": "image", "stage": "sft", "config": {}}',
        b'{"kind": "language", "stage": "sft", "config": 7}',
        b'{"kind": "language", "stage": "sft", "config": {}, "history": "sft"}',
        b'{"kind": "language", "stage": "sft", "config": {}, "base": {"licence": 3}}',
    ],
    ids=lambda damage: damage[:30].decode("latin-1"),
)
def test_a_damaged_record_is_told_in_one_line_with_exit_code_4(tmp_path, trained, damage):
    record = save_trained(tmp_path, trained) / "model.json"
    record.write_bytes(damage)
    with pytest.raises(
        CheckpointError, match=r"model\.json[: ]+(damaged: |cannot be|holds|has no)"
    ) as error:
        load_trained(tmp_path)
    assert error.value.exit_code == 4 and "\n" not in str(error.value)


def test_parameters_of_another_model_than_the_record_describes_are_refused(tmp_path, trained):
    record = save_trained(tmp_path, trained) / "model.json"
    about = json.loads(record.read_text())
    for changes in ({"num_layers": 3}, {"max_length": 7}, {"tie_embeddings": False}):
        edit(record, {"config": about["config"] | changes})
        with pytest.raises(CheckpointError, match=r"not those that model\.json describes: "):
            load_trained(tmp_path)
    edit(record, {"config": about["config"], "kind": "scalar"})
    with pytest.raises(CheckpointError, match=r"not those that model\.json describes: head/bias"):
        load_trained(tmp_path)


@pytest.mark.parametrize("changes", [{"num_heads": 4}, {"norm_eps": 0.1}, {"rope_theta": 9.0}])
def test_an_edit_that_no_shape_shows_is_refused_until_its_author_owns_it(
    tmp_path, trained, changes
):
    record = save_trained(tmp_path, trained) / "model.json"
    text = record.read_text()
    about = json.loads(text)
    record.write_text(json.dumps(about | {"config": about["config"] | changes}, indent=2) + "\n")
    with pytest.raises(CheckpointError, match='if you changed it yourself, delete its "sha256"'):
        load_trained(tmp_path)
    lines = record.read_text().splitlines()
    record.write_text("\n".join(line for line in lines if '"sha256":' not in line))
    assert load_trained(tmp_path).config == dataclasses.replace(SHAPE, **changes)


def test_another_tokenizer_or_other_arrays_are_refused_and_the_message_says_what_to_do(
    tmp_path, trained
):
    save_trained(tmp_path / "a", trained)
    save_trained(tmp_path / "b", trained._replace(params=parameters(seed=1)))
    other = train_bpe(["another text, and as long"] * 3, vocab_size=TOKENIZER.vocab_size)
    assert other.vocab_size <= TOKENIZER.vocab_size
    other.save(tmp_path / "a")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not .*: .*take it out"):
        load_trained(tmp_path / "a")
    files = json.loads((tmp_path / "a/model.json").read_text())["files"]
    TOKENIZER.save(tmp_path / "a")
    assert load_trained(tmp_path / "a").kind == "language"
    (tmp_path / "a/tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>", "mine": 1}')
    edit(
        tmp_path / "a/model.json", {"files": {k: v for k, v in files.items() if "config" not in k}}
    )
    assert load_trained(tmp_path / "a").kind == "language"
    shutil.rmtree(tmp_path / "a/params")
    shutil.copytree(tmp_path / "b/params", tmp_path / "a/params")
    with pytest.raises(CheckpointError, match=r"params/manifest\.json is not the file"):
        load_trained(tmp_path / "a")


def test_a_model_of_before_the_hashes_loads_and_its_shapes_are_looked_at(tmp_path, trained):
    record = save_trained(tmp_path, trained) / "model.json"
    config = json.loads(record.read_text())["config"]
    edit(record, {"files": None})
    assert labs.same_bits(load_trained(tmp_path).params, trained.params)
    edit(record, {"config": config | {"num_layers": 3}})
    with pytest.raises(CheckpointError, match=r"not those that model\.json describes: "):
        load_trained(tmp_path)


def test_parameters_that_are_not_finite_are_refused_at_load(tmp_path, trained):
    leaves, tree = jax.tree.flatten(trained.params)
    leaves[0] = leaves[0].at[0].set(jnp.nan)
    save_trained(tmp_path, trained)
    save_model(tmp_path / "params", jax.tree.unflatten(tree, leaves), {})
    edit(tmp_path / "model.json", {"files": None})
    with pytest.raises(CheckpointError, match="a parameter is not finite; take another model"):
        load_trained(tmp_path)


def test_what_a_model_came_from_is_handed_on_through_the_stages(tmp_path, trained):
    base = Base("Owner/Base-1B", "apache-2.0", "llama")
    imported = trained._replace(stage="imported", base=base)
    save_trained(tmp_path / "a", imported)
    tuned = load_trained(tmp_path / "a")._replace(stage="sft")
    save_trained(tmp_path / "b", tuned)
    loaded = load_trained(tmp_path / "b")
    assert loaded.base == base and loaded.history == ("imported", "sft")
    assert read_record(tmp_path / "b").history == ("imported",)


def test_a_model_is_computed_as_the_stage_says_whatever_its_folder_does(tmp_path, trained):
    save_trained(tmp_path, trained._replace(config=dataclasses.replace(SHAPE, remat="full")))
    assert load_trained(tmp_path, compute=ComputeConfig()).config.remat == "full"
    chosen = ComputeConfig(dtype="bfloat16", remat="none", attention="xla")
    config = load_trained(tmp_path, compute=chosen).config
    assert (config.dtype, config.remat, config.attention) == ("bfloat16", "none", "xla")


def test_a_folder_is_complete_once_its_record_is_there(tmp_path, trained, monkeypatch):
    """A kill while it is written leaves no model, and no half of one."""

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("instruct_jax.data.tokenizer.Tokenizer.save", stopped)
    with pytest.raises(KeyboardInterrupt):
        save_trained(tmp_path, trained)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"neither model\.json"):
        load_trained(tmp_path)


def test_a_named_size_takes_its_vocabulary_from_the_tokenizer():
    config = ModelConfig(preset="tiny", max_length=64, dtype="bfloat16", remat="full")
    built = config.build(TOKENIZER)
    assert built == dataclasses.replace(
        preset("tiny"),
        vocab_size=TOKENIZER.vocab_size,
        max_length=64,
        dtype="bfloat16",
        remat="full",
    )
    assert ModelConfig(preset="tiny").build(TOKENIZER).max_length == preset("tiny").max_length
    with pytest.raises(ConfigError, match=r"config.model.preset: .*did you mean mini"):
        ModelConfig(preset="minni").build(TOKENIZER)


@pytest.mark.parametrize("rows", [1, 4, 5, 8])
def test_batches_of_one_shape_cover_all_rows_in_order(rows):
    shapes = set()

    def double(x, y):
        shapes.add((x.shape, y.shape))
        return 2 * x[:, 0] + y

    x, y = np.arange(rows * 3.0).reshape(rows, 3), np.arange(rows) * 0.5
    np.testing.assert_array_equal(in_batches(double, 4, x, y), 2 * x[:, 0] + y)
    assert shapes == {((4, 3), (4,))}


def test_a_spike_is_skipped_where_the_configuration_sets_a_limit():
    """R9: counted, and without a trace in the parameters; 1e6 times the usual gradient."""

    def loss(params, batch, key):
        return jnp.sum(params["w"] * batch["x"]), jnp.float32(len(batch["x"])), {}

    usual = {"x": np.ones(4, np.float32)}
    spike = {"x": np.full(4, 1e6, np.float32)}
    for limit, skipped in ((100.0, [0, 1]), (None, [0, 0])):
        config = FitConfig(skip_above=limit)
        tx = make_optimizer(config, steps=10)
        state, counts = init_state({"w": jnp.ones(4)}, tx), []
        for batch in (usual, spike):
            before = state
            state, metrics = make_step(config, loss, tx)(state, {}, batch, labs.KEY)
            counts.append(int(metrics["skipped"]))
        assert counts == skipped
        assert labs.same_bits(state.params, before.params) == bool(skipped[1])


def test_a_folder_that_is_no_model_is_told_with_its_field_and_what_was_meant(tmp_path):
    (tmp_path / "runs/own_gpt/model").mkdir(parents=True)
    (tmp_path / "runs/going").mkdir()
    write_json(tmp_path / "runs/going/config.json", {"schema": "instruct_jax.run/1", "config": {}})
    for folder, reason in {
        "runs/own_gtp/model": "no such folder; did you mean .*runs/own_gpt/model",
        "runs/own_gtp": "no such folder; did you mean .*runs/own_gpt",
        "runs/going/model": "no such folder; the run in .*going has left no model yet",
        "runs/elsewhere/model": "no such folder; name the `model` folder",
        "runs/own_gpt/model": "neither model.json nor config.json here",
    }.items():
        with pytest.raises(ConfigError, match=f"^config.init={tmp_path / folder}: {reason}"):
            load_trained(tmp_path / folder, field="config.init")
