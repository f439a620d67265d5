"""The tensor names of the families: our parameter path -> where it is stored."""

from instruct_jax.models.hf.schema import Tensor

_QKV = ("query", "key", "value")


def _layernorm(path: str, name: str) -> dict[str, Tensor]:
    return {f"{path}/scale": Tensor(f"{name}.weight"), f"{path}/bias": Tensor(f"{name}.bias")}


def _linear(
    path: str,
    name: str,
    *,
    transpose: bool = True,
    fused: tuple[str, ...] = (),
    per_head: bool = False,
) -> dict[str, Tensor]:
    return {
        f"{path}/kernel": Tensor(f"{name}.weight", transpose, fused, per_head),
        f"{path}/bias": Tensor(f"{name}.bias", False, fused, per_head),
    }


def _fused(
    module: str,
    parts: tuple[str, ...],
    name: str,
    *,
    transpose: bool = True,
    per_head: bool = False,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for part in parts:
        options = {"transpose": transpose, "per_head": per_head}
        tensors |= _linear(f"{module}/{part}", name, fused=parts, **options)
    return tensors


HEADS = {
    "unembedding/kernel": Tensor("lm_head.weight", transpose=True),
    "head/kernel": Tensor("score.weight", transpose=True),
}
_ATTENTION, _MLP = "layers/attention", "layers/mlp"

GPT2 = {
    **HEADS,
    "embedder/tokens": Tensor("wte.weight"),
    "embedder/positions": Tensor("wpe.weight"),
    **_layernorm("final_norm", "ln_f"),
    **_layernorm("layers/attention_norm", "h.{}.ln_1"),
    **_fused(_ATTENTION, _QKV, "h.{}.attn.c_attn", transpose=False),
    **_linear(f"{_ATTENTION}/out", "h.{}.attn.c_proj", transpose=False),
    **_layernorm("layers/mlp_norm", "h.{}.ln_2"),
    **_linear(f"{_MLP}/up", "h.{}.mlp.c_fc", transpose=False),
    **_linear(f"{_MLP}/down", "h.{}.mlp.c_proj", transpose=False),
}
OPT = {
    **HEADS,
    "embedder/tokens": Tensor("embed_tokens.weight"),
    "embedder/positions": Tensor("embed_positions.weight", skip=2),
    **_layernorm("final_norm", "final_layer_norm"),
    **_layernorm("layers/attention_norm", "layers.{}.self_attn_layer_norm"),
    **_linear(f"{_ATTENTION}/query", "layers.{}.self_attn.q_proj"),
    **_linear(f"{_ATTENTION}/key", "layers.{}.self_attn.k_proj"),
    **_linear(f"{_ATTENTION}/value", "layers.{}.self_attn.v_proj"),
    **_linear(f"{_ATTENTION}/out", "layers.{}.self_attn.out_proj"),
    **_layernorm("layers/mlp_norm", "layers.{}.final_layer_norm"),
    **_linear(f"{_MLP}/up", "layers.{}.fc1"),
    **_linear(f"{_MLP}/down", "layers.{}.fc2"),
}
NEOX = {
    **HEADS,
    "unembedding/kernel": Tensor("embed_out.weight", transpose=True),
    "embedder/tokens": Tensor("embed_in.weight"),
    **_layernorm("final_norm", "final_layer_norm"),
    **_layernorm("layers/attention_norm", "layers.{}.input_layernorm"),
    **_fused(_ATTENTION, _QKV, "layers.{}.attention.query_key_value", per_head=True),
    **_linear(f"{_ATTENTION}/out", "layers.{}.attention.dense"),
    **_layernorm("layers/mlp_norm", "layers.{}.post_attention_layernorm"),
    **_linear(f"{_MLP}/up", "layers.{}.mlp.dense_h_to_4h"),
    **_linear(f"{_MLP}/down", "layers.{}.mlp.dense_4h_to_h"),
}
LLAMA = {
    **HEADS,
    "embedder/tokens": Tensor("embed_tokens.weight"),
    "final_norm/scale": Tensor("norm.weight"),
    "layers/attention_norm/scale": Tensor("layers.{}.input_layernorm.weight"),
    **_linear(f"{_ATTENTION}/query", "layers.{}.self_attn.q_proj"),
    **_linear(f"{_ATTENTION}/key", "layers.{}.self_attn.k_proj"),
    **_linear(f"{_ATTENTION}/value", "layers.{}.self_attn.v_proj"),
    **_linear(f"{_ATTENTION}/out", "layers.{}.self_attn.o_proj"),
    f"{_ATTENTION}/query_norm/scale": Tensor("layers.{}.self_attn.q_norm.weight"),
    f"{_ATTENTION}/key_norm/scale": Tensor("layers.{}.self_attn.k_norm.weight"),
    "layers/mlp_norm/scale": Tensor("layers.{}.post_attention_layernorm.weight"),
    **_linear(f"{_MLP}/gate", "layers.{}.mlp.gate_proj"),
    **_linear(f"{_MLP}/up", "layers.{}.mlp.up_proj"),
    **_linear(f"{_MLP}/down", "layers.{}.mlp.down_proj"),
}
GEMMA = {
    **LLAMA,
    "layers/attention_post_norm/scale": Tensor("layers.{}.post_attention_layernorm.weight"),
    "layers/mlp_norm/scale": Tensor("layers.{}.pre_feedforward_layernorm.weight"),
    "layers/mlp_post_norm/scale": Tensor("layers.{}.post_feedforward_layernorm.weight"),
}
PHI3 = {
    **LLAMA,
    **_fused(_ATTENTION, _QKV, "layers.{}.self_attn.qkv_proj"),
    **_fused(_MLP, ("gate", "up"), "layers.{}.mlp.gate_up_proj"),
}
