"""Reads a checkpoint by the description of its family."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from knnmoe.runtime.bundle import MAX_GATES, ModelShape
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError, SettingError
from knnmoe.runtime.routing import RoutingRule

from .architecture import Architecture, Layer, Swiglu
from .config import NOT_DESCRIBED, Config
from .family import FULL, SLIDING, ConfigNames, Family
from .latent import read_latent
from .mxfp4 import BLOCK, is_mxfp4
from .rope import Rope, read_rope
from .tensors import check_tensors

HEAD_SIZE_MULTIPLE = 16  # of ONNX Runtime's GroupQueryAttention, where it rotates


def describe(checkpoint: Checkpoint, family: Family) -> Architecture:
    """Read a checkpoint's config by the family's description, and check its tensors against it.

    Raises:
        CheckpointError: If an entry is missing, malformed or inconsistent, the config asks for
            something the family's description cannot express, or a tensor is missing, unknown, or
            of an unexpected shape or dtype.
    """
    architecture = describe_config(checkpoint.config, checkpoint.path / CONFIG, family)
    check_tensors(checkpoint, architecture)
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
    config = Config(content, where, family.defaults, family.aliases)
    names = family.config
    mxfp4 = is_mxfp4(config, known=family.tensors.stacked_gate_up is not None)
    for name in (names.hidden_size, names.expert_width) if mxfp4 else ():
        if config.count(name) % BLOCK:
            raise config.wrong(name, "is not in whole blocks of MXFP4", f"a multiple of {BLOCK}")
    hidden = config.count(names.hidden_size)
    heads = config.count(names.num_heads)
    kv_heads = config.count(names.num_kv_heads, default=heads)
    layers = _layers(config, family)
    gates = sum(layer.gate is not None for layer in layers)
    experts = config.count(names.num_experts)
    latent = read_latent(config, names.latent) if names.latent else None
    if latent is not None and kv_heads != heads:
        raise config.wrong(names.num_kv_heads, "is not the number of heads", str(heads))
    if latent is not None:
        kv_heads, head_size = 1, latent.cached
    else:
        head_size = _head_size(config, family, hidden, heads)
    if heads % kv_heads:
        raise config.wrong(names.num_kv_heads, "does not divide the heads", f"a divisor of {heads}")
    config.must_be(names.activation, family.activation)
    for entry, value in family.fixed:
        if config.raw(entry) is not None:
            config.must_be(entry, value)
    expert_width = config.count(names.expert_width)
    rope = read_rope(config, family.rope_theta, names.max_positions, names.rotated_share)
    return Architecture(
        family=family,
        shape=ModelShape(
            hidden_size=hidden,
            vocab_size=config.count(names.vocab_size),
            num_layers=len(layers),
            num_gates=gates,
            num_experts=experts,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_positions=config.count(names.max_positions),
            latent_size=0 if latent is None else latent.rank,
        ),
        routing=_routing(config, family, experts),
        layers=layers,
        expert_width=expert_width,
        dense_width=(
            config.count(names.dense_width) if names.dense_width and gates < len(layers) else None
        ),
        shared_width=_shared_width(config, names, expert_width),
        attention_bias=_attention_bias(config, family),
        head_norms=(
            config.flag(names.head_norms)
            if names.head_norms
            else latent is None and family.tensors.query_norm is not None
        ),
        latent=latent,
        rotary_size=latent.rotary if latent else _rotary_size(config, family, head_size, rope),
        further_layers=config.natural(names.further_layers) if names.further_layers else 0,
        norm_epsilon=config.positive(names.norm_epsilon),
        rope=rope,
        clip_qkv=_clip(config, names.clip_qkv),
        tied_head=config.flag(names.tied_head),
        swiglu=Swiglu(
            alpha=config.positive(names.swiglu_alpha) if names.swiglu_alpha else 1.0,
            shift=family.swiglu_shift,
            limit=config.positive(names.swiglu_limit) if names.swiglu_limit else None,
        ),
        mxfp4=mxfp4,
    )


def _routing(config: Config, family: Family, experts: int) -> RoutingRule:
    names = family.config
    top_k = config.count(names.top_k)
    if top_k > experts:
        raise config.wrong(names.top_k, "is more than there are experts", f"at most {experts}")
    grouped = names.method is None or _method(config, family, names.method)
    groups, top_groups = (
        config.count(name, default=1) if name and grouped else 1
        for name in (names.groups, names.top_groups)
    )
    try:
        rule = RoutingRule(
            top_k=top_k,
            score=family.score,
            renormalize=(
                config.flag(names.renormalize) if names.renormalize else family.renormalize
            ),
            scale=config.positive(names.routing_scale) if names.routing_scale else 1.0,
            groups=groups,
            top_groups=top_groups,
            group_score=family.group_score,
            selection_bias=family.tensors.selection_bias is not None,
        )
        rule.check_experts(experts)
    except SettingError as error:
        raise CheckpointError(
            config.where,
            f"states a routing rule that cannot be: {error.where} {error.problem}",
            expected=error.expected,
            found=error.found,
            fix=NOT_DESCRIBED,
        ) from error
    return rule


def _method(config: Config, family: Family, name: str) -> bool:
    """Whether experts are selected by groups."""
    found, known = config.raw(name), dict(family.methods)
    if not isinstance(found, str) or found not in known:
        raise config.wrong(name, "is not supported", " or ".join(known))
    return known[found]


def _shared_width(config: Config, names: ConfigNames, expert_width: int) -> int | None:
    if names.shared_count is not None:
        return config.count(names.shared_count) * expert_width
    return config.count(names.shared_width) if names.shared_width else None


def _clip(config: Config, name: str | None) -> float | None:
    return None if name is None or config.raw(name) is None else config.positive(name)


def _head_size(config: Config, family: Family, hidden: int, heads: int) -> int:
    names = family.config
    stated = config.raw(names.head_size) is not None
    if hidden % heads and not (stated and family.free_head_size):
        raise config.wrong(
            names.num_heads, "does not divide the hidden size", f"a divisor of {hidden}"
        )
    head_size = config.count(names.head_size, default=hidden // heads)
    if head_size != hidden // heads and not family.free_head_size:
        raise config.wrong(
            names.head_size, "is not the hidden size over the heads", str(hidden // heads)
        )
    if head_size % HEAD_SIZE_MULTIPLE:
        raise config.wrong(
            names.head_size if stated else names.num_heads,
            f"gives heads of size {head_size}",
            f"a head size that is a multiple of {HEAD_SIZE_MULTIPLE}",
        )
    return head_size


def _rotary_size(config: Config, family: Family, head_size: int, rope: Rope) -> int:
    """How much of a head is turned."""
    size = int(head_size * rope.share)
    if family.config.rotated_share is not None and (size % HEAD_SIZE_MULTIPLE or not size):
        raise config.wrong(
            family.config.rotated_share,
            f"turns {size} of the {head_size} numbers of a head",
            f"a share that makes a multiple of {HEAD_SIZE_MULTIPLE}",
        )
    return size


def _attention_bias(config: Config, family: Family) -> bool:
    name = family.config.attention_bias
    if name is None:
        return False
    if family.tensors.query_bias is None:
        config.must_be(name, False)
        return False
    return config.flag(name)


def _layers(config: Config, family: Family) -> tuple[Layer, ...]:
    """Which layers have a gate, and how far each one's queries see."""
    names = family.config
    count = config.count(names.num_layers)
    if count > MAX_GATES:
        raise config.wrong(names.num_layers, "is too large", f"at most {MAX_GATES}")
    dense = set(config.counts(names.dense_layers)) if names.dense_layers else set()
    if names.first_dense is not None:
        dense |= set(range(config.natural(names.first_dense)))
    step = config.count(names.sparse_step) if names.sparse_step else 1
    windows = _windows(config, family, count)
    layers: list[Layer] = []
    gates = 0
    for index, window in enumerate(windows):
        sparse = index not in dense and (index + 1) % step == 0
        layers.append(Layer(gates if sparse else None, window))
        gates += sparse
    if not gates:
        name = (names.first_dense or names.dense_layers) if dense else names.sparse_step
        raise config.wrong(name or names.num_layers, "leaves no layer with experts", "at least one")
    return tuple(layers)


def _windows(config: Config, family: Family, count: int) -> list[int | None]:
    """The window of each layer."""
    names = family.config
    name = names.window
    used = name is not None and config.raw(name) is not None
    if names.window_switch is not None and not config.flag(names.window_switch):
        used = False
    window = config.count(name) if used and name is not None else None
    kinds = None if names.layer_kinds is None else config.raw(names.layer_kinds)
    if names.layer_kinds is not None and kinds is not None:
        known = (FULL,) if window is None else (FULL, SLIDING)
        if not isinstance(kinds, list) or len(kinds) != count or any(k not in known for k in kinds):
            raise config.wrong(
                names.layer_kinds, "malformed", f"{count} times {' or '.join(known)}"
            )
        return [window if kind == SLIDING else None for kind in kinds]
    if names.window_end is not None and window is not None:
        end = config.raw(names.window_end)
        if type(end) is not int or end < 0:
            raise config.wrong(names.window_end, "malformed", "a whole number")
        return [window if index % 2 == 0 and index < end else None for index in range(count)]
    if family.alternating_windows:
        return [window if index % 2 == 0 else None for index in range(count)]
    return [window] * count
