"""What a family can say about itself, as data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .latent import LatentNames

SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers, as configs have them


@dataclass(frozen=True)
class TensorNames:
    """Templates of the tensors' names; `{layer}` and `{expert}` are filled in.

    Shapes are those of the Hugging Face layout: a linear layer is [out, in]. What a family does not
    have is None. Experts have three tensors each (`expert_*`), or a layer's are stacked
    (`stacked_*`), each [in, out].
    """

    embedding: str
    input_norm: str
    query: str
    key: str | None
    value: str | None
    output: str
    router_norm: str  # of a dense layer as well, where no router reads it
    router: str
    expert_gate: str | None
    expert_up: str | None
    expert_down: str | None
    final_norm: str
    head: str
    query_norm: str | None = None
    key_norm: str | None = None
    query_down: str | None = None  # latent attention (latent.py): to what queries are made of,
    query_up: str | None = None  # which has `query_norm`, and from it to all heads
    latent_down: str | None = None  # to the latent and the key that is turned
    latent_norm: str | None = None
    latent_up: str | None = None  # of each head first to its key, then to its value
    query_bias: str | None = None  # the biases are there where the config says so
    key_bias: str | None = None
    value_bias: str | None = None
    output_bias: str | None = None
    sinks: str | None = None  # [heads]: scores of a token that adds nothing
    router_bias: str | None = None
    stacked_gate_up: str | None = None  # [E, D, 2F], gate and up taking turns
    stacked_gate_up_bias: str | None = None  # [E, 2F]
    stacked_down: str | None = None  # [E, F, D]
    stacked_down_bias: str | None = None  # [E, D]
    dense_gate: str | None = None
    dense_up: str | None = None
    dense_down: str | None = None
    shared_gate: str | None = None  # the expert that every token goes through
    shared_up: str | None = None
    shared_down: str | None = None
    shared_router: str | None = None  # [1, D]: how much of it, as a logit
    selection_bias: str | None = None  # [E]: the routing rule selects by score plus this
    further: str | None = None  # only in layers behind the last, which predict more tokens
    ignored: tuple[str, ...] = ()  # names that old checkpoints carry and nobody needs


@dataclass(frozen=True)
class ConfigNames:
    """Which entry of `config.json` holds what; None where a family has no such thing."""

    hidden_size: str = "hidden_size"
    vocab_size: str = "vocab_size"
    num_layers: str = "num_hidden_layers"
    num_heads: str = "num_attention_heads"
    num_kv_heads: str = "num_key_value_heads"
    head_size: str = "head_dim"
    max_positions: str = "max_position_embeddings"
    num_experts: str = "num_experts"
    expert_width: str = "intermediate_size"
    dense_width: str | None = None
    shared_width: str | None = None
    shared_count: str | None = None  # of shared experts, as wide as the others and fused into one
    first_dense: str | None = None  # how many layers are without experts at the beginning
    dense_layers: str | None = None  # a list of layers without experts
    sparse_step: str | None = None  # every so many layers one has experts
    top_k: str = "num_experts_per_tok"
    renormalize: str | None = "norm_topk_prob"
    routing_scale: str | None = None
    groups: str | None = None  # of experts; null in the config is one
    top_groups: str | None = None
    method: str | None = None  # the name of a way to select; see `Family.methods`
    norm_epsilon: str = "rms_norm_eps"
    clip_qkv: str | None = None
    activation: str = "hidden_act"
    head_norms: str | None = None  # a flag without which query and key have no norms
    attention_bias: str | None = "attention_bias"
    tied_head: str = "tie_word_embeddings"
    window: str | None = None
    window_switch: str | None = None  # a flag without which the window is not used
    window_end: str | None = None  # of the layers before it every other one has a window
    rotated_share: str | None = None  # of a head: the rest of it knows no position
    further_layers: str | None = None  # how many follow that predict more tokens; left out
    latent: LatentNames | None = None  # of latent attention
    layer_kinds: str | None = None  # a list of `SLIDING` and `FULL`; other layers are refused
    swiglu_alpha: str | None = None
    swiglu_limit: str | None = None


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, described as data.

    Attributes:
        name: As the manifest and messages have it.
        model_type: The `model_type` of its configs.
        tensors: Names of its tensors.
        score: How its router's logits become scores; see `RoutingRule`, as for the next two.
        group_score: What its groups of experts are ranked by.
        renormalize: Whether the selected experts' weights are divided by their sum, where no entry
            of the config says so.
        methods: Ways to select experts by the config's word for them, and whether they mind the
            groups; others are refused.
        activation: Of its experts: act(gate) · up.
        swiglu_shift: What is added to up before the product; see `architecture.Swiglu`.
        alternating_windows: Whether every other layer has a window, from the first on, where no
            list of the config's says which.
        head_norms: Whether the norms of query and key are over each head, not over all of them.
        free_head_size: Whether the config may state a head size that is not D over the heads.
        config: Names of the entries of its config.
        aliases: Entries by another name: (name in some configs, name in `config`).
        defaults: What an entry is where the config leaves it out.
        fixed: Entries that hold this wherever they are; what else they ask for is not supported.
        rope_theta: Base of the rotary embedding where the config leaves it out.
    """

    name: str
    model_type: str
    tensors: TensorNames
    score: str = "softmax"
    group_score: str = "max"
    renormalize: bool = False
    methods: tuple[tuple[str, bool], ...] = ()
    activation: str = "silu"
    swiglu_shift: float = 0.0
    alternating_windows: bool = False
    head_norms: bool = False
    free_head_size: bool = False
    config: ConfigNames = field(default_factory=ConfigNames)
    aliases: tuple[tuple[str, str], ...] = ()
    defaults: tuple[tuple[str, Any], ...] = ()
    fixed: tuple[tuple[str, Any], ...] = ()
    rope_theta: float = 10000.0
