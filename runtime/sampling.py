"""From logits to the next token: the options of `generation_config.json` and what they do.

The options mean what they mean in transformers, in its order: repetition penalty, then, where
sampling, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import BackendError, SettingError
from .manifest import parse_object

Logits = NDArray[np.float32]

NUCLEUS_FIRST = 1024
LEAST_TEMPERATURE = 1e-30  # any below it takes the likeliest token too, and may be 0 in fp32
DRAWS = 64  # at a time


@dataclass(frozen=True)
class GenerationConfig:
    """How tokens are chosen and when to stop.

    Attributes:
        max_new_tokens: Tokens to generate at most, 1 or more.
        do_sample: Draw from the distribution; otherwise the most likely token (greedy).
        temperature: Divides the logits, above 0.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that together reach this probability, 0 to 1 (all).
        min_p: Keep tokens at least this likely relative to the most likely one, 0 to 1.
        repetition_penalty: Divides positive and multiplies negative logits of tokens already in the
            prompt or the text, above 0; 1 is none. Applies to greedy decoding too.
        eos_token_ids: Tokens that end the text.
        stop: Strings that end the text; they are not part of it.
        seed: Of the draws, 0 or more; None draws a new one each time.
        top_logprobs: How many of the likeliest tokens each event lists, 0 to 100.

    Raises:
        SettingError: If a field is of the wrong type or out of its range.
    """

    max_new_tokens: int = 128
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        # Lists are welcome from JSON and callers; a frozen value holds tuples.
        for name in ("eos_token_ids", "stop"):
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name, (kind, low, high, open_low) in _NUMBERS.items():
            _check_number(name, getattr(self, name), kind, low, high, open_low)
        if not isinstance(self.do_sample, bool):
            raise SettingError(
                "do_sample", "not a flag", expected="true or false", found=self.do_sample
            )
        for token_id in self.eos_token_ids:
            _check_number("eos_token_ids", token_id, int, 0, _MAX_INT, False)
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise SettingError(
                    "stop", "not a stop string", expected="text that is not empty", found=repr(text)
                )
        if self.seed is not None:
            _check_number("seed", self.seed, int, 0, _MAX_INT, False)

    def with_overrides(self, **overrides: Any) -> GenerationConfig:
        """The same with some fields replaced; a value of None leaves its field alone.

        Raises:
            SettingError: If a name is not a field, or a value out of its range.
        """
        names = [field.name for field in fields(self)]
        for name in overrides:
            if name not in names:
                raise SettingError(name, "unknown generation option", expected=", ".join(names))
        return replace(self, **{k: v for k, v in overrides.items() if v is not None})

    @staticmethod
    def from_json(path: str | Path, *, eos_token_ids: Iterable[int] = ()) -> GenerationConfig:
        """Read a Hugging Face `generation_config.json`; keys of no meaning here are ignored.

        Args:
            path: The file; where it does not exist, the defaults hold.
            eos_token_ids: What ends a text if the file does not say.

        Raises:
            SettingError: If the file is malformed or a field wrong; names both.
        """
        file = Path(path)
        if not file.is_file():
            return GenerationConfig(eos_token_ids=tuple(eos_token_ids))
        try:
            content = parse_object(file.read_bytes())
        except ValueError as error:
            raise SettingError(file, "not a JSON object", found=error) from error
        options = {
            name: content[key] for key, name in _JSON_KEYS.items() if content.get(key) is not None
        }
        options.setdefault("eos_token_ids", tuple(eos_token_ids))
        try:
            return GenerationConfig(**options)
        except SettingError as error:
            keys = {name: key for key, name in _JSON_KEYS.items()}
            raise SettingError(
                f"{file}: {keys[error.where]}",
                error.problem,
                expected=error.expected,
                found=error.found,
            ) from error


_MAX_INT = (1 << 63) - 1

# field → kind, lowest, highest, whether the lowest is excluded
_NUMBERS: dict[str, tuple[type, float, float, bool]] = {
    "max_new_tokens": (int, 1, 1 << 31, False),
    "temperature": (float, 0, 1e6, True),
    "top_k": (int, 0, 1 << 31, False),
    "top_p": (float, 0, 1, False),
    "min_p": (float, 0, 1, False),
    "repetition_penalty": (float, 0, 1e6, True),
    "top_logprobs": (int, 0, 100, False),
}

_JSON_KEYS = {
    "max_new_tokens": "max_new_tokens",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "eos_token_id": "eos_token_ids",
    "stop_strings": "stop",
}


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _check_number(
    name: str, number: Any, kind: type, low: float, high: float, open_low: bool
) -> None:
    kinds = (int,) if kind is int else (int, float)
    right = isinstance(number, kinds) and not isinstance(number, bool) and low <= number <= high
    if right and not (open_low and number == low):
        return
    noun = "a whole number" if kind is int else "a number"
    bounds = f"{noun} above {low:g}" if open_low else f"{noun} of {low:g} or more"
    if high <= 100:
        bounds = f"{noun} from {low:g} to {high:g}"
    fix = None
    if name == "temperature" and number == 0:
        fix = "For the most likely token each time, turn sampling off (greedy)."
    raise SettingError(name, "out of range", expected=bounds, found=repr(number), fix=fix)


class Sampler:
    """Chooses the next token of one sequence, and again, by the same seed in the same way.

    Args:
        config: The options.
        vocab_size: Width V of the logits.
        prompt_ids: Tokens so far, which the repetition penalty counts as said.
    """

    def __init__(
        self, config: GenerationConfig, vocab_size: int, prompt_ids: Sequence[int] = ()
    ) -> None:
        self._config = config
        self._uniform = _uniform(config.seed)
        self._odds = np.empty(vocab_size, np.float32)
        self._said: NDArray[np.bool_] | None = None
        if config.repetition_penalty != 1.0:
            self._said = np.zeros(vocab_size, np.bool_)
            self._said[np.asarray(prompt_ids, np.int64)] = True

    def choose(self, logits: Logits) -> tuple[int, float]:
        """The next token and its log-probability in the model's own distribution.

        Args:
            logits: [V] fp32, not changed.

        Raises:
            BackendError: If the logits are not numbers.
        """
        token_id = int(logits.argmax())
        highest = float(logits[token_id])
        if not math.isfinite(highest):  # where one is NaN, it is the first NaN
            raise BackendError(
                "logits",
                "not finite",
                expected="numbers",
                found=highest,
                fix="Check the bundle with `knnmoe-export --verify`.",
            )
        odds = np.subtract(logits, highest, out=self._odds)
        normalizer = highest + math.log(np.add.reduce(np.exp(odds, out=odds)))
        scores = logits
        if self._said is not None:
            scores = penalize(logits, self._said, self._config.repetition_penalty)
            token_id = int(scores.argmax())
        if self._config.do_sample:
            token_id = self._draw(scores, scores[token_id])
        if self._said is not None:
            self._said[token_id] = True
        return token_id, float(logits[token_id]) - normalizer

    def _draw(self, scores: Logits, highest: np.float32) -> int:
        ids, odds = odds_of(scores, highest, self._config)
        steps = odds.cumsum()
        place = int(steps.searchsorted(next(self._uniform) * steps[-1], side="right"))
        return int(ids[min(place, len(ids) - 1)])


def _uniform(seed: int | None) -> Iterator[float]:
    """Random numbers from 0 to 1, made many at a time: one by one each costs as much as many."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.random(DRAWS).tolist()


def likeliest_tokens(logits: Logits, count: int) -> tuple[tuple[int, float], ...]:
    """The likeliest tokens by logits [V] fp32 with their log-probabilities, likeliest first."""
    count = min(count, len(logits))
    ids = np.argpartition(logits, -count)[-count:]
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    highest = float(logits[ids[0]])
    normalizer = highest + math.log(float(np.exp(logits - highest).sum(dtype=np.float64)))
    return tuple((int(token), float(logits[token]) - normalizer) for token in ids)


def penalize(logits: Logits, said: NDArray[np.bool_], penalty: float) -> Logits:
    """Make tokens already said [V] less likely: logits [V] divided, or multiplied if negative."""
    factor = np.float32(penalty)
    ids = np.flatnonzero(said)
    chosen = logits[ids]
    scores = logits.copy()
    scores[ids] = np.where(chosen < 0, chosen * factor, chosen / factor)
    return scores


def odds_of(
    scores: Logits, highest: np.float32, config: GenerationConfig
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """What a draw chooses from: token ids [M], ascending, and their odds [M].

    The likeliest has odds of 1, those that top-p and min-p leave out have 0. Of tokens as likely as
    the k-th top-k keeps all; top-p always keeps the likeliest one.

    Args:
        scores: [V] fp32, penalised.
        highest: Of the scores.
        config: The options.
    """
    if 0 < config.top_k < len(scores):
        ids = _largest(scores, config.top_k)
        scores = scores[ids]
    else:
        ids = np.arange(len(scores))
    temperature = max(config.temperature, LEAST_TEMPERATURE)
    odds = np.exp((scores - highest) / temperature).astype(np.float64)
    if config.top_p < 1:
        beyond = 0.0
        if len(odds) > NUCLEUS_FIRST:
            # Sorting a whole vocabulary costs milliseconds, and the mass is nearly always in a few.
            few = _largest(scores, NUCLEUS_FIRST)
            total, inside = float(odds.sum()), float(odds[few].sum())
            if inside >= config.top_p * total:
                ids, scores, odds, beyond = ids[few], scores[few], odds[few], total - inside
        order = scores.argsort(kind="stable")  # of equally likely tokens the first ids go first
        rising = odds[order].cumsum()
        spare = (1 - config.top_p) * (rising[-1] + beyond) - beyond
        out = int(rising.searchsorted(spare, side="right"))
        odds[order[: min(out, len(order) - 1)]] = 0
    if config.min_p > 0:
        odds[odds < config.min_p] = 0
    return ids, odds


def _largest(scores: Logits, count: int) -> NDArray[np.int64]:
    """Where the `count` largest are, ascending, and all that are equal to the last of them."""
    ranked = scores.copy()
    ranked.partition(-count)
    found: NDArray[np.int64] = (scores >= ranked[-count]).nonzero()[0]
    return found
