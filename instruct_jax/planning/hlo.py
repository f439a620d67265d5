"""What a compiled program sends between devices, read from its text.

`cost_analysis` counts the body of a loop once. Here every instruction counts as often as it runs:
the trip counts of the loops around it multiply. A loop whose length is known only when it runs (the
decode loop, which may end early) counts as often as the caller says.
"""

import math
import re
from collections import defaultdict
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5}

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_OPERATION = re.compile(r"=\s+(\(.*?\)|\S+)\s+([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|(?:branch|called)_computations|(?:true|false)_computation)"
    r"=\{?([^,}]+(?:, ?%[^,}]+)*)\}?"
)
# Operations that give what is there already another name.
_NAMES_ONLY = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')


class Collective(NamedTuple):
    """All collectives of one kind: how often they run, and the bytes that a device sends."""

    count: float
    bytes: float


def collectives(text: str, *, unknown_trips: float = 1.0) -> dict[str, Collective]:
    """By kind, the collectives that one run of the program makes.

    Bytes are what a device sends in a ring: of a group of n and a whole of S bytes, S (n - 1) / n
    for an all-gather, a reduce-scatter and an all-to-all, twice that for an all-reduce, S for a
    permutation.
    """
    bodies, entry = _computations(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    everyone = int(partitions[1]) if partitions else 1
    times: dict[str, float] = defaultdict(float)

    def visit(name: str, factor: float) -> None:
        times[name] += factor
        for called, trips in edges.get(name, ()):
            visit(called, factor * trips)

    edges = {name: _edges(lines, bodies, unknown_trips) for name, lines in bodies.items()}
    visit(entry, 1.0)
    counts: dict[str, float] = defaultdict(float)
    sent: dict[str, float] = defaultdict(float)
    for name, factor in times.items():
        starts = any("AsyncCollectiveStart" in line for line in bodies[name])
        for line in bodies[name]:
            # A TPU writes one that runs beside others down in each of them: its start counts.
            if "chain_id=" in line and not starts:
                continue
            found = _collective(line, everyone, scattered=name.startswith("all-reduce-scatter"))
            if found is not None:
                kind, size = found
                counts[kind] += factor
                sent[kind] += factor * size
    return {kind: Collective(counts[kind], sent[kind]) for kind in KINDS if counts[kind]}


def largest_temporaries(text: str, *, count: int = 5) -> list[tuple[float, str]]:
    """The largest arrays that the program makes, as (bytes, "type[shape] operation").

    What is made inside of a fusion is never in memory as a whole, and does not count.
    """
    seen: dict[str, float] = {}
    bodies, _ = _computations(text)
    fused = set(re.findall(r" fusion\(.*?calls=%?([\w.\-]+)", text))
    for line in (line for name, lines in bodies.items() if name not in fused for line in lines):
        match = _OPERATION.search(line)
        if match is None or match[2] in _NAMES_ONLY or match[2].endswith(("-start", "-done")):
            continue
        for dtype, dims in _SHAPE.findall(match[1]):
            shape = f"{dtype}[{dims}]"
            seen[f"{shape} {match[2]}"] = _size(shape)
    return sorted(((size, name) for name, size in seen.items()), reverse=True)[:count]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of every computation, and the name of the first that runs."""
    bodies: dict[str, list[str]] = {}
    entry, current = "", None
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            current = header[2]
            bodies[current] = []
            if header[1]:
                entry = current
        elif line.startswith("}"):
            current = None
        elif current is not None:
            bodies[current].append(line)
    return bodies, entry


def _edges(
    lines: list[str], bodies: dict[str, list[str]], unknown_trips: float
) -> list[tuple[str, float]]:
    """(computation, how often) for all that these lines run."""
    edges = []
    for line in lines:
        operation = _OPERATION.search(line)
        if operation is None or operation[2].endswith(("-done", "-update")):
            continue
        if operation[2] == "while":
            body, trips = _BODY.search(line), _TRIPS.search(line)
            if body:
                known = float(trips[1]) if trips else _trips(line, bodies)
                edges.append((body[1], known or unknown_trips))
            continue
        if operation[2].removesuffix("-start") in KINDS:
            continue  # its reduction
        for match in _CALLED.finditer(line):
            names = [name.strip().lstrip("%") for name in match[1].split(",")]
            # The two branches of a guard: the one that updates is as long as both.
            edges.extend((name, 1.0) for name in names if name in bodies)
    return edges


def _trips(line: str, bodies: dict[str, list[str]]) -> float | None:
    """The one constant that the condition of a loop compares its counter with; None without it.

    A TPU's program says no more; a loop over 0 to n is compared with n alone.
    """
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = list(bodies.get(condition[1], [])) if condition else []
    for called in re.findall(r"calls=%?([\w.\-]+)", "\n".join(lines)):
        lines.extend(bodies.get(called, []))
    if any(" and(" in inner for inner in lines):
        return None
    constants = set(re.findall(r"s32\[\](?:\{[^}]*\})? constant\((\d+)\)", "\n".join(lines)))
    return float(constants.pop()) if len(constants) == 1 else None


def _collective(line: str, everyone: int, *, scattered: bool) -> tuple[str, float] | None:
    """The kind of the collective that `line` starts, and the bytes that a device sends."""
    match = _OPERATION.search(line)
    if match is None or match[2].removesuffix("-start") not in KINDS:
        return None
    kind = match[2].removesuffix("-start")
    shapes = [_size(f"{t}[{d}]") for t, d in _SHAPE.findall(match[1])]
    group = _group_size(line, everyone)
    # A start gives (operands, results): the results are the second half, and what is whole in them.
    if match[2].endswith("-start") and len(shapes) > 1 and kind != "all-reduce":
        real = [size for size in shapes if size > 8]
        shapes = real[len(real) // 2 :] if len(real) > 1 else real
    size = sum(shapes)
    if kind == "collective-permute":
        return kind, size
    share = (group - 1) / group
    if kind == "all-reduce":
        return ("reduce-scatter", size * share) if scattered else (kind, 2 * size * share)
    if kind == "reduce-scatter":
        size *= group
    return kind, size * share


def _size(shape: str) -> float:
    match = _SHAPE.search(shape)
    if match is None:
        return 0.0
    dims = [int(d) for d in match[2].split(",") if d]
    return _BYTES.get(match[1], 4) * math.prod(dims)


def _group_size(line: str, everyone: int) -> int:
    """Devices that take part together; where no groups are listed, `everyone`."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\].*? \{([^}]*)\}", line)
    if named:  # mesh['a'=16,'b'=4] {'b'}, or {'a':(1)2} for a part of an axis
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in parts)
    iota = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if iota:
        return max(int(iota[2]), 1)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return len(listed[1].split(",")) if listed else everyone
