"""Models go out through the script and come back to the bit, with the record of their run."""

import json
import platform
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import ConfigError, UserError
from instruct_jax.models import scalar_model
from instruct_jax.models.hf import load_pretrained
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from tests.edits import edit
from tests.experiments import scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its record, its model, and both conversions of it."""
    folder = tmp_path_factory.mktemp("convert")
    model = scripts.write_model(folder / "sft" / "model")
    edit(model / "model.json", {"notes": {"valid_loss": 1.5}, "template": "hh"})
    record = {"config": {"sft": {"epochs": 2}}, "data": {"rows.jsonl": "cafe"}}
    (folder / "sft" / "config.json").write_text(json.dumps(record))
    scripts.launch(
        "convert", "--config=configs/convert.py:to_hf", f"--config.source={model}",
        f"--workdir={folder / 'out'}", "--config.shard_gb=0.00005",
    )  # fmt: skip
    scripts.launch(
        "convert", "--config=configs/convert.py:from_hf", f"--config.source={folder / 'out/hf'}",
        f"--workdir={folder / 'back'}",
    )  # fmt: skip
    return SimpleNamespace(folder=folder, model=model, hf=folder / "out/hf",
                           back=folder / "back/model")  # fmt: skip


def same_bits(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_model_comes_back_as_it_left(run):
    before, after = load_trained(run.model), load_trained(run.back)
    real = before.config.vocab_size
    for tree in (before.params, after.params):
        tree["embedder"]["tokens"] = tree["embedder"]["tokens"][:real]
    same_bits(after.params, before.params)
    assert after.tokenizer.fingerprint == before.tokenizer.fingerprint
    assert after.config.vocab_size == real and after.stage == "imported"


def test_the_exported_folder_has_all_that_transformers_reads(run):
    files = {path.name for path in run.hf.iterdir()}
    wanted = "config.json generation_config.json tokenizer.json tokenizer_config.json README.md"
    wanted += " chat_template.jinja model.safetensors.index.json"
    assert set(wanted.split()) <= files
    assert len(list(run.hf.glob("model-*.safetensors"))) > 1
    generation = json.loads((run.hf / "generation_config.json").read_text())
    tokenizer = load_trained(run.model).tokenizer
    assert generation["eos_token_id"] == tokenizer.eos_id
    assert generation["suppress_tokens"] == [tokenizer.pad_id]
    assert (run.back / "chat_template.jinja").read_text() == (
        run.hf / "chat_template.jinja"
    ).read_text()
    assert "Human: " in (run.hf / "chat_template.jinja").read_text(), "the run's own template"


def test_the_card_is_made_of_the_run_s_record(run):
    card = (run.hf / "README.md").read_text()
    assert "# sft-pretrain" in card
    assert "`rows.jsonl`, sha256 `cafe`" in card and "`valid_loss`: 1.5" in card


def test_a_reward_model_with_a_bias_goes_round(run):
    trained = load_trained(run.model)
    shape = TransformerConfig(
        vocab_size=trained.tokenizer.vocab_size, num_layers=1, d_model=16, num_heads=2,
        max_length=32, norm="rmsnorm", positions="rope", activation="swiglu", use_bias=False,
    )  # fmt: skip
    params = jax.device_get(scalar_model(shape).init(jax.random.key(0)))
    params["head"]["bias"] = np.array([-0.3], np.float32)
    reward = TrainedModel("scalar", shape, params, trained.tokenizer, "reward_model")
    source = save_trained(run.folder / "rm" / "model", reward)
    scripts.launch("convert", "--config=configs/convert.py:to_hf", f"--config.source={source}",
                   f"--workdir={run.folder / 'rm_out'}")  # fmt: skip
    card = (run.folder / "rm_out/hf/README.md").read_text()
    assert f"Add {float(np.float32(-0.3))!r}" in card
    scripts.launch("convert", f"--config.source={run.folder / 'rm_out/hf'}",
                   f"--workdir={run.folder / 'rm_back'}")  # fmt: skip
    back = load_trained(run.folder / "rm_back" / "model", kind="scalar")
    same_bits(back.params["head"], params["head"])
    same_bits(back.params["layers"], params["layers"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "config.source is empty"),
        (["--config.source=nowhere/at/all"], "neither a folder nor a hub id"),
        (["--config=configs/convert.py:to_hf", "--config.source=nowhere"],
         "config.source=nowhere: no such folder"),
        (["--config.source=HF", "--config.shard_gb=0"], "config.shard_gb=0"),
        (["--config=configs/convert.py:to_hf", "--config.source=MODEL", "--config.family=lama"],
         "no family is called 'lama'"),
        (["--config=configs/convert.py:to_hf", "--config.source=MODEL", "--config.template=x"],
         'no template "x"'),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_told_in_one_line(run, capsys, arguments, message, tmp_path):
    given = [a.replace("HF", str(run.hf)).replace("MODEL", str(run.model)) for a in arguments]
    with pytest.raises(SystemExit) as ended:
        scripts.launch("convert", f"--workdir={tmp_path / 'w'}", *given)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()


def test_the_round_trip_loads_as_a_plain_folder_too(run):
    config, params = load_pretrained(run.hf)
    assert config.vocab_size == load_trained(run.model).config.vocab_size
    assert params["layers"]["attention"]["query"]["kernel"].dtype == np.float32


@pytest.fixture
def grown(run, tmp_path):
    """The exported folder with a tokenizer of one token more, and the table as it was."""
    folder = tmp_path / "grown"
    shutil.copytree(run.hf, folder)
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    number = load_trained(run.model).tokenizer.vocab_size
    think = {**spec["added_tokens"][0], "id": number, "content": "<think>"}
    path.write_text(json.dumps(spec | {"added_tokens": [*spec["added_tokens"], think]}))
    return folder


def test_a_token_that_the_model_lacks_is_refused_at_import_and_at_load(
    run, grown, capsys, tmp_path
):
    remedy = "--config.resize=True"
    with pytest.raises(UserError, match=remedy):
        load_trained(grown)
    with pytest.raises(SystemExit) as ended:
        scripts.launch("convert", f"--config.source={grown}", f"--workdir={tmp_path / 'w'}")
    error = capsys.readouterr().err
    assert ended.value.code == 2 and remedy in error and error.count("\n") == 1
    assert not (tmp_path / "w").exists()
    shutil.copy(run.hf / "tokenizer.json", grown)
    assert load_trained(grown), "with its own tokenizer it loads"
    smaller = scripts.tokenizer(["one", "two"])
    assert smaller.vocab_size < load_trained(run.model).tokenizer.vocab_size
    smaller.save(grown)
    with pytest.raises(UserError, match="put back the tokenizer"):
        load_trained(grown)


def test_a_folder_of_ours_with_another_tokenizer_is_refused(run, tmp_path):
    folder = shutil.copytree(run.model, tmp_path / "model")
    edit(folder / "model.json", {"files": None})  # as its owner takes them out
    for words in (["one", "two"], [f"word{i}" for i in range(200)]):
        other = train_bpe([" ".join(words)] * 4, vocab_size=270 if len(words) == 2 else 400)
        other.save(folder)
        with pytest.raises(ConfigError, match="put back the tokenizer that the model was trained"):
            load_trained(folder)


def test_resized_a_model_reads_and_writes_its_new_tokens_and_goes_out_again(run, grown, tmp_path):
    scripts.launch("convert", f"--config.source={grown}", f"--workdir={tmp_path / 'in'}",
                   "--config.resize=True")  # fmt: skip
    before, after = load_trained(run.model), load_trained(tmp_path / "in" / "model")
    old, new = before.config.vocab_size, after.config.vocab_size
    assert new == old + 1 == after.tokenizer.vocab_size
    table = np.asarray(after.params["embedder"]["tokens"])
    np.testing.assert_array_equal(table[:old], before.params["embedder"]["tokens"][:old])
    np.testing.assert_allclose(table[old], table[:old].mean(0), atol=1e-6)
    tokens = np.arange(8, dtype=np.int32)[None]
    logits = before.model.apply(before.params, tokens)[..., :old]
    grew = after.model.apply(after.params, tokens)
    np.testing.assert_allclose(grew[..., :old], logits, atol=1e-5)
    np.testing.assert_allclose(grew[..., old], logits.mean(-1), atol=1e-4)
    scripts.launch("convert", "--config=configs/convert.py:to_hf",
                   f"--config.source={tmp_path / 'in/model'}",
                   f"--workdir={tmp_path / 'out'}")  # fmt: skip
    again = load_trained(tmp_path / "out" / "hf")
    assert again.tokenizer.fingerprint == after.tokenizer.fingerprint
    same_bits(again.params["layers"], after.params["layers"])


def test_a_card_names_base_licence_and_stages_and_no_path_of_this_machine(tmp_path):
    """Through three stages: what came in with the weights is still told."""
    secret = tmp_path / "home of jane" / "secret"
    model = scripts.write_model(secret / "made" / "model")
    scripts.launch("convert", "--config=configs/convert.py:to_hf", f"--config.source={model}",
                   f"--workdir={secret / 'out'}")  # fmt: skip
    foreign = shutil.copytree(secret / "out/hf", secret / "foreign")
    (foreign / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    raw = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(raw | {"_name_or_path": "Owner/Base-1B"}))
    scripts.launch("convert", f"--config.source={foreign}",
                   f"--workdir={secret / 'in'}")  # fmt: skip
    rows = scripts.write_rows(secret / "data")
    scripts.launch("sft", "--config=configs/sft.py:debug", "--config.data.source=files",
                   f"--config.init={secret / 'in/model'}", "--config.sft.epochs=0.1",
                   "--config.data.valid_fraction=0.2", "--config.sft.pack_length=none",
                   "--config.model.dtype=bfloat16",
                   "--config.model.remat=products", "--config.model.attention=xla",
                   f"--config.data.demonstrations={rows['demonstrations']}",
                   f"--workdir={secret / 'sft'}")  # fmt: skip
    scripts.launch("convert", "--config=configs/convert.py:to_hf",
                   f"--config.source={secret / 'sft/model'}",
                   f"--workdir={secret / 'card'}")  # fmt: skip
    tuned = load_trained(secret / "sft/model").config
    assert (tuned.dtype, tuned.remat, tuned.attention) == ("bfloat16", "products", "xla")
    card = (secret / "card/hf/README.md").read_text()
    assert "base_model: Owner/Base-1B" in card and "Trained from `Owner/Base-1B`" in card
    assert "license: apache-2.0" in card and "`imported`, `sft`" in card
    assert "`demonstrations.jsonl`" in card
    for told in (str(tmp_path), "secret", "jane", platform.node()):
        assert told not in card, told


@pytest.mark.parametrize("name", ["a[1]", "a\\b"])
def test_a_folder_below_which_arrays_cannot_be_kept_is_refused_before_anything_is_written(
    run, name, tmp_path
):
    """The rest of a name is nobody's business: braces, stars, quotes and spaces go in and out."""
    with pytest.raises(ConfigError, match="arrays cannot be kept below"):
        scripts.write_model(tmp_path / name / "model")
    assert not (tmp_path / name).exists()
    foreign = shutil.copytree(run.hf, tmp_path / name / "hf")
    assert load_trained(foreign).stage == "imported", "weights of a foreign folder are no arrays"
    odd = scripts.write_model(tmp_path / "a {b,c} *?'" / "model")
    same_bits(load_trained(odd).params, load_trained(scripts.write_model(tmp_path / "b")).params)
