"""What needs data or a model is checked before a first program is compiled, in every script; and a
run without held-out rows, or without files that it would not read, is a run.
"""

import importlib
import json
import re

import pytest

from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts

LENGTHS = {"prompt_length": 24, "response_length": 16}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Rows, a language model and a reward model of the same tokens."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = scripts.write_rows(folder)
    scripts.write_reward_model(folder / "reward", scripts.write_model(folder / "model"))
    return folder, paths


READS = {
    "pretrain": ("documents",),
    "sft": ("demonstrations",),
    "reward_model": ("comparisons", "demonstrations"),
    "preference": ("comparisons",),
    "ppo": ("prompts",),
    "evaluate": ("prompts",),
}


def arguments(inputs, script, workdir, **rows):
    """A command on files that trains in seconds."""
    folder, paths = inputs
    start = {
        "pretrain": ["--config.vocab_size=300", "--config.pretrain.length=40"],
        "ppo": [f"--config.init={folder / 'model'}", f"--config.reward_model={folder / 'reward'}"],
        "evaluate": [
            f"--config.models=('sft={folder / 'model'}',)",
            f"--config.reward_model={folder / 'reward'}",
            *(f"--config.{name}={value}" for name, value in LENGTHS.items()),
        ],
    }.get(script, [f"--config.init={folder / 'model'}"])
    if script not in ("pretrain", "evaluate"):
        start += [f"--config.{script}.{name}={value}" for name, value in LENGTHS.items()]
    if script == "sft":
        start += ["--config.sft.pack_length=none"]
    return [
        f"--config=configs/{script}.py:debug",
        f"--workdir={workdir}",
        "--mesh=data:2",
        "--config.data.source=files",
        *(f"--config.data.{kind}={rows.get(kind, paths[kind])}" for kind in READS[script]),
        *start,
    ]


def few(folder, kind, source, count=12, **changes):
    """A file of the first `count` rows of another."""
    rows = [json.loads(line) | changes for line in source.read_text().splitlines()[:count]]
    path = folder / f"few_{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


LONG = " ".join(scripts.WORDS * 4)


@pytest.mark.parametrize(
    ("script", "override", "reason"),
    [
        ("pretrain", "--config.pretrain.batch_size=100000", "less than one batch"),
        ("pretrain", "--config.pretrain.batch_size=9", "9 rows cannot be divided over mesh data:2"),
        ("sft", "--config.sft.batch_size=64", "demonstrations to train on, less than one batch"),
        ("sft", "--config.sft.prompt_length=1", "none of "),
        ("sft", "--config.sft.prompt_length=1", "raise config.sft.prompt_length: "),
        ("sft", "--config.sft.pack_length=8", "the longest demonstration has"),
        ("sft", "--config.sft.pack_length=1000000000", "all demonstrations together have"),
        ("sft", "--config.data.demonstrations={long}", "raise config.sft.prompt_length"),
        ("sft", "--config.sft.batch_size=7", "7 rows cannot be divided over mesh data:2"),
        ("reward_model", "--config.data.demonstrations={long}", "normalisation=demo_mean needs"),
        ("reward_model", "--config.data.demonstrations=", "needs data.demonstrations, answers wh"),
        (
            "reward_model",
            "--config.data.comparisons={ranked_long}",
            "comparisons is left",
        ),
        ("reward_model", "--config.data.comparisons={tied}", "each is a tie"),
        (
            "reward_model",
            "--config.reward_model.completions=2",
            "comparisons.jsonl:1:1: 3 completions",
        ),
        ("reward_model", "--config.reward_model.batch_size=64", "less than one batch"),
        ("preference", "--config.preference.completions=2", "over config.preference.completions=2"),
        (
            "preference",
            "--config.data.comparisons={ranked_long}",
            "raise config.preference",
        ),
        ("preference", "--config.data.comparisons={tied}", "each is a tie"),
        ("preference", "--config.preference.batch_size=64", "less than one batch"),
        ("ppo", "--config.data.prompts={long}", "raise config.ppo.prompt_length"),
        (
            "ppo",
            "--config.ppo.rollout_batch=64 --config.ppo.episodes=64",
            "prompts to train on, less than one batch",
        ),
        ("ppo", "--mesh=data:3", "16 rows cannot be divided over mesh data:3"),
        ("evaluate", "--config.data.test.prompts={long}", "longer than config.prompt_length=24"),
    ],
)
def test_rows_that_will_not_do_are_told_before_anything_is_compiled(
    tmp_path, capsys, monkeypatch, inputs, script, override, reason
):
    _, paths = inputs
    files = {
        "long": few(tmp_path, "long", paths["demonstrations"], 60, prompt=LONG),
        "ranked_long": few(tmp_path, "ranked_long", paths["comparisons"], 60, prompt=LONG),
        "tied": few(tmp_path, "tied", paths["comparisons"], 60, ranks=[0, 0, 0]),
    }
    module = importlib.import_module(f"experiments.{script}")
    stage = getattr(module, script, None)
    if hasattr(stage, "train"):
        monkeypatch.setattr(stage, "train", None)
    workdir = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        scripts.launch(
            script, *arguments(inputs, script, workdir), *override.format(**files).split()
        )
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    assert reason in err
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("script", "report"),
    [
        ("pretrain", None),
        ("sft", None),
        ("reward_model", "accuracy.json"),
        ("preference", "preference.json"),
        ("ppo", "samples.jsonl"),
    ],
)
def test_a_run_without_held_out_rows_trains_and_writes_no_held_out_figure(
    tmp_path, capsys, inputs, script, report
):
    """It once trained to its end and failed there, and so again when it was run again."""
    workdir = tmp_path / "run"
    command = [*arguments(inputs, script, workdir), "--config.data.valid_fraction=0"]
    scripts.launch(script, *command)
    out, err = capsys.readouterr()
    told = "there is no held-out loss" if script == "ppo" else "it trains on all of them"
    assert err.count(f"are held out: {told}") == 1
    assert out == f"model: {workdir / 'model'}\n"
    assert load_trained(workdir / "model").stage == script
    assert json.loads((workdir / "model" / "model.json").read_text())["notes"] == {}
    assert report is None or not (workdir / report).exists()
    logged = (workdir / f"{script}.jsonl").read_text().splitlines()
    assert not any("valid" in name for line in logged for name in json.loads(line))
    scripts.launch(script, *command)  # and is done when it is run again
    assert capsys.readouterr().out == out


def test_twelve_rows_with_one_system_prompt_train_or_are_refused_but_never_fail_at_the_end(
    tmp_path, capsys, inputs
):
    rows = tmp_path / "chats.jsonl"
    turns = [
        [("system", "the mat"), ("user", scripts.sentence(i, 3)), ("assistant", "a cat")]
        for i in range(12)
    ]
    rows.write_text("".join(
        json.dumps({"messages": [{"role": r, "content": t} for r, t in chat]}) + "\n"
        for chat in turns
    ))  # fmt: skip
    command = [
        f"--config.data.demonstrations={rows}",
        "--config.data.valid_fraction=0",
        "--config.sft.batch_size=4",
        "--config.sft.prompt_length=48",
    ]
    scripts.launch("sft", *arguments(inputs, "sft", tmp_path / "run"), *command)
    assert capsys.readouterr().out == f"model: {tmp_path / 'run' / 'model'}\n"


def test_a_reward_model_without_normalisation_needs_no_demonstrations(tmp_path, capsys, inputs):
    command = arguments(inputs, "reward_model", tmp_path / "run")
    command = [word for word in command if "data.demonstrations" not in word]
    scripts.launch("reward_model", *command, "--config.reward_model.normalisation=none")
    out = capsys.readouterr().out
    assert out.startswith(f"model: {tmp_path / 'run' / 'model'} (held-out accuracy ")
    report = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert report["mean_demonstration"] is None and report["prompts"] > 0


def test_ppo_and_evaluation_need_no_documents(tmp_path, capsys, inputs):
    fraction = "--config.data.valid_fraction=0.3"
    scripts.launch("ppo", *arguments(inputs, "ppo", tmp_path / "ppo"), fraction)
    out, err = capsys.readouterr()
    assert "no documents are held out" in err
    lines = out.splitlines()
    assert lines[0] == f"model: {tmp_path / 'ppo' / 'model'}"
    assert lines[1].endswith("samples.jsonl")
    scripts.launch("evaluate", *arguments(inputs, "evaluate", tmp_path / "evaluate"), fraction)
    out, err = capsys.readouterr()
    assert "no loss of text to compare" in err
    report = json.loads((tmp_path / "evaluate" / "evaluation.json").read_text())
    assert "pretrain_loss" not in report["models"]["sft"] and report["held_out_tokens"] == 0
    assert "reward" in out and "answers that end" in out and "held-out text loss" not in out
    for name in ("evaluation.json", "samples.jsonl"):
        assert str(tmp_path / "evaluate" / name) in out


def test_how_many_rows_went_where_is_told_and_recorded(tmp_path, capsys, inputs):
    scripts.launch("sft", *arguments(inputs, "sft", tmp_path / "run"))
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data: ")]
    found = re.fullmatch(
        r"data: demonstrations: (\d+) to train on, (\d+) for validation, (\d+) for evaluation", told
    )
    counts = dict(zip(("train", "valid", "test"), map(int, found.groups()), strict=True))
    assert sum(counts.values()) == 60
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert record["rows"] == {"demonstrations": counts}


def test_a_warning_is_a_plain_line_that_is_said_once(tmp_path, capsys, inputs):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(inputs[1]["demonstrations"].read_text() + '{"prompt": "a", "response": ""}\n')
    skip = [f"--config.data.demonstrations={rows}", "--config.data.on_bad_row=skip"]
    scripts.launch("sft", *arguments(inputs, "sft", tmp_path / "run"), *skip)
    lines = [line for line in capsys.readouterr().err.splitlines() if "bad rows" in line]
    assert lines == [
        f"warning: {rows}: prompt+response, 60 rows; 1 bad rows skipped (1 x response: empty text)"
    ]


def test_few_held_out_prompts_are_told_at_an_evaluation(tmp_path, capsys, inputs):
    scripts.launch("evaluate", *arguments(inputs, "evaluate", tmp_path / "run"))
    err = capsys.readouterr().err
    assert re.search(
        r"note: only \d prompts are held out, too few .* config.data.test.prompts", err
    )


def test_a_pack_length_that_the_rows_do_not_fit_is_measured_too(tmp_path, capsys, inputs):
    """Of a dozen short rows no batch of 512 tokens is filled; longer ones once ended the run."""
    command = [*arguments(inputs, "sft", tmp_path / "run"), "--config.measure_lengths=true"]
    for given in (8, 512):
        workdir = f"--workdir={tmp_path / str(given)}"
        scripts.launch("sft", *command, workdir, f"--config.sft.pack_length={given}")
        found = re.search(r"note: pack_length (\d+) and not (\d+)", capsys.readouterr().err)
        assert int(found[2]) == given and 8 < int(found[1]) < 512


def test_lengths_are_measured_and_told(tmp_path, capsys, inputs):
    """The lengths of the embedded world once took 300 of 347 rows of anybody's files."""
    command = [
        *arguments(inputs, "sft", tmp_path / "run"),
        "--config.measure_lengths=true",
        "--config.sft.prompt_length=512",
        "--config.sft.response_length=512",
    ]
    scripts.launch("sft", *command)
    err = capsys.readouterr().err
    assert "note: measured on " in err and "of 128 positions" in err
    assert "that are longer" not in err
