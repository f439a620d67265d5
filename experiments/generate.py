"""A word with any model: one prompt, a file of prompts, or a dialogue in the terminal.

    python experiments/generate.py --config.model=runs/sft/model --config.prompt="What is water?"
    python experiments/generate.py --config.model=runs/sft/model --config.chat=True
    python experiments/generate.py --config.model=DIR --config.data.prompts=FILE --workdir=runs/a

`config.model` is a model folder of a stage or of convert.py, or a Hugging Face folder. It is asked
in the template that it was fine-tuned on, else in its own chat template, else with the bare text;
`config.template` says another. Answers stream as they are decoded. Of a file of prompts, in any of
the formats that the stages read, every answer becomes a line of WORKDIR/answers.jsonl, in order; a
run that was stopped goes on after the last line.

In a dialogue: /system TEXT starts anew with another system turn, /reset starts anew, /save FILE
writes the turns as a row of messages, /quit (or Ctrl-D) ends; Ctrl-C ends an answer.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np

from instruct_jax import cli
from instruct_jax.data.formats import OnBadRow, read_questions
from instruct_jax.data.rows import Turn
from instruct_jax.errors import ConfigError, Interrupted
from instruct_jax.files import user_path, write_text
from instruct_jax.models.config import ComputeConfig
from instruct_jax.sampling.choose import Sampling
from instruct_jax.sampling.engine import Engine
from instruct_jax.sampling.stream import Piece, stream
from instruct_jax.settings import NEVER, Settings, setting
from instruct_jax.stages.dialogue import Dialogue, Speaker, way_of_asking
from instruct_jax.stages.trained import load_trained

ANSWERS = "answers.jsonl"
COMPILING = "compiling, which takes a while the first time a model of this shape is asked"


@dataclass(frozen=True)
class Questions(Settings):
    """A file of questions."""

    prompts: str = setting("", "file, glob or hub id, in any of the formats that PPO's may have")
    limit: int | None = setting(None, "questions that are read, at most", low=1, needs="prompts")
    on_bad_row: OnBadRow = setting(
        "error",
        "whether a row that cannot be used ends the run, or is left out and counted",
        needs="prompts",
    )


@dataclass(frozen=True)
class Config(Settings):
    """Who is asked what, and how tokens are drawn."""

    acts_if: ClassVar[Mapping[str, str]] = {"compute.remat": NEVER}

    model: str = setting("runs/sft/model", "model folder, of ours or of Hugging Face")
    prompt: str = setting("", "one question; its answer is printed")
    data: Questions = Questions()
    chat: bool = setting(False, "a dialogue in the terminal")
    system: str = setting("", "a system turn before every question")
    template: str | None = setting(
        None,
        "alpaca, plain, hh or chat; model is the chat template of the model's folder; None is what "
        "the model was trained on, else its own",
    )
    reward_model: str | None = setting(None, "model folder of a reward model that scores answers")
    compute: ComputeConfig = ComputeConfig()
    response_length: int = setting(
        256, "of an answer, at most; fewer where the model ends", low=1, unit="tokens"
    )
    temperature: float = setting(0.7, "0 takes the most probable token each time", low=0.0)
    top_k: int | None = setting(None, "only the k most probable tokens", low=1)
    top_p: float | None = setting(
        None, "only the fewest tokens that have this probability", above=0.0, high=1.0
    )
    min_p: float | None = setting(
        None, "only tokens that are this many times as probable as the first", low=0.0, high=1.0
    )
    stop: tuple[str, ...] = setting((), "texts that end an answer and are not part of it")
    n: int = setting(1, "answers to each question", low=1)
    batch_size: int = setting(32, "answers that are decoded together", low=1, needs="data.prompts")
    seed: int = setting(0, "seed of all that is drawn", low=0, high=2**32 - 1)

    def __post_init__(self) -> None:
        """ConfigError also where several things are asked, and for a stop text that is empty."""
        super().__post_init__()
        if bool(self.prompt) + bool(self.data.prompts) + self.chat > 1:
            raise ConfigError("prompt, data.prompts and chat: name one of them, not several")
        if not all(self.stop):
            raise ConfigError("stop: an empty text would end every answer at once")

    @property
    def leaves_files(self) -> bool:
        """Only answers to a file of prompts are written down."""
        return bool(self.data.prompts)


def main(config: Config, run: cli.Run) -> Path | None:
    """Asks, and returns the file of answers where there is one."""
    if not (config.prompt or config.data.prompts or config.chat):
        raise ConfigError(
            "nothing is asked: give --config.prompt=TEXT, --config.data.prompts=FILE or "
            "--config.chat=True"
        )
    speaker = open_speaker(config)
    if config.data.prompts:
        return answer_file(config, speaker, run)
    if config.chat:
        converse(config, speaker)
    else:
        turns = asked(config, config.prompt)
        ids = prompt_ids(speaker, turns, "config.prompt")
        run.note(COMPILING)
        for k in range(config.n):
            show(config, speaker, turns, ids, jax.random.fold_in(jax.random.key(config.seed), k))
    return None


def open_speaker(config: Config) -> Speaker:
    """The models of a run. Raises ConfigError."""
    trained = load_trained(
        user_path(config.model), kind="language", compute=config.compute, field="config.model"
    )
    asking = way_of_asking(trained, config.template)
    judge = None
    if config.reward_model is not None:
        reward = load_trained(
            user_path(config.reward_model),
            kind="scalar",
            compute=config.compute,
            field="config.reward_model",
        )
        judge = reward, way_of_asking(reward)
    return Speaker(trained, asking, judge)


def asked(config: Config, question: str) -> tuple[Turn, ...]:
    """A question with the system turn that goes before it."""
    system = (Turn("system", config.system),) if config.system.strip() else ()
    return (*system, Turn("user", question))


def prompt_ids(speaker: Speaker, turns: Sequence[Turn], where: str) -> list[int]:
    """The ids of a prompt; ConfigError where its template refuses it or the model has no room."""
    try:
        ids = speaker.asking.ids(turns)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error
    room_for(speaker, ids, where)
    return ids


def room_for(speaker: Speaker, ids: Sequence[int], where: str) -> int:
    """The tokens that an answer may have; ConfigError where there are none."""
    most = speaker.trained.config.max_length
    if len(ids) >= most:
        raise ConfigError(f"{where}: {len(ids)} tokens, and the model can read {most} at most")
    return most - len(ids)


def open_engine(config: Config, speaker: Speaker, slots: int) -> Engine:
    """An engine that draws as `config` says."""
    sampling = Sampling(
        stop_ids=speaker.trained.tokenizer.stop_ids,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        min_p=config.min_p,
    )
    return Engine(speaker.trained.model, speaker.trained.params, sampling, slots=slots)


def show(
    config: Config, speaker: Speaker, turns: Sequence[Turn], ids: Sequence[int], key: jax.Array
) -> tuple[str, tuple[int, ...]]:
    """Prints an answer as it comes; its text and tokens."""
    engine = open_engine(config, speaker, slots=1)
    budget = min(config.response_length, room_for(speaker, ids, "the prompt"))
    engine.submit([ids], key[None], max_new_tokens=budget)
    text, end = "", Piece(0, "")
    try:
        for end in stream(engine, speaker.trained.tokenizer, stops=config.stop, turns=4):
            text += end.text
            print(printable(end.text), end="", flush=True)
    except (KeyboardInterrupt, Interrupted) as stopped:
        if not config.chat or getattr(stopped, "number", 2) != 2:
            raise
    print("" if end.end == "stop" else " ..." if end.end else " (stopped)")
    score = speaker.score(turns, text, end.tokens)
    if score is not None:
        print(f"[score {score:.3f}]")
    return text, end.tokens


def printable(text: str) -> str:
    """`text` without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


def converse(config: Config, speaker: Speaker) -> None:
    """A dialogue until the input ends."""
    tokenizer = speaker.trained.tokenizer
    system = config.system
    dialogue = Dialogue(speaker.asking, tokenizer.stop_ids, system=system)
    print(
        f"{config.model}, template {speaker.asking.name}; /system TEXT, /reset, /save FILE, /quit"
    )
    key = jax.random.key(config.seed)
    for number, line in enumerate(lines()):
        command, _, rest = line.strip().partition(" ")
        if command == "/quit":
            return
        if command in ("/system", "/reset"):
            system = rest if command == "/system" else system
            dialogue = Dialogue(speaker.asking, tokenizer.stop_ids, system=system)
            print("a new dialogue")
        elif command == "/save":
            save(dialogue, rest)
        elif command.startswith("/"):
            print(f"no command {command}; there are /system, /reset, /save and /quit")
        elif command:
            reply(config, speaker, dialogue, line, jax.random.fold_in(key, number))


def reply(config: Config, speaker: Speaker, dialogue: Dialogue, line: str, key: jax.Array) -> None:
    """One question and its answer; what cannot be asked is said, and the dialogue stands."""
    before = list(dialogue.turns)
    try:
        ids = dialogue.ask(line)
        room_for(speaker, ids, "this dialogue")
    except (ValueError, ConfigError) as error:
        dialogue.turns = before
        print(f"{error} (/reset starts anew)")
        return
    text, tokens = show(config, speaker, dialogue.turns, ids, key)
    dialogue.answered(tokens, text)


def lines() -> Iterator[str]:
    """Lines of the terminal, or of whatever the standard input is."""
    with suppress(ImportError):
        import readline  # noqa: F401  history and editing, where there is one
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


def save(dialogue: Dialogue, name: str) -> None:
    """Writes the turns as a row of messages, which every stage reads."""
    if not name:
        print("/save FILE: name a file")
        return
    path = user_path(name)
    if path.exists():
        print(f"{path} is there already; name another")
        return
    messages = [{"role": turn.role, "content": turn.text} for turn in dialogue.turns]
    try:
        write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        print(f"{path}: {error.strerror}")
        return
    print(f"{path}: {len(messages)} turns")


def answer_file(config: Config, speaker: Speaker, run: cli.Run) -> Path:
    """WORKDIR/answers.jsonl: `n` answers to every question of a file, in order."""
    rows = read_questions(
        config.data.prompts, limit=config.data.limit, on_bad_row=config.data.on_bad_row
    )
    questions = [(*asked(config, "")[:-1], *row.turns) for row in rows]
    where = f"{config.data.prompts}: question"
    prompts = [prompt_ids(speaker, q, f"{where} {i}") for i, q in enumerate(questions)]
    path = run.workdir / ANSWERS
    done, total = whole_lines(path), len(questions) * config.n
    engine = open_engine(config, speaker, slots=min(config.batch_size, total))
    if done < total:
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(
            jax.random.key(config.seed), np.arange(done, total, dtype=np.int32)
        )
        for key, i in zip(keys, range(done, total), strict=True):
            ids = prompts[i // config.n]
            budget = min(config.response_length, room_for(speaker, ids, "a question"))
            engine.submit([ids], key[None], max_new_tokens=budget)
    run.note(f"{total - done} answers to come; {COMPILING}")
    pieces = stream(engine, speaker.trained.tokenizer, stops=config.stop, turns=16)
    with path.open("a", encoding="utf-8") as file:
        for i, (text, last) in enumerate(in_order(pieces), start=done):
            turns = questions[i // config.n]
            line = {
                "question": i // config.n,
                "messages": [{"role": turn.role, "content": turn.text} for turn in turns],
                "answer": text,
                "ended": last.end == "stop",
                "tokens": len(last.tokens),
            }
            if (score := speaker.score(turns, text, last.tokens)) is not None:
                line["score"] = score
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
    run.say(f"answers: {path} ({total} of them, to {len(questions)} questions)")
    return path


def in_order(pieces: Iterable[Piece]) -> Iterator[tuple[str, Piece]]:
    """The whole text and the last piece of every answer, in the order of their numbers."""
    texts: dict[int, str] = {}
    ended: dict[int, Piece] = {}
    following = 0
    for piece in pieces:
        texts[piece.number] = texts.get(piece.number, "") + piece.text
        if piece.end is not None:
            ended[piece.number] = piece
        while following in ended:
            yield texts.pop(following), ended.pop(following)
            following += 1


def whole_lines(path: Path) -> int:
    """How many lines of `path` are whole; half a one, of a process that was killed, is cut off."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    os.truncate(path, data.rfind(b"\n") + 1)
    return data.count(b"\n")


if __name__ == "__main__":
    cli.run(main, Config, default="configs/generate.py", writes=(ANSWERS,))
