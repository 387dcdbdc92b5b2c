"""What a family can say about itself, and what a checkpoint of it turns out to be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from knnmoe.runtime.bundle import MAX_GATES, ModelShape
from knnmoe.runtime.checkpoint import CONFIG, Checkpoint
from knnmoe.runtime.errors import CheckpointError, SettingError
from knnmoe.runtime.routing import RoutingRule

from .config import NOT_DESCRIBED, Config
from .latent import Latent, LatentNames, read_latent
from .mxfp4 import BLOCK, is_mxfp4, is_packed, packed_shapes
from .rope import Rope, read_rope

WEIGHT_DTYPES = ("F32", "F16", "BF16")
PACKED_DTYPES = ("U8",)  # of MXFP4's blocks and scales
HEAD_SIZE_MULTIPLE = 16  # of ONNX Runtime's GroupQueryAttention, where it rotates


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


SLIDING, FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Swiglu:
    """What an expert makes of gate and up: gate · σ(alpha · gate) · (up + shift).

    Attributes:
        alpha, shift: Of the formula; as they are here it is silu(gate) · up.
        limit: Before that, gate is cut off above it, and up above it and below its negative; None
            for no limit.
    """

    alpha: float = 1.0
    shift: float = 0.0
    limit: float | None = None


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
        swiglu_shift: What is added to up before the product; see `Swiglu`.
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


@dataclass(frozen=True)
class Layer:
    """What sets one layer apart from the others.

    Attributes:
        gate: Number of its gate; None for a dense layer.
        window: Tokens that a query sees, itself the last of them; None for all before it.
    """

    gate: int | None
    window: int | None


@dataclass(frozen=True)
class Architecture:
    """A checkpoint's sizes and constants, checked; `shape` and `routing` go into the manifest.

    `mxfp4` says whether the checkpoint's experts are in that format; no bundle has them so.
    """

    family: Family
    shape: ModelShape
    routing: RoutingRule
    layers: tuple[Layer, ...]
    expert_width: int
    dense_width: int | None  # of the layers without experts
    shared_width: int | None  # of the expert that every token goes through
    attention_bias: bool
    head_norms: bool  # whether query and key have norms
    latent: Latent | None  # sizes of latent attention; `shape` says what it caches
    rotary_size: int  # numbers of a head that the rotary embedding turns, the first ones
    further_layers: int  # of the checkpoint, behind the last one: they predict more tokens
    norm_epsilon: float
    rope: Rope
    clip_qkv: float | None
    tied_head: bool
    swiglu: Swiglu = Swiglu()  # of the experts behind a gate
    mxfp4: bool = False

    @property
    def query_width(self) -> int:
        """Width of all query heads."""
        return self.shape.num_heads * (self.latent.query if self.latent else self.shape.head_size)

    @property
    def attended_width(self) -> int:
        """Width of what all heads make of the values."""
        return self.shape.num_heads * (self.latent.value if self.latent else self.shape.head_size)

    @property
    def softmax_scale(self) -> float:
        """What the products of queries and keys are multiplied with."""
        if self.latent is None:
            return 1 / math.sqrt(self.shape.head_size)
        return self.rope.softmax / math.sqrt(self.latent.query)

    @property
    def kv_width(self) -> int:
        """Width of all key (or value) heads."""
        return self.shape.num_kv_heads * self.shape.head_size

    @property
    def gate_layers(self) -> tuple[int, ...]:
        """The layer of each gate."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.gate is not None)

    @property
    def expert_biases(self) -> bool:
        """Whether the experts' linear maps have biases."""
        return self.family.tensors.stacked_gate_up_bias is not None

    @property
    def output_bias(self) -> bool:
        """Whether the linear map after attention has a bias."""
        return self.attention_bias and self.family.tensors.output_bias is not None

    @property
    def interleaved(self) -> bool:
        """Whether the numbers that the rotary embedding turns as a pair are neighbours."""
        return self.latent is not None and self.latent.interleaved

    @property
    def shared_router(self) -> bool:
        """Whether a router of its own says how much of the shared expert is added."""
        return self.family.tensors.shared_router is not None

    def segment_layers(self, segment: int) -> range:
        """The layers whose attention a segment holds: behind one gate, up to the next."""
        ends = [0, *(layer + 1 for layer in self.gate_layers), len(self.layers)]
        return range(ends[segment], ends[segment + 1])


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


def layer_tensors(architecture: Architecture, layer: int) -> dict[str, tuple[int, ...]]:
    """The tensors of one layer by their names, with their shapes; without those of its experts."""
    names, hidden = architecture.family.tensors, architecture.shape.hidden_size
    query, kv = architecture.query_width, architecture.kv_width
    head, experts = architecture.shape.head_size, architecture.shape.num_experts
    normed = (head, head) if architecture.family.head_norms else (query, kv)
    found: dict[str | None, tuple[int, ...]] = {
        names.input_norm: (hidden,),
    }
    if architecture.latent is None:
        found |= {names.query: (query, hidden), names.key: (kv, hidden), names.value: (kv, hidden)}
    else:
        found |= _latent_tensors(architecture, architecture.latent)
    found |= {
        names.output: (hidden, architecture.attended_width),
        names.sinks: (architecture.shape.num_heads,),
        names.router_norm: (hidden,),
    }
    if architecture.head_norms:
        found |= {names.query_norm: (normed[0],), names.key_norm: (normed[1],)}
    if architecture.attention_bias:
        found |= {names.query_bias: (query,), names.key_bias: (kv,), names.value_bias: (kv,)}
        found |= {names.output_bias: (hidden,)}
    if architecture.layers[layer].gate is None:
        width = architecture.dense_width
        gate, up, down = names.dense_gate, names.dense_up, names.dense_down
    else:
        found |= {names.router: (experts, hidden), names.shared_router: (1, hidden)}
        found |= {names.router_bias: (experts,)}
        found |= {names.selection_bias: (experts,)}
        width = architecture.shared_width
        gate, up, down = names.shared_gate, names.shared_up, names.shared_down
    if width is not None:
        found |= {gate: (width, hidden), up: (width, hidden), down: (hidden, width)}
    return {name.format(layer=layer): size for name, size in found.items() if name is not None}


def _latent_tensors(a: Architecture, latent: Latent) -> dict[str | None, tuple[int, ...]]:
    names, hidden, heads = a.family.tensors, a.shape.hidden_size, a.shape.num_heads
    found: dict[str | None, tuple[int, ...]] = {
        names.latent_down: (latent.cached, hidden),
        names.latent_norm: (latent.rank,),
        names.latent_up: (heads * (latent.plain + latent.value), latent.rank),
    }
    if latent.query_rank is None:
        return found | {names.query: (a.query_width, hidden)}
    return found | {
        names.query_down: (latent.query_rank, hidden),
        names.query_norm: (latent.query_rank,),
        names.query_up: (a.query_width, latent.query_rank),
    }


def expected_tensors(architecture: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of this architecture has, with its shape."""
    names, shape = architecture.family.tensors, architecture.shape
    hidden = shape.hidden_size
    yield names.embedding, (shape.vocab_size, hidden)
    yield names.final_norm, (hidden,)
    if not architecture.tied_head:
        yield names.head, (shape.vocab_size, hidden)
    for index, layer in enumerate(architecture.layers):
        yield from layer_tensors(architecture, index).items()
        if layer.gate is not None:
            yield from _expert_tensors(architecture, index)


def _expert_tensors(
    architecture: Architecture, layer: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The tensors of the experts of one layer, with their shapes."""
    names, count = architecture.family.tensors, architecture.shape.num_experts
    hidden, width = architecture.shape.hidden_size, architecture.expert_width
    for expert in range(count):
        for template, size in (
            (names.expert_gate, (width, hidden)),
            (names.expert_up, (width, hidden)),
            (names.expert_down, (hidden, width)),
        ):
            if template is not None:
                yield template.format(layer=layer, expert=expert), size
    for template, inside, out in (
        (names.stacked_gate_up, hidden, 2 * width),
        (names.stacked_down, width, hidden),
    ):
        if template is not None and architecture.mxfp4:
            yield from packed_shapes(template.format(layer=layer), (count, out), inside)
        elif template is not None:
            yield template.format(layer=layer), (count, inside, out)
    for template, out in (
        (names.stacked_gate_up_bias, 2 * width),
        (names.stacked_down_bias, hidden),
    ):
        if template is not None:
            yield template.format(layer=layer), (count, out)


def _check_tensors(checkpoint: Checkpoint, architecture: Architecture) -> None:
    expected = set()
    for name, shape in expected_tensors(architecture):
        if name == architecture.family.tensors.head and name not in checkpoint.tensors:
            raise CheckpointError(
                checkpoint.path,
                f"tensor {name} is missing, and the config does not tie the head to the embedding",
                fix="If it is tied, set tie_word_embeddings to true in config.json; if not, the "
                "checkpoint is incomplete.",
            )
        entry = checkpoint.entry(name)
        expected.add(name)
        where = f"{checkpoint.path / entry.shard}: {name}"
        if entry.shape != shape:
            raise CheckpointError(
                where,
                "has another shape than the config states",
                expected=list(shape),
                found=list(entry.shape),
                fix="Use the config.json that belongs to these weights.",
            )
        dtypes = PACKED_DTYPES if architecture.mxfp4 and is_packed(name) else WEIGHT_DTYPES
        if entry.dtype not in dtypes:
            raise CheckpointError(
                where,
                "has a dtype that cannot be exported",
                expected=" or ".join(dtypes),
                found=entry.dtype,
                fix="Convert the checkpoint to float32, float16 or bfloat16.",
            )
    names, further = architecture.family.tensors, set(further_tensors(checkpoint, architecture))
    for name in checkpoint.tensors:
        tied = architecture.tied_head and name == names.head
        known = name in expected or name in further or tied or name.endswith(names.ignored)
        if not known:
            raise CheckpointError(
                f"{checkpoint.path}: {name}",
                f"is not a tensor of the family {architecture.family.name}",
                fix=NOT_DESCRIBED,
            )


def further_tensors(checkpoint: Checkpoint, architecture: Architecture) -> tuple[str, ...]:
    """Those of layers behind the last one, which predict more tokens and are left out."""
    mark, count = architecture.family.tensors.further, architecture.shape.num_layers
    if mark is None:
        return ()
    layers = range(count, count + architecture.further_layers)
    # A layer like the others is none of them, whatever the config says of their number.
    found = [layer for layer in layers if mark.format(layer=layer) in checkpoint.tensors]
    prefixes = tuple(f"{mark.partition('{layer}')[0]}{layer}." for layer in found)
    return tuple(name for name in checkpoint.tensors if name.startswith(prefixes))


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
