"""The field that a misspelt name means: ours in a hurry, or what another library calls it."""

import difflib
from collections.abc import Iterable, Sequence

# What users of TRL, OpenRLHF, veRL, Axolotl, LLaMA-Factory and the 2019 code type -> the fields of
# ours that it may mean, the likeliest first, by their last words, or a flag.
_ELSEWHERE = {
    "actor_learning_rate actor_lr": "learning_rate",
    "adam_beta1 beta1": "adam.b1",
    "adam_beta2 beta2": "adam.b2",
    "adam_epsilon adam_eps": "adam.eps",
    "attn_implementation flash_attention flash_attn use_flash_attention_2": "attention",
    "bf16 fp16 torch_dtype precision mixed_precision compute_dtype": "dtype",
    "block_size context_length n_ctx seq_len seq_length max_seq_length max_seq_len cutoff_len"
    " sequence_len max_position_embeddings": "length pack_length max_length response_length",
    "chat_template prompt_template": "template",
    "clip_range cliprange clip_eps epsilon clip_ratio eps_clip": "clip",
    "clip_ratio_high epsilon_high": "clip_high",
    "cliprange_value clip_range_vf value_clip_range vf_clip": "value_clip",
    "critic_learning_rate critic_lr value_lr": "value_learning_rate",
    "data_dir data_path dataset dataset_name dataset_path datasets train_file train_files": (
        "demonstrations comparisons prompts documents files"
    ),
    "delta": "dual_clip",
    "dropout resid_pdrop hidden_dropout": "residual_dropout",
    "evaluation_steps eval_interval eval_steps eval_freq": "eval_every",
    "gamma": "discount margin",
    "gradient_accumulation_steps grad_accum_steps micro_batch_size": "micro_batches",
    "gradient_checkpointing activation_checkpointing recompute": "remat",
    "init_kl_coef kl_beta kl_coeff kl_penalty kl_weight beta": "kl_coef beta",
    "lam lambda": "gae_lambda odds_weight",
    "load_in_4bit load_in_8bit quantization quantization_bit": "base",
    "log_interval logging_steps log_freq": "log_every",
    "lora_alpha": "alpha",
    "lora_r lora_rank r": "rank",
    "lora_target_modules lora_target target_modules": "targets",
    "lr_scheduler lr_scheduler_type lr_schedule scheduler": "schedule",
    "max_grad_norm grad_clip gradient_clipping clip_grad clip_grad_norm": "adam.clip",
    "min_lr min_lr_ratio lr_decay": "final_fraction",
    "max_samples max_train_samples num_samples": "limit",
    "max_steps num_steps total_steps": "epochs episodes",
    "mini_batch_size ppo_mini_batch_size num_mini_batches": "minibatch batch_size",
    "max_new_tokens max_completion_length max_tokens max_response_length generate_max_len"
    " response_len": "response_length",
    "max_prompt_length prompt_max_len max_prompt_len": "prompt_length",
    "model model_name model_name_or_path pretrain pretrained base_model sft_model_path actor"
    " checkpoint load_from ref_model": "init preset source model",
    "model_size": "preset",
    "num_epochs num_train_epochs max_epochs n_epochs": "epochs",
    "num_generations group_size n_samples_per_prompt rollout_n best_of": "samples_per_prompt",
    "optim optimizer_name optimizer_type": "optimizer",
    "output output_dir save_dir save_path logging_dir output_path experiment_dir": "--workdir",
    "packing sample_packing": "pack_length",
    "per_device_train_batch_size train_batch_size global_batch_size": "batch_size rollout_batch",
    "ppo_epochs num_ppo_epochs noptepochs": "inner_epochs",
    "random_seed": "seed",
    "reward_model_path reward_pretrain reward_model_name": "reward_model",
    "save_steps save_interval save_freq checkpoint_every": "save_every",
    "scale_rewards": "group_scale whiten_rewards",
    "target_kl kl_target_value": "kl_target",
    "tensor_parallel_size num_gpus fsdp tp dp num_devices": "--mesh",
    "tokenizer_name tokenizer_path tokenizer_name_or_path": "tokenizer",
    "total_episodes num_episodes": "episodes",
    "train_on_inputs train_on_prompt completion_only_loss mask_prompt": "loss_on_prompt",
    "validation_split val_size test_size val_fraction": "valid_fraction",
    "warmup_ratio warmup_steps num_warmup_steps lr_warmup_steps": "warmup warmup_iterations",
    "wd weight_decay": "adam.weight_decay",
}
_MEANT = {word: meant.split() for words, meant in _ELSEWHERE.items() for word in words.split()}


def suggest(word: str, known: Iterable[str]) -> str:
    """ "; did you mean ...?", or all that is known."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; there are {', '.join(sorted(known))}"


def suggest_field(name: str, known: Sequence[str]) -> str:
    """The field of `known` that "a.b" means, by its last word: what another library calls it, its
    initials (lr), one of its words or a likeness; else those of its group.
    """
    group, _, word = name.rpartition(".")
    word = word.lower().replace("-", "_")
    meant = _MEANT.get(word, [])
    if meant and meant[0].startswith("--"):
        return f"; did you mean {meant[0]}?"

    def likeness(candidate: str) -> float:
        owner, _, field = candidate.rpartition(".")
        words = field.split("_")
        alike = difflib.SequenceMatcher(None, word, field).ratio()
        if word == "".join(w[0] for w in words if w):
            alike = 0.9
        elif set(word.split("_")) & set(words):
            alike = max(alike, 0.7)
        for rank, ours in enumerate(meant):
            if f".{candidate}".endswith(f".{ours}"):
                return 2.0 - 0.1 * rank
        return alike + 0.05 * (owner == group)  # the right field in the wrong group also counts

    def order(field: str) -> tuple[float, int, bool]:
        """By likeness; of equals the one that is not in a group within, and is not the data's."""
        return likeness(field), -field.count("."), not field.startswith("data.")

    best = max(known, key=order)
    if likeness(best) >= 0.7:
        return f"; did you mean config.{best}?"
    siblings = [field for field in known if field.rpartition(".")[0] == group] or known
    return f"; there are {', '.join(siblings)}"
