"""The other side of `experiments/benchmark.py --config.peer=tunix`: not to be run by hand.

Runs in the interpreter that has Tunix, and imports nothing of this package; the protocol is that of
benchmark_peers.py. Everything is fp32 on the CPU, in one process whose matrix products use all
cores. The actor and the reference are our weights, read as Qwen 2; the critic is the same trunk
with a head of its own. The reward is a Python function, which costs next to nothing: there is no
reward model.
"""

import dataclasses
import json
import sys

import numpy as np
from benchmark_peers import folder_named, serve


def main(folder):
    """Serves iterations of Tunix's PPO."""
    libraries = {"tunix": "google-tunix", "jax": "jax", "flax": "flax"}
    serve(folder, libraries, peer, iteration)


def peer(spec, versions):
    """Who does the work."""
    return f"Tunix {versions['google-tunix']}"


def iteration(folder, spec, rows, turns):
    """PPOLearner: rollout, log-probs of policy and reference, values, and the updates of both."""
    import jax
    from flax import nnx
    from tunix.rl.ppo.ppo_learner import PPOConfig, PPOLearner

    cluster = _cluster(folder, spec)
    learner = PPOLearner(
        cluster,
        PPOConfig(num_iterations=spec["epochs"], beta=0.02),
        reward_fns=lambda prompts, completions, **_: [_variety(text) for text in completions],
    )
    texts = np.array([" ".join(map(str, row)) for row in rows["prompts"].tolist()])

    def batches():
        """The learner asks for a batch where an iteration begins, and so where one has ended."""
        turns.begin()
        for start in range(0, sys.maxsize, spec["rows"]):
            yield {"prompts": np.take(texts, np.arange(start, start + spec["rows"]), mode="wrap")}
            trained = cluster.actor_trainer.model, cluster.critic_trainer.model
            jax.block_until_ready([nnx.state(model) for model in trained])
            turns.end(spec["rows"])

    learner.train(batches())


def _cluster(folder, spec):
    """Actor, critic and reference on one mesh, with the cheapest settings for this shape."""
    import jax
    import optax
    from flax import nnx
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2.params import create_model_from_safe_tensors
    from tunix.rl import rl_cluster
    from tunix.rl.rollout.base_rollout import RolloutConfig
    from tunix.rl.utils import create_critic_model

    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = _model_config(json.loads((folder / "model" / "config.json").read_text()))
    with jax.set_mesh(mesh):
        actor, reference = (
            create_model_from_safe_tensors(str(folder / "model"), config, mesh) for _ in range(2)
        )
        # A critic replaces the head, which a model with one table does not have.
        untied = dataclasses.replace(config, use_tied_embedding=False)
        critic = qwen2.Qwen2(untied, rngs=nnx.Rngs(spec["seed"]))
        nnx.update(critic, nnx.state(actor))
        critic = create_critic_model(critic)
    count, prompt = spec["rows"], spec["prompt"]
    minibatch = count // spec["minibatches"]
    settings = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(rl_cluster.Role, mesh),
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=_optimizer(optax),
            critic_optimizer=_optimizer(optax),
            mini_batch_size=minibatch,
            train_micro_batch_size=minibatch,
            rollout_micro_batch_size=count,
            compute_logps_micro_batch_size=count,
            eval_every_n_steps=sys.maxsize,
            max_steps=sys.maxsize,
        ),
        rollout_config=RolloutConfig(
            max_prompt_length=prompt,
            max_tokens_to_generate=spec["response"],
            kv_cache_size=prompt + spec["response"],
            temperature=1.0,
            top_p=1.0,  # the whole softmax, without a sort; None would be greedy
            eos_tokens=[-1],  # which no model draws: all responses have their full length
        ),
    )
    return rl_cluster.RLCluster(
        actor=actor,
        critic=critic,
        reference=reference,
        tokenizer=_Numbers(spec["eos_id"], spec["pad_id"]),
        cluster_config=settings,
    )


def _model_config(sizes):
    """Tunix's configuration of a config.json of Qwen 2."""
    from tunix.models.qwen2.model import ModelConfig

    return ModelConfig(
        num_layers=sizes["num_hidden_layers"],
        vocab_size=sizes["vocab_size"],
        embed_dim=sizes["hidden_size"],
        hidden_dim=sizes["intermediate_size"],
        num_heads=sizes["num_attention_heads"],
        head_dim=sizes["head_dim"],
        num_kv_heads=sizes["num_key_value_heads"],
        rope_theta=sizes["rope_theta"],
        norm_eps=sizes["rms_norm_eps"],
        use_tied_embedding=sizes["tie_word_embeddings"],
    )


def _optimizer(optax):
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-5))


def _variety(text):
    """The share of different tokens: any reward would do."""
    words = text.split()
    return len(set(words)) / max(len(words), 1)


class _Numbers:
    """A tokenizer whose text is the tokens' numbers."""

    def __init__(self, eos, pad):
        self._eos, self._pad = eos, pad

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None  # no token comes before a prompt

    def eos_id(self):
        return self._eos

    def pad_id(self):
        return self._pad


if __name__ == "__main__":
    main(folder_named(__doc__))
