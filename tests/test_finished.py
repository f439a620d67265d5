"""A run that has ended is not made again while nothing has changed (R22); what its record says of
where things are.
"""

import hashlib
import re
from dataclasses import dataclass

from instruct_jax import cli
from instruct_jax.paths import expanded, given_back, published
from instruct_jax.settings import Settings, setting

OVERWRITE = "--overwrite"


def times(workdir):
    return {p: (p.stat().st_mtime_ns, p.is_file() and p.read_bytes()) for p in workdir.rglob("*")}


@dataclass(frozen=True)
class Tuned(Settings):
    """What a stage's configuration may name."""

    init: str = setting("gpt/model", "start")
    steps: int = setting(1, "updates", low=1, may_change="more")
    files: tuple[str, ...] = setting((), "rewards")


def test_a_run_that_has_ended_is_not_made_again_and_is_once_anything_has_changed(
    tmp_path, monkeypatch, capsys
):
    """Its own files to the bit, the models, rows and rewards that it was made of, its
    configuration.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "presets.py").write_text("def get_config():\n    return {}\n")
    (tmp_path / "gpt/model").mkdir(parents=True)
    (tmp_path / "gpt/model/model.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("1")
    (tmp_path / "rewards.py").write_text("1")
    made = []

    def main(config, run):
        made.append(config)
        (run.workdir / "log").write_text(str(config.steps))
        run.say(f"log: {(run.workdir / 'log').resolve()}")
        rows = tmp_path / "rows.jsonl"
        run.record(data={str(rows): hashlib.sha256(rows.read_bytes()).hexdigest()})

    def launch(*argv):
        before = len(made)
        options = {"default": "./presets.py", "writes": ("log",), "once": True}
        argv = ["--workdir=runs/a", "--config.files=('python=rewards.py:exact*2',)", *argv]
        cli.run(main, Tuned, **options, argv=argv)
        return len(made) > before

    assert launch()
    before = times(tmp_path)
    capsys.readouterr()
    for argv in ((), (f"--config.init={tmp_path}/gpt/model",)):
        assert not launch(*argv)
        out, err = capsys.readouterr()
        assert out == f"log: {tmp_path}/runs/a/log\n", "what it came to is told again"
        assert "note: runs/a is as this run left it" in err
    assert times(tmp_path) == before
    for name in ("runs/a/log", "gpt/model/model.json", "rows.jsonl", "rewards.py"):
        (tmp_path / name).write_text('{"other": 1}')
        assert launch(), name
        assert not launch(), name
    (tmp_path / "runs/a/log").unlink()
    assert launch() and not launch()
    assert launch("--config.steps=2") and not launch("--config.steps=2")
    assert launch(OVERWRITE)


def test_paths_in_a_record_lead_there_from_the_work_directory(tmp_path, monkeypatch):
    """And back; a URL, a path from where the command was given and other texts stay."""
    home, workdir = tmp_path / "home/me", tmp_path / "runs/sft"
    monkeypatch.setenv("HOME", str(home))
    workdir.mkdir(parents=True)
    up = "/.." * len(workdir.parents)
    for given, shown in {
        f"{workdir}": "$HERE",
        f"--workdir={workdir}/": "--workdir=$HERE/",
        f"{tmp_path}/runs/gpt/model": "$HERE/../gpt/model",
        f"{tmp_path}/runs2/a": "$HERE/../../runs2/a",
        f"('a={tmp_path}/runs/a','b={tmp_path}/b')": "('a=$HERE/../a','b=$HERE/../../b')",
        f"models={workdir}/a,{workdir}/b:mean": "models=$HERE/a,$HERE/b:mean",
        f"{home}/rows.jsonl": "$HERE/../../home/me/rows.jsonl",
        "/data/rows.jsonl": f"$HERE{up}/data/rows.jsonl",
        "runs/gpt/model": "runs/gpt/model",
        "~/rows.jsonl": "~/rows.jsonl",
        "endpoint=https://host/get_reward": "endpoint=https://host/get_reward",
        "a / b": "a / b",
    }.items():
        assert published(given, workdir) == shown
        assert published({given: [given, 1]}, workdir) == {shown: [shown, 1]}
        for text in re.split(r"[=,]", given):
            if text.startswith("/"):
                back = expanded(published(text, workdir), workdir)
                assert back.rstrip("/") == text.rstrip("/")
    through = f"{tmp_path}/runs/../data/rows.jsonl"
    assert expanded(published(through, workdir), workdir) == f"{tmp_path}/data/rows.jsonl"
    (shown,) = given_back([through], workdir)
    assert given_back([through], workdir)[shown] == through and str(tmp_path) not in shown
    elsewhere = tmp_path / "elsewhere/run"
    elsewhere.mkdir(parents=True)
    monkeypatch.setenv("HOME", "/home/me")
    assert published("/home/me/rows.jsonl", elsewhere) == "~/rows.jsonl"
    assert expanded("~/rows.jsonl", elsewhere) == "/home/me/rows.jsonl"
