"""Improves a policy by PPO against a reward model (M5), with a pretraining mix PPO-ptx (M6).

    python experiments/ppo.py --config=configs/ppo.py:toyworld_ptx \\
        --config.init=runs/rlhf_init/model --config.reward_model=runs/reward_model/model \\
        --workdir=runs/ppo_ptx

configs/grpo.py and configs/rloo.py run critic-free algorithms through the same script.

Writes WORKDIR/model (the exponential moving average of the policy, which is the one to use),
metrics.jsonl, checkpoints and samples.jsonl. Run again, it resumes.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import jax

from instruct_jax import cli
from instruct_jax.data.encoding import encode_prompts
from instruct_jax.data.loader import Batches
from instruct_jax.data.sources import DataConfig, open_source
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.sampling.complete import complete
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo import PPOConfig
from instruct_jax.stages.ppo_models import on_the_policys_trunk
from instruct_jax.stages.stage import TrainedModel, load_adapter, load_trained, save_trained
from instruct_jax.stages.text import text_rows
from instruct_jax.training.mesh import make_mesh

PROBES = 32


# Beside what every run writes; --overwrite replaces these.
WRITES = ("ppo.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Config:
    """`init` is the policy's start and KL reference, `reward_model` a scalar model folder."""

    init: str = "runs/rlhf_init/model"
    reward_model: str = "runs/reward_model/model"
    # The reward model's `adapter` folder, where it was trained on `init` with a LoRA rank: then the
    # policy's trunk serves the reference, the reward model and the value model too.
    reward_adapter: str | None = None
    data: DataConfig = DataConfig()
    model: ComputeConfig = ComputeConfig()
    ptx_length: int = 96
    ppo: PPOConfig = PPOConfig()


def main(config: Config, run: cli.Run) -> Path:
    """Trains and returns the model folder of the averaged policy."""
    start = load_trained(config.init, kind="language", compute=config.model)
    reward = load_trained(config.reward_model, kind="scalar", compute=config.model)
    check_lengths(config, start, reward)
    if reward.tokenizer.fingerprint != start.tokenizer.fingerprint:
        raise ConfigError(
            f"{config.reward_model} and {config.init} have different tokenizers; "
            "the reward model must read the policy's tokens"
        )
    reward_params = reward.params
    if config.reward_adapter is not None:
        adapter = load_adapter(config.reward_adapter)
        reward_params = on_the_policys_trunk(
            config.ppo, start, reward, adapter, config.reward_adapter
        )
    source = open_source(config.data)
    prompts = encode_prompts(
        source.prompts("train"), start.tokenizer, prompt_length=config.ppo.prompt_length
    )
    ptx = None
    mesh = make_mesh(run.mesh)
    text = {"length": config.ptx_length, "folder": config.data.token_folder(run.workdir)}
    held_out = text_rows(source, "valid", start.tokenizer, **text)[:]
    if config.ppo.ptx_coef > 0:
        rows = text_rows(source, "train", start.tokenizer, **text)
        size = config.ppo.updates * config.ppo.minibatch * config.ppo.ptx_ratio
        ptx = Batches({"tokens": rows}, size, seed=config.ppo.seed + 1)

    policy = start.model
    held_out_prompts = source.prompts("valid")
    run.record_data(source.provenance(), source.licences())
    fitting = encode_prompts(
        held_out_prompts, start.tokenizer, prompt_length=config.ppo.prompt_length
    )["index"]
    probes = [held_out_prompts[i].text for i in fitting[:PROBES]]

    def evaluate(step: int, state: ppo.PPOState) -> dict[str, float]:
        """Held-out pretraining loss, and a fixed set of prompts answered, for people to read."""
        params = state.policy.ema
        answers = complete(
            policy,
            params,
            start.tokenizer,
            probes,
            key=jax.random.key(0),
            max_new_tokens=config.ppo.response_length,
            prompt_length=config.ppo.prompt_length,
            batch_size=PROBES,
            mesh=mesh,
        )
        if run.writes:
            with (run.workdir / "samples.jsonl").open("a") as file:
                for prompt, answer in zip(probes, answers, strict=True):
                    row = {"step": step, "prompt": prompt, "response": answer.text}
                    file.write(json.dumps(row | {"ended": answer.ended}) + "\n")
        return {"valid_pretrain_loss": held_out_loss(policy, params, held_out, mesh=mesh)}

    state = ppo.train(
        config.ppo,
        policy,
        reward.model,
        start.params,
        reward_params,
        Batches(prompts, config.ppo.prompts, seed=config.ppo.seed),
        ptx=ptx,
        eos_id=start.tokenizer.eos_id,
        mesh=mesh,
        workdir=run.workdir,
        evaluate=evaluate,
    )
    trained = start._replace(params=state.policy.ema, stage="ppo")
    return save_trained(run.workdir / "model", trained)


def check_lengths(config: Config, start: TrainedModel, reward: TrainedModel) -> None:
    """ConfigError where a row has positions that a model has not."""
    longest = config.ppo.prompt_length + config.ppo.response_length
    for name, trained in (("init", start), ("reward_model", reward)):
        field = f"config.ppo.prompt_length + response_length, of config.{name}"
        check_length(trained.config, longest, field=field)
    check_length(start.config, config.ptx_length, field="config.ptx_length")


if __name__ == "__main__":
    cli.run(main, Config, default="configs/ppo.py", writes=WRITES)
