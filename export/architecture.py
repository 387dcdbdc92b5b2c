"""What a family can say about itself, and what a checkpoint of it turns out to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knnmoe.runtime.bundle import ModelShape
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError
from knnmoe.runtime.routing import RoutingRule

WEIGHT_DTYPES = ("F32", "F16", "BF16")
HEAD_SIZE_MULTIPLE = 8  # of ONNX Runtime's GroupQueryAttention

NOT_DESCRIBED = "knnmoe has no description for this kind of checkpoint yet."


@dataclass(frozen=True)
class TensorNames:
    """Templates of the tensors' names; `{layer}` and `{expert}` are filled in.

    Shapes are those of the Hugging Face layout: a linear layer is [out, in].
    """

    embedding: str
    input_norm: str
    query: str
    key: str
    value: str
    output: str
    query_norm: str  # over the whole width of all heads
    key_norm: str
    router_norm: str
    router: str
    expert_gate: str
    expert_up: str
    expert_down: str
    final_norm: str
    head: str
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
    top_k: str = "num_experts_per_tok"
    renormalize: str = "norm_topk_prob"
    norm_epsilon: str = "rms_norm_eps"
    clip_qkv: str = "clip_qkv"
    activation: str = "hidden_act"
    attention_bias: str = "attention_bias"
    tied_head: str = "tie_word_embeddings"


@dataclass(frozen=True)
class Family:
    """A family of checkpoints, described as data.

    Attributes:
        name: As the manifest and messages have it.
        model_type: The `model_type` of its configs.
        tensors: Names of its tensors.
        score: How its router's logits become scores.
        activation: Of its experts: act(gate) · up.
        config: Names of the entries of its config.
        defaults: What an entry is where the config leaves it out.
        rope_theta: Base of the rotary embedding where the config leaves it out.
    """

    name: str
    model_type: str
    tensors: TensorNames
    score: str = "softmax"
    activation: str = "silu"
    config: ConfigNames = field(default_factory=ConfigNames)
    defaults: tuple[tuple[str, Any], ...] = ()
    rope_theta: float = 10000.0


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's sizes and constants, checked; `shape` and `routing` go into the manifest."""

    family: Family
    shape: ModelShape
    routing: RoutingRule
    expert_width: int
    norm_epsilon: float
    rope_theta: float
    clip_qkv: float | None
    tied_head: bool

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.shape.num_heads * self.shape.head_size

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads."""
        return self.shape.num_kv_heads * self.shape.head_size


def describe(checkpoint: Checkpoint, family: Family) -> Architecture:
    """Read a checkpoint's config by the family's description, and check its tensors against it.

    Raises:
        CheckpointError: If an entry is missing, malformed or inconsistent, the config asks for
            something the family's description cannot express, or a tensor is missing, unknown, or
            of an unexpected shape or dtype.
    """
    architecture = describe_config(checkpoint.config, checkpoint.path / CONFIG, family)
    _check_tensors(checkpoint, architecture)
    return architecture


def describe_config(content: Mapping[str, Any], where: Path, family: Family) -> Architecture:
    """Read a config by the family's description; no tensor is looked at.

    Args:
        content: Of `config.json`.
        where: Its path, for messages.
        family: Which description to read it by.

    Raises:
        CheckpointError: If an entry is missing, malformed or inconsistent, or asks for something
            the family's description cannot express.
    """
    config = _Config(content, where, family)
    names = family.config
    hidden = config.count(names.hidden_size)
    heads = config.count(names.num_heads)
    kv_heads = config.count(names.num_kv_heads, default=heads)
    layers = config.count(names.num_layers)
    experts = config.count(names.num_experts)
    top_k = config.count(names.top_k)
    if hidden % heads:
        raise config.wrong(
            names.num_heads, "does not divide the hidden size", f"a divisor of {hidden}"
        )
    if heads % kv_heads:
        raise config.wrong(names.num_kv_heads, "does not divide the heads", f"a divisor of {heads}")
    head_size = config.count(names.head_size, default=hidden // heads)
    if head_size != hidden // heads:
        raise config.wrong(
            names.head_size, "is not the hidden size over the heads", str(hidden // heads)
        )
    if head_size % HEAD_SIZE_MULTIPLE:
        raise config.wrong(
            names.num_heads,
            f"gives heads of size {head_size}",
            f"a head size that is a multiple of {HEAD_SIZE_MULTIPLE}",
        )
    if top_k > experts:
        raise config.wrong(names.top_k, "is more than there are experts", f"at most {experts}")
    config.must_be(names.activation, family.activation)
    config.must_be(names.attention_bias, False)
    return Architecture(
        family=family,
        shape=ModelShape(
            hidden_size=hidden,
            vocab_size=config.count(names.vocab_size),
            num_layers=layers,
            num_gates=layers,
            num_experts=experts,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_positions=config.count(names.max_positions),
        ),
        routing=RoutingRule(
            top_k=top_k, score=family.score, renormalize=config.flag(names.renormalize)
        ),
        expert_width=config.count(names.expert_width),
        norm_epsilon=config.positive(names.norm_epsilon),
        rope_theta=_rope_theta(config, family),
        clip_qkv=_clip(config, names.clip_qkv),
        tied_head=config.flag(names.tied_head),
    )


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this architecture has, with its shape."""
    names, shape = architecture.family.tensors, architecture.shape
    hidden, width = shape.hidden_size, architecture.expert_width
    query, kv = architecture.query_width, architecture.kv_width
    expected: dict[str, tuple[int, ...]] = {
        names.embedding: (shape.vocab_size, hidden),
        names.final_norm: (hidden,),
    }
    if not architecture.tied_head:
        expected[names.head] = (shape.vocab_size, hidden)
    per_layer = {
        names.input_norm: (hidden,),
        names.query: (query, hidden),
        names.key: (kv, hidden),
        names.value: (kv, hidden),
        names.output: (hidden, query),
        names.query_norm: (query,),
        names.key_norm: (kv,),
        names.router_norm: (hidden,),
        names.router: (shape.num_experts, hidden),
    }
    per_expert = {
        names.expert_gate: (width, hidden),
        names.expert_up: (width, hidden),
        names.expert_down: (hidden, width),
    }
    for layer in range(shape.num_layers):
        for template, size in per_layer.items():
            expected[template.format(layer=layer)] = size
        for expert in range(shape.num_experts):
            for template, size in per_expert.items():
                expected[template.format(layer=layer, expert=expert)] = size
    return expected


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    expected = expected_tensors(architecture)
    for name, shape in expected.items():
        entry = checkpoint.entry(name)
        where = f"{checkpoint.path / entry.shard}: {name}"
        if entry.shape != shape:
            raise CheckpointError(
                where,
                "has another shape than the config states",
                expected=list(shape),
                found=list(entry.shape),
                fix="Use the config.json that belongs to these weights.",
            )
        if entry.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                where,
                "has a dtype that cannot be exported",
                expected=" or ".join(WEIGHT_DTYPES),
                found=entry.dtype,
                fix="Convert the checkpoint to float32, float16 or bfloat16.",
            )
    ignored = architecture.family.tensors.ignored
    for name in checkpoint.tensors:
        tied = architecture.tied_head and name == architecture.family.tensors.head
        if name not in expected and not tied and not name.endswith(ignored):
            raise CheckpointError(
                f"{checkpoint.path}: {name}",
                f"is not a tensor of the family {architecture.family.name}",
                fix=NOT_DESCRIBED,
            )


class _Config:
    """Access to `config.json` with the family's defaults; every error names the entry."""

    def __init__(self, content: Mapping[str, Any], where: Path, family: Family) -> None:
        self._where = where
        self._content = dict(family.defaults) | dict(content)

    def raw(self, name: str) -> Any:
        return self._content.get(name)

    def wrong(self, name: str, problem: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where}: {name}",
            problem,
            expected=expected,
            found=str(self._content.get(name, "nothing"))[:200],
            fix=NOT_DESCRIBED if name in self._content else "Use the checkpoint's own config.json.",
        )

    def count(self, name: str, *, default: int | None = None) -> int:
        found = self.raw(name)
        if found is None and default is not None:
            return default
        if type(found) is not int or not 1 <= found < 1 << 31:
            raise self.wrong(name, "malformed", "a positive whole number")
        return found

    def positive(self, name: str) -> float:
        found = self.raw(name)
        if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e38:
            raise self.wrong(name, "malformed", "a positive number")
        return float(found)

    def flag(self, name: str) -> bool:
        found = self.raw(name)
        if not isinstance(found, bool):
            raise self.wrong(name, "malformed", "true or false")
        return found

    def must_be(self, name: str, value: Any) -> None:
        if self.raw(name) != value:
            raise self.wrong(name, "is not supported", str(value))


def _clip(config: _Config, name: str) -> float | None:
    return None if config.raw(name) is None else config.positive(name)


def _rope_theta(config: _Config, family: Family) -> float:
    """The base of the rotary embedding, in the old form of config or the new.

    Old: `rope_theta`, `rope_scaling`; new: `rope_parameters` with both.
    """
    for name in ("rope_parameters", "rope_scaling"):
        found = config.raw(name)
        if found is None:
            continue
        if not isinstance(found, dict):
            raise config.wrong(name, "malformed", "an object or null")
        if found.get("rope_type", found.get("type", "default")) != "default":
            raise config.wrong(
                name, "asks for a scaling that is not supported", "rope_type default"
            )
        if found.get("partial_rotary_factor", 1.0) != 1.0:
            raise config.wrong(name, "rotates only a part of each head", "the whole head")
    parameters = config.raw("rope_parameters") or {}
    theta = parameters.get("rope_theta", config.raw("rope_theta"))
    if theta is None:
        return family.rope_theta
    if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e12:
        raise config.wrong("rope_theta", "malformed", "a number above 1")
    return float(theta)
