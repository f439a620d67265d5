"""One start of a stage for `experiments/benchmark.py --config=configs/benchmark.py:startup`: not to
be run by hand.

    python experiments/benchmark_startup.py STAGE EVENTS FLAGS...

Runs experiments/STAGE.py with these flags and appends to the file EVENTS when its imports were done
and each duration that jax reports. Whoever started it reads them, and ends it after its first step.
"""

import argparse
import importlib
import json
import time
from typing import TextIO


def main(stage: str, events: TextIO, argv: list[str]) -> None:
    """The stage's own script, listened to."""
    script = importlib.import_module(stage)
    import jax

    from instruct_jax import cli

    def note(name: str, seconds: float = 0.0, **_: object) -> None:
        print(
            json.dumps({"name": name, "seconds": seconds, "time": time.time()}),
            file=events,
            flush=True,
        )

    note("imported")
    jax.monitoring.register_event_duration_secs_listener(note)
    default = f"configs/{stage}.py"
    cli.run(script.main, script.Config, default=default, argv=argv, writes=script.WRITES)


if __name__ == "__main__":
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("stage", metavar="STAGE", help="the script")
    parser.add_argument("events", metavar="EVENTS", help="the file to write")
    parser.add_argument("flags", metavar="FLAGS", nargs=argparse.REMAINDER, help="of the script")
    given = parser.parse_args()
    with open(given.events, "w") as file:
        main(given.stage, file, given.flags)
