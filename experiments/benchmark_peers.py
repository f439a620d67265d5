"""The other side of `experiments/benchmark.py --config.peer=trl`: not to be run by hand.

Runs in the interpreter that has torch, transformers and TRL, and imports nothing of this package.
Reads FOLDER/spec.json, FOLDER/rows.npz and the weights in FOLDER/model, does one turn of work for
every line "go" on its standard input, and answers each with one JSON line. Everything is fp32 on
the CPU; activation checkpointing, on by default in TRL, is off, as it is on our side.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np


def main(folder):
    """Serves turns of TRL, or of transformers for rollouts."""
    serve(folder, {"torch": "torch", "transformers": "transformers", "trl": "trl"}, peer, run)


def peer(spec, versions):
    """Who does the work of a phase."""
    if spec["phase"] == "rollout":
        return f"transformers {versions['transformers']}"
    return f"TRL {versions['trl']}"


def run(folder, spec, rows, turns):
    """The phase that `spec` names."""
    import torch
    import transformers

    torch.manual_seed(spec["seed"])
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    transformers.utils.logging.set_verbosity_error()
    work = {"rollout": rollout, "sft": sft, "reward_model": reward_model, "iteration": iteration}
    try:
        work[spec["phase"]](folder, spec, rows, turns)
    except ImportError as error:
        raise ImportError(f"{error}; PPO is in TRL up to 1.12.0") from error


def folder_named(about):
    """The folder on the command line; `about` is for --help."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=about, formatter_class=form)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with spec.json and rows.npz")
    return parser.parse_args().folder


def serve(folder, libraries, peer, run):
    """Serves turns until the pipe closes.

    `libraries` are the modules that must be there and the distributions they are of,
    `peer(spec, versions)` is its name, `run(folder, spec, rows, turns)` its work.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to the log

    def answer(**message):
        print(json.dumps(message), file=answers, flush=True)

    try:
        for module in libraries:
            importlib.import_module(module)
    except ImportError as error:
        needed = " and ".join(libraries.values())
        answer(error=f"{sys.executable} has no {error.name}; name an interpreter with {needed}")
        return
    spec = json.loads((folder / "spec.json").read_text())
    with np.load(folder / "rows.npz") as archive:
        rows = dict(archive)
    versions = {name: importlib.metadata.version(name) for name in libraries.values()}

    def ready():
        answer(peer=peer(spec, versions), versions=versions)

    def wait():
        """Until the next turn; leaves when there is none."""
        if not sys.stdin.readline():
            sys.exit(0)

    try:
        run(folder, spec, rows, Turns(ready, wait, answer))
    except ImportError as error:
        answer(error=f"{sys.executable}: {error}")


class Turns:
    """Opens with `begin`; `end(work)` closes a turn, tells its time and waits for the next."""

    def __init__(self, ready, wait, answer):
        self._ready, self._wait, self._answer = ready, wait, answer

    def begin(self):
        """Say that all is set up, and wait."""
        self._ready()
        self._wait()
        self._start = time.perf_counter()

    def end(self, work):
        """Say how long the turn took and what was done in it, and wait."""
        seconds = time.perf_counter() - self._start
        self._answer(seconds=seconds, work=float(work))
        self._wait()
        self._start = time.perf_counter()


def rollout(folder, spec, rows, turns):
    """`generate` of transformers with its own cache, sampling from the whole softmax."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval()
    count, length = spec["rows"], spec["response"]
    model.generation_config = GenerationConfig(pad_token_id=spec["pad_id"])
    settings = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=length, min_new_tokens=length,
        pad_token_id=spec["pad_id"],
    )  # fmt: skip
    prompts, mask = (torch.as_tensor(rows[n][:count]) for n in ("prompts", "prompt_mask"))
    turns.begin()
    while True:
        with torch.no_grad():
            out = model.generate(
                input_ids=prompts.long(), attention_mask=mask.long(), generation_config=settings
            )
        turns.end(out.numel() - prompts.numel())


def sft(folder, spec, rows, turns):
    """SFTTrainer on rows that are tokens already; the work is its real tokens."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    examples = []
    for tokens, mask, targets in zip(rows["tokens"], rows["mask"], rows["loss_mask"], strict=True):
        ids = tokens[mask].tolist()
        labels = np.where(targets[mask], tokens[mask], -100).tolist()
        examples.append({"input_ids": ids, "labels": labels})
    config = SFTConfig(
        **_training(spec["rows"]), max_length=spec["pack_length"], packing=spec["packed"]
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"),
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=_tokenizer(spec),
    )

    def tokens(inputs):
        mask = inputs.get("attention_mask")
        return inputs["input_ids"].numel() if mask is None else int(mask.sum())

    _serve(trainer, turns, tokens)


def reward_model(folder, spec, rows, turns):
    """RewardTrainer on pairs that are tokens already; the work is its pairs."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    examples = []
    for tokens, mask, ranks in zip(rows["ranked"], rows["ranked_mask"], rows["ranks"], strict=True):
        better, worse = np.argsort(ranks[:2], kind="stable")
        chosen, rejected = (tokens[i][mask[i]].tolist() for i in (better, worse))
        examples.append({"chosen_ids": chosen, "rejected_ids": rejected})
    model = AutoModelForSequenceClassification.from_pretrained(
        folder / "model", num_labels=1, pad_token_id=spec["pad_id"]
    )
    config = RewardConfig(**_training(spec["ranked"]), max_length=None)
    trainer = RewardTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(examples),
        processing_class=_tokenizer(spec),
    )
    _serve(trainer, turns, lambda inputs: len(inputs["input_ids"]) // 2)


def iteration(folder, spec, rows, turns):
    """PPOTrainer: four models, one optimizer; the work is its episodes."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    policy, reference = (AutoModelForCausalLM.from_pretrained(folder / "model") for _ in range(2))
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=1, pad_token_id=spec["pad_id"]
        )
        for _ in range(2)
    )
    count = spec["rows"]
    settings = _training(count) | {"max_steps": -1, "num_train_epochs": 1}
    config = PPOConfig(
        **settings,
        total_episodes=1000 * count,
        num_mini_batches=1,
        num_ppo_epochs=spec["epochs"],
        local_rollout_forward_batch_size=count,
        response_length=spec["response"],
        temperature=1.0,
        stop_token="eos" if spec["ends"] else None,
        kl_coef=0.02,
        num_sample_generations=0,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=_tokenizer(spec),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=Dataset.from_dict({"input_ids": rows["prompts"].tolist()}),
        eval_dataset=Dataset.from_dict({"input_ids": rows["prompts"][:count].tolist()}),
    )
    trainer.add_callback(_callback(turns, lambda: count))
    trainer.train()


def _training(batch_size):
    """What all trainers are given: fp32 on the CPU, no checkpoint, no report."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": 1,
        "max_steps": 1000,
        "learning_rate": 1e-5,
        "bf16": False,
        "fp16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _tokenizer(spec):
    """A tokenizer of as many words as the model has, of which only the padding is ever used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(spec["pad_id"] + 1)}
    names = {"eos_token": f"w{spec['eos_id']}", "pad_token": f"w{spec['pad_id']}"}
    made = Tokenizer(models.WordLevel(words, unk_token="w1"))
    return PreTrainedTokenizerFast(tokenizer_object=made, padding_side="left", **names)


def _serve(trainer, turns, count):
    """One update a turn; `count` tells the work of the inputs of a training step."""
    done = 0
    step = trainer.training_step

    def counted(model, inputs, *rest, **more):
        nonlocal done
        done = count(inputs)
        return step(model, inputs, *rest, **more)

    trainer.training_step = counted
    trainer.add_callback(_callback(turns, lambda: done))
    trainer.train()


def _callback(turns, work):
    from transformers import TrainerCallback

    class Turnstile(TrainerCallback):
        """A turn is from the end of one step to the end of the next: its data are in it."""

        def on_train_begin(self, *_, **__):
            turns.begin()

        def on_step_end(self, *_, **__):
            turns.end(work())

    return Turnstile()


if __name__ == "__main__":
    main(folder_named(__doc__))
