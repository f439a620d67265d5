"""The door of every script: what is wrong with a command line is one line and exit code 2, before
anything is read, computed, written or deleted.

The wrong command lines are made by machine from what is said beside each field.
"""

import dataclasses
import importlib
import os
import re
import resource
import subprocess
import sys
import time
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest

from instruct_jax import cli
from instruct_jax.cli.config import conditions, fields, known, resolve
from instruct_jax.cli.names import suggest_field
from instruct_jax.errors import ConfigError
from instruct_jax.settings import About, about, is_never

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "experiments").glob("*.py")
    if "cli.run(main, Config" in path.read_text()
)
SECONDS = 3.0  # of processor time, since the machine may be busy


@pytest.fixture(autouse=True)
def _scripts_see_each_other(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "experiments"))  # as when one of them is run


class Mistake(NamedTuple):
    """A wrong flag of a script, and of what kind."""

    script: str
    kind: str
    flag: str


@cache
def module(script: str) -> types.ModuleType:
    return importlib.import_module(f"experiments.{script}")


def leaf_fields(kind: type, prefix: str = "") -> Iterator[tuple[str, Any, About]]:
    """("a.b", type without None, what is said of it) of every field below `kind`."""
    for name, hint in fields(kind).items():
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        options = [x for x in (typing.get_args(hint) if union else (hint,)) if x is not type(None)]
        if dataclasses.is_dataclass(options[0]):
            yield from leaf_fields(options[0], f"{prefix}{name}.")
        elif len(options) == 1:
            yield prefix + name, options[0], about(kind, name)


def wrong_values(hint: Any, said: About) -> Iterator[tuple[str, str]]:
    """(kind of mistake, text) of values that a field cannot have."""
    step = 1 if hint is int else 0.5
    if typing.get_origin(hint) is Literal:
        yield "choice", "ignore_all"
    if hint is bool:
        yield "type", "yes"
    if hint in (int, float):
        yield "type", "many"
        yield "type", ""
        if said.low is not None:
            yield "low", str(hint(said.low - step))
        if said.above is not None:
            yield "low", str(hint(said.above))
        if said.high is not None:
            yield "high", str(hint(said.high + step))
        if said.below is not None:
            yield "high", str(hint(said.below))
    if hint is int:
        yield "type", "1.5"
    if hint is float:
        yield from (("not finite", text) for text in ("nan", "inf", "-inf"))
    if typing.get_origin(hint) is tuple:
        yield "tuple", "('a'"
        yield "tuple", "(1.5, {})"


def mistakes_of(script: str) -> Iterator[Mistake]:
    """Every wrong flag that can be made of the fields of a script."""
    config_class = module(script).Config
    flag = "--config.{}={}".format
    for name, hint, said in leaf_fields(config_class):
        if any(map(is_never, conditions(config_class, name))):
            yield Mistake(script, "not read", flag(name, "1"))
            continue
        for kind, text in wrong_values(hint, said):
            yield Mistake(script, kind, flag(name, text))
        yield Mistake(script, "misspelt", flag(name[:-1] + "zq", "1"))
        yield Mistake(script, "no value", f"--config.{name}")
    for name, hint in fields(config_class).items():
        if dataclasses.is_dataclass(hint):
            yield Mistake(script, "group", flag(name, "1"))
    yield from (
        Mistake(script, "preset", f"--config={text}")
        for text in ("configs/no_such.py", f"configs/{script}.py:no_such", "no_such", "")
    )
    yield Mistake(script, "flag", "--no_such_flag=1")
    yield Mistake(script, "flag", "--host_devices=0")


@cache
def wrong_command_lines(count: int = 200) -> list[Mistake]:
    """So many mistakes: of each script and kind some, chosen by a seed."""
    rng = np.random.default_rng(0)
    groups: dict[tuple[str, str], list[Mistake]] = {}
    for script in SCRIPTS:
        for mistake in mistakes_of(script):
            groups.setdefault((script, mistake.kind), []).append(mistake)
    for group in groups.values():
        rng.shuffle(group)  # type: ignore[arg-type]
    turns = [group[n] for n in range(count) for group in groups.values() if n < len(group)]
    return [Mistake(*turn) for turn in turns[:count]]


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder`, with when it was written and what is in it."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A place to stand in, with a run that a mistake must not touch."""
    monkeypatch.chdir(tmp_path)
    cli.run(
        lambda config, run: (run.workdir / "log").write_text("x"),
        module("quickstart").Config,
        default="configs/quickstart.py",
        argv=["--workdir=runs/earlier"],
    )
    return tmp_path


def refused(mistake: Mistake, status: Any, err: str, out: str) -> None:
    assert status == 2, (mistake, err)
    assert err.startswith("error: ") and err.count("\n") == 1 and not out, (mistake, err)
    assert len(err) < 4_000, mistake
    if mistake.kind not in ("preset", "flag", "not read"):
        name = mistake.flag.partition("=")[0].removeprefix("--")
        assert name in err or name.rpartition(".")[0] in err, (mistake, err)


def test_two_hundred_wrong_command_lines_are_one_line_each_and_touch_nothing(workdir, capsys):
    before, slowest = snapshot(workdir), 0.0
    mistakes = wrong_command_lines()
    assert len(mistakes) == 200 and {m.script for m in mistakes} == set(SCRIPTS)

    def main(config: Any, run: cli.Run) -> None:
        raise AssertionError("main was reached")

    for i, mistake in enumerate(mistakes):
        argv = ["--workdir=runs/earlier", mistake.flag, *["--overwrite"] * (i % 2)]
        began = time.process_time()
        with pytest.raises(SystemExit) as exit_:
            cli.run(
                main,
                module(mistake.script).Config,
                default=f"configs/{mistake.script}.py",
                argv=argv,
            )
        slowest = max(slowest, time.process_time() - began)
        out, err = capsys.readouterr()
        refused(mistake, exit_.value.code, err, out)
    assert slowest < SECONDS
    assert snapshot(workdir) == before


def as_a_command(workdir: Path, mistake: Mistake, *, overwrite: bool) -> float:
    """Runs the script itself; seconds of processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "experiments" / f"{mistake.script}.py"),
            "--workdir=runs/earlier",
            mistake.flag,
            *["--overwrite"] * overwrite,
        ],
        cwd=workdir,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    refused(mistake, done.returncode, done.stderr, done.stdout)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_script_itself_says_it_within_three_seconds(workdir):
    before = snapshot(workdir)
    wanted = {"ppo": "low", "sft": "type", "reward_model": "choice", "preference": "not finite"}
    for script, kind in wanted.items():
        mistake = next(m for m in mistakes_of(script) if m.kind == kind)
        assert as_a_command(workdir, mistake, overwrite=True) < SECONDS, mistake
    assert snapshot(workdir) == before


@pytest.mark.slow
def test_two_hundred_scripts_say_it_within_three_seconds_each(workdir, capsys):
    before = snapshot(workdir)
    seconds = {
        mistake: as_a_command(workdir, mistake, overwrite=bool(i % 2))
        for i, mistake in enumerate(wrong_command_lines())
    }
    slowest = max(seconds, key=lambda mistake: seconds[mistake])
    with capsys.disabled():
        print(f"\n{len(seconds)} wrong command lines, {sum(seconds.values()):.0f} s;", end=" ")
        print(f"the slowest {seconds[slowest]:.2f} s: {slowest}")
    assert seconds[slowest] < SECONDS
    assert snapshot(workdir) == before


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("pretrain", "pretrain.batch_size=0", "config.pretrain.batch_size=0: expected 1 or more"),
        ("pretrain", "pretrain.epochs=0", "config.pretrain.epochs=0.0: expected above 0"),
        ("pretrain", "pretrain.learning_rate=nan", "learning_rate=nan: expected above 0"),
        ("pretrain", "pretrain.learning_rate=inf", "learning_rate=inf: expected above 0"),
        ("pretrain", "pretrain.learning_rate=1e300", "at most 3.40282e+38, the largest of float32"),
        ("pretrain", "pretrain.epochs=1e12", "epochs=1000000000000.0: expected above 0 and at m"),
        ("pretrain", "pretrain.save_every=3000000000", "expected at most 2,147,483,647"),
        ("ppo", "ppo.episodes=1000000000000", "expected at most 2,147,483,647"),
        ("pretrain", "pretrain.learning_rate=-1", "learning_rate=-1.0: expected above 0"),
        # A run in which nothing is learnt is a mistake.
        ("pretrain", "pretrain.learning_rate=0", "learning_rate=0.0: expected above 0"),
        ("pretrain", "pretrain.residual_dropout=1.5", "residual_dropout=1.5: expected 0 or more"),
        ("pretrain", "pretrain.seed=-1", "seed=-1: expected 0 to 4,294,967,295"),
        ("pretrain", "pretrain.log_every=0", "log_every=0: expected 1 or more"),
        ("pretrain", "pretrain.adam.b1=1", "config.pretrain.adam.b1=1.0: expected 0 or more and"),
        ("pretrain", "pretrain.adam.eps=0", "config.pretrain.adam.eps=0.0: expected above 0"),
        (
            "pretrain",
            "pretrain.lion.b2=0.9",
            "lion.b2 has no effect: pretrain.optimizer is 'adamw'",
        ),
        (
            "pretrain",
            "pretrain.optimizer=lion pretrain.adam.b2=0.9",
            "config.pretrain.adam.b2 has no effect: pretrain.optimizer is 'lion'",
        ),
        ("sft", "sft.optimizer=sgd", "expected one of adamw, adafactor, lion, muon"),
        ("sft", "sft.muon.iterations=0", "config.sft.muon.iterations=0: expected 1 to 20"),
        (
            "sft",
            "sft.decay_fraction=0.1",
            "config.sft.decay_fraction has no effect: sft.schedule is 'cosine'",
        ),
        (
            "sft",
            "sft.schedule=constant sft.final_fraction=0.1",
            "config.sft.final_fraction has no effect: sft.schedule is 'constant'",
        ),
        ("ppo", "ppo.schedule=cosine", "expected one of constant, linear"),
        (
            "ppo",
            "ppo.final_fraction=0.1",
            "final_fraction has no effect: ppo.schedule is 'constant'",
        ),
        ("pretrain", "pretrain.length=1", "config.pretrain.length=1: expected 2 or more"),
        ("pretrain", "pretrain.micro_batches=3", "batch_size 32 is not a multiple of micro_batch"),
        ("pretrain", "pretrain.lora.alpha=2", "config.pretrain.lora.alpha has no effect: "),
        ("pretrain", "pretrain.lora.base=nf4", "config.pretrain.lora.base 'nf4' is frozen: "),
        (
            "pretrain",
            "pretrain.lora.rank=2 pretrain.lora.targets=('(',)",
            "config.pretrain.lora.targets: '(' is no regular expression",
        ),
        ("sft", "sft.prompt_length=0", "config.sft.prompt_length=0: expected 1 or more"),
        ("sft", "sft.pack_length=1", "config.sft.pack_length=1: expected 2 or more"),
        (
            "sft",
            "sft.batch_size=5 sft.pretrain_fraction=0.1",
            "config.sft.pretrain_fraction 0.1 of batch_size 5 is 0 rows of text: expected 1 to 4",
        ),
        ("sft", "sft.pretrain_fraction=0.99", "is 16 rows of text: expected 1 to 15"),
        ("sft", "sft.loss_on_prompt=true sft.all_turns=true", "config.sft.all_turns has no effect"),
        ("sft", "sft.all_turns=true", "config.sft.all_turns has no effect: data.dialogues is ()"),
        (
            "sft",
            "data.source=files data.valid_fraction=0 sft.eval_every=5",
            "config.sft.eval_every has no effect: data.source is 'files' and data.valid_fraction",
        ),
        ("reward_model", "reward_model.completions=1", "completions=1: expected 2 or more"),
        (
            "reward_model",
            "reward_model.completions=2 reward_model.pair_norm=comb",
            "config.reward_model.pair_norm has no effect: reward_model.completions is 2",
        ),
        ("preference", "preference.margin=2", "margin has no effect: preference.loss is 'dpo'"),
        ("preference", "preference.label_smoothing=0.5", "expected 0 or more and below 0.5"),
        ("ppo", "ppo.temperature=0", "config.ppo.temperature=0.0: expected above 0"),
        ("ppo", "ppo.temperature=-1", "config.ppo.temperature=-1.0: expected above 0"),
        ("ppo", "ppo.minibatch=0", "config.ppo.minibatch=0: expected 1 or more"),
        ("ppo", "ppo.rollout_batch=0", "config.ppo.rollout_batch=0: expected 1 or more"),
        ("ppo", "ppo.samples_per_prompt=0", "config.ppo.samples_per_prompt=0: expected 1 or more"),
        ("ppo", "ppo.inner_epochs=0", "config.ppo.inner_epochs=0: expected 1 or more"),
        ("ppo", "ppo.episodes=64", "config.ppo.episodes 64 is less than one rollout_batch of 128"),
        ("ppo", "ppo.warmup_iterations=40", "warmup_iterations 40 of 32 iterations: the learning"),
        ("ppo", "ppo.clip=-0.2", "config.ppo.clip=-0.2: expected above 0"),
        ("ppo", "ppo.dual_clip=1", "config.ppo.dual_clip=1.0: expected above 1"),
        ("ppo", "ppo.reward_clip=-5", "config.ppo.reward_clip=-5.0: expected above 0"),
        ("ppo", "ppo.ema_decay=1.5", "config.ppo.ema_decay=1.5: expected 0 or more and below 1"),
        ("ppo", "ppo.gae_lambda=1.1", "config.ppo.gae_lambda=1.1: expected 0 to 1"),
        ("ppo", "ppo.ptx_coef=-1", "config.ppo.ptx_coef=-1.0: expected 0 or more"),
        ("ppo", "ppo.kl_coef=0 ppo.kl_target=6", "config.ppo.kl_target steers kl_coef, which is 0"),
        ("ppo", "ppo.kl_horizon=100", "kl_horizon has no effect: ppo.kl_target is None"),
        ("ppo", "ppo.ptx_ratio=2", "config.ppo.ptx_ratio has no effect: ppo.ptx_coef is 0.0"),
        ("ppo", "ppo.ptx_micro_batches=2", "ptx_micro_batches has no effect: ppo.ptx_coef is 0.0"),
        ("ppo", "ppo.group_scale=none", "group_scale has no effect: ppo.estimator is 'gae'"),
        ("ppo", "ppo.missing_eos=none ppo.missing_eos_penalty=2", "penalty has no effect: "),
        (
            "ppo",
            "ppo.samples_per_prompt=4 ppo.estimator=rloo ppo.whiten_rewards=true",
            "config.ppo.whiten_rewards leaves the mean of the rewards, and pays it once a token",
        ),
        (
            "ppo",
            "ppo.samples_per_prompt=4 ppo.estimator=rloo ppo.value_clip=0.1",
            "config.ppo.value_clip has no effect: ppo.estimator is 'rloo'",
        ),
        (
            "ppo",
            "ppo.minibatch=128 ppo.old_log_probs=forward ppo.clip=0.1",
            "config.ppo.clip has no effect: ppo.updates is 1 and ppo.rollout_lag is 0 and",
        ),
        ("ppo", "ppo.length_buckets=25", "config.ppo.length_buckets 25 is not between 1 and"),
        ("ppo", "data.valid_fraction=1.5", "valid_fraction=1.5: expected 0 or more and below 1"),
        ("ppo", "data.limit=0", "config.data.limit=0: expected 1 or more"),
        ("ppo", "data.template=chatml_", "config.data.template=chatml_: expected one of"),
        ("ppo", "data.on_bad_row=ignore", "on_bad_row=ignore: expected one of error, skip"),
    ],
)
def test_what_was_accepted_in_silence_or_crashed_is_refused_by_name(script, flags, message):
    values = cli.load_config(f"configs/{script}.py:toyworld")
    overrides = dict(flag.split("=", 1) for flag in flags.split())
    with pytest.raises(ConfigError) as error:
        resolve(module(script).Config, values, overrides)
    assert message in str(error.value)


# What users of other libraries type first, and the field that they mean.
ELSEWHERE = {
    "sft": {
        "lr": "sft.learning_rate",
        "sft.lr": "sft.learning_rate",
        "learning_rate": "sft.learning_rate",
        "num_train_epochs": "sft.epochs",
        "num_epochs": "sft.epochs",
        "per_device_train_batch_size": "sft.batch_size",
        "train_batch_size": "sft.batch_size",
        "gradient_accumulation_steps": "sft.micro_batches",
        "max_seq_length": "sft.pack_length",
        "cutoff_len": "sft.pack_length",
        "packing": "sft.pack_length",
        "max_prompt_length": "sft.prompt_length",
        "max_new_tokens": "sft.response_length",
        "model_name_or_path": "init",
        "base_model": "init",
        "dataset": "data.demonstrations",
        "dataset_name": "data.demonstrations",
        "train_file": "data.demonstrations",
        "chat_template": "data.template",
        "max_train_samples": "data.limit",
        "lr_scheduler_type": "sft.schedule",
        "min_lr_ratio": "sft.final_fraction",
        "optim": "sft.optimizer",
        "warmup_ratio": "sft.warmup",
        "warmup_steps": "sft.warmup",
        "max_grad_norm": "sft.adam.clip",
        "adam_beta2": "sft.adam.b2",
        "adam_epsilon": "sft.adam.eps",
        "wd": "sft.adam.weight_decay",
        "weight_decay": "sft.adam.weight_decay",
        "lora_r": "sft.lora.rank",
        "lora_alpha": "sft.lora.alpha",
        "target_modules": "sft.lora.targets",
        "load_in_4bit": "sft.lora.base",
        "bf16": "model.dtype",
        "torch_dtype": "model.dtype",
        "gradient_checkpointing": "model.remat",
        "attn_implementation": "model.attention",
        "logging_steps": "sft.log_every",
        "eval_steps": "sft.eval_every",
        "save_steps": "sft.save_every",
        "random_seed": "sft.seed",
        "train_on_inputs": "sft.loss_on_prompt",
        "val_size": "data.valid_fraction",
    },
    "ppo": {
        "ppo.beta": "ppo.kl_coef",
        "kl_penalty": "ppo.kl_coef",
        "init_kl_coef": "ppo.kl_coef",
        "target_kl": "ppo.kl_target",
        "cliprange": "ppo.clip",
        "cliprange_value": "ppo.value_clip",
        "epsilon_high": "ppo.clip_high",
        "lam": "ppo.gae_lambda",
        "gamma": "ppo.discount",
        "num_ppo_epochs": "ppo.inner_epochs",
        "num_generations": "ppo.samples_per_prompt",
        "mini_batch_size": "ppo.minibatch",
        "total_episodes": "ppo.episodes",
        "critic_lr": "ppo.value_learning_rate",
        "max_completion_length": "ppo.response_length",
        "reward_model_path": "reward_model",
        "scale_rewards": "ppo.group_scale",
    },
    "preference": {"beta": "preference.beta", "loss_type": "preference.loss"},
    "pretrain": {"block_size": "pretrain.length", "model_size": "model.preset"},
}


@pytest.mark.parametrize("script", ELSEWHERE)
def test_a_name_of_another_library_leads_to_ours(script):
    names = known(module(script).Config)
    wrong = {
        word: suggest_field(word, names)
        for word, field in ELSEWHERE[script].items()
        if suggest_field(word, names) != f"; did you mean config.{field}?"
    }
    assert not wrong
    assert suggest_field("output_dir", names) == "; did you mean --workdir?"
    assert suggest_field("tensor_parallel_size", names) == "; did you mean --mesh?"


def test_a_flag_without_its_config_is_told_which_field_it_is(workdir, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.run(
            lambda *_: None,
            module("sft").Config,
            default="configs/sft.py",
            argv=["--learning_rate=1e-4"],
        )
    assert exit_.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --learning_rate=1e-4; did you mean"
        " config.sft.learning_rate?\n"
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_help_of_every_script_fits_the_page_and_names_what_can_be_set(script, capsys):
    cli.run(module(script).main, module(script).Config, default=f"configs/{script}.py", argv=["-h"])
    text = capsys.readouterr().out
    words = [line for line in text.splitlines() if not line.startswith("  --config.")]
    assert max(map(len, words)) <= 100
    assert "\\\\" not in text, "a command that is shown can be pasted"
    for name in known(module(script).Config):
        assert f"--config.{name}=" in text


def test_numbers_are_shown_as_people_write_them(capsys):
    cli.run(
        module("ppo").main,
        module("ppo").Config,
        default="configs/ppo.py:instructgpt_1p3b",
        argv=["-h"],
    )
    text = capsys.readouterr().out
    assert "--config.ppo.learning_rate=5e-6\n" in text and "--config.ppo.episodes=256_000\n" in text
    assert "at most 1e6" not in text and not re.search(r"\de[+-]0", text)
    text = cli.resolve(module("ppo").Config, {}, {"ppo.episodes": "256_000"})
    assert text.ppo.episodes == 256_000


def test_why_a_field_is_not_read_is_told():
    for script, field, why in (
        ("collect", "data.prompts", "the training prompts of the embedded world are read"),
        (
            "sft",
            "data.comparisons",
            "this script reads data.demonstrations, data.dialogues, data.d",
        ),
        ("evaluate", "model.remat", "nothing is trained"),
    ):
        with pytest.raises(ConfigError, match=f"config.{field} has no effect: {why}"):
            resolve(module(script).Config, {}, {field: "full"})


def test_intervals_may_change_and_a_run_may_be_made_longer():
    for script in ("pretrain", "sft", "reward_model", "preference", "ppo"):
        said = {name.split(".")[-1]: of for name, _, of in leaf_fields(module(script).Config)}
        assert all(said[f"{name}_every"].may_change is True for name in ("log", "eval", "save"))
        assert said["episodes" if script == "ppo" else "epochs"].may_change == "more"
        assert not said["learning_rate"].may_change and not said["seed"].may_change


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/*.py")), ids=lambda path: path.stem)
def test_the_command_at_the_head_of_a_config_file_can_be_pasted(path):
    head = path.read_text().partition('"""')[2].partition('"""')[0]
    assert "python experiments/" in head and "\\\\" not in head


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_field_of_every_script_says_what_it_does(script):
    config_class = module(script).Config
    silent = [
        name
        for name, _, said in leaf_fields(config_class)
        if not said.text and not any(map(is_never, conditions(config_class, name)))
    ]
    assert not silent
