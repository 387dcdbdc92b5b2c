from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_pipeline import FakePipeline
from knnmoe.runtime.errors import InputError
from knnmoe.runtime.generation import Completion, Event, StopStrings, check_prompt, collect
from knnmoe.runtime.sampling import GenerationConfig
from knnmoe.runtime.session import Session
from knnmoe.runtime.tokenizer import Tokenizer
from tiny import write_tiny_tokenizer

EOS = 256


def stream(
    pipeline: FakePipeline, tokenizer: Tokenizer, ids: list[int], config: GenerationConfig
) -> Iterator[Event]:
    """Write one text, with as much room as it can need."""
    positions = pipeline.max_positions
    capacity = max(2, min(len(ids) + config.max_new_tokens, positions))
    return Session(pipeline, tokenizer, config, capacity=capacity).stream(ids)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("tokenizer")
    write_tiny_tokenizer(root)
    return Tokenizer.load(root)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids; one character must not come twice, the pipeline knows only the last token."""
    ids = tokenizer.encode(text)
    assert len(set(ids)) == len(ids)
    return ids


def say(
    tokenizer: Tokenizer, text: str, config: GenerationConfig, *, end: bool = True
) -> list[Event]:
    """Let a pipeline that says `text` continue its first character."""
    ids = [*ids_of(tokenizer, text), *([EOS] if end else [])]
    pipeline = FakePipeline.saying(ids, vocab_size=258)
    return list(stream(pipeline, tokenizer, ids[:1], config))


CONFIG = GenerationConfig(eos_token_ids=(EOS,))


def test_the_model_ends_the_text(tokenizer: Tokenizer) -> None:
    events = say(tokenizer, ">abc", CONFIG)
    assert [event.text for event in events] == ["a", "b", "c", ""]
    assert [event.index for event in events] == [0, 1, 2, 3]
    assert [event.token_id for event in events] == [*ids_of(tokenizer, "abc"), EOS]
    assert [event.finish_reason for event in events] == [None, None, None, "eos"]


def test_the_prompt_goes_in_at_once_and_each_token_alone(tokenizer: Tokenizer) -> None:
    prompt, answer = ids_of(tokenizer, "xy>"), ids_of(tokenizer, "ab")
    pipeline = FakePipeline.saying([*prompt, *answer], vocab_size=258)
    list(stream(pipeline, tokenizer, prompt, GenerationConfig(max_new_tokens=2)))
    # nobody needs the step after the last token
    assert pipeline.steps == [prompt, answer[:1]]


def test_the_length_asked_for_ends_the_text(tokenizer: Tokenizer) -> None:
    events = say(tokenizer, ">abcdef", GenerationConfig(max_new_tokens=3))
    assert "".join(event.text for event in events) == "abc"
    assert events[-1].finish_reason == "length"


def test_the_end_of_the_context_ends_the_text(tokenizer: Tokenizer) -> None:
    ids = ids_of(tokenizer, ">abcdef")
    pipeline = FakePipeline.saying(ids, vocab_size=258, max_positions=5)
    events = list(stream(pipeline, tokenizer, ids[:2], GenerationConfig(max_new_tokens=100)))
    assert "".join(event.text for event in events) == "bcd"
    assert events[-1].finish_reason == "length"
    assert pipeline.capacities == [5]


def test_a_stop_string_across_tokens_is_cut_out_whole(tokenizer: Tokenizer) -> None:
    config = CONFIG.with_overrides(stop=["cde"])
    events = say(tokenizer, ">abcdefg", config)
    assert [event.text for event in events] == ["a", "b", "", "", ""]
    assert events[-1].finish_reason == "stop"
    assert [event.token_id for event in events] == ids_of(tokenizer, "abcde")


def test_what_only_began_like_a_stop_string_comes_after_all(tokenizer: Tokenizer) -> None:
    config = CONFIG.with_overrides(stop=["bcX", "defY"])
    events = say(tokenizer, ">abcdef", config)
    assert [event.text for event in events] == ["a", "", "", "bc", "", "", "def"]
    assert events[-1].finish_reason == "eos"


def test_a_stop_string_may_cut_through_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    config = CONFIG.with_overrides(stop=["é"])
    assert "".join(event.text for event in say(tokenizer, ">aéb", config)) == "a"


def test_an_unfinished_character_is_given_out_at_the_end(tokenizer: Tokenizer) -> None:
    events = say(tokenizer, ">a你", GenerationConfig(max_new_tokens=3))
    assert [event.text for event in events] == ["a", "", "\N{REPLACEMENT CHARACTER}"]


def test_log_probabilities_are_those_of_the_table(tokenizer: Tokenizer) -> None:
    (event, *_) = say(tokenizer, ">a", CONFIG)
    assert event.logprob == pytest.approx(5 - np.log(np.exp(5) + 257), abs=1e-5)


def test_a_seed_fixes_the_text(tokenizer: Tokenizer) -> None:
    def draw(seed: int) -> list[int]:
        pipeline = FakePipeline(np.zeros((258, 258), np.float32))
        config = GenerationConfig(max_new_tokens=30, do_sample=True, top_k=0, seed=seed)
        return [event.token_id for event in stream(pipeline, tokenizer, [1], config)]

    assert draw(1) == draw(1) != draw(2)


def test_a_completion_is_its_events(tokenizer: Tokenizer) -> None:
    events = say(tokenizer, ">abc", CONFIG)
    completion = collect(iter(events), prompt_tokens=1)
    assert isinstance(completion, Completion)
    assert completion.text == "abc"
    assert completion.token_ids == tuple(event.token_id for event in events)
    assert completion.logprobs == tuple(event.logprob for event in events)
    assert completion.finish_reason == "eos"
    assert completion.prompt_tokens == 1
    assert 0 <= completion.timings.first_token_ms <= completion.timings.total_ms
    assert completion.timings.tokens_per_s is not None


def test_one_token_has_no_rate(tokenizer: Tokenizer) -> None:
    completion = collect(say(tokenizer, ">abc", GenerationConfig(max_new_tokens=1)), 1)
    assert completion.timings.tokens_per_s is None


@pytest.mark.parametrize(
    ("prompt", "problem"),
    [
        ([], "prompt: empty"),
        ([3, 258], "outside the vocabulary; expected 0 to 257; found 258"),
        ([-1, 3], "outside the vocabulary; expected 0 to 257; found -1"),
        ([1.5], "not a sequence of token ids"),
        ([[1], [2]], "not a sequence of token ids"),
        ([1] * 64, r"at most 63 tokens .*; found 64 tokens\. Shorten the prompt by 1 tokens"),
        ([1] * 70, r"found 70 tokens\. Shorten the prompt by 7 tokens"),
    ],
)
def test_an_unusable_prompt_is_refused_before_anything_runs(
    tokenizer: Tokenizer, prompt: list[int], problem: str
) -> None:
    pipeline = FakePipeline.saying([1, 2], vocab_size=258)
    with pytest.raises(InputError, match=problem):
        stream(pipeline, tokenizer, prompt, CONFIG)


def test_the_longest_prompt_leaves_room_for_one_token(tokenizer: Tokenizer) -> None:
    assert check_prompt([1] * 63, 258, 64).shape == (1, 63)
    pipeline = FakePipeline.saying([1, 2], vocab_size=258)
    (event,) = stream(pipeline, tokenizer, [1] * 63, CONFIG)
    assert event.finish_reason == "length"


SHORT = st.text(st.sampled_from("ab"), min_size=1, max_size=4)


@given(pieces=st.lists(st.text(st.sampled_from("ab"), max_size=5)), stops=st.lists(SHORT))
def test_where_a_text_stops_does_not_depend_on_how_it_is_cut(
    pieces: list[str], stops: list[str]
) -> None:
    def run(parts: list[str]) -> tuple[str, bool]:
        matcher, out = StopStrings(stops), ""
        for part in parts:
            text, stopped = matcher.push(part)
            out += text
            if stopped:
                return out, True
        return out + matcher.finish(), False

    whole = "".join(pieces)
    ends = [end for end in range(len(whole) + 1) if whole[:end].endswith(tuple(stops))]
    expected = (whole, False)
    if ends:  # the first to be complete; if several are, the longest of them
        longest = max(len(stop) for stop in stops if whole[: ends[0]].endswith(stop))
        expected = (whole[: ends[0] - longest], True)
    assert run(pieces) == run(list(whole)) == expected
