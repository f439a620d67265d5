"""The compression report: every variant measured beside the original, and what is asked in vain."""

import json

import jax
import numpy as np
import pytest

from instruct_jax.models.transformer import scalar_from_language
from instruct_jax.stages.trained import TrainedModel, load_trained, save_trained
from tests.experiments import scripts

VARIANTS = (
    "int8", "int8_activations", "fp8", "int4", "nf4", "int8_cache",
    "prune:0.3", "prune:0.5", "distill:samples", "distill:logits",
)  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A language model that ends its answers soon, a reward model, and rows to measure them on."""
    folder = tmp_path_factory.mktemp("models")
    trained = load_trained(scripts.write_model(folder / "random"))
    table, params = np.asarray(trained.params["embedder"]["tokens"]), dict(trained.params)
    end = table[trained.tokenizer.eos_id]
    push = 4.5 * end / (end @ end)  # a logit of 4.5 before anything else: p is about 1/4
    params["final_norm"] = params["final_norm"] | {"bias": push.astype(np.float32)}
    save_trained(folder / "policy", trained._replace(params=params))
    reward = scalar_from_language(params, jax.random.key(1), trained.config)
    save_trained(
        folder / "reward",
        TrainedModel("scalar", trained.config, reward, trained.tokenizer, "reward_model"),
    )
    return folder, scripts.write_rows(folder / "data", rows=200)


def arguments(models, workdir, *extra):
    folder, paths = models
    return [
        "--config=configs/compress.py:debug",
        f"--workdir={workdir}",
        "--mesh=data:1",
        f"--config.model={folder / 'policy'}",
        f"--config.reward_model={folder / 'reward'}",
        "--config.data.source=files",
        "--config.data.valid_fraction=0.3",
        f"--config.data.documents={paths['documents']}",
        f"--config.data.prompts={paths['prompts']}",
        "--config.document_length=32",
        "--config.prompt_length=24",
        "--config.response_length=16",
        *extra,
    ]


@pytest.fixture(scope="module")
def report(models, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("report")
    scripts.launch("compress", *arguments(models, workdir, "--config.distill_prompts=100"))
    return workdir, json.loads((workdir / "compression.json").read_text())["variants"]


def test_every_variant_is_measured_beside_the_original(report):
    workdir, variants = report
    assert list(variants) == ["original", *VARIANTS]
    original = variants["original"]
    assert original["size_ratio"] == 1.0 and original["perplexity_change"] == 0.0
    assert original["cosine_min"] == pytest.approx(1.0, abs=1e-5)
    assert original["reward_change"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    lines = (workdir / "compression.md").read_text().splitlines()
    assert len(lines) == 2 + len(variants)
    assert lines[0].startswith("| variant | size (kB) |") and "RM score" in lines[0]
    assert "gold" not in lines[0], "there is no judge of a user's own files"
    assert len({line.count("|") for line in lines}) == 1


def test_sizes_and_losses_are_ordered_as_they_must_be(report):
    _, variants = report
    size = {name: row["size_ratio"] for name, row in variants.items()}
    assert size["int4"] == size["nf4"] < size["int8"] == size["int8_activations"] == size["fp8"]
    assert size["int8"] < 0.5
    assert size["prune:0.5"] < size["prune:0.3"] < 1.0
    cosine = {name: row["cosine_mean"] for name, row in variants.items()}
    assert cosine["original"] > cosine["int8"] > cosine["int4"]
    assert cosine["prune:0.3"] > cosine["prune:0.5"]
    assert variants["int8"]["perplexity_change"] < 0.01
    assert all(row["tokens_per_second"] > 0 for row in variants.values())
    assert any(row["reward_change"]["mean"] != 0 for row in variants.values())


def test_pruning_is_reported_by_layer_and_a_student_is_kept(report):
    workdir, variants = report
    layers = variants["prune:0.5"]["layers"]
    assert len(layers) == 2 * 6
    weights = sum(row["weights"] for row in layers)
    zeroed = sum(row["weights"] * row["zeroed"] for row in layers)
    assert zeroed / weights == pytest.approx(0.5, abs=1e-3)
    for targets in ("samples", "logits"):
        student = load_trained(workdir / f"distill_{targets}" / "model", kind="language")
        assert student.config.num_layers == variants[f"distill:{targets}"]["layers"] == 1


@pytest.mark.parametrize("variant", ["int3", "prune:1.0", "prune:half", "distill:dreams", "int8:4"])
def test_an_unknown_variant_is_refused_before_anything_is_read(models, tmp_path, capsys, variant):
    with pytest.raises(SystemExit) as end:
        chosen = f"--config.variants={variant}"
        scripts.launch("compress", *arguments(models, tmp_path / "w", chosen))
    assert end.value.code == 2
    assert f"config.variants: '{variant}' is none of int8" in capsys.readouterr().err
    assert not (tmp_path / "w").exists()


def test_a_teacher_that_does_not_end_its_answers_is_no_teacher(models, tmp_path, capsys):
    folder, _ = models
    with pytest.raises(SystemExit) as end:
        scripts.launch(
            "compress",
            *arguments(models, tmp_path, "--config.variants=distill:samples",
                       f"--config.model={folder / 'random'}"),
        )  # fmt: skip
    assert end.value.code == 2
    assert "answers ended, less than one batch" in capsys.readouterr().err
