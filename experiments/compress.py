"""Makes smaller variants of a trained model and reports what each costs and saves.

    python experiments/compress.py --config=configs/compress.py:toyworld \\
        --config.model=runs/ppo_ptx/model --config.reward_model=runs/reward_model/model \\
        --workdir=runs/compress

Variants: int8, int8_activations, int4, nf4, fp8, int8_cache (models/quantization.py); prune:S, a
share S of the weights zeroed (models/pruning.py); distill:samples and distill:logits, a student of
fewer layers (stages/distill.py). int8_cache rounds the keys and values of decoding alone: its size
and its perplexity are the original's.

Writes WORKDIR/compression.json, everything, the pruning of each layer included; WORKDIR/
compression.md, the table; WORKDIR/distill_*/model, the students. Every variant answers the same
prompts with the same keys, so a change is a mean of paired differences. Cosine is that of a
position's logits with the original's, on the held-out documents that perplexity is of.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.encoding import encode_demonstrations
from instruct_jax.data.rows import Demonstration, Prompt
from instruct_jax.data.sources import Source, ToySource, open_source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.intervals import bootstrap_mean
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.files import write_json, write_text
from instruct_jax.models.config import ComputeConfig, check_length
from instruct_jax.models.matrices import parameter_total, tree_bytes
from instruct_jax.models.pruning import prune, sparse_bytes
from instruct_jax.models.quantization import quantize_params, quantized, with_int8_cache
from instruct_jax.models.transformer import Model, language_model, unstack_layers
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import Settings, never, setting
from instruct_jax.stages import distill
from instruct_jax.stages.distill import DistillConfig
from instruct_jax.stages.inputs import data_acts
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.stage import in_batches
from instruct_jax.stages.text import text_rows
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from instruct_jax.training.mesh import make_mesh

ORIGINAL = "original"


# Beside what every run writes; --overwrite replaces these.
WRITES = ("compression.json", "compression.md", "distill_*/", "distill_*/distill.jsonl")


@dataclass(frozen=True)
class Config(Settings):
    """What is made smaller, how, and what it is measured on."""

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("prompts", "documents"),
        "compute.remat": "students",
        "distill": "students",
        "distill.eval_every": never("a student is measured when it is done"),
    }

    model: str = setting("runs/ppo_ptx/model", "model folder of the original, a language model")
    reward_model: str | None = setting(None, "folder of the scalar model that scores answers")
    compute: ComputeConfig = ComputeConfig()
    variants: tuple[str, ...] = setting(
        ("int8",),
        "what is made: int8, int8_activations, int4, nf4, fp8, int8_cache, prune:SHARE,"
        " distill:samples, distill:logits",
    )
    data: DataConfig = DataConfig()
    prompts: int = setting(400, "prompts that every variant answers", low=1)
    document_length: int = setting(96, "tokens of a row of held-out text", low=2, unit="tokens")
    prompt_length: int = setting(56, "tokens of the longest prompt", low=1, unit="tokens")
    response_length: int = setting(24, "tokens that an answer may have", low=1, unit="tokens")
    temperature: float = setting(1.0, "temperature of sampling; 0 is greedy", low=0.0)
    batch_size: int = setting(128, "answers that are sampled together", low=1)
    seed: int = setting(0, "seed of the answers", low=0, high=2**32 - 1)
    distill_prompts: int = setting(
        4_000, "training prompts that a student's teacher answers", low=1, needs="students"
    )
    distill: DistillConfig = DistillConfig()

    def __post_init__(self) -> None:
        """ConfigError for a variant that there is not."""
        super().__post_init__()
        for name in self.variants:
            _check_variant(name)

    @property
    def students(self) -> tuple[str, ...]:
        """The variants that are trained."""
        return tuple(name for name in self.variants if name.startswith("distill"))


@dataclass(frozen=True)
class Variant:
    """A model to measure; `decoding` are its parameters in the form that decodes fastest."""

    model: Model
    params: Any
    stored_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)
    decoding: Any = None


@dataclass(frozen=True)
class Materials:
    """What all variants are measured on."""

    prompts: Sequence[Prompt]
    documents: np.ndarray
    source: Source
    reward: TrainedModel | None


def main(config: Config, run: cli.Run) -> dict[str, Any]:
    """Measures the original and all variants; returns what compression.json holds."""
    original, reward = load_models(config)
    source = open_source(config.data)
    run.record_data(source.provenance(), source.licences(), source.counts())
    kept = {"length": config.document_length, "folder": config.data.token_folder(run.workdir)}
    documents = text_rows(source, "valid", original.tokenizer, **kept)[:]
    materials = Materials(_fitting(config, original, source, "test"), documents, source, reward)

    results: dict[str, dict[str, Any]] = {}
    plain = Variant(original.model, original.params, tree_bytes(original.params))
    before = _measure(config, original, plain, plain, materials)
    results[ORIGINAL] = _summary(before, before)
    for name in config.variants:
        variant = _make(config, run, name, original, source)
        results[name] = _summary(_measure(config, original, variant, plain, materials), before)
    report = {
        "model": config.model,
        "prompts": len(materials.prompts),
        "held_out_tokens": int(documents.size),
        "variants": results,
    }
    write_json(run.workdir / "compression.json", report)
    text = table(results)
    write_text(run.workdir / "compression.md", text)
    print(text)
    return report


def load_models(config: Config) -> tuple[TrainedModel, TrainedModel | None]:
    """The original and the reward model. Raises ConfigError where a length does not fit them."""
    original = load_trained(config.model, kind="language", compute=config.compute)
    check_length(original.config, config.document_length, field="config.document_length")
    longest = config.prompt_length + config.response_length
    field = "config.prompt_length + response_length"
    check_length(original.config, longest, field=field)
    if config.reward_model is None:
        return original, None
    reward = load_trained(config.reward_model, kind="scalar", compute=config.compute)
    check_length(reward.config, longest, field=f"{field}, of config.reward_model")
    return original, reward


def _check_variant(name: str) -> None:
    kind, _, value = name.partition(":")
    if kind in ("int8", "int8_activations", "int4", "nf4", "fp8", "int8_cache") and not value:
        return
    if kind == "distill" and value in ("samples", "logits"):
        return
    if kind == "prune":
        try:
            if 0.0 <= float(value) < 1.0:
                return
        except ValueError:
            pass
    raise ConfigError(
        f"variants: {name!r} is none of int8, int8_activations, int4, nf4, fp8, int8_cache, "
        "prune:SHARE (0 <= SHARE < 1), distill:samples, distill:logits"
    )


def _make(
    config: Config, run: cli.Run, name: str, original: TrainedModel, source: Source
) -> Variant:
    kind, _, value = name.partition(":")
    if kind == "prune":
        params, report = prune(original.params, float(value))
        notes = {"layers": [row._asdict() for row in report]}
        return Variant(original.model, params, sparse_bytes(params), notes)
    if kind == "distill":
        return _student(config, run, value, original, source)
    if kind == "int8_cache":
        model = with_int8_cache(original.model)
        return Variant(model, original.params, tree_bytes(original.params))
    activations = kind == "int8_activations"
    params = quantize_params(original.params, "int8" if activations else kind)  # type: ignore[arg-type]
    model = quantized(original.model, activations=activations)
    # The sampler would cast the integers of a stack; separate layers it takes as they are.
    return Variant(model, params, tree_bytes(params), decoding=unstack_layers(params))


def _student(
    config: Config, run: cli.Run, targets: str, teacher: TrainedModel, source: Source
) -> Variant:
    """Trains a student on the teacher's answers to training prompts, and keeps its folder."""
    prompts = _fitting(config, teacher, source, "train", limit=config.distill_prompts)
    answers = _answers(config, teacher, teacher.model, teacher.params, prompts, draw=1)
    rows = [
        Demonstration(prompt.text, answer.text)
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer.ended
    ]
    encoded = encode_demonstrations(
        rows,
        teacher.tokenizer,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
    )
    if len(rows) < config.distill.batch_size:
        raise ConfigError(
            f"distill:{targets}: {len(rows)} of {len(prompts)} answers ended, less than one batch "
            f"of {config.distill.batch_size}; raise config.distill_prompts or response_length"
        )
    shape, start = distill.shortened(teacher.config, teacher.params, config.distill.layers)
    workdir = run.workdir / f"distill_{targets}"
    params = distill.train(
        config.distill,
        targets,  # type: ignore[arg-type]
        language_model(shape),
        start,
        teacher.model,
        teacher.params,
        encoded,
        mesh=make_mesh(run.mesh),
        workdir=workdir,
    )
    student = teacher._replace(config=shape, params=jax.device_get(params), stage="distill")
    save_trained(workdir / "model", student)
    notes = {"layers": shape.num_layers, "answers": len(rows)}
    return Variant(student.model, student.params, tree_bytes(student.params), notes)


def _fitting(
    config: Config, trained: TrainedModel, source: Source, split: Any, limit: int | None = None
) -> list[Prompt]:
    """The first prompts of a split that fit `prompt_length`."""
    fitting = [
        row
        for row in source.prompts(split)
        if len(trained.tokenizer.encode(row.text)) <= config.prompt_length
    ]
    return fitting[: config.prompts if limit is None else limit]


def _answers(
    config: Config,
    trained: TrainedModel,
    model: Model,
    params: Any,
    prompts: Sequence[Prompt],
    *,
    draw: int = 0,
) -> list[Completion]:
    return complete(
        model,
        params,
        trained.tokenizer,
        [row.text for row in prompts],
        key=jax.random.fold_in(jax.random.key(config.seed), draw),
        max_new_tokens=config.response_length,
        prompt_length=config.prompt_length,
        batch_size=config.batch_size,
        temperature=config.temperature,
    )


def _measure(
    config: Config,
    original: TrainedModel,
    variant: Variant,
    plain: Variant,
    materials: Materials,
) -> dict[str, Any]:
    """Sizes and averages, and per prompt what is compared with the original."""
    prompts, documents = materials.prompts, materials.documents
    decoding = variant.params if variant.decoding is None else variant.decoding

    def answer(rows: Sequence[Prompt]) -> list[Completion]:
        return _answers(config, original, variant.model, decoding, rows)

    answer(prompts[: config.batch_size])  # compiles
    start = time.perf_counter()
    answers = answer(prompts)
    seconds = time.perf_counter() - start
    cosines, agree = _agreement(plain, variant, documents)
    measured: dict[str, Any] = {
        "bytes": variant.stored_bytes,
        "parameters": parameter_total(variant.params),
        "perplexity": float(np.exp(held_out_loss(variant.model, variant.params, documents))),
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "top_1_agreement": float(agree.mean()),
        "tokens_per_second": sum(len(a.tokens) for a in answers) / seconds,
        "eos_rate": float(np.mean([a.ended for a in answers])),
        "per_prompt": {},
        **variant.notes,
    }
    if materials.reward is not None:
        measured["per_prompt"]["reward"] = _rewards(
            config, materials.reward, original.tokenizer, prompts, answers
        )
    if isinstance(materials.source, ToySource):
        world = materials.source.world
        measured["per_prompt"]["gold"] = np.array(
            [
                world.judge(row, a.text, a.ended).overall
                for row, a in zip(prompts, answers, strict=True)
            ]
        )
    return measured


def _agreement(
    plain: Variant, variant: Variant, documents: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of the two models' logits, float32[N, T], and whether their best tokens agree."""
    vocab_size = plain.model.config.vocab_size

    @jax.jit
    def compare(first: Any, second: Any, tokens: jax.Array) -> jax.Array:
        a, b = (
            model.apply(params, tokens)[..., :vocab_size]
            for model, params in ((plain.model, first), (variant.model, second))
        )
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cosine = jnp.sum(a * b, axis=-1) / norms
        agree = (a.argmax(-1) == b.argmax(-1)).astype(jnp.float32)
        return jnp.stack([cosine, agree], axis=1)

    run: Callable[[np.ndarray], jax.Array] = lambda t: compare(plain.params, variant.params, t)  # noqa: E731
    both = in_batches(run, 32, documents)
    return both[:, 0], both[:, 1]


def _rewards(
    config: Config,
    reward: TrainedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    answers: Sequence[Completion],
) -> np.ndarray:
    return score_answers(
        reward,
        tokenizer,
        [row.text for row in prompts],
        answers,
        prompt_length=config.prompt_length,
        response_length=config.response_length,
    )


def _summary(measured: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """The measurements with their changes against the original's."""
    summary = {name: value for name, value in measured.items() if name != "per_prompt"}
    summary["size_ratio"] = measured["bytes"] / before["bytes"]
    summary["perplexity_change"] = measured["perplexity"] / before["perplexity"] - 1.0
    for name, values in measured["per_prompt"].items():
        change = bootstrap_mean(values - before["per_prompt"][name])
        summary[name] = bootstrap_mean(values)._asdict()
        summary[f"{name}_change"] = change._asdict()
    return summary


def table(results: dict[str, dict[str, Any]]) -> str:
    """The report as a Markdown table; a column that nothing was measured for is left out."""
    columns: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("size (kB)", lambda r: f"{r['bytes'] / 1000:,.0f}"),
        ("of original", lambda r: f"{r['size_ratio']:.2f}"),
        ("perplexity", lambda r: f"{r['perplexity']:.3f} ({r['perplexity_change']:+.2%})"),
        ("cosine, least", lambda r: f"{r['cosine_mean']:.5f}, {r['cosine_min']:.4f}"),
        ("same best token", lambda r: f"{r['top_1_agreement']:.1%}"),
    ]
    for name, title in (("reward", "RM score"), ("gold", "gold score")):
        if name in results[ORIGINAL]:
            columns.append((title, lambda r, name=name: _changed(r, name)))
    columns.append(("tokens/s", lambda r: f"{r['tokens_per_second']:,.0f}"))
    lines = [
        "| variant | " + " | ".join(title for title, _ in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *(
            f"| {name} | " + " | ".join(show(result) for _, show in columns) + " |"
            for name, result in results.items()
        ),
    ]
    return "\n".join(lines) + "\n"


def _changed(result: dict[str, Any], name: str) -> str:
    change = result[f"{name}_change"]
    interval = f"[{change['low']:+.3f}, {change['high']:+.3f}]"
    return f"{result[name]['mean']:.3f} ({change['mean']:+.3f} {interval})"


if __name__ == "__main__":
    cli.run(main, Config, default="configs/compress.py", writes=WRITES)
