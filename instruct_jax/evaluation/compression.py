"""What a smaller variant of a model costs and saves, measured beside the original.

Every variant answers the same prompts with the same keys, so a change of a grade is a mean of
paired differences, with an interval that resamples prompts. Cosine is that of a position's logits
with the original's, on the held-out documents that perplexity is of; speed is that of decoding the
answers, after a batch of them that compiles.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from instruct_jax.data.ragged import Rows
from instruct_jax.data.rows import Prompt
from instruct_jax.evaluation.intervals import bootstrap_mean
from instruct_jax.evaluation.language import held_out_loss
from instruct_jax.models.compression import Variant
from instruct_jax.models.matrices import parameter_total
from instruct_jax.models.transformer import Model, Params
from instruct_jax.sampling.complete import Completion
from instruct_jax.stages.stage import in_batches

ORIGINAL = "original"


class Exam(NamedTuple):
    """What all variants are measured on.

    `answer(model, params, prompts)` samples one answer a prompt, with keys that depend on nothing
    else. `graders` give float[N] for the answers to all N prompts, by name. `warm_up` prompts
    compile what answering all of them needs.
    """

    prompts: Sequence[Prompt]
    documents: Rows
    answer: Callable[[Model, Params, Sequence[Prompt]], list[Completion]]
    graders: Mapping[str, Callable[[Sequence[Completion]], np.ndarray]]
    warm_up: int


@dataclass(frozen=True)
class Figures:
    """One variant as measured: averages, and `grades` float[N] of every grader."""

    bytes: int
    parameters: int
    perplexity: float
    cosine_mean: float
    cosine_min: float
    top_1_agreement: float
    tokens_per_second: float
    eos_rate: float
    grades: Mapping[str, np.ndarray] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


def measure(variant: Variant, original: Variant, exam: Exam) -> Figures:
    """The figures of `variant`, its logits compared with those of `original`."""
    model, decoding = variant.model, variant.decoding
    decoding = variant.params if decoding is None else decoding
    exam.answer(model, decoding, exam.prompts[: exam.warm_up])
    start = time.perf_counter()
    answers = exam.answer(model, decoding, exam.prompts)
    seconds = time.perf_counter() - start
    cosines, agree = agreement(original, variant, exam.documents)
    return Figures(
        bytes=variant.stored_bytes,
        parameters=parameter_total(variant.params),
        perplexity=float(np.exp(held_out_loss(model, variant.params, exam.documents))),
        cosine_mean=float(cosines.mean()),
        cosine_min=float(cosines.min()),
        top_1_agreement=float(agree.mean()),
        tokens_per_second=sum(len(answer.tokens) for answer in answers) / seconds,
        eos_rate=float(np.mean([answer.ended for answer in answers])),
        grades={name: grade(answers) for name, grade in exam.graders.items()},
        notes=variant.notes,
    )


def agreement(one: Variant, other: Variant, documents: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Cosine of two models' logits at every position of int32[N, T], float32[N, T], and 1 where
    their best tokens agree, else 0.
    """
    vocab_size = one.model.config.vocab_size

    @jax.jit
    def compare(first: Params, second: Params, tokens: jax.Array) -> jax.Array:
        a, b = (
            model.apply(params, tokens)[..., :vocab_size]
            for model, params in ((one.model, first), (other.model, second))
        )
        norms = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
        cosine = jnp.sum(a * b, axis=-1) / norms
        agree = (a.argmax(-1) == b.argmax(-1)).astype(jnp.float32)
        return jnp.stack([cosine, agree], axis=1)

    both = in_batches(lambda tokens: compare(one.params, other.params, tokens), 32, documents)
    return both[:, 0], both[:, 1]


def summary(figures: Figures, original: Figures) -> dict[str, Any]:
    """The figures as JSON values, with their changes against the original's."""
    values = asdict(figures)
    grades, notes = values.pop("grades"), values.pop("notes")
    values |= notes
    values["size_ratio"] = figures.bytes / original.bytes
    values["perplexity_change"] = figures.perplexity / original.perplexity - 1.0
    for name, of in grades.items():
        values[name] = bootstrap_mean(of)._asdict()
        values[f"{name}_change"] = bootstrap_mean(of - original.grades[name])._asdict()
    return values


def compression_table(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Summaries by name, ORIGINAL among them, as Markdown; what nobody graded has no column."""
    columns: list[tuple[str, Callable[[Mapping[str, Any]], str]]] = [
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


def _changed(result: Mapping[str, Any], name: str) -> str:
    change = result[f"{name}_change"]
    interval = f"[{change['low']:+.3f}, {change['high']:+.3f}]"
    return f"{result[name]['mean']:.3f} ({change['mean']:+.3f} {interval})"
