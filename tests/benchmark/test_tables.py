"""The tables of the benchmark, of rows as its JSON has them."""

import dataclasses

from instruct_jax.benchmark.startup import Start, Startup
from instruct_jax.benchmark.tables import startup_table


def test_a_stage_has_a_line_for_each_cache_and_its_ratio_at_the_second():
    first = Start(8.0, imports=1.0, setup=0.5, tracing=0.75, compiling=5.5, step=0.25, programs=31)
    second = dataclasses.replace(first, seconds=2.75, compiling=0.25)
    row = dataclasses.asdict(Startup("sft", first, second, 2.75 / 8, (2.75, 3.0)))
    assert startup_table([row]).splitlines()[2:] == [
        "| sft | empty | 8.00 |  | 1.00 | 0.50 | 0.75 | 5.50 | 0.25 | 31 |",
        "| sft | full | 2.75 | 0.34 | 1.00 | 0.50 | 0.75 | 0.25 | 0.25 | 31 |",
    ]
