"""What a world is made of, in numbers: the counterpart of the paper's data tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from instruct_jax.data.toyworld.world import Split, ToyWorld

Table = dict[str, dict[str, float]]


def describe(world: ToyWorld, n: int = 1000, *, split: Split = "train") -> Table:
    """Statistics of n prompts, demonstrations and documents, as tables of plain numbers.

    Shares of families, prompt kinds, use cases, annotations, flaws and document kinds; lengths in
    words; the gold grades of the demonstrations.
    """
    prompts = world.prompts(n, split=split)
    demonstrations = [world.demonstrate(prompt) for prompt in prompts]
    grades = [world.judge(p, d.response) for p, d in zip(prompts, demonstrations, strict=True)]
    documents = world.pretraining_corpus(n)
    metas = [prompt.meta for prompt in prompts]
    flaws = [demonstration.meta["flaws"] for demonstration in demonstrations]
    return {
        "families": _shares((meta["family"] for meta in metas), n),
        "skills": _shares((meta["skill"] for meta in metas), n),
        "kinds": _shares((meta["kind"] for meta in metas), n),
        "use_cases": _shares((meta["use_case"] for meta in metas), n),
        "annotations": _shares((k for m in metas for k, v in m["annotations"].items() if v), n),
        "flaws": _shares((flaw for each in flaws for flaw in (each or ["none"])), n),
        "documents": _shares((document.meta["kind"] for document in documents), n),
        "prompt_words": _spread([len(prompt.text.split()) for prompt in prompts]),
        "response_words": _spread([len(d.response.split()) for d in demonstrations]),
        "document_words": _spread([len(document.text.split()) for document in documents]),
        "grades": _spread([grade.overall for grade in grades]),
        "grade_by_family": _means(
            [meta["family"] for meta in metas], [grade.overall for grade in grades]
        ),
    }


def _shares(names: Iterable[str], n: int) -> dict[str, float]:
    return {name: count / n for name, count in Counter(names).most_common()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    quarters = np.percentile(values, [0, 25, 50, 75, 100])
    spread: Mapping[str, float] = dict(
        zip(("min", "25%", "50%", "75%", "max"), quarters, strict=True)
    )
    return {"mean": float(np.mean(values)), "sd": float(np.std(values))} | {
        name: float(value) for name, value in spread.items()
    }


def _means(names: Sequence[str], values: Sequence[float]) -> dict[str, float]:
    return {
        name: float(np.mean([v for other, v in zip(names, values, strict=True) if other == name]))
        for name in sorted(set(names))
    }
