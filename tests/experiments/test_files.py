"""Every script on a user's own files: what each writes, and that a second run changes nothing."""

import hashlib
import importlib
import json
import os
import re
import socket
from pathlib import Path

import pytest

from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts
from tests.stages.lab import same_bits

# A script refuses the name of a file that it would not read.
READS = {
    "pretrain": ("documents", "demonstrations"),
    "sft": ("documents", "demonstrations"),
    "reward_model": ("comparisons", "demonstrations"),
    "preference": ("comparisons",),
    "ppo": ("prompts", "documents"),
    "select_sft": ("prompts",),
    "evaluate": ("prompts", "documents"),
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The stages one after another; {script: the arguments it was started with}."""
    folder = tmp_path_factory.mktemp("files")
    paths = scripts.write_rows(folder / "data")
    data = ["--config.data.source=files", "--config.data.valid_fraction=0.2", "--mesh=data:2"]
    data += ["--config.data.test_fraction=0.1"]

    def start(script, group, *arguments, config=None, **fields):
        config = config or script
        prefix = f"--config.{group}." if group else "--config."
        commands[config] = [
            f"--config=configs/{config}.py:debug",
            f"--workdir={folder / config}",
            *data,
            *(f"--config.data.{name}={paths[name]}" for name in READS[script]),
            *(f"{prefix}{name}={value}" for name, value in fields.items()),
            *arguments,
        ]
        scripts.launch(script, *commands[config])
        return folder / config

    commands = {}
    lengths = {"prompt_length": 24, "response_length": 16}
    gpt = start("pretrain", "pretrain", "--config.vocab_size=300", length=40, epochs=0.5) / "model"
    sft = start(
        "sft", "sft", f"--config.init={gpt}", "--config.keep_epochs=True",
        epochs=2, pack_length=48, pretrain_fraction=0.25, **lengths,
    )  # fmt: skip
    reward = start(
        "reward_model", "reward_model", f"--config.init={sft / 'model'}", **lengths
    )  # fmt: skip
    policies = [f"--config.init={sft / 'model'}", f"--config.reward_model={reward / 'model'}"]
    start("ppo", "ppo", *policies, "--config.ptx_length=32", ptx_coef=1.0, ptx_ratio=1, **lengths)
    start("ppo", "ppo", *policies, config="grpo", **lengths)
    start("ppo", "ppo", *policies, config="rloo", **lengths)
    start("preference", "preference", f"--config.init={sft / 'model'}", **lengths)
    start(
        "select_sft", None, f"--config.epochs={sft / 'epochs'}",
        f"--config.reward_model={reward / 'model'}", **lengths,
    )  # fmt: skip
    models = f"('gpt={gpt}', 'sft={sft / 'model'}', 'ppo={folder / 'ppo' / 'model'}')"
    start(
        "evaluate", None, f"--config.models={models}", document_length=32,
        reward_model=reward / "model", **lengths,
    )  # fmt: skip
    return folder, paths, commands


def read(path):
    return json.loads(path.read_text())


def test_every_stage_writes_its_model_and_says_what_its_data_was(pipeline):
    folder, paths, _ = pipeline
    for script in ("pretrain", "sft", "reward_model", "ppo", "preference"):
        assert load_trained(folder / script / "model").stage == script
        hashes = read(folder / script / "config.json")["data"]
        names = {f"$HERE/../data/{paths[name].name}": paths[name] for name in READS[script]}
        assert set(hashes) == set(names)
        for name, path in names.items():
            assert hashes[name] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_reward_model_is_judged_beside_the_lengths(pipeline):
    accuracy = read(pipeline[0] / "reward_model" / "accuracy.json")
    assert {"accuracy", "length_only", "ece", "calibration", "by_sources"} <= set(accuracy)
    assert accuracy["prompts"] > 0 and abs(accuracy["mean_demonstration"]) <= 1e-4, "RM-4"


def test_the_models_are_compared_without_a_gold_judge(pipeline):
    report = read(pipeline[0] / "evaluate" / "evaluation.json")
    assert list(report["models"]) == ["gpt", "sft", "ppo"]
    for result in report["models"].values():
        assert {"pretrain_loss", "reward", "response_length", "eos_rate"} <= set(result)
        assert "gold" not in result
    lines = (pipeline[0] / "evaluate" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == report["prompts"] > 0


def test_preferences_are_judged_on_held_out_comparisons(pipeline):
    report = read(pipeline[0] / "preference" / "preference.json")
    assert {"loss", "accuracy", "margin", "log_prob_chosen"} <= set(report)
    assert report["loss"] > 0


@pytest.mark.parametrize("config", ["grpo", "rloo"])
def test_critic_free_runs_log_their_groups_and_no_values(pipeline, config):
    lines = (pipeline[0] / config / "ppo.jsonl").read_text().splitlines()
    logged = set().union(*map(json.loads, lines))
    assert "score_sd_in_group" in logged
    assert not {"value_loss", "explained_variance"} & logged
    assert load_trained(pipeline[0] / config / "model").stage == "ppo"


def test_runs_are_drawn_over_each_other(pipeline, tmp_path, capsys):
    plot = importlib.import_module("experiments.plot")
    runs = [str(pipeline[0] / name) for name in ("ppo", "grpo")]
    assert {"score", "kl", "eos_rate"} <= set(plot.read_curves(pipeline[0] / "ppo"))
    plot.main([*runs, f"--to={tmp_path / 'a.png'}"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    for arguments, message in (
        ([*runs, "--metrics=scroe"], "no run has logged scroe; there are "),
        ([str(tmp_path)], "no *.jsonl with steps here"),
    ):
        with pytest.raises(SystemExit) as exit_:
            plot.main([*arguments, f"--to={tmp_path / 'b.png'}"])
        assert exit_.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()


def test_ppo_saves_its_average_and_shows_samples(pipeline):
    """T40, PPO-14: what is kept and evaluated is the EMA."""
    folder, _, _ = pipeline
    start, end = (load_trained(folder / part / "model").params for part in ("sft", "ppo"))
    assert not same_bits(start, end)
    samples = (folder / "ppo" / "samples.jsonl").read_text()
    rows = [json.loads(line) for line in samples.splitlines()]
    assert {row["step"] for row in rows} == {1, 2}
    assert {"step", "prompt", "response", "ended"} <= set(rows[0])


@pytest.mark.parametrize(
    "script", ["pretrain", "sft", "reward_model", "ppo", "preference", "select_sft"]
)
def test_a_finished_run_started_again_changes_nothing(pipeline, script, capsys):
    """JAX-10, R22: no byte and no time of any file or folder; and it says so."""
    folder, _, commands = pipeline
    before = contents(folder / script)
    capsys.readouterr()
    scripts.launch(script, *commands[script])
    out, err = capsys.readouterr()
    assert f"note: {folder / script} is as this run left it" in err
    assert out.startswith(f"model: {folder / script / 'model'}"), "what it came to, as before"
    assert contents(folder / script) == before


def contents(workdir):
    """The time of every file and folder, and the bytes of files."""
    paths = [workdir, *workdir.rglob("*")]
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in paths}


def test_nothing_that_a_run_writes_tells_of_the_machine(pipeline):
    """No path but those from the work directory or the home, no name of this machine: what a run
    writes is published. Nothing is excepted: whom a lock belongs to is told by a hash.
    """
    folder = pipeline[0]
    host = re.compile(rf"(?<![a-z0-9]){re.escape(socket.gethostname())}(?![a-z0-9])")
    secrets = [str(folder.parent).encode(), str(Path.home()).encode() + b"/", os.getcwd().encode()]
    written = [p for p in folder.rglob("*") if p.is_file() and folder / "data" not in p.parents]
    assert len(written) > 200
    for path in written:
        assert not host.search(str(path.relative_to(folder))), path
        data = path.read_bytes()
        assert not [secret for secret in secrets if secret in data], path
        try:
            assert not host.search(data.decode()), path
        except UnicodeDecodeError:
            continue  # arrays, in which a short name may stand by chance
