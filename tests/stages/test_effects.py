"""No field of a stage is accepted without effect: another value is refused or makes another run."""

import dataclasses
from functools import cache
from typing import Any

import pytest

from instruct_jax.cli import resolve
from instruct_jax.errors import ConfigError
from instruct_jax.stages.optimizers import AdafactorConfig, AdamConfig, LionConfig, MuonConfig
from tests.stages import effects

BASES = effects.bases()
KINDS = sorted({base.split()[0] for base in BASES})
# The one field by which a run does nothing else: the same scores of the reference, got earlier.
SAME_RESULT = {("preference", "reference")}
# What the scripts read when they make rows, and not the stage.
OF_ROWS = {
    "sft": ("prompt_length", "response_length", "all_turns", "pack_length"),
    "reward_model": ("prompt_length", "response_length", "completions"),
    "preference": ("prompt_length", "response_length", "completions"),
    "ppo": ("prompt_length",),
}
# What `stage.fit` alone reads is looked at in one of the stages that call it.
OF_FIT = (
    *(f"adam.{field.name}" for field in dataclasses.fields(AdamConfig)),
    *(f"adafactor.{field.name}" for field in dataclasses.fields(AdafactorConfig)),
    *(f"lion.{field.name}" for field in dataclasses.fields(LionConfig)),
    *(f"muon.{field.name}" for field in dataclasses.fields(MuonConfig)),
    *("optimizer", "schedule", "decay_fraction", "best_metric", "best_mode"),
    *(f"lora.{name}" for name in ("rank", "alpha", "targets", "base")),
    *("learning_rate", "warmup", "final_fraction", "skip_above", "micro_batches"),
)


@cache
def accepted(base: str) -> dict[str, Any]:
    """Field -> the configuration with another value of it, of those that the door lets through."""
    config: Any = BASES[base]
    holder: Any = dataclasses.make_dataclass("Holder", [("stage", type(config))], frozen=True)
    found = {}
    for path, hint, said, value in effects.leaves(config):
        if path in OF_ROWS.get(base.split()[0], ()):
            continue
        for other in effects.others(path, hint, said, value):
            text = ",".join(other) if isinstance(other, tuple) else str(other)
            values = {"stage": dataclasses.asdict(config)}
            try:
                found[path] = resolve(holder, values, {f"stage.{path}": text}).stage
            except ConfigError:
                continue
            break
    return found


def once(base: str) -> list[str]:
    """The fields that no earlier base of the same stage accepts."""
    kind = base.split()[0]
    earlier = [b for b in list(BASES)[: list(BASES).index(base)] if b.split()[0] == kind]
    seen = {path for b in earlier for path in accepted(b)}
    seen |= set() if kind in ("pretrain", "ppo") else set(OF_FIT)
    return [path for path in accepted(base) if path not in seen]


def idle(base: str, fields: list[str], tmp_path) -> list[str]:
    """Those of the fields whose other value makes the same run."""
    if not fields:
        return []
    plain = effects.plan(base, BASES[base], tmp_path / "plain")
    kind = base.split()[0]
    return [
        path
        for path in fields
        if (kind, path) not in SAME_RESULT
        and plain.same_as(effects.plan(base, accepted(base)[path], tmp_path / path))
    ]


def test_a_plan_is_the_same_for_the_same_configuration(tmp_path):
    first, second = (effects.plan("sft", BASES["sft"], tmp_path / name) for name in "ab")
    assert first.same_as(second)


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_acts_in_some_configuration(kind):
    """One that is refused in all of these runs would be of no use."""
    bases = [base for base in BASES if base.split()[0] == kind]
    fields = {path for path, *_ in effects.leaves(BASES[bases[0]])} - set(OF_ROWS.get(kind, ()))
    fields -= set() if kind in ("pretrain", "ppo") else set(OF_FIT)
    assert fields <= {path for base in bases for path in accepted(base)}


@pytest.mark.parametrize("base", BASES)
def test_a_field_that_is_accepted_makes_another_run(base, tmp_path):
    """Each field once a stage; where another choice turns it off, see the slow one."""
    assert idle(base, once(base), tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_field_that_is_accepted_makes_another_run_beside_every_choice(base, tmp_path):
    assert idle(base, list(accepted(base)), tmp_path) == []


# These change how a result is computed, in more parts, at other widths or at another time, and not
# the result: another program (or other files) is what is seen of them above.
BY_DESIGN = {"micro_batches", "ptx_micro_batches", "length_buckets", "reference"}


@pytest.mark.slow
@pytest.mark.parametrize("base", BASES)
def test_a_field_that_is_accepted_makes_another_result(base, tmp_path):
    """Of whole runs: in their models, their metrics or their checkpoints."""
    plain = effects.result(base, BASES[base], tmp_path / "plain")
    unfelt = []
    for path in once(base):
        other = effects.result(base, accepted(base)[path], tmp_path / path)
        if not plain.differs_from(other):
            unfelt.append(path)
    # KTO's reference point is of the micro-batch.
    of_parts = {"micro_batches"} if base == "preference kto" else set()
    assert set(unfelt) == (BY_DESIGN - of_parts) & set(once(base))
