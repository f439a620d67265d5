"""R22: damage to any file of a finished run is noticed by what reads it next, in one line.

Files of all programs are flipped, cut, emptied, deleted and swapped with their namesakes in other
runs. `checkpoint.py verify` names each with exit code 4; so does, with 4 or 2, the next program
that reads it, or else it makes the file again and ends as if nothing had been.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.programs.client import Programs

KINDS = ("flip", "flip", "flip", "cut", "halve", "empty", "delete", "swap")
# Files that nothing reads, and why that may be.
UNREAD = {
    r"[^/]*/ledger\.log": "the account of a run: a line that is damaged is left out of it",
    r"[^/]*/tensorboard/.*": "to be looked at; the figures are those of the JSONL file beside it",
}
QUICK = ("prepare", "corpus", "arithmetic", "pretrain", "to_hf")
QUICK_COUNT, COUNT, EACH_QUICK = 60, 350, 12


def files_of(folder: Path, names: tuple[str, ...]) -> list[str]:
    """The files of finished programs that something reads, relative to the folder of all."""
    found = (p.relative_to(folder).as_posix() for n in names for p in (folder / n).rglob("*")
             if p.is_file())  # fmt: skip
    return sorted(p for p in found if not any(re.fullmatch(u, p) for u in UNREAD))


def spoil(path: Path, kind: str, others: list[Path], rng: np.random.Generator) -> bytes | None:
    """What is in the file instead; None where it is gone, its own contents where it cannot be."""
    data = path.read_bytes()
    if kind == "delete":
        return None
    if kind == "swap":
        namesakes = [b for b in (other.read_bytes() for other in others) if b != data]
        return namesakes[rng.integers(len(namesakes))] if namesakes else data
    if kind == "flip" and data:
        at = int(rng.integers(len(data)))
        return data[:at] + bytes([data[at] ^ 1 << int(rng.integers(8))]) + data[at + 1 :]
    return data[: {"cut": -1, "halve": len(data) // 2, "empty": 0}.get(kind, len(data))]


def damages(folder: Path, names: tuple[str, ...], count: int) -> Iterator[tuple[str, str, bytes]]:
    """(file, kind, contents instead) `count` times, over all files of the programs by turns, and
    among those of arrays, which are many and alike, over one in four.
    """
    rng = np.random.default_rng(0)
    paths = files_of(folder, names)
    arrays = [path for path in paths if re.search(r"/(params|checkpoints/\d+)/", path)]
    others = [path for path in paths if path not in set(arrays)]
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        by_name.setdefault(Path(path).name, []).append(folder / path)
    order = [list(rng.permutation(some)) for some in (others, arrays)]
    made = turn = 0
    while made < count:
        pool = order[turn % 4 == 3 and bool(arrays)]
        path = str(pool[turn // 4 % len(pool)] if pool is order[1] else pool[made % len(pool)])
        kind = str(rng.choice(KINDS))
        turn += 1
        beside = [other for other in by_name[Path(path).name] if other != folder / path]
        instead = spoil(folder / path, kind, beside, rng)
        if instead != (folder / path).read_bytes():
            made += 1
            yield path, kind, instead


def reader_of(programs: Programs, path: str) -> list[str] | None:
    """The cheapest command that reads a file, or None where that is verify alone; it works in a
    folder that was not there, or again in that of the file.
    """
    name, *inner = path.split("/")
    used = f"--workdir={programs.folder / 'used'}"
    if len(inner) == 1 and inner[0] == "config.json":
        return programs.commands[name]
    model = re.match(r"([^/]*/(?:model|epochs/\d+))/", path)
    if model is not None:
        source = f"--config.source={programs.folder / model[1]}"
        return ["convert", "--config=configs/convert.py:to_hf", source, used]
    if inner[0] == "hf":
        source = f"--config.source={programs.folder / name / 'hf'}"
        return ["convert", "--config=configs/convert.py:from_hf", source, used]
    if inner[0] == "tokens" and name == "corpus":
        return programs.commands[name]
    rows = path.removesuffix(".sha256")
    if len(inner) == 1 and rows.endswith(".jsonl") and name in ("prepare", "arithmetic", "collect"):
        kind = {"collect": "comparisons"}.get(name, "prompts")
        if rows.endswith("documents.jsonl") or not (programs.folder / path).exists():
            return None
        files = f"--config.files=('{programs.folder / rows}',)"
        arguments = ["--config=configs/prepare.py:paper", files, f"--config.kind={kind}", used]
        return ["prepare", *arguments]
    return None


def told_in_one_line(code: int, text: str) -> bool:
    """Whether a program ended as the house has it."""
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    return code in (2, 4) and len(errors) == 1 and "Traceback" not in text


def unnoticed(programs: Programs, names: tuple[str, ...], count: int) -> tuple[list[str], int]:
    """The damages that were not noticed as they should be, and how many programs read one."""
    wrong, read = [], 0
    for path, kind, instead in damages(programs.folder, names, count):
        place, name = programs.folder / path, path.split("/")[0]
        before, kept = place.read_bytes(), programs.folder / "kept"
        shutil.copytree(programs.folder / name, kept)
        place.unlink() if instead is None else place.write_bytes(instead)
        code, text = programs.run("checkpoint", "verify", str(programs.folder / name))
        # Of a folder without a record nobody can say that it was a run; the run itself can.
        gone = path == f"{name}/config.json" and instead is None
        if not gone and (code != 4 or not told_in_one_line(code, text)):
            wrong.append(f"{path} {kind}: verify {code} {text[-200:]}")
        reader = reader_of(programs, path)
        if path.endswith(".sha256") and instead and instead[:64] == before[:64]:
            reader = None  # the hash is right; the name behind it is for sha256sum
        if reader is not None:
            read += 1
            code, text = programs.run(*reader)
            again = f"--workdir={programs.folder / name}" in reader
            healed = again and code == 0 and programs.state(name) == programs.states[name]
            if not told_in_one_line(code, text) and not healed:
                wrong.append(f"{path} {kind}: {reader[0]} {code} {text[-200:]}")
            shutil.rmtree(programs.folder / "used", ignore_errors=True)
        shutil.rmtree(programs.folder / name)
        kept.rename(programs.folder / name)
        assert place.read_bytes() == before
    return wrong, read


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with Programs(tmp_path_factory.mktemp("damage")) as started:
        yield started


def finish(programs: Programs, names: tuple[str, ...]) -> None:
    """Runs what these need, and notes what they left."""
    for name in list(programs.commands):
        if name in names and name not in programs.events:
            programs.finish(name)
            programs.states[name] = programs.state(name)


def test_a_whole_run_is_intact(programs):
    finish(programs, ("pretrain", "prepare"))
    for name in ("pretrain", "prepare"):
        code, text = programs.run("checkpoint", "verify", str(programs.folder / name))
        assert code == 0 and "record: intact" in text, text


def test_damage_to_any_file_is_noticed_in_one_line(programs):
    finish(programs, (*QUICK, "sft"))
    wrong, read = unnoticed(programs, QUICK, QUICK_COUNT)
    assert not wrong, "\n".join(wrong)
    assert read > QUICK_COUNT // 4


@pytest.mark.slow
def test_350_damages_over_the_files_of_all_programs_are_noticed_in_one_line(programs, capsys):
    finish(programs, tuple(programs.commands))
    wrong, read = unnoticed(programs, tuple(programs.commands), COUNT)
    with capsys.disabled():
        print(f"\n{COUNT} damages: verify of each, and {read} programs that read one")
    assert not wrong, "\n".join(wrong)
