"""experiments/generate.py through its command line: one word, a dialogue, a file that goes on."""

import json

import jax
import pytest

from instruct_jax.models.transformer import TransformerConfig, language_model, scalar_model
from instruct_jax.stages.trained import TrainedModel, save_trained
from tests.data.test_chat_template import template
from tests.experiments import scripts

SHORT = "--config=configs/generate.py:debug"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model with a chat template of its own, and a reward model."""
    chat = template("chatml", marked=False)
    chat.tokenizer.chat = chat.source
    shape = TransformerConfig(chat.tokenizer.vocab_size, 2, 16, 2, max_length=96)
    where = tmp_path_factory.mktemp("generate")
    for kind, make in (("language", language_model), ("scalar", scalar_model)):
        params = make(shape).init(jax.random.key(0))
        save_trained(where / kind, TrainedModel(kind, shape, params, chat.tokenizer, "imported"))
    return where


def generate(folders, *argv):
    scripts.launch("generate", SHORT, f"--config.model={folders / 'language'}", *argv)


def test_a_prompt_is_answered_with_a_score_and_nothing_is_left_behind(
    folders, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    generate(
        folders, "--config.prompt=Hello", "--config.n=2",
        f"--config.reward_model={folders / 'scalar'}",
    )  # fmt: skip
    assert capsys.readouterr().out.count("[score ") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_questions_goes_on_after_the_last_whole_line(folders, tmp_path, capsys):
    asked = tmp_path / "asked.jsonl"
    rows = [
        {"prompt": "Hello"},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"instruction": "Add", "input": "1 2", "output": "3"},
    ]
    asked.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = tmp_path / "run"
    argv = [f"--config.data.prompts={asked}", "--config.n=2", f"--workdir={run}"]
    generate(folders, *argv)
    answers = run / "answers.jsonl"
    whole = answers.read_bytes()
    found = list(map(json.loads, whole.splitlines()))
    assert [row["question"] for row in found] == [0, 0, 1, 1, 2, 2]
    assert found[4]["messages"] == [{"role": "user", "content": "Add\n\n1 2"}]
    assert found[0]["answer"] != found[1]["answer"], "each is drawn with a key of its own"
    answers.write_bytes(whole[: len(whole) // 2])
    generate(folders, *argv)
    assert answers.read_bytes() == whole


def test_a_dialogue_takes_commands_and_what_it_saves_is_read(
    folders, tmp_path, monkeypatch, capsys
):
    said = iter(["Hello", "/save d.jsonl", "/save d.jsonl", "/what", "More", "x" * 200,
                 "/system Be kind.", "Hi", "/save e.jsonl"])  # fmt: skip

    def line(_):
        try:
            return next(said)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", line)
    monkeypatch.chdir(tmp_path)
    generate(folders, "--config.chat=True")
    out = capsys.readouterr().out
    assert "is there already" in out
    assert "no command /what" in out
    assert "the model can read 96" in out, "what does not fit is said, and the dialogue goes on"
    first, second = (
        json.loads((tmp_path / name).read_text())["messages"] for name in ("d.jsonl", "e.jsonl")
    )
    assert [turn["role"] for turn in first] == ["user", "assistant"]
    assert second[0] == {"role": "system", "content": "Be kind."}
    generate(folders, "--config.data.prompts=e.jsonl", "--workdir=run")


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        ([], "nothing is asked"),
        (["--config.prompt=a", "--config.chat=True"], "name one of them"),
        (["--config.prompt=a", "--config.stop=('a','')"], "an empty text"),
        (["--config.prompt=a", "--config.data.limit=2"], "no effect"),
        (["--config.prompt=a", "--config.template=none_such"], "no template"),
        (["--config.prompt=" + "x" * 300], "the model can read 96"),
        (["--config.prompt=a\U00100005"], "private code point"),
        (["--config.data.prompts=missing.jsonl"], "missing.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(folders, tmp_path, monkeypatch, capsys, argv, reason):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        generate(folders, *argv)
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert reason in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_terminal_is_told_no_control_characters():
    from experiments.generate import printable

    assert printable("a\x1b[31mb\n\tc\x00é") == "a\ufffd[31mb\n\tc\ufffdé"
