"""Models go out through the script and come back to the bit, with the record of their run."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from instruct_jax.models import scalar_model
from instruct_jax.models.hf import load_pretrained
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.stages.stage import TrainedModel, load_trained, save_trained
from tests.experiments import scripts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run: its record, its model, and both conversions of it."""
    folder = tmp_path_factory.mktemp("convert")
    model = scripts.write_model(folder / "sft" / "model")
    about = json.loads((model / "model.json").read_text())
    (model / "model.json").write_text(json.dumps(about | {"notes": {"valid_loss": 1.5}}))
    record = {"config": {"data": {"template": "hh"}}, "data": {"rows.jsonl": "cafe"}}
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
        (["--config=configs/convert.py:to_hf", "--config.source=nowhere"], "neither model.json"),
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
