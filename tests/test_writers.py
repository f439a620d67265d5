"""R22: every file is written whole or not at all, so by one writer (instruct_jax/files.py)."""

import ast

import pytest

# What writes a file in its place. `write_text` and `write_bytes` are those of pathlib, not ours.
METHODS = {"write_text", "write_bytes", "savefig", "tofile", "to_csv", "to_json", "to_parquet"}
FUNCTIONS = {
    *(("json", name) for name in ("dump",)),
    *(("np", name) for name in ("save", "savez", "savez_compressed", "savetxt")),
    *(("shutil", name) for name in ("copy", "copy2", "copyfile", "copytree", "move")),
    *(("pickle", name) for name in ("dump",)),
}
# Where it is right all the same.
ALLOWED = {
    "instruct_jax/files.py: .write_bytes": "the writer itself",
    "instruct_jax/data/rows.py: open(wb)": "inside of `replacing`",
    "instruct_jax/models/hf/container.py: open(wb)": "inside of `replacing`",
    "instruct_jax/evaluation/figure.py: .savefig": "into memory",
    "instruct_jax/benchmark/peers.py: np.savez": "into memory",
    "instruct_jax/training/metrics.py: open(a)": "a line at a time; half a line is passed over",
    "instruct_jax/data/corpus.py: open(r+b)": "tokens; the journal counts those that are safe",
    "instruct_jax/data/corpus.py: os.open": "the same file, to lock it",
    "instruct_jax/training/ledger.py: os.open": "the ledger, appended to",
    "instruct_jax/benchmark/peers.py: open(w)": "what a process of another library says",
    "instruct_jax/benchmark/startup.py: open(w)": "what a process of its own says",
    "experiments/benchmark_startup.py: open(w)": "what happened in a process, line by line",
    "experiments/benchmark_peers.py: os.fdopen": "a pipe",
    "instruct_jax/data/packed.py: os.open": "read",
    "experiments/generate.py: open(a)": "a line at a time; half a line is cut off",
}


def writes(tree):
    """(line, what) of every call that may write a file in place."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(getattr(called, "value", None), "id", "")
        if name == "open" and owner != "os":
            texts = [a.value for a in node.args if isinstance(a, ast.Constant)]
            texts += [k.value.value for k in node.keywords if k.arg == "mode"]
            modes = [t for t in texts if isinstance(t, str) and set(t) <= set("rwxabt+")]
            if any(set(mode) & set("wxa+") for mode in modes):
                yield node.lineno, f"open({modes[0]})"
        elif owner == "os" and name in ("open", "fdopen"):
            flags = ast.unparse(node)
            if name == "fdopen" or "O_CREAT" in flags or "flags" in flags:
                yield node.lineno, f"os.{name}"
        elif name == "memmap":
            if not any(isinstance(a, ast.Constant) and a.value == "r" for a in node.args):
                yield node.lineno, "memmap"
        elif (owner, name) in FUNCTIONS:
            yield node.lineno, f"{owner}.{name}"
        elif isinstance(called, ast.Attribute) and name in METHODS:
            yield node.lineno, f".{name}"


@pytest.fixture(scope="module")
def found(repository):
    """{"file: what": "file:line"}"""
    places = {}
    for room in ("instruct_jax", "experiments"):
        for path in sorted((repository / room).rglob("*.py")):
            name = path.relative_to(repository).as_posix()
            for line, what in writes(ast.parse(path.read_text())):
                places[f"{name}: {what}"] = f"{name}:{line}"
    return places


def test_no_file_is_written_but_by_the_one_writer(found):
    wrong = sorted(place for what, place in found.items() if what not in ALLOWED)
    assert not wrong, f"use instruct_jax.files: {wrong}"


def test_every_exception_is_one_still(found):
    assert set(ALLOWED) <= set(found)


def test_the_writers_of_others_are_found():
    text = "\n".join(
        [
            "path.open('w')",
            "open(path, 'wb')",
            "open(path, mode='a')",
            "path.write_text('')",
            "json.dump({}, file)",
            "np.savez(path)",
            "np.memmap(path, np.uint8)",
            "figure.savefig(path)",
            "shutil.copytree(a, b)",
            "os.open(path, os.O_RDWR | os.O_CREAT)",
        ]
    )
    assert [line for line, _ in writes(ast.parse(text))] == list(range(1, 11))
    assert not list(writes(ast.parse("open(path)\npath.open('rb')\nwrite_text(path, text)")))
