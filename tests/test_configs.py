"""Every preset opens the door of its script, fits its model, and is what the papers say."""

import dataclasses
import importlib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.cli import from_config
from instruct_jax.cli.config import load_config, resolve
from instruct_jax.errors import ConfigError
from instruct_jax.models import families
from instruct_jax.models.config import ComputeConfig
from instruct_jax.models.transformer import language_model
from instruct_jax.stages.ppo_models import learning_rates
from instruct_jax.training.optim import schedule

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
STAGES = ("pretrain", "sft", "reward_model", "ppo")
# Files of presets for a script of another name.
SCRIPT_OF = {"grpo": "ppo", "rloo": "ppo"}


@pytest.fixture(autouse=True)
def _scripts_see_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))  # as when one of them is run


def config_module(script: str) -> types.ModuleType:
    return importlib.import_module(f"configs.{script}")


def opened(script: str, preset: str):
    """The frozen dataclass that the script's main receives."""
    config_class = importlib.import_module(f"experiments.{SCRIPT_OF.get(script, script)}").Config
    return from_config(config_class, load_config(f"configs/{script}.py:{preset}"))


ALL = [(script, name) for script in SCRIPTS for name in config_module(script).PRESETS]


@pytest.mark.parametrize(("script", "name"), ALL)
def test_every_preset_opens_the_strict_door(script, name):
    config = opened(script, name)
    assert dataclasses.is_dataclass(config)
    field = dataclasses.fields(config)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config, field, None)


@pytest.mark.parametrize(
    ("script", "group"),
    [(s, "model") for s in (*STAGES, "preference", "evaluate", "collect", "select_sft")]
    + [("compress", "compute")],
)
def test_how_a_model_is_computed_is_every_stage_s_to_say(script, group):
    config_class = importlib.import_module(f"experiments.{script}").Config
    values = load_config(f"configs/{script}.py:debug")
    wanted = {"dtype": "bfloat16", "attention": "xla"}
    trains = script not in ("evaluate", "collect", "select_sft")
    wanted |= {"remat": "full"} if trains else {}
    overrides = {f"{group}.{name}": value for name, value in wanted.items()}
    group_of = getattr(resolve(config_class, values, overrides), group)
    assert isinstance(group_of, ComputeConfig)
    model = group_of.on(families.preset("mini"))
    assert {name: getattr(model, name) for name in wanted} == wanted
    if not trains:  # a field that cannot act is refused
        with pytest.raises(ConfigError, match="has no effect: nothing is trained"):
            resolve(config_class, values, {f"{group}.remat": "full"})


@pytest.mark.parametrize("script", STAGES)
def test_setting_one_field_of_adam_keeps_its_neighbours(script):
    config_class = importlib.import_module(f"experiments.{script}").Config
    values = load_config(f"configs/{script}.py:toyworld")
    before = getattr(from_config(config_class, values), script).adam
    after = getattr(resolve(config_class, values, {f"{script}.adam.clip": "0.5"}), script).adam
    assert after == dataclasses.replace(before, clip=0.5)


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_unknown_preset_names_the_known_ones(script):
    with pytest.raises(ConfigError, match=r"no preset 'toywrld'; there are \w+, "):
        load_config(f"configs/{script}.py:toywrld")


def test_the_presets_of_the_specification_exist():
    """JAX-12."""
    wanted = {
        "pretrain": "toyworld debug instructgpt_1p3b instructgpt_6b instructgpt_175b gpt4llm_small",
        "sft": "toyworld toyworld_rlhf_init debug instructgpt_1p3b instructgpt_6b instructgpt_175b"
        " instructgpt_1p3b_rlhf_init instructgpt_6b_rlhf_init instructgpt_175b_rlhf_init tldr_1b"
        " gpt4llm_7b gpt4llm_small",
        "reward_model": "toyworld debug instructgpt_6b lmhp_sentiment_124m"
        " lmhp_descriptiveness_124m tldr_1b gpt4llm_7b gpt4llm_small",
        "ppo": "toyworld toyworld_ptx debug instructgpt_1p3b instructgpt_6b instructgpt_175b"
        " instructgpt_1p3b_ptx instructgpt_6b_ptx instructgpt_175b_ptx lmhp_sentiment_124m"
        " lmhp_descriptiveness_124m tldr_1b gpt4llm_7b gpt4llm_small",
    }
    for script, names in wanted.items():
        assert set(names.split()) <= set(config_module(script).PRESETS), script


@pytest.mark.parametrize("name", config_module("pretrain").PRESETS)
def test_every_model_can_be_shaped_without_memory(name):
    config = opened("pretrain", name)
    assert config.vocab_size > 256, "a byte-level BPE has 256 entries before its first merge"
    size = families.preset(config.model.preset)
    length = config.model.max_length or size.max_length
    size = config.model.on(dataclasses.replace(size, max_length=length))
    assert config.pretrain.length <= size.max_length
    model = language_model(size)
    params = jax.eval_shape(model.init, jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((2, config.pretrain.length), jnp.int32)
    logits = jax.eval_shape(model.apply, params, tokens)
    assert logits.shape[:2] == tokens.shape
    assert logits.dtype == jnp.float32
    counted = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))
    expected = {"instructgpt_1p3b": 1.3e9, "instructgpt_6b": 6.7e9, "instructgpt_175b": 175e9}
    if name in expected:
        assert counted == pytest.approx(expected[name], rel=0.02)


@pytest.mark.parametrize("name", config_module("ppo").PRESETS)
def test_prompt_and_response_fit_the_sizes_they_are_made_for(name):
    ppo = opened("ppo", name).ppo
    limit = {"toyworld": 256, "toyworld_ptx": 256, "debug": 256, "lmhp_sentiment_124m": 1024,
             "lmhp_descriptiveness_124m": 1024}.get(name, 2048)  # fmt: skip
    assert ppo.prompt_length + ppo.response_length <= limit


def adam(config) -> tuple[float, float, float, float, float]:
    return config.b1, config.b2, config.eps, config.weight_decay, config.clip


@pytest.mark.parametrize(
    ("name", "tokens", "rate"),
    [
        ("instructgpt_1p3b", 1e6, 2.0e-4),
        ("instructgpt_6b", 2e6, 1.2e-4),
        ("instructgpt_175b", 3.2e6, 0.6e-4),
    ],
)
def test_pretraining_follows_gpt3(name, tokens, rate):
    """MODEL-2."""
    config = opened("pretrain", name).pretrain
    assert config.batch_size * config.length == pytest.approx(tokens, rel=0.06)
    assert config.warmup * config.batch_size * config.length == pytest.approx(375e6, rel=0.01)
    assert config.learning_rate == rate
    assert config.final_fraction == 0.1
    assert adam(config.adam) == (0.9, 0.95, 1e-8, 0.1, 1.0)


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("instructgpt_1p3b", 32, 9.65e-6),
        ("instructgpt_6b", 32, 9.65e-6),
        ("instructgpt_175b", 8, 5.03e-6),
    ],
)
def test_fine_tuning_follows_the_paper(name, batch, rate):
    """SFT-2, and its learning-rate goldens (T33)."""
    config = opened("sft", name)
    sft = config.sft
    assert (sft.epochs, sft.batch_size, sft.learning_rate) == (16, batch, rate)
    assert (sft.warmup, sft.final_fraction, sft.residual_dropout) == (0, 0.1, 0.2)
    assert not sft.loss_on_prompt
    assert sft.pretrain_fraction == 0.0
    assert adam(sft.adam) == (0.9, 0.95, 1e-8, 0.0, 1.0)
    assert config.keep_epochs, "the epoch is selected by reward-model score (SFT-4)"
    shape = {"final": sft.final_fraction, "warmup": sft.warmup}
    at = schedule(sft.learning_rate, sft.schedule, steps=100, **shape)
    rates = [float(at(s)) / rate for s in (0, 50, 100)]
    np.testing.assert_allclose(rates, [1.0, 0.55, 0.1], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("instructgpt_1p3b", 32, 5e-6),
        ("instructgpt_6b", 32, 1.04e-5),
        ("instructgpt_175b", 8, 2.45e-6),
    ],
)
def test_the_start_of_ppo_follows_the_paper(name, batch, rate):
    """SFT-5."""
    sft = opened("sft", f"{name}_rlhf_init").sft
    assert (sft.epochs, sft.batch_size, sft.learning_rate) == (2, batch, rate)
    assert (sft.pretrain_fraction, sft.final_fraction, sft.warmup) == (0.1, 0.1, 0)
    assert adam(sft.adam) == (0.9, 0.95, 1e-8, 0.0, 1.0)


def test_the_reward_model_follows_the_paper():
    """RM-1..4."""
    config = opened("reward_model", "instructgpt_6b").reward_model
    assert (config.epochs, config.batch_size, config.learning_rate) == (1.0, 64, 9e-6)
    assert (config.completions, config.pair_norm, config.normalisation) == (9, "valid", "demo_mean")
    assert (config.warmup, config.final_fraction, config.residual_dropout) == (0, 0.1, 0.0)
    assert adam(config.adam) == (0.9, 0.95, 1e-8, 0.0, 1.0)


@pytest.mark.parametrize(
    ("name", "rate", "ptx_rate", "value_rate"),
    [
        ("instructgpt_1p3b", 5e-6, 9.65e-6, 9e-6),
        ("instructgpt_6b", 5e-6, 9.65e-6, 9e-6),
        ("instructgpt_175b", 2.55e-6, 2.55e-6, 5e-6),
    ],
)
@pytest.mark.parametrize("ptx", [False, True])
def test_ppo_follows_the_paper(name, rate, ptx_rate, value_rate, ptx):
    """PPO-3, and its learning-rate goldens (T33)."""
    ppo = opened("ppo", name + "_ptx" * ptx).ppo
    assert (ppo.episodes, ppo.rollout_batch, ppo.minibatch, ppo.inner_epochs) == (
        256_000, 512, 64, 1,
    )  # fmt: skip
    assert ppo.iterations == 500
    assert ppo.iterations * ppo.updates == 4_000
    assert (ppo.prompt_length, ppo.response_length, ppo.temperature) == (1024, 1024, 1.0)
    assert (ppo.kl_coef, ppo.kl_target) == (0.02, None)
    assert (ppo.clip, ppo.value_clip, ppo.discount, ppo.gae_lambda) == (0.2, 0.2, 1.0, 0.95)
    assert (ppo.missing_eos, ppo.reward_clip, ppo.whiten_rewards) == ("none", None, False)
    assert ppo.whiten_advantages == "rollout"
    assert ppo.ptx_coef == (27.8 if ptx else 0.0)
    assert ppo.ptx_ratio * ppo.minibatch == 512
    assert ppo.learning_rate == (ptx_rate if ptx else rate)
    assert ppo.value_learning_rate == value_rate
    assert ppo.ema_decay == 0.992
    assert adam(ppo.adam) == (0.9, 0.95, 1e-5, 0.0, 1.0)
    policy, value = learning_rates(ppo)
    every = [i * ppo.updates for i in (0, 5, 10, 11, 499)]
    ratio = value_rate / ppo.learning_rate
    np.testing.assert_allclose([value(i) / policy(i) for i in every], ratio, rtol=1e-5)
    rates = [float(policy(i)) / ppo.learning_rate for i in every[:4]]
    np.testing.assert_allclose(rates, [0.1, 0.55, 1.0, 1.0], rtol=2e-6)


@pytest.mark.parametrize("name", ["lmhp_sentiment_124m", "lmhp_descriptiveness_124m"])
def test_the_style_tasks_follow_ziegler(name):
    """Section 10.1."""
    ppo = opened("ppo", name).ppo
    assert (ppo.prompt_length, ppo.response_length, ppo.temperature) == (64, 24, 0.7)
    assert (ppo.rollout_batch, ppo.minibatch, ppo.inner_epochs) == (512, 512, 4)
    assert ppo.iterations == 1_953
    assert (ppo.kl_coef, ppo.kl_target, ppo.kl_horizon) == (0.15, 6.0, 10_000)
    assert (ppo.learning_rate, ppo.adam.eps, ppo.whiten_rewards) == (1e-5, 1e-5, True)
    assert (ppo.clip, ppo.value_clip, ppo.gae_lambda) == (0.2, 0.2, 0.95)
    reward = opened("reward_model", name).reward_model
    assert (reward.batch_size, reward.learning_rate, reward.completions) == (32, 5e-5, 4)
    assert (reward.final_fraction, reward.normalisation) == (0.0, "policy_meanstd")


def test_summarisation_follows_huang():
    """Section 10.2."""
    sft, reward, ppo = (
        opened("sft", "tldr_1b").sft,
        opened("reward_model", "tldr_1b").reward_model,
        opened("ppo", "tldr_1b").ppo,
    )
    assert [c.learning_rate for c in (sft, reward, ppo)] == [3e-6] * 3
    assert [c.adam.eps for c in (sft, reward, ppo)] == [1e-5] * 3
    assert (sft.batch_size, reward.batch_size, ppo.rollout_batch) == (128, 64, 512)
    assert (sft.epochs, reward.epochs, sft.residual_dropout) == (1, 1.0, 0.0)
    assert {c.prompt_length for c in (sft, reward, ppo)} == {512}
    assert {c.response_length for c in (sft, reward, ppo)} == {53}
    assert (ppo.kl_coef, ppo.temperature, ppo.inner_epochs) == (0.05, 0.7, 4)
    assert (ppo.missing_eos, ppo.missing_eos_penalty) == ("replace", 1.0)
    assert not ppo.whiten_rewards


def test_instruction_tuning_follows_peng():
    """G4-4."""
    config = opened("sft", "gpt4llm_7b")
    sft = config.sft
    assert (sft.epochs, sft.learning_rate, sft.batch_size) == (3, 2e-5, 64)
    assert (sft.adam.weight_decay, sft.final_fraction) == (0.0, 0.0)
    assert sft.prompt_length + sft.response_length == 512
    steps = sft.epochs * 52_002 * (1 - config.data.valid_fraction) / sft.batch_size
    assert sft.warmup / steps == pytest.approx(0.03, rel=0.02)
    assert config.data.template == "alpaca"
    assert opened("reward_model", "gpt4llm_7b").reward_model.completions == 3


def test_the_embedded_world_fits_together():
    """Stages of one pipeline agree on lengths, tables and mixes; no prompt is too long for one."""
    pretrain = opened("pretrain", "toyworld")
    sft, init = opened("sft", "toyworld").sft, opened("sft", "toyworld_rlhf_init").sft
    reward = opened("reward_model", "toyworld").reward_model
    ppo, ptx = opened("ppo", "toyworld"), opened("ppo", "toyworld_ptx")
    direct = opened("preference", "toyworld").preference
    free = [opened(name, "toyworld").ppo for name in ("grpo", "rloo")]
    asked = [opened(name, "toyworld") for name in ("collect", "evaluate")]
    for stage in (sft, init, reward, direct, ppo.ppo, ptx.ppo, *free, *asked):
        assert stage.prompt_length + stage.response_length <= pretrain.pretrain.length
        assert (stage.prompt_length, stage.response_length) == (56, 24)
    assert ppo.ptx_length <= pretrain.pretrain.length
    assert (init.epochs, init.pretrain_fraction) == (sft.epochs, 0.1)
    assert ppo.ppo == dataclasses.replace(ptx.ppo, ptx_coef=0.0), "the mix is the only difference"
