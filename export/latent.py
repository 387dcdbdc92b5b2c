"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): its sizes.

Keys and values of all heads are linear maps of one short vector a token, the latent; beside it goes
one small key that is turned by position and shared by all heads. What is cached is these two.
"""

from __future__ import annotations

from dataclasses import dataclass

from .config import Config

# Of the norms over latents, whatever the config says of the others: so it is in DeepSeek's own code
# and in transformers.
LATENT_EPSILON = 1e-6
CACHED_MULTIPLE = 8  # of ONNX Runtime's GroupQueryAttention, where it does not rotate


@dataclass(frozen=True)
class LatentNames:
    """Which entry of `config.json` holds which size; see `Latent`."""

    query_rank: str = "q_lora_rank"
    rank: str = "kv_lora_rank"
    plain: str = "qk_nope_head_dim"
    rotary: str = "qk_rope_head_dim"
    value: str = "v_head_dim"
    interleaved: str | None = None  # a flag; without it, pairs are neighbours


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention.

    Attributes:
        query_rank: Of the vector that queries are made of; None where they are made of the stream.
        rank: Of the latent that keys and values are made of.
        plain: Numbers of a query or key that know no position.
        rotary: Numbers of a query or key that are turned by it; the key's are all heads' own.
        value: Numbers of a value.
        interleaved: Whether the numbers that are turned as a pair are neighbours, and not half of
            `rotary` apart.
    """

    query_rank: int | None
    rank: int
    plain: int
    rotary: int
    value: int
    interleaved: bool

    @property
    def query(self) -> int:
        """Numbers of a query, and of a key where there are any."""
        return self.plain + self.rotary

    @property
    def cached(self) -> int:
        """Numbers that a token leaves in the cache of a layer: turned key, then latent."""
        return self.rotary + self.rank


def read_latent(config: Config, names: LatentNames) -> Latent:
    """The sizes as a config states them.

    Raises:
        CheckpointError: If an entry is malformed, or a size is not supported.
    """
    stated = config.raw(names.query_rank) is not None
    found = Latent(
        query_rank=config.count(names.query_rank) if stated else None,
        rank=config.count(names.rank),
        plain=config.count(names.plain),
        rotary=config.count(names.rotary),
        value=config.count(names.value),
        interleaved=names.interleaved is None or config.flag(names.interleaved),
    )
    if found.rotary % 2:
        raise config.wrong(names.rotary, "cannot be turned in pairs", "an even number")
    if found.cached % CACHED_MULTIPLE:
        raise config.wrong(
            names.rank,
            f"makes {found.cached} with {names.rotary}",
            f"a sum that is a multiple of {CACHED_MULTIPLE}",
        )
    return found
