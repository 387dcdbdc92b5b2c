from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.errors import BackendError, SettingError
from knnmoe.runtime.sampling import DRAWS, GenerationConfig, Sampler, odds_of, penalize

VOCAB = 200


def some_logits(seed: int, *, coarse: bool = False) -> np.ndarray[Any, np.dtype[np.float32]]:
    logits = np.random.default_rng(seed).normal(0, 3, VOCAB)
    return (np.round(logits) if coarse else logits).astype(np.float32)


def dense(scores: np.ndarray[Any, Any], config: GenerationConfig) -> np.ndarray[Any, Any]:
    """The distribution [V] that is drawn from."""
    ids, odds = odds_of(scores, scores.max(), config)
    row = np.zeros(len(scores))
    row[ids] = odds / odds.sum()
    return row


OPTIONS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 1000},
    {"top_k": 0, "temperature": 0.3},
    {"top_k": 0, "temperature": 3.0, "top_p": 0.5},
    {"top_k": 0, "top_p": 0.9},
    {"top_k": 0, "top_p": 0.0},
    {"top_k": 0, "top_p": 0.999},
    {"top_k": 0, "min_p": 0.05},
    {"top_k": 0, "min_p": 1.0},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.1, "temperature": 1.4},
    {"repetition_penalty": 1.7, "top_k": 0},
    {"repetition_penalty": 0.6, "top_k": 12, "temperature": 0.8},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers.generation import logits_process as theirs

    config = GenerationConfig(do_sample=True, **options)
    said = [1, 5, 5, 80, 199]
    for seed in range(20):
        logits = some_logits(seed)
        scores = torch.from_numpy(logits)[None]
        if config.repetition_penalty != 1:
            penalty = theirs.RepetitionPenaltyLogitsProcessor(config.repetition_penalty)
            scores = penalty(torch.tensor([said]), scores)
        if config.temperature != 1:
            scores = theirs.TemperatureLogitsWarper(config.temperature)(None, scores)
        if config.top_k:
            scores = theirs.TopKLogitsWarper(config.top_k)(None, scores)
        if config.top_p < 1:
            scores = theirs.TopPLogitsWarper(config.top_p)(None, scores)
        if config.min_p:
            scores = theirs.MinPLogitsWarper(config.min_p)(None, scores)
        expected = torch.softmax(scores[0].double(), dim=-1).numpy()

        mask = np.zeros(VOCAB, np.bool_)
        mask[said] = True
        ours = dense(penalize(logits, mask, config.repetition_penalty), config)
        assert np.array_equal(ours > 0, expected > 0)
        np.testing.assert_allclose(ours, expected, atol=1e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 4.0])
@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_top_p_over_a_large_vocabulary_keeps_the_fewest_that_reach_it(
    top_p: float, spread: float
) -> None:
    logits = np.random.default_rng(2).normal(0, spread, 5000).astype(np.float32)
    (ids,) = np.nonzero(dense(logits, GenerationConfig(top_k=0, top_p=top_p)))
    wide = np.exp(logits.astype(np.float64) - logits.max())
    wide /= wide.sum()
    mass = wide[ids].sum()
    assert mass >= top_p - 1e-6
    assert mass - wide[ids].min() < top_p + 1e-6
    assert wide[ids].min() >= np.delete(wide, ids).max()


def test_top_k_keeps_all_that_are_as_likely_as_the_last() -> None:
    drawn_from = dense(np.array([1, 3, 2, 2, 0], np.float32), GenerationConfig(top_k=2))
    assert np.flatnonzero(drawn_from).tolist() == [1, 2, 3]


def test_greedy_takes_the_first_of_equals() -> None:
    sampler = Sampler(GenerationConfig(), 4)
    token_id, logprob = sampler.choose(np.array([0, 2, 2, 1], np.float32))
    assert token_id == 1
    odds = [math.exp(logit) for logit in (0, 2, 2, 1)]
    assert logprob == pytest.approx(math.log(odds[1] / sum(odds)))


def test_the_log_probability_is_the_models_own_whatever_the_options() -> None:
    logits = some_logits(3)
    config = GenerationConfig(
        do_sample=True, temperature=0.1, top_k=1, repetition_penalty=2.0, seed=1
    )
    token_id, logprob = Sampler(config, VOCAB, range(VOCAB)).choose(logits)
    shifted = logits.astype(np.float64) - logits.max()
    assert logprob == pytest.approx(shifted[token_id] - np.log(np.exp(shifted).sum()), abs=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    sampler = Sampler(GenerationConfig(do_sample=True, top_k=3, top_p=0.95, seed=7), 4)
    drawn = np.bincount([sampler.choose(logits)[0] for _ in range(8000)], minlength=4) / 8000
    np.testing.assert_allclose(drawn, [0.5, 0.25, 0.125, 0.125], atol=0.02)


def test_a_seed_fixes_the_draws() -> None:
    def draws(seed: int | None) -> list[int]:
        sampler = Sampler(
            GenerationConfig(do_sample=True, top_k=0, temperature=5, seed=seed), VOCAB
        )
        return [sampler.choose(some_logits(step))[0] for step in range(40)]

    assert draws(11) == draws(11)
    assert draws(11) != draws(12)
    assert draws(None) != draws(None)


def plain_distribution(logits: Any, config: GenerationConfig) -> np.ndarray[Any, Any]:
    """As the options are defined, over the whole vocabulary."""
    scores = logits.astype(np.float64) / config.temperature
    if config.top_k:
        scores[scores < np.sort(scores)[-config.top_k]] = -np.inf
    row = np.exp(scores - scores.max())
    row /= row.sum()
    order = np.argsort(row, kind="stable")[::-1]
    before = np.cumsum(row[order]) - row[order]
    row[order[1:][before[1:] >= config.top_p]] = 0
    row[row < config.min_p * row.max()] = 0
    return row / row.sum()


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.8, "top_p": 0.95}, {"top_k": 0, "top_p": 0.7}, {"min_p": 0.1}],
    ids=str,
)
def test_a_seed_draws_one_number_a_token_and_looks_it_up_in_the_order_of_ids(
    options: dict[str, Any],
) -> None:
    config = GenerationConfig(do_sample=True, seed=5, **options)
    sampler, random = Sampler(config, 2000), np.random.default_rng(5)
    many = np.random.default_rng(1).normal(0, 3, (3 * DRAWS, 2000)).astype(np.float32)
    for logits in many:
        steps = np.cumsum(plain_distribution(logits, config))
        expected = np.searchsorted(steps, random.random() * steps[-1], side="right")
        assert sampler.choose(logits)[0] == expected


def test_the_repetition_penalty_counts_prompt_and_text_also_when_greedy() -> None:
    logits = np.array([4, 3, 2.5, -1], np.float32)
    sampler = Sampler(GenerationConfig(repetition_penalty=2.0), 4, [0])
    assert [sampler.choose(logits)[0] for _ in range(3)] == [1, 2, 0]


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_an_error(number: float, do_sample: bool) -> None:
    logits = some_logits(0)
    logits[17] = number
    for wrong in (logits, np.full(VOCAB, -math.inf, np.float32)):
        with pytest.raises(BackendError, match="logits: not finite"):
            Sampler(GenerationConfig(do_sample=do_sample), VOCAB).choose(wrong)


@pytest.mark.parametrize("temperature", [1e-37, 1e-45, 1e-60])
def test_a_temperature_near_zero_takes_the_likeliest_token(temperature: float) -> None:
    logits = np.array([3, -2, 11, 10.5, -np.inf], np.float32)
    config = GenerationConfig(do_sample=True, top_k=0, temperature=temperature)
    ids, odds = odds_of(logits, logits.max(), config)
    assert odds[ids == 2] == odds.sum() == 1


def test_choosing_leaves_the_logits_alone() -> None:
    logits = some_logits(0)
    before = logits.copy()
    config = GenerationConfig(do_sample=True, repetition_penalty=1.5, temperature=0.5)
    Sampler(config, VOCAB, [3]).choose(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", True),
        ("do_sample", 1),
        ("temperature", 0),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", -1),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repetition_penalty", 0),
        ("repetition_penalty", math.inf),
        ("eos_token_ids", (-1,)),
        ("eos_token_ids", ("</s>",)),
        ("stop", ("",)),
        ("stop", (3,)),
        ("seed", -1),
    ],
)
def test_an_option_out_of_its_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(SettingError, match=f"^{name}: "):
        GenerationConfig().with_overrides(**{name: value})


def test_overrides_replace_named_fields_only() -> None:
    config = GenerationConfig(top_k=3).with_overrides(temperature=0.5, top_k=None, stop="x")
    assert config == GenerationConfig(top_k=3, temperature=0.5, stop=("x",))
    with pytest.raises(SettingError, match=r"^beams: unknown generation option"):
        config.with_overrides(beams=4)


def test_the_file_of_a_checkpoint_is_read(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(
        json.dumps(
            {
                "do_sample": True,
                "temperature": 0.6,
                "top_k": None,
                "eos_token_id": [3, 4],
                "stop_strings": "END",
                "pad_token_id": 1,
                "transformers_version": "5.0.0",
            }
        )
    )
    assert GenerationConfig.from_json(path) == GenerationConfig(
        do_sample=True, temperature=0.6, eos_token_ids=(3, 4), stop=("END",)
    )


def test_a_missing_file_or_key_leaves_what_the_caller_knows(tmp_path: Path) -> None:
    path = tmp_path / "generation_config.json"
    assert GenerationConfig.from_json(path, eos_token_ids=[9]).eos_token_ids == (9,)
    path.write_text('{"eos_token_id": 2}')
    assert GenerationConfig.from_json(path, eos_token_ids=[9]).eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"temperature": -1}', "temperature: out of range"),
        ('{"eos_token_id": "end"}', "eos_token_id: out of range"),
        ('{"stop_strings": [""]}', "stop_strings: not a stop string"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_key(tmp_path: Path, content: str, named: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(content)
    with pytest.raises(SettingError) as caught:
        GenerationConfig.from_json(path)
    assert str(path) in str(caught.value)
    assert named in str(caught.value)
