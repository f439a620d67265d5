"""transformers itself loads what we export and computes the same (slow; needs torch)."""

import jax
import numpy as np
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.models import language_model, load_pretrained, scalar_model
from instruct_jax.models.hf import save_pretrained
from instruct_jax.models.transformer import TransformerConfig, final_scores
from tests.models.folders import NAMES, recorded, write_folder

pytestmark = [
    pytest.mark.slow,
    # transformers warns of its own deprecations and of our scalar_head.safetensors.
    pytest.mark.filterwarnings("ignore"),
]
cases = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch", reason="transformers computes with torch")
    torch.set_num_threads(1)
    return torch


def exported(tmp_path, name, *, scalar=False):
    """(the folder of an export whose PAD row would win every argmax, our config and params)"""
    config, params = load_pretrained(write_folder(tmp_path / "theirs", name, scalar=scalar))
    if not scalar:
        if not config.tie_embeddings:
            kernel = params["unembedding"]["kernel"]
            kernel[:, config.pad_id] = 3 * kernel[:, : config.vocab_size].sum(axis=1)
        else:
            table = params["embedder"]["tokens"]
            table[config.pad_id] = 3 * table[: config.vocab_size].sum(axis=0)
    model_type = recorded(name)[0]["config"]["model_type"]
    return save_pretrained(tmp_path / "ours", config, params, family=model_type), config, params


@cases
def test_a_language_model_gives_the_same_logits_and_greedy_text(tmp_path, torch, name):
    from transformers import AutoModelForCausalLM

    folder, config, _ = exported(tmp_path, name)
    _, kept = recorded(name)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    model.eval()
    tokens = torch.tensor(kept["a"][None])
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits[0].numpy()
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=64
        )
    assert logits.shape[-1] == config.vocab_size + 1
    np.testing.assert_allclose(logits[:, : config.vocab_size], kept["alone_a"], rtol=0, atol=1e-5)
    assert out[0, 12:].tolist() == kept["greedy"].tolist()


@cases
def test_a_scalar_model_gives_the_same_scores(tmp_path, torch, name):
    from transformers import AutoModelForSequenceClassification

    folder, config, _ = exported(tmp_path, name, scalar=True)
    _, kept = recorded(name)
    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    assert model.config.num_labels == 1
    batch = np.stack([kept["a"], np.r_[kept["b"], np.full(5, config.pad_id)]])
    with torch.no_grad():
        scores = model.eval()(
            torch.tensor(batch), attention_mask=torch.tensor(batch != config.pad_id).long()
        )
    np.testing.assert_allclose(scores.logits[:, 0].numpy(), kept["scores"], rtol=0, atol=1e-5)


def test_our_own_reward_model_and_its_bias_are_loaded(tmp_path, torch):
    """Rotary, ReLU, layer norm: the shape of the embedded world's models."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = train_bpe(["the cat sat on the mat and saw the dog"] * 3, vocab_size=280)
    config = TransformerConfig(
        vocab_size=tokenizer.vocab_size, num_layers=2, d_model=32, num_heads=2, max_length=64,
        activation="relu", positions="rope",
    )  # fmt: skip
    params = jax.device_get(scalar_model(config).init(jax.random.key(0)))
    params["head"]["bias"] = np.array([1.5], np.float32)
    folder = save_pretrained(tmp_path / "rm", config, params, tokenizer=tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    theirs = AutoTokenizer.from_pretrained(folder)
    texts = ["the cat sat on the mat", "the dog"]
    batch = theirs(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        scores = model(**batch).logits[:, 0].numpy()
    tokens, mask = batch["input_ids"].numpy().astype(np.int32), batch["attention_mask"].numpy() > 0
    ours = final_scores(jax.jit(scalar_model(config).apply)(params, tokens, mask=mask), mask)
    np.testing.assert_allclose(scores, ours, rtol=0, atol=1e-5)


def test_the_real_llama_goes_round(tmp_path, torch, shared):
    from transformers import AutoModelForCausalLM

    source = shared / "weights" / "stories260K"
    config, params = load_pretrained(source)
    folder = save_pretrained(tmp_path / "llama", config, params)
    reference = np.load(source / "reference.npz")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        logits = model(torch.tensor(reference["input_ids"][None]).long()).logits[0].numpy()
    np.testing.assert_allclose(logits[:, :512], reference["logits"], rtol=0, atol=1e-4)
    ours = jax.jit(language_model(config).apply)(params, reference["input_ids"][None])[0]
    np.testing.assert_allclose(logits[:, :512], ours[:, :512], rtol=0, atol=1e-4)
