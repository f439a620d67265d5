"""The pitfalls T1 to T60 of the specification: each is tested, or here stands what it waits for.

A test names its statements in its docstring. `WAITING` holds those that no test can check yet, and
`UNFINISHED` those of which a part waits; whoever closes one deletes its line.
"""

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parent
STATEMENTS = [f"T{n}" for n in range(1, 61)]

# Statement -> why no test of the suite decides it.
WAITING: dict[str, str] = {
    "T59": "a study of several runs against a gold model, to come with the issue on the losses",
    "T60": "needs GPT-2 124M and the labels of 2019 at hand; its test skips with that reason",
}
# Statement -> the part that is still to come, and with what.
UNFINISHED: dict[str, str] = {
    "T1": "at equal micro-batch shapes on a TPU or GPU in bfloat16: with the issue on speed",
    "T24": "across processes: with the issue on several hosts",
    "T55": "onto a mesh of other processes: with the issue on several hosts",
}


def docstrings() -> dict[str, list[str]]:
    """{statement: the tests whose docstrings name it}."""
    found: dict[str, list[str]] = {name: [] for name in STATEMENTS}
    for path in sorted(TESTS.rglob("test_*.py")):
        if path == Path(__file__).resolve():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.startswith("test_"):
                continue
            for name in set(re.findall(r"\bT[1-9]\d?\b", ast.get_docstring(node) or "")):
                where = f"{path.relative_to(TESTS)}::{node.name}"
                found.setdefault(name, []).append(where)
    return found


def test_every_statement_is_tested_or_waits_for_a_reason():
    found = docstrings()
    missing = [name for name in STATEMENTS if not found[name] and name not in WAITING]
    assert not missing, f"no test names {', '.join(missing)}"


def test_no_test_names_a_statement_that_is_not_there():
    unknown = {name: where for name, where in docstrings().items() if name not in STATEMENTS}
    assert not unknown


def test_what_is_unfinished_is_tested_in_part():
    found = docstrings()
    assert set(WAITING) | set(UNFINISHED) <= set(STATEMENTS)
    assert not set(WAITING) & set(UNFINISHED)
    assert all(found[name] for name in UNFINISHED)
