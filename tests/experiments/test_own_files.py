"""The README's chain on files of one's own, in five formats and with their flaws, and what each
script says at its end.
"""

import json
import re

import pytest

from instruct_jax.paths import expanded
from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts
from tests.experiments.own_files import write_own_files

slow = pytest.mark.slow  # six scripts, each with programs of its own
SKIP = "--config.data.on_bad_row=skip"
SMALL = {
    "pretrain": ("--config.model.preset=tiny", "--config.vocab_size=400",
                 "--config.pretrain.epochs=1", "--config.pretrain.length=96",
                 "--config.data.split_text=paragraph"),
    "sft": ("--config.sft.epochs=1", "--config.sft.pack_length=256"),
    "ppo": ("--config.ppo.episodes=32", "--config.ppo.rollout_batch=32",
            "--config.ppo.response_length=16", "--config.ppo.warmup_iterations=1"),
    "evaluate": ("--config.response_length=16", "--config.document_length=64",
                 "--config.data.split_text=paragraph"),
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The files, and the folder of the runs."""
    folder = tmp_path_factory.mktemp("own")
    return write_own_files(folder / "data", rows=80), folder


@pytest.fixture(scope="module")
def chain(data):
    """The workdirs of all stages, one after another."""
    paths, folder = data

    def start(script, *arguments, **files):
        named = [
            f"--config.data.{kind}={','.join(str(paths[name]) for name in names.split())}"
            for kind, names in files.items()
        ]
        scripts.launch(
            script, f"--config=configs/{script}.py:files", f"--workdir={folder / script}",
            "--mesh=data:1", "--config.data.valid_fraction=0.1", SKIP, *named, *arguments,
            *SMALL.get(script, ()),
        )  # fmt: skip
        return folder / script / "model"

    gpt = start("pretrain", documents="documents")
    sft = start(
        "sft", f"--config.init={gpt}", "--config.data.template=chat",
        demonstrations="alpaca questions", dialogues="chats",
    )  # fmt: skip
    ranked = {"comparisons": "pairs ranks"}
    reward = start("reward_model", f"--config.init={sft}", **ranked)
    dpo = start("preference", f"--config.init={sft}", **ranked)
    policies = [f"--config.init={sft}", f"--config.reward_model={reward}"]
    ppo = start("ppo", *policies, prompts="questions alpaca")
    start(
        "evaluate", f"--config.models=('sft={sft}','dpo={dpo}','ppo={ppo}')",
        f"--config.reward_model={reward}", prompts="questions alpaca", documents="documents",
    )  # fmt: skip
    return folder


@slow
def test_the_chain_of_the_readme_runs_on_files_of_five_formats(chain):
    for script in ("pretrain", "sft", "reward_model", "preference", "ppo"):
        trained = load_trained(chain / script / "model")
        assert trained.stage == script
        assert trained.template == (None if script == "pretrain" else "chat"), script
    report = json.loads((chain / "evaluate" / "evaluation.json").read_text())
    assert list(report["models"]) == ["sft", "dpo", "ppo"] and report["prompts"] > 0
    samples = (chain / "evaluate" / "samples.jsonl").read_text().splitlines()
    asked = [json.loads(line)["prompt"] for line in samples]
    assert len(set(asked)) == len(asked) == report["prompts"]
    assert all("<|assistant|>" in prompt for prompt in asked), "one template for the whole chain"


@slow
@pytest.mark.parametrize(
    ("script", "figure"),
    [
        ("pretrain", r" \(held-out loss [\d.]+ on \d+ rows\)"),
        ("sft", r" \(held-out loss [\d.]+ on \d+ rows\)"),
        ("reward_model", r" \(held-out accuracy [\d.]+ % on \d+ pairs, by length alone [\d.]+ %\)"),
        ("preference", r" \(held-out accuracy [\d.]+ %, loss [\d.]+ on \d+ comparisons\)"),
        ("ppo", ""),
    ],
)
def test_a_finished_run_started_again_says_where_its_model_is_and_its_figure(
    chain, capsys, script, figure
):
    record = json.loads((chain / script / "config.json").read_text())
    command = [expanded(word, chain / script) for word in record["command"][1:]]
    scripts.launch(script, *command)
    out = capsys.readouterr().out.splitlines()
    assert re.fullmatch(re.escape(f"model: {chain / script / 'model'}") + figure, out[0]), out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ((), "empty text"),
        ((SKIP,), "one template a run: name it, as --config.data.template="),
    ],
)
def test_the_flaws_are_told_with_what_to_do(data, tmp_path, capsys, change, words):
    paths, _ = data
    model = scripts.write_model(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        scripts.launch(
            "sft", "--config=configs/sft.py:files", f"--workdir={tmp_path / 'run'}",
            f"--config.init={model}",
            f"--config.data.demonstrations={paths['alpaca']}",
            f"--config.data.dialogues={paths['chats']}", *change,
        )  # fmt: skip
    err = capsys.readouterr().err
    *warnings, error = err.splitlines()
    assert stop.value.code == 2 and words in error and "alpaca.json" in error
    assert all(line.startswith("warning: ") and "rows skipped (" in line for line in warnings)
    assert len(warnings) == len(change)  # said once, of one file
