"""Every implementation of attention computes the same, whatever the rows hold; off their hardware
splash runs interpreted and cuDNN as XLA's reading of the same arguments.
"""

import dataclasses
import importlib.util
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from instruct_jax.models import block_attention, language_model
from instruct_jax.models.attention import attend, implementation
from instruct_jax.models.rows import PADDING, Rows
from tests.models.cases import GPT, LLAMA, language, random_tokens

KERNELS = ("blocks", "splash", "cudnn")
AXES = ("data", "fsdp", "tensor", "sequence")
LENGTH, SIZE = 160, 8  # no multiple of a block


class Case(NamedTuple):
    """What rows hold, and what the model asks for."""

    heads: int = 4
    kv_heads: int = 4
    segments: tuple[tuple[int, ...], ...] = ((LENGTH,), (LENGTH,))  # lengths; negative: padding
    branches: bool = False
    window: int | None = None
    cap: float | None = None


CASES = {
    "full": Case(),
    "grouped, padded left and right": Case(4, 2, ((-37, 123), (-5, 100, -55))),
    "one key head, packed": Case(4, 1, ((40, 1, 88, -31), (129, 31))),
    "window": Case(4, 2, ((-10, 150), (70, 90)), window=20),
    "soft cap": Case(4, 2, ((-10, 150), (70, 90)), cap=1.5),
    "branches": Case(4, 2, ((150, -10), (-LENGTH,)), branches=True),
    "trees": Case(4, 2, ((70, 60, -30), (100, 60)), branches=True),
}


def mask_of(case, rows):
    """bool[B, 1, 1, T, T], what XLA's attention is given; its queries go in three blocks."""
    t = np.arange(LENGTH)
    distance = t[:, None] - t[None]
    near = (distance >= 0) & (distance < (case.window or LENGTH))
    return (jnp.asarray(near)[None] & rows.meets(rows))[:, None, None]


@pytest.mark.parametrize("kernel", ["xla", *KERNELS])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients_equal_a_float64_reference(kernel, case):
    if kernel == "cudnn" and case.cap is not None:
        pytest.skip("refused: cuDNN has no soft cap")
    q, k, v, weights = arrays(case)
    config, rows = configured(case, kernel), rows_of(case)
    seen = rows
    if kernel == "xla":
        config, seen = dataclasses.replace(config, dtype="float32"), mask_of(case, rows)
    # Nobody reads what is computed at padding.
    weights = np.where(np.asarray(rows.segments)[:, None, :, None] == PADDING, 0, weights)

    @jax.jit
    def run(q, k, v):
        y, pull = jax.vjp(lambda *qkv: attend(config, *qkv, seen), q, k, v)
        return y, pull(weights)

    y, changes = run(q, k, v)
    expected, expected_changes = reference(case, q, k, v, weights)
    real = weights != 0
    np.testing.assert_allclose(y[real], expected[real], rtol=0, atol=1e-5)
    for found, wanted in zip(changes, expected_changes, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("case", "changed", "touched"),
    [
        (Case(segments=((40, 50, 70),) * 2), slice(40, 90), slice(40, 90)),
        (Case(segments=((-40, 120),) * 2), slice(0, 40), slice(0, 40)),
        (Case(), slice(150, 160), slice(150, 160)),
        (Case(window=20), slice(30, 40), slice(30, 59)),
        # Branches are 60..99, 100..139 and 140..: what is common is seen by all, they by nobody.
        (Case(branches=True), slice(60, 100), slice(60, 100)),
        (Case(branches=True), slice(50, 60), slice(50, 160)),
    ],
    ids=["segment", "padding", "future", "window", "branch", "beginning"],
)
def test_nothing_is_seen_that_should_not_be(kernel, case, changed, touched):
    """Other queries keep every bit; those that do see it, change."""
    q, k, v, _ = arrays(case)
    config, rows = configured(case, kernel), rows_of(case)
    run = jax.jit(lambda q, k, v: attend(config, q, k, v, rows))
    before = np.asarray(run(q, k, v))
    for x in (k, v):
        x[:, :, changed] = -2 * x[:, :, changed] + 1
    after = np.asarray(run(q, k, v))
    moved = (before != after).any((0, 1, 3))
    assert moved[touched].all()
    moved[touched] = False
    assert not moved.any()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_no_block_is_met_in_which_nothing_is_seen(case):
    """What a tree or a packed row costs on a CPU."""
    rows, size = rows_of(case), block_attention.BLOCK
    padded = rows.padded(-LENGTH % size)
    met, counts = block_attention.Seen.of(padded, case.window).keys()
    mask = np.asarray(mask_of(case, rows))[:, 0, 0] & (np.asarray(rows.segments) >= 0)[:, :, None]
    n = len(met) // len(mask)
    for a, (keys, count) in enumerate(zip(np.asarray(met), np.asarray(counts), strict=True)):
        row, i = divmod(a, n)
        own = mask[row, i * size : (i + 1) * size]
        wanted = [j for j in range(n) if own[:, j * size : (j + 1) * size].any()]
        assert (keys[:count] - row * n).tolist() == wanted


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("branched", [False, True], ids=["segments", "branches"])
def test_on_a_mesh_a_model_has_the_logits_and_gradients_of_xla(kernel, branched):
    """Rows, heads and positions split; one key head, which the mesh cannot split; local layers,
    global ones and their rotations in one scan; recomputed activations.
    """
    pattern = {} if branched else {"attention_pattern": "gl", "window": 50}
    base = dataclasses.replace(
        LLAMA, num_kv_heads=1, max_length=LENGTH, rope_local_theta=50.0, **pattern
    )
    tokens = random_tokens(4, LENGTH)
    case = Case(segments=((-30, 130), (40, 120), (150, -10), (LENGTH,)), branches=branched)
    rows = rows_of(case)
    mask = np.asarray(rows.segments) != PADDING
    kinds = {"branches": rows.branches} if branched else {"segment_ids": rows.segments}
    if branched:
        kinds["positions"] = np.tile(np.arange(LENGTH, dtype=np.int32) % 100, (4, 1))

    def outcome(config):
        model = language_model(config)

        def loss(params):
            logits = model.apply(params, tokens, mask=mask, **kinds)[..., : GPT.vocab_size]
            return jnp.sum(jnp.where(mask[..., None], jnp.sin(logits), 0.0)), logits

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(language(base)[1])

    (_, logits), changes = outcome(base)
    mesh = jax.make_mesh((1, 2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        found = outcome(dataclasses.replace(base, attention=kernel, remat="full"))
    np.testing.assert_allclose(np.asarray(found[0][1])[mask], np.asarray(logits)[mask], atol=2e-5)
    for ours, theirs in zip(*map(jax.tree.leaves, (found[1], changes)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


HALF = dataclasses.replace(GPT, dtype="bfloat16")


@pytest.mark.parametrize(
    ("platform", "change", "expected"),
    [
        ("cpu", {}, "blocks"),
        ("cpu", {"dtype": "float32"}, "blocks"),
        ("cpu", {"attention_dropout": 0.1}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"attention_softcap": 50.0, "head_dim": 256}, "splash"),
        ("tpu", {"dtype": "float32"}, "xla"),
        ("tpu", {"attention_dropout": 0.1}, "xla"),
        ("tpu", {"attention": "xla"}, "xla"),
        ("cuda", {}, "cudnn"),
        ("cuda", {"attention_pattern": "gl", "window": 9}, "cudnn"),
        ("cuda", {"attention_softcap": 50.0}, "xla"),
        ("cuda", {"head_dim": 256}, "xla"),
        ("cuda", {"head_dim": 12}, "xla"),
        ("cpu", {"attention": "splash"}, "splash"),
    ],
)
def test_the_platform_of_the_mesh_chooses(platform, change, expected):
    """Also one that is not here, which a program is only compiled for."""
    config = dataclasses.replace(HALF, **change)
    device = AbstractDevice(device_kind=platform, num_cores=None, platform=platform)
    mesh = AbstractMesh((4, 1), ("fsdp", "sequence"), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert implementation(config, 2048) == expected
        assert implementation(config, 64) == "xla"
        assert implementation(config, 2047) == ("xla" if expected == "cudnn" else expected)
    split = mesh.update(axis_sizes=(2, 2), axis_names=mesh.axis_names)
    with jax.sharding.use_abstract_mesh(split):
        whole = expected in ("blocks", "cudnn")  # which would compute every query on both devices
        assert implementation(config, 2048) == ("xla" if whole else expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"attention": "flash"},
            "attention='flash' is not one of auto, xla, blocks, cudnn, splash",
        ),
        ({"attention": "splash", "attention_dropout": 0.1}, "cannot drop weights"),
        ({"attention": "cudnn", "attention_softcap": 30.0}, "no soft cap"),
    ],
)
def test_a_kernel_that_cannot_do_it_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(HALF, **change)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the extra `plan`")
@pytest.mark.parametrize("branched", [False, True], ids=["segments", "branches"])
def test_compiled_for_a_tpu_no_scores_are_in_memory(branched):
    """A training step's gradient for a machine that is not here."""
    from instruct_jax.planning.topologies import compile_mesh, open_devices, parse_topology

    topology = parse_topology("v5e:2x2")
    mesh = compile_mesh(topology, "fsdp:2,tensor:2", open_devices(topology))
    tokens = jax.ShapeDtypeStruct((4, 1024), jnp.int32)
    config = dataclasses.replace(HALF, max_length=1024, d_model=128, num_heads=2)
    texts = {}
    for attention in ("auto", "xla"):
        model = language_model(dataclasses.replace(config, attention=attention))
        extra = {"branches": tokens, "positions": tokens} if branched else {"segment_ids": tokens}

        def loss(params, tokens, mask, extra, model=model):
            return jnp.sum(model.hidden(params, tokens, mask=mask, **extra).astype(jnp.float32))

        params = jax.eval_shape(model.init, jax.random.key(0))
        mask = jax.ShapeDtypeStruct(tokens.shape, jnp.bool_)
        with jax.set_mesh(mesh):
            lowered = jax.jit(jax.grad(loss)).lower(params, tokens, mask, extra)
        texts[attention] = lowered.compile().as_text()
    scores = re.compile(r"(?:f32|bf16)\[[\d,]*1024,1024\]")
    assert "splash_mha_dkv" in texts["auto"]
    assert not scores.search(texts["auto"])
    assert scores.search(texts["xla"])


def configured(case, kernel):
    """The configuration of a case, as far as attention reads it."""
    pattern = {} if case.window is None else {"attention_pattern": "l", "window": case.window}
    return dataclasses.replace(
        HALF,
        num_heads=case.heads,
        num_kv_heads=case.kv_heads,
        attention=kernel,
        attention_softcap=case.cap,
        **pattern,
    )


def arrays(case):
    """Queries, keys, values and the weights of the outputs in a sum, float32."""
    rng = np.random.default_rng(0)
    rows = len(case.segments)
    heads = case.heads, case.kv_heads, case.kv_heads, case.heads
    shapes = [(rows, n, LENGTH, SIZE) for n in heads]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def rows_of(case):
    """Segments of the lengths of a case; branches from slot 60 on, of 40."""
    spans = [
        [i if n > 0 else PADDING for i, n in enumerate(row) for _ in range(abs(n))]
        for row in case.segments
    ]
    segments = np.array(spans, np.int32)
    slots = np.arange(LENGTH, dtype=np.int32)
    branches = np.tile(np.maximum(slots // 20 - 1, 0) // 2, (len(spans), 1))
    return Rows(jnp.array(segments), jnp.array(branches) if case.branches else None)


def reference(case, q, k, v, weights):
    """Outputs and the gradients of sum(weights * outputs), in float64 and by the formulas."""
    q, k, v, weights = (np.asarray(x, np.float64) for x in (q, k, v, weights))
    segments, branches = (None if x is None else np.asarray(x) for x in rows_of(case))
    k, v = (np.repeat(x, case.heads // case.kv_heads, axis=1) for x in (k, v))
    y = np.zeros_like(q)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, n in np.ndindex(q.shape[:2]):
        scores = q[b, n] @ k[b, n].T
        slope = np.ones_like(scores)
        if case.cap is not None:
            turned = np.tanh(scores / case.cap)
            scores, slope = case.cap * turned, 1 - turned**2
        for t, s in np.ndindex(scores.shape):
            seen = s <= t and segments[b, s] == segments[b, t]
            if case.window is not None:
                seen = seen and t - s < case.window
            if branches is not None:
                seen = seen and branches[b, s] in (0, branches[b, t])
            if not seen:
                scores[t, s] = -np.inf
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        y[b, n] = p @ v[b, n]
        dp = weights[b, n] @ v[b, n].T
        ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope
        dq[b, n], dk[b, n], dv[b, n] = ds @ k[b, n], ds.T @ q[b, n], p.T @ weights[b, n]
    shared = (q.shape[0], case.kv_heads, -1, *q.shape[2:])
    return y, (dq, *(x.reshape(shared).sum(2) for x in (dk, dv)))
