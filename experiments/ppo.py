"""Improves a policy by PPO against a reward model (M5), with a pretraining mix PPO-ptx (M6).

    python experiments/ppo.py --config=configs/ppo.py:toyworld_ptx \\
        --config.init=runs/rlhf_init/model --config.reward_model=runs/reward_model/model \\
        --workdir=runs/ppo_ptx

configs/grpo.py and configs/rloo.py run critic-free algorithms through the same script.

Writes WORKDIR/model (the exponential moving average of the policy, which is the one to use),
ppo.jsonl (metrics), checkpoints and samples.jsonl. Run again, it resumes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.encoding import Encoded, encode_demonstrations, encode_prompts
from instruct_jax.data.loader import Batches
from instruct_jax.data.rows import Prompt, PromptText, plain_text
from instruct_jax.data.sources import Source, open_source
from instruct_jax.data.tokens import TokenRows
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.transformer import scalar_from_language
from instruct_jax.sampling.complete import complete
from instruct_jax.settings import Settings, setting
from instruct_jax.stages import ppo
from instruct_jax.stages.algorithms import named
from instruct_jax.stages.evaluations import (
    evaluate_with,
    keeping_best,
    users_evaluation,
    with_users,
)
from instruct_jax.stages.inputs import (
    check_batch,
    data_acts,
    measured,
    prompt_tokens,
)
from instruct_jax.stages.ppo import PPOConfig
from instruct_jax.stages.ppo_models import on_the_policys_trunk
from instruct_jax.stages.reward_model import score_rows
from instruct_jax.stages.reward_sources import ModelReward, named_rewards
from instruct_jax.stages.rewards import HostRewards
from instruct_jax.stages.text import held_out_text, names_text, training_text
from instruct_jax.stages.trained import (
    TrainedModel,
    check_model,
    load_adapter,
    load_trained,
    save_trained,
)
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.metrics import append_rows

PROBES = 32
# The role of the key of a value model's head where no reward model gives one (stages/stage.py).
VALUE_HEAD = 2**32 - 3
# Held-out demonstrations that are scored.
DEMONSTRATIONS = 256


# Beside what every run writes; --overwrite replaces these.
WRITES = ("ppo.jsonl", ppo.SAMPLES)

# What is drawn by weights, where its files have any.
WEIGHED = ("prompts", "documents")


@dataclass(frozen=True)
class Config(Settings):
    """A run from the policy in `init`, which is the KL reference too."""

    # Documents are the text of PPO-ptx, and without the mix that of the held-out loss; what
    # demonstrations score is what the policy's score is held against.
    acts_if: ClassVar[Mapping[str, str]] = data_acts("prompts", "documents", "demonstrations")

    init: str = setting("runs/rlhf_init/model", "model folder that the policy starts from")
    reward_model: str | None = setting(
        "runs/reward_model/model",
        "model folder of the reward model, which the value model starts as; none: rewards alone",
    )
    reward_weight: float = setting(
        1.0, "how much its score counts; 0: not at all", needs="reward_model"
    )
    rewards: tuple[str, ...] = setting(
        (),
        "what is added to that: KIND=WHAT or KIND=WHAT*WEIGHT, of model=FOLDER, models=FOLDER,"
        "FOLDER:mean|min|mean-0.5sd, python=FILE.py:FUNCTION, endpoint=URL",
    )
    reward_seconds: float = setting(
        60.0, "how long a batch of these may take", above=0.0, unit="s", needs="rewards"
    )
    reward_batch: int = setting(
        64, "answers that one is asked about at a time", low=1, needs="rewards"
    )
    reward_adapter: str | None = setting(
        None,
        "the reward model's adapter folder, where it was trained on init with a LoRA rank: one "
        "trunk then serves policy, reference, reward and value model",
        needs="ppo.lora.rank",
    )
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    ptx_length: int = setting(96, "of a row of documents", low=2, unit="tokens")
    ppo: PPOConfig = PPOConfig()
    evaluate_with: str | None = evaluate_with("ppo.eval_every")
    measure_lengths: bool = setting(
        False, "whether prompt_length is cut to what the training prompts need"
    )

    def __post_init__(self) -> None:
        """ConfigError where there is nothing to learn from."""
        super().__post_init__()
        if not self.rewards and (self.reward_model is None or not self.reward_weight):
            raise ConfigError(
                "reward_model: none, or of weight 0, and no rewards: name one of them"
            )


def main(config: Config, run: cli.Run) -> Path:
    """Trains and returns the model folder of the averaged policy."""
    users = users_evaluation(config.evaluate_with)
    if config.reward_model is not None:  # told before the larger of the two is read
        check_model(config.reward_model, field="config.reward_model")
    start = load_trained(config.init, kind="language", compute=config.model, field="config.init")
    reward, reward_params = load_reward(config, start)
    check_lengths(config, start, reward)
    mesh = make_mesh(run.mesh)
    ppo.check_batches(config.ppo, mesh)
    source = open_source(config.data, template=start.template, model=config.init, weighed=WEIGHED)
    stage, prompts, rows = read_prompts(config, run, source, start, reward)
    shares = source.shares("prompts", prompts["index"])
    rewards = load_rewards(config, stage, start, rows)
    ptx, held_out = read_text(config, stage, run, source, start)
    probes = read_probes(stage, source, start)
    standard = demonstration_score(config.data, stage, source, reward)
    run.record_data(source.provenance(), source.licences(), source.counts())
    run.note(f"algorithm: {named(stage)}")
    if not len(held_out):
        run.note("no documents are held out: there is no held-out loss of text")
    trained = start._replace(stage="ppo")
    look = Look(run, stage, trained, mesh, held_out, probes, standard)
    own = look if probes or len(held_out) or standard else None
    state = ppo.train(
        stage,
        start.model,
        reward.model,
        start.params,
        reward_params,
        Batches(prompts, stage.prompts, seed=stage.seed, shares=shares),
        more_prompts=Batches(prompts, stage.prompts, seed=stage.seed + 2, shares=shares),
        ptx=ptx,
        eos_id=start.tokenizer.eos_id,
        mesh=mesh,
        workdir=run.workdir,
        rewards=rewards,
        model_weight=0.0 if config.reward_model is None else config.reward_weight,
        evaluate=with_users(own, users, trained, mesh, params=lambda state: state.policy.ema),
        on_best=keeping_best(run.workdir, trained, run.say),
    )
    notes = look.judge(state.policy.ema)
    trained = trained._replace(params=state.policy.ema)
    folder = save_trained(run.workdir / "model", trained, notes=notes)
    figure = ""
    if notes:
        loss = notes["valid_pretrain_loss"]
        figure = f" (held-out text loss {loss:.3f} on {len(held_out):,} rows)"
    run.say(f"model: {folder}{figure}")
    if (run.workdir / ppo.SAMPLES).exists():
        run.say(f"answers to held-out prompts on the way: {run.workdir / ppo.SAMPLES}")
    return folder


@dataclass(frozen=True)
class Look:
    """What the policy's average is evaluated by; `trained` gives its functions and tokenizer."""

    run: cli.Run
    stage: PPOConfig
    trained: TrainedModel
    mesh: Mesh
    held_out: np.ndarray | TokenRows
    probes: Sequence[PromptText]
    standard: Mapping[str, float]

    def judge(self, params: Any) -> dict[str, float]:
        """Held-out pretraining loss, where there is such text."""
        if not len(self.held_out):
            return {}
        loss = held_out_loss(self.trained.model, params, self.held_out, mesh=self.mesh)
        return {"valid_pretrain_loss": loss}

    def __call__(self, step: int, state: ppo.PPOState) -> dict[str, float]:
        """That, and a fixed set of prompts answered, for people to read."""
        params = state.policy.ema
        answers = complete(
            self.trained.model,
            params,
            self.trained.tokenizer,
            self.probes,
            key=jax.random.key(0),
            max_new_tokens=self.stage.response_length,
            prompt_length=self.stage.prompt_length,
            batch_size=PROBES,
            temperature=self.stage.temperature,
            mesh=self.mesh,
        )
        if self.run.writes and self.probes:
            rows = (
                {"step": step, "prompt": plain_text(p), "response": a.text, "ended": a.ended}
                for p, a in zip(self.probes, answers, strict=True)
            )
            append_rows(self.run.workdir / ppo.SAMPLES, rows)
        return {**self.judge(params), **self.standard}


def read_text(
    config: Config, stage: PPOConfig, run: cli.Run, source: Source, start: TrainedModel
) -> tuple[Batches | None, np.ndarray | TokenRows]:
    """Batches of the text of PPO-ptx, where it is mixed in, and the rows that are held out."""
    text = {"length": config.ptx_length, "folder": config.data.token_folder(run.workdir)}
    ptx = None
    if stage.ptx_coef > 0:
        rows, of_text = training_text(source, start.tokenizer, **text)
        update = stage.minibatch * stage.ptx_ratio
        kind = f"rows of {config.ptx_length} tokens of text"
        check_batch(len(rows), update, kind=kind, field="ppo.minibatch x ptx_ratio")
        ptx = Batches({"tokens": rows}, stage.updates * update, seed=stage.seed + 1, shares=of_text)
    return ptx, held_out_text(config.data, source, start.tokenizer, **text)


def check_lengths(config: Config, start: TrainedModel, reward: TrainedModel) -> None:
    """ConfigError where a row has positions that a model has not."""
    if names_text(config.data):
        check_length(start.config, config.ptx_length, field="config.ptx_length")
    longest = config.ppo.prompt_length + config.ppo.response_length
    for name, trained in (("init", start), ("reward_model", reward)):
        if not config.measure_lengths:
            field = f"config.ppo.prompt_length + response_length, of config.{name}"
            check_length(trained.config, longest, field=field)


def load_reward(config: Config, start: TrainedModel) -> tuple[TrainedModel, Any]:
    """The reward model, and the parameters that PPO scores with. Raises ConfigError.

    Without one, what the value model starts as: the policy's trunk and a head of its own.
    """
    if config.reward_model is None:
        key = jax.random.fold_in(jax.random.key(config.ppo.seed), VALUE_HEAD)
        params = scalar_from_language(start.params, key, start.config)
        fresh = start._replace(kind="scalar", params=params, stage="none")
        return fresh, params
    reward = load_trained(
        config.reward_model, kind="scalar", compute=config.model, field="config.reward_model"
    )
    if reward.tokenizer.fingerprint != start.tokenizer.fingerprint:
        raise ConfigError(
            f"{config.reward_model} and {config.init} have different tokenizers; "
            "the reward model must read the policy's tokens; give it as --config.rewards="
            f"\"('model={config.reward_model}',)\", with --config.reward_model=none, and it reads "
            "their text"
        )
    if config.reward_adapter is None:
        return reward, reward.params
    adapter = load_adapter(config.reward_adapter)
    return reward, on_the_policys_trunk(config.ppo, start, reward, adapter, config.reward_adapter)


def load_rewards(
    config: Config, stage: PPOConfig, start: TrainedModel, rows: Sequence[Prompt]
) -> HostRewards | None:
    """What is asked for rewards besides the reward model. Raises ConfigError."""
    if not config.rewards:
        return None

    def model(folder: str) -> ModelReward:
        reward = load_trained(folder, kind="scalar", compute=config.model)
        return ModelReward(reward, start.tokenizer, stage.prompt_length, stage.response_length)

    found = named_rewards(config.rewards, model=model, seconds=config.reward_seconds)
    limits = {"seconds": config.reward_seconds, "batch": config.reward_batch}
    return HostRewards(found, rows, start.tokenizer, **limits)


def read_prompts(
    config: Config, run: cli.Run, source: Source, start: TrainedModel, reward: TrainedModel
) -> tuple[PPOConfig, Encoded, Sequence[Prompt]]:
    """The stage, with lengths measured on the training prompts where it is to be so, and these."""
    rows, stage = source.prompts("train"), config.ppo
    if config.measure_lengths:
        # A response may be as long as is said, or half of what the models read; a prompt has the
        # rest of that.
        limit = min(start.config.max_length, reward.config.max_length)
        response = min(stage.response_length, limit // 2)
        room = min(stage.prompt_length, limit - response)
        stage = dataclasses.replace(stage, prompt_length=room, response_length=response)
        counts = prompt_tokens(rows, start.tokenizer)
        stage, words = measured(
            stage, counts, np.array([response]), limit=limit, group="config.ppo"
        )
        run.note(words)
    left = start.config.max_length - stage.response_length
    form = {"prompt_length": stage.prompt_length, "group": "config.ppo", "positions": left}
    prompts = encode_prompts(rows, start.tokenizer, **form)
    field = "ppo.rollout_batch / samples_per_prompt"
    check_batch(len(prompts["tokens"]), stage.prompts, kind="prompts", field=field)
    return stage, prompts, rows


def read_probes(stage: PPOConfig, source: Source, start: TrainedModel) -> list[PromptText]:
    """A few held-out prompts, answered again and again on the way."""
    held_out = source.prompts("valid")
    form = {"prompt_length": stage.prompt_length, "required": False}
    fitting = encode_prompts(held_out, start.tokenizer, **form)["index"]
    return [held_out[i].text for i in fitting[:PROBES]]


def demonstration_score(
    data: DataConfig, stage: PPOConfig, source: Source, reward: TrainedModel
) -> dict[str, float]:
    """The reward model's mean score of held-out demonstrations (PPO-16), where there are any."""
    if reward.stage == "none":
        return {}
    if data.source == "files" and not (data.demonstrations or data.valid.demonstrations):
        return {}
    rows = encode_demonstrations(
        source.demonstrations("valid")[:DEMONSTRATIONS],
        reward.tokenizer,
        prompt_length=stage.prompt_length,
        response_length=stage.response_length,
        required=False,
    )
    if not len(rows["tokens"]):
        return {}
    scores = score_rows(reward.model, reward.params, rows["tokens"], rows["mask"])
    return {"demonstration_score": float(scores.mean())}


if __name__ == "__main__":
    cli.run(main, Config, default="configs/ppo.py", writes=WRITES, once=True)
