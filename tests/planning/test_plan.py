"""Plans: the stages' own programs compiled for devices that are not used, and what is read."""

import json
import re
import sys
from dataclasses import asdict, replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from instruct_jax.errors import CheckpointError, ConfigError
from instruct_jax.models.families import preset
from instruct_jax.planning import topologies
from instruct_jax.planning.abstract import abstract_params
from instruct_jax.planning.hlo import collectives
from instruct_jax.planning.jobs import Job
from instruct_jax.planning.report import Compiled, Plan, compile_part, make_plan, remedies, render
from instruct_jax.planning.search import candidates
from instruct_jax.planning.topologies import (
    abstract_mesh,
    compile_mesh,
    open_devices,
    parse_topology,
)
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.reward_model import RewardModelConfig
from instruct_jax.stages.sft import SFTConfig

TINY = replace(preset("tiny"), max_length=64)
NARROW = replace(TINY, d_model=32)
CPU = parse_topology("cpu:8")
LENGTHS = {"prompt_length": 8, "response_length": 8}
PPO = PPOConfig(rollout_batch=32, minibatch=16, ptx_coef=1.0, ptx_ratio=2, **LENGTHS)
JOBS = {
    "pretrain": Job("pretrain", PretrainConfig(batch_size=16, length=32), TINY),
    "sft": Job("sft", SFTConfig(batch_size=16, residual_dropout=0.1, **LENGTHS), TINY),
    "reward_model": Job(
        "reward_model", RewardModelConfig(batch_size=16, completions=3, **LENGTHS), TINY
    ),
    "preference": Job("preference", PreferenceConfig(batch_size=16, **LENGTHS), TINY),
    # A reward model of another size than the policy.
    "ppo": Job("ppo", PPO, NARROW, TINY, ptx_length=32, steps=10),
}


def compiled_plan(job: Job, spec: str) -> Plan:
    mesh = compile_mesh(CPU, spec, open_devices(CPU))
    plan, programs = make_plan(job, job.stage, CPU, mesh)
    for part, program in zip(plan.parts, programs, strict=True):
        compile_part(part, program, CPU)
    return plan


def test_the_programs_of_ppo_compile_with_four_models_of_two_sizes():
    plan = compiled_plan(JOBS["ppo"], "fsdp:4,tensor:2")
    assert [part.name for part in plan.parts] == ["rollout", "score", "update"]
    update = plan.parts[-1]
    assert update.compiled.collectives["all-gather"].bytes > 0


def test_ppo_holds_five_of_the_policy_and_four_of_the_reward_model():
    """Policy, average, two moments, reference; reward and value model, two moments."""
    plan, _ = make_plan(JOBS["ppo"], "ppo", CPU, abstract_mesh(CPU, "data:8"))
    policy, reward = (
        sum(4 * x.size for x in jax.tree.leaves(abstract_params(config, kind)))
        for config, kind in ((NARROW, "language"), (TINY, "scalar"))
    )
    roles = ("policy", "average", "optimizer", "value model", "frozen")
    held = sum(plan.parts[-1].estimated[role] for role in roles)
    counts = 100  # the optimizers count their updates
    assert 0 <= held - (5 * policy + 4 * reward) < counts


@pytest.mark.parametrize("stage", ["pretrain", "reward_model"])
def test_arguments_are_as_the_compiler_counts_them(stage):
    """The first part of the estimate is exact."""
    plan = compiled_plan(JOBS[stage], "fsdp:8")
    (part,) = plan.parts
    arguments = sum(part.estimated[r] for r in ("parameters", "optimizer", "frozen", "batch"))
    assert part.compiled.arguments == pytest.approx(arguments, rel=0.01)


@pytest.mark.parametrize("optimizer", ["adafactor", "lion", "muon"])
def test_the_state_of_every_optimizer_is_as_the_compiler_counts_it(optimizer):
    """Exact, and below Adam's two moments; Adafactor's are next to nothing beside a matrix."""
    config = replace(JOBS["pretrain"].config, optimizer=optimizer)
    config = replace(config, adafactor=replace(config.adafactor, min_factored=16))
    plan = compiled_plan(replace(JOBS["pretrain"], config=config), "fsdp:4,tensor:2")
    (part,) = plan.parts
    arguments = sum(part.estimated[r] for r in ("parameters", "optimizer", "frozen", "batch"))
    assert part.compiled.arguments == pytest.approx(arguments, rel=0.01)
    share = part.estimated["optimizer"] / part.estimated["parameters"]
    least, most = {"adafactor": (0.0, 0.5), "lion": (1.0, 1.01), "muon": (1.0, 2.0)}[optimizer]
    assert least < share < most


SMALL = replace(preset("small"), num_layers=4, max_length=256, scan_unroll=1, remat="full")
WIDE = {"prompt_length": 64, "response_length": 64}
MIXED = PPOConfig(rollout_batch=64, minibatch=32, ptx_coef=1.0, ptx_ratio=2, **WIDE)
ESTIMATED = {
    "pretrain": (Job("pretrain", PretrainConfig(batch_size=64, length=256), SMALL), "fsdp:8"),
    "kept": (
        Job("pretrain", PretrainConfig(batch_size=64, length=256), replace(SMALL, remat="none")),
        "fsdp:8",
    ),
    "products": (
        Job(
            "pretrain",
            PretrainConfig(batch_size=64, length=256),
            replace(SMALL, remat="products"),
        ),
        "fsdp:8",
    ),
    "micro_batches": (
        Job("pretrain", PretrainConfig(batch_size=64, length=256, micro_batches=4), SMALL),
        "fsdp:4,tensor:2",
    ),
    "sft": (Job("sft", SFTConfig(batch_size=64, **WIDE), SMALL), "data:8"),
    "text_in_parts": (
        Job(
            "ppo",
            replace(MIXED, ptx_ratio=8, ptx_micro_batches=8),
            SMALL,
            replace(SMALL, d_model=512),
            ptx_length=128,
        ),
        "fsdp:8",
    ),
    "ppo": (Job("ppo", MIXED, SMALL, replace(SMALL, d_model=512), ptx_length=128), "fsdp:8"),
}


@pytest.mark.parametrize(
    "case",
    [
        "micro_batches",
        *(pytest.param(c, marks=pytest.mark.slow) for c in ESTIMATED if c != "micro_batches"),
    ],
)
def test_the_estimate_is_within_a_tenth_of_the_compilers_memory(case):
    for part in compiled_plan(*ESTIMATED[case]).parts:
        assert part.peak_estimated == pytest.approx(part.compiled.peak, rel=0.1), part.name


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_every_stage_compiles(stage):
    plan = compiled_plan(JOBS[stage], "fsdp:4,tensor:2")
    assert plan.fits
    assert plan.peak > 0


def test_a_collective_in_a_loop_counts_as_often_as_the_loop_turns():
    mesh = compile_mesh(CPU, "fsdp:8", open_devices(CPU))
    split = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())

    def chain(x, layers):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0]

    layers = jax.ShapeDtypeStruct(
        (5, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp", None))
    )
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=split)
    text = jax.jit(chain, out_shardings=whole).lower(x, layers).compile().as_text()
    found = collectives(text)
    # The layers are split by rows, so every product is a partial sum: 8 x 64 floats, 5 times.
    in_loop = [c for kind, c in found.items() if kind in ("all-reduce", "reduce-scatter")]
    assert sum(c.count for c in in_loop) >= 5
    assert sum(c.bytes for c in in_loop) >= 5 * 8 * 64 * 4 * 7 / 8


HLO = """\
%sum (a: f32[], b: f32[]) -> f32[] {
  ROOT %add = f32[] add(%a, %b)
}

%body (p: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %g = bf16[32,8]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %r = f32[16,8]{1,0} all-reduce(%y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%sum
  ROOT %t = (s32[], f32[16,8]) tuple(%i, %r)
}

%cond (p: (s32[], f32[16,8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (q: f32[16,8]) -> f32[16,8] {
  %w = (s32[], f32[16,8]) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %v = (s32[], f32[16,8]) while(%w), condition=%cond, body=%body
  ROOT %s = f32[4,8]{1,0} reduce-scatter(%z), replica_groups=[2,4]<=[8], to_apply=%sum
}
"""  # noqa: E501


def test_one_that_runs_beside_others_is_counted_where_it_starts_in_groups_of_named_axes():
    """A TPU writes the gather down in every fusion that it runs beside."""
    gather = (
        "%g = bf16[16,8]{1,0} all-gather(%x), channel_id=7, "
        "replica_groups=mesh['a'=16,'b'=4] {'b'}, frontend_attributes={chain_id=\"1\"}"
    )
    text = f"""\
%start (x: bf16[4,8]) -> bf16[16,8] {{
  {gather}
  ROOT %c = bf16[16,8] custom-call(%g), custom_call_target="AsyncCollectiveStart"
}}

%beside (x: bf16[4,8]) -> bf16[16,8] {{
  ROOT {gather}
}}

ENTRY %main (q: bf16[4,8]) -> bf16[16,8] {{
  %s = bf16[16,8]{{1,0}} fusion(%q), kind=kCustom, calls=%start
  ROOT %f = bf16[16,8]{{1,0}} fusion(%q), kind=kOutput, calls=%beside
}}
"""
    assert collectives(text) == {"all-gather": (1, 16 * 8 * 2 * 3 / 4)}


def test_decoding_gathers_the_weights_once_and_not_for_every_token():
    mesh = compile_mesh(CPU, "fsdp:8", open_devices(CPU))
    _, (rollout, *_) = make_plan(JOBS["ppo"], "ppo", CPU, mesh)
    text = rollout.lower().compile().as_text()
    one, many = (
        sum(c.bytes for c in collectives(text, unknown_trips=turns).values()) for turns in (1, 101)
    )
    weights = 4 * sum(x.size for x in jax.tree.leaves(abstract_params(NARROW, "language")))
    assert one > weights / 2
    assert (many - one) / 100 < weights / 20


def test_bytes_are_those_of_a_ring_times_the_turns_of_the_loops():
    found = collectives(HLO, unknown_trips=10)
    turns = 3 + 10
    assert found["all-gather"] == (turns, turns * 32 * 8 * 2 * 3 / 4)
    assert found["all-reduce"] == (turns, turns * 2 * 16 * 8 * 4 * 3 / 4)
    assert found["reduce-scatter"] == (1, 4 * 8 * 4 * 4 * 3 / 4)


def test_what_does_not_fit_is_told_with_what_to_change():
    large = replace(preset("gpt3-6.7b"), dtype="bfloat16", remat="full")
    job = Job("ppo", PPOConfig(ptx_coef=27.8), large, large, ptx_length=2048, steps=500)
    topology = parse_topology("v5e:4x4")
    plan, _ = make_plan(job, "6b", topology, abstract_mesh(topology, "fsdp:16"))
    assert not plan.fits
    text = render(plan, job)
    assert "DOES NOT FIT" in text
    assert "micro_batches=2" in text
    assert any("topology" in remedy for remedy in remedies(plan, job))


def test_a_compiler_that_gives_up_is_a_plan_that_does_not_fit():
    topology = parse_topology("v5e:2x4")
    plan, _ = make_plan(JOBS["sft"], "sft", topology, abstract_mesh(topology, "fsdp:8"))
    assert plan.fits
    plan.parts[0].compiled = Compiled(1.0, error="RESOURCE_EXHAUSTED: 18.27G")
    assert not plan.fits
    assert "RESOURCE_EXHAUSTED" in render(plan, JOBS["sft"])


def test_the_estimate_of_175b_takes_no_devices_and_gives_the_run():
    large = replace(preset("gpt3-175b"), dtype="bfloat16", remat="full")
    scalar = replace(preset("gpt3-6.7b"), dtype="bfloat16", remat="full")
    config = PPOConfig(ptx_coef=27.8)
    job = Job("ppo", config, large, scalar, ptx_length=2048, steps=config.iterations)
    topology = parse_topology("v5p:8x8x8")
    plan, _ = make_plan(job, "175b", topology, abstract_mesh(topology, "fsdp:64,tensor:8"))
    row = plan.as_json(price=4.2)
    # Ouyang et al.: 60 petaflop/s-days for the 175B PPO-ptx.
    days = sum(part.flops for part in plan.parts) * plan.steps / 86_400e15
    assert 55 < days < 75
    # At best on 512 chips of 0.459 petaflop/s, most of the forward passes of the update made twice.
    assert 60 * 1.2 / 512 / 0.459 < row["days"] < 1
    assert row["cost"] == pytest.approx(row["chip_hours"] * 4.2)
    json.dumps(row)


def test_search_keeps_to_meshes_that_divide_the_work():
    large = replace(preset("gpt3-1.3b"), dtype="bfloat16")
    scalar = replace(preset("gpt3-6.7b"), dtype="bfloat16")
    job = Job("ppo", PPOConfig(ptx_coef=27.8), large, scalar, ptx_length=2048, steps=500)
    topology = parse_topology("v5e:8x8")
    chosen, count = candidates(job, "x", topology, lambda spec: abstract_mesh(topology, spec))
    assert count > len(chosen) > 0
    best = chosen[0]
    assert best.plan.peak <= 1.1 * topology.memory
    assert job.rows % best.job.config.micro_batches == 0
    assert [c.order for c in chosen] == sorted(c.order for c in chosen)


@pytest.mark.parametrize("name", ["v5e:4x4x4", "v9:2x2", "v5p", "cpu:0"])
def test_a_topology_that_is_none_is_one_line(name):
    with pytest.raises(ConfigError, match=re.escape(f"--topology={name}")):
        parse_topology(name)


def test_a_missing_plugin_names_the_extra(monkeypatch):
    def absent(**_):
        raise RuntimeError("no such platform")

    monkeypatch.setattr(topologies.topologies, "get_topology_desc", absent)
    monkeypatch.setattr(topologies, "_plugin_is_there", lambda module: False)
    with pytest.raises(ConfigError, match=r"instruct-jax\[plan\]"):
        open_devices(parse_topology("v5p:4x4x4"))
    with pytest.raises(ConfigError, match=r"instruct-jax\[gpu\]"):
        open_devices(parse_topology("h100:1x1x8"))


@pytest.fixture
def plan(repository, monkeypatch):
    """The script, in a process whose devices are chosen already."""
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    monkeypatch.setattr(plan, "prepare", lambda *_: None)
    return plan


def test_the_script_names_the_stage_and_the_sizes(plan, capsys, tmp_path):
    out = tmp_path / "plan-a.json"
    plan.main(
        [
            "--config=configs/ppo.py:instructgpt_1p3b_ptx",
            "--topology=v5e:8x8",
            "--mesh=fsdp:64",
            "--config.ppo.micro_batches=1",
            "--estimate_only",
            f"--json={out}",
        ]
    )
    text = capsys.readouterr().out
    assert "verdict:" in text
    written = json.loads(out.read_text())
    assert written["plans"][0]["steps"] == 500
    assert written["command"].startswith("python experiments/plan.py --config=configs/ppo.py")
    plan.main([f"--table={tmp_path / 'plans.md'}"])
    assert "| ppo instructgpt_1p3b_ptx | v5e:8x8 | fsdp:64 |" in (tmp_path / "plans.md").read_text()
    with pytest.raises(ConfigError, match="--policy"):
        plan.main(["--config=configs/sft.py:toyworld", "--policy=gpt3-6b", "--topology=cpu:8"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--scaling=8,x"], "--scaling: expected a whole number from 1, got 'x'"),
        (["--scaling=0"], "--scaling: expected a whole number from 1, got '0'"),
        (["--search=-2"], "--search: expected a whole number from 1, got '-2'"),
        (["--rows=0"], "--rows: expected a whole number from 1"),
        (["--price=nan"], "--price: expected a number from 0, got 'nan'"),
        (["--price=free"], "--price: expected a number from 0, got 'free'"),
        (["--scaling=8", "--search"], "--scaling has no effect with --search"),
        (["--mesh=data:8", "--search=2"], "--mesh has no effect with --search"),
        (["--remat=full", "--search"], "--remat has no effect with --search"),
        (["--config.sft.micro_batches=2", "--search"], "--config.sft.micro_batches has no effect"),
        (["--estimate_only", "--scaling=8"], "--estimate_only has no effect with --scaling"),
        (["--reward=gpt3-6.7b"], "--reward=gpt3-6.7b has no effect: sft has one model"),
        (["--config=configs/ppo.py:toyworld", "--rows=9"], "config.ppo.episodes says how long"),
        (["--table=EMPTY/plans.md"], "no plan-*.json in its folder; --json=FILE writes one"),
    ],
)
def test_a_flag_that_cannot_be_or_cannot_act_is_refused(plan, tmp_path, arguments, words):
    given = [argument.replace("EMPTY", str(tmp_path)) for argument in arguments]
    with pytest.raises(ConfigError) as error:
        plan.main(["--config=configs/sft.py:toyworld", *given])
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_damaged_plan_is_no_row_of_a_table(plan, tmp_path):
    (tmp_path / "plan-a.json").write_text("{bad")
    with pytest.raises(CheckpointError, match=r"plan-a\.json"):
        plan.main([f"--table={tmp_path / 'plans.md'}"])
    assert not (tmp_path / "plans.md").exists()


def test_a_damaged_model_folder_is_told_with_exit_code_4(plan, tmp_path):
    (tmp_path / "model.json").write_text("[]")
    arguments = [f"--config.init={tmp_path}", "--topology=v5e:8x8", "--estimate_only"]
    with pytest.raises(CheckpointError, match=r"model\.json") as error:
        plan.main(["--config=configs/sft.py:toyworld", *arguments])
    assert error.value.exit_code == 4


@pytest.fixture
def jobs(plan, monkeypatch, tmp_path):
    """`job_of` in a directory where a stage has left a tiny model, as the presets name it."""
    about = {"config": asdict(TINY), "kind": "language", "stage": "sft", "notes": {}}
    for name in ("runs/rlhf_init/model", "runs/reward_model/model", "runs/gpt2/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.json").write_text(json.dumps(about))
    monkeypatch.chdir(tmp_path)
    return partial(plan.job_of, schemas=plan.SCHEMAS)


@pytest.mark.parametrize(
    ("preset_of", "overrides", "sizes", "widths", "origins"),
    [
        ("ppo.py:instructgpt_1p3b", {}, {}, (2048, 4096), ("the name of the preset", "the paper")),
        ("ppo.py:toyworld", {}, {}, (128, 128), ("mini with 767 tokens",) * 2),
        (
            "ppo.py:instructgpt_1p3b",
            {"init": "runs/rlhf_init/model"},
            {},
            (TINY.d_model, 4096),
            ("2 layers, 64 wide, 256 tokens, by config.init=runs/rlhf_init/model", "the paper"),
        ),
        ("ppo.py:toyworld", {}, {"policy": "gpt2-small"}, (768, 768), ("gpt2-small, by --policy",)),
        (
            "ppo.py:toyworld",
            {},
            {"policy": "gpt2-small", "reward": "gpt3-350m"},
            (768, 1024),
            ("gpt2-small, by --policy", "gpt3-350m, by --reward"),
        ),
    ],
)  # fmt: skip
def test_a_presets_own_sizes_win_over_a_model_that_happens_to_be_there(
    jobs, preset_of, overrides, sizes, widths, origins
):
    """A plan of 175B once was that of the toy model in runs/."""
    job = jobs(f"configs/{preset_of}", overrides, **sizes)
    assert (job.model.d_model, job.scalar.d_model) == widths
    assert all(wanted in said for wanted, said in zip(origins, job.origins, strict=False))
    plan, _ = make_plan(job, preset_of, CPU, abstract_mesh(CPU, "data:8"))
    assert f"policy: {job.origins[0]}\nreward and value model: {job.origins[1]}" in render(
        plan, job
    )


def test_why_a_plan_for_this_cpu_has_no_time_is_said(repository, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(repository / "experiments"))
    monkeypatch.delitem(sys.modules, "plan", raising=False)
    import plan

    monkeypatch.setattr(plan, "prepare", lambda *_: None)  # jax has its eight devices here
    plan.main(["--config=configs/sft.py:debug", "--topology=cpu:8", "--estimate_only"])
    assert "steps; how fast this machine computes is not known here: " in capsys.readouterr().out


def test_a_model_that_is_named_but_not_there_is_no_plan_of_another(jobs):
    with pytest.raises(ConfigError, match=r"config.init=nowhere: neither model.json nor config"):
        jobs("configs/sft.py:instructgpt_6b", {"init": "nowhere"})
