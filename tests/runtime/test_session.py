"""Texts that are continued, interrupted, written side by side, and watched."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from knnmoe.runtime.asynchronous import iterate
from knnmoe.runtime.errors import BackendError, InputError, SettingError
from knnmoe.runtime.layouts import GateRecord
from knnmoe.runtime.model import Model
from knnmoe.runtime.session import Hooks, StepRecord

IDS = np.random.default_rng(0).integers(0, 256, 40).tolist()
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}


@pytest.fixture
def model(tiny_bundle: Path, tiny_pack: Path) -> Model:
    return Model.load(tiny_bundle, memory=tiny_pack, threads=1)


def fresh(model: Model, ids: list[int], **options: Any) -> tuple[int, ...]:
    return model.generate(ids, **{**GREEDY, **options}).token_ids


def test_what_the_cache_holds_of_a_text_is_not_run_again(model: Model) -> None:
    session = model.session()
    first = session.generate(IDS[:20], **GREEDY).token_ids
    assert first == fresh(model, IDS[:20])
    assert session.tokens == (*IDS[:20], *first[:-1])
    before = model.metrics
    longer = [*IDS[:20], *first, *IDS[20:25]]
    assert session.generate(longer, **GREEDY).token_ids == fresh(model, longer)
    assert model.metrics.reused_tokens - before.reused_tokens == 20 + len(first) - 1


def test_a_text_that_departs_from_the_last_one_is_as_if_new(model: Model) -> None:
    session = model.session()
    session.generate(IDS[:20], **GREEDY)
    other = [*IDS[:12], *IDS[25:35]]
    assert session.generate(other, **GREEDY).token_ids == fresh(model, other)
    assert session.generate(IDS[:20], **GREEDY).token_ids == fresh(model, IDS[:20])


def test_a_frozen_router_lets_any_common_beginning_stay(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, threads=1)
    session = model.session()
    session.generate(IDS[:20], **GREEDY)
    other = [*IDS[:12], *IDS[25:35]]
    assert session.generate(other, **GREEDY).token_ids == fresh(model, other)
    assert model.metrics.reused_tokens == 12


def test_after_a_swap_the_next_call_starts_anew(model: Model, tiny_pack: Path) -> None:
    session = model.session()
    session.generate(IDS[:20], **GREEDY)
    model.disable_memory()
    assert session.generate(IDS[:20], **GREEDY).token_ids == fresh(model, IDS[:20])
    model.swap_memory(tiny_pack)
    assert session.generate(IDS[:20], **GREEDY).token_ids == fresh(model, IDS[:20])
    assert model.metrics.reused_tokens == 0
    assert model.metrics.swaps == 3


def test_a_cancelled_text_ends_before_its_next_step(model: Model) -> None:
    cancel = threading.Event()
    events = model.stream(IDS[:9], cancel=cancel, **GREEDY)
    first = next(events)
    cancel.set()
    last = next(events)
    assert first.token_id is not None
    assert first.finish_reason is None
    assert (last.token_id, last.finish_reason, last.index) == (None, "cancelled", 1)
    assert np.isnan(last.logprob)
    assert list(events) == []
    assert model.metrics.finished == {"cancelled": 1}


def test_a_deadline_may_pass_before_the_first_token(model: Model) -> None:
    completion = model.generate(IDS[:9], deadline_s=0.0, **GREEDY)
    assert completion.token_ids == ()
    assert completion.finish_reason == "deadline"
    assert model.metrics.steps == 0
    whole = model.generate(IDS[:9], deadline_s=600.0, **GREEDY)
    assert whole.token_ids == fresh(model, IDS[:9])


def test_a_text_that_outgrows_its_room_slides(model: Model) -> None:
    session = model.session(capacity=16, overflow="slide", keep=3)
    ids = session.generate(IDS[:14], do_sample=False, max_new_tokens=5).token_ids
    assert ids[:3] == fresh(model, IDS[:14])[:3]
    assert session.tokens[:3] == tuple(IDS[:3])
    # Of 17 tokens, 16 fit: 3 kept, and the last 8 again; then one more.
    text = [*IDS[:14], *ids]
    assert session.tokens == (*text[:3], *text[9:18])
    assert ids[3] == fresh(model, [*text[:3], *text[9:17]], max_new_tokens=1)[0]


def test_without_sliding_the_room_ends_the_text(model: Model) -> None:
    session = model.session(capacity=16)
    completion = session.generate(IDS[:14], do_sample=False, max_new_tokens=5)
    assert (len(completion.token_ids), completion.finish_reason) == (2, "length")
    with pytest.raises(InputError, match="too long"):
        session.stream(IDS[:16])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"capacity": 1}, "capacity"),
        ({"capacity": 1 << 20}, "capacity"),
        ({"overflow": "drop"}, "overflow"),
        ({"capacity": 16, "keep": 8}, "keep"),
    ],
)
def test_bad_settings_of_a_session_are_named(
    model: Model, options: dict[str, Any], named: str
) -> None:
    with pytest.raises(SettingError, match=named):
        model.session(**options)
    for deadline in (float("nan"), "soon"):
        with pytest.raises(SettingError, match="deadline_s"):
            model.stream(IDS[:3], deadline_s=deadline)
    with pytest.raises(SettingError, match="cancel: cannot be asked"):
        model.stream(IDS[:3], cancel=True)


@pytest.mark.parametrize("prompt", [None, 5, ["a"], [1.5], [[1], [2, 3]], [[1, 2]]], ids=repr)
def test_a_prompt_is_text_or_whole_numbers(model: Model, prompt: Any) -> None:
    calls = (model.generate, model.stream, model.session().stream, model.routing_trace)
    for call in (*calls, lambda prompt: model.generate_batch([prompt])):
        with pytest.raises(InputError, match="prompt: not a sequence of token ids"):
            call(prompt)


def test_a_new_call_ends_an_unread_stream(model: Model) -> None:
    session = model.session()
    old = session.stream(IDS[:9], **GREEDY)
    next(old)
    assert session.generate(IDS[:12], **GREEDY).token_ids == fresh(model, IDS[:12])
    with pytest.raises(InputError, match="went on with another call"):
        next(old)


def test_a_call_of_another_thread_waits_for_the_step_and_takes_over(model: Model) -> None:
    entered, may_end = threading.Event(), threading.Event()

    def hold(_: StepRecord) -> None:
        entered.set()
        assert may_end.wait(10)

    problems: list[str] = []

    def write() -> None:
        try:
            list(session.stream(IDS[:5], **GREEDY))
        except InputError as error:
            problems.append(error.problem)

    session = model.session(hooks=Hooks(on_step=hold))
    thread = threading.Thread(target=write)
    thread.start()
    assert entered.wait(10)
    may_end.set()
    second = session.stream(IDS[:12], **GREEDY)
    tokens = [event.token_id for event in second]
    thread.join(10)
    assert tuple(tokens) == fresh(model, IDS[:12])
    assert problems in ([], ["went on with another call"])  # [] if it was done by then


@pytest.mark.parametrize("seed", [None, 3])
def test_a_batch_writes_what_each_would_alone(model: Model, seed: int | None) -> None:
    prompts = [IDS[:9], IDS[10:13], IDS[:1], IDS[20:40]]
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": seed is not None, "seed": seed}
    alone = [model.generate(prompt, **options) for prompt in prompts]
    eos = alone[0].token_ids[3]  # so that texts end at different steps
    options["eos_token_ids"] = (eos,)
    alone = [model.generate(prompt, **options) for prompt in prompts]
    together = model.generate_batch(prompts, **options)
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert [one.finish_reason for one in together] == [one.finish_reason for one in alone]
    assert len({len(one.token_ids) for one in together}) > 1
    with pytest.raises(InputError, match="none given"):
        model.generate_batch([])


def test_sessions_side_by_side_write_what_they_write_alone(model: Model) -> None:
    prompts = [IDS[start : start + 12] for start in range(12)]
    alone = [fresh(model, prompt) for prompt in prompts]
    found: dict[int, list[tuple[int, ...]]] = {index: [] for index in range(len(prompts))}

    def run(index: int) -> None:
        session = model.session()
        for _ in range(3):
            found[index].append(session.generate(prompts[index], **GREEDY).token_ids)

    threads = [threading.Thread(target=run, args=(index,)) for index in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {index: [ids] * 3 for index, ids in enumerate(alone)}
    assert model.metrics.active == 0


def test_an_event_loop_reads_what_a_loop_reads(model: Model, tiny_bundle: Path) -> None:
    async def read() -> tuple[list[int | None], tuple[int, ...]]:
        loaded = await Model.aload(tiny_bundle, threads=1)
        events = [event.token_id async for event in loaded.astream(IDS[:9], **GREEDY)]
        completion = await loaded.agenerate(IDS[:9], **GREEDY)
        return events, completion.token_ids

    model.disable_memory()
    events, tokens = asyncio.run(read())
    assert tuple(events) == tokens == fresh(model, IDS[:9])


def test_a_cancelled_task_ends_its_text(model: Model) -> None:
    async def read() -> None:
        async for _ in model.astream(IDS[:9], do_sample=False, max_new_tokens=60):
            pass

    async def cancel() -> None:
        task = asyncio.create_task(read())
        while not model.metrics.texts:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert model.metrics.finished == {"cancelled": 1}


def endless(making: threading.Event, going_on: threading.Event, closed: list[str]) -> Iterator[int]:
    """Items of which the second takes until it may go on."""
    try:
        yield 0
        making.set()
        assert going_on.wait(10)
        yield 1
    finally:
        closed.append("closed")


@pytest.mark.parametrize("ended_by", ["cancelled twice", "the end of the loop"])
def test_a_step_that_runs_is_waited_for_whatever_ends_its_text(ended_by: str) -> None:
    making, going_on, closed = threading.Event(), threading.Event(), []
    problems: list[dict[str, Any]] = []

    async def read() -> None:
        async for _ in iterate(endless(making, going_on, closed)):
            pass

    async def end() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        task = loop.create_task(read())
        while not making.is_set():
            await asyncio.sleep(0.001)
        if ended_by == "the end of the loop":
            loop.call_later(0.02, going_on.set)
            return
        for _ in range(2):
            task.cancel()
            await asyncio.sleep(0.01)
        assert not task.done()
        going_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(end())
    assert closed == ["closed"]
    assert not problems


def test_hooks_are_told_of_every_step(model: Model) -> None:
    steps: list[StepRecord] = []
    routed: list[tuple[int, tuple[GateRecord, ...]]] = []
    hooks = Hooks(
        on_step=steps.append, on_route=lambda ids, records: routed.append((len(ids), records))
    )
    tokens = model.session(hooks=hooks).generate(IDS[:9], **GREEDY).token_ids
    assert tokens == fresh(model, IDS[:9])
    assert [(step.past, step.tokens) for step in steps] == [(0, 9), *((9 + i, 1) for i in range(5))]
    assert [count for count, _ in routed] == [step.tokens for step in steps]
    gates = model.bundle.manifest.architecture.num_gates
    for count, records in routed:
        assert len(records) == gates
        assert all(len(record.expert_ids) == count for record in records)


def test_the_likeliest_tokens_come_with_their_log_probabilities(model: Model) -> None:
    (event,) = model.stream(IDS[:9], do_sample=False, max_new_tokens=1, top_logprobs=3)
    logits = model.logits(IDS[:9])[-1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum())
    best = np.argsort(-expected)[:3]
    assert [token for token, _ in event.alternatives] == best.tolist()
    np.testing.assert_allclose([p for _, p in event.alternatives], expected[best], atol=1e-5)
    assert event.alternatives[0] == (event.token_id, pytest.approx(event.logprob, abs=1e-6))


def test_a_closed_model_ends_the_texts_of_a_batch(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(tiny_bundle, threads=1)
    whole = model.generate_batch([IDS[:9], IDS[:4]], **GREEDY)
    run, steps = model.pipeline.step, []

    def step(*arguments: Any) -> Any:
        steps.append(run(*arguments))
        if len(steps) == 3:
            model.close()
        return steps[-1]

    monkeypatch.setattr(model.pipeline, "step", step)
    ended = model.generate_batch([IDS[:9], IDS[:4]], **GREEDY)
    assert [text.finish_reason for text in ended] == ["cancelled", "cancelled"]
    assert [text.token_ids for text in ended] == [text.token_ids[:3] for text in whole]
    assert model.metrics.finished["cancelled"] == 2


def test_a_closed_model_ends_its_texts_and_refuses_others(tiny_bundle: Path) -> None:
    with Model.load(tiny_bundle, threads=1) as model:
        events = model.stream(IDS[:9], **GREEDY)
        next(events)
    assert next(events).finish_reason == "cancelled"
    for call in (
        lambda: model.generate(IDS[:3]),
        lambda: model.swap_memory(None),
        lambda: model.logits(IDS[:3]),
    ):
        with pytest.raises(BackendError, match="was closed"):
            call()


def test_numbers_that_are_not_finite_are_traced_to_where_they_begin(model: Model) -> None:
    session = model.session()
    events = session.stream(IDS[:9], **GREEDY)
    next(events)
    last = max(session._cache.values)
    session._cache.values[last][...] = np.nan
    with pytest.raises(BackendError, match=r"step over tokens 9 to 9: segment \d+: leaves numbers"):
        list(events)
    assert model.metrics.finished == {"error": 1}
    assert session.generate(IDS[:9], **GREEDY).token_ids == fresh(model, IDS[:9])


def test_each_step_says_which_memory_routed_it(model: Model, tiny_pack: Path) -> None:
    steps: list[StepRecord] = []
    first = model.pipeline.memory
    events = model.session(hooks=Hooks(on_step=steps.append)).stream(IDS[:9], **GREEDY)
    next(events)
    model.swap_memory(tiny_pack)
    list(events)
    assert [step.memory for step in steps] == [first] + [model.pipeline.memory] * 5
    assert first is not model.pipeline.memory


def test_a_session_that_rests_keeps_no_memory_that_was_swapped_away(
    model: Model, tiny_pack: Path
) -> None:
    session = model.session()
    session.generate(IDS[:9], **GREEDY)
    old = weakref.ref(model.pipeline.layout)
    model.swap_memory(tiny_pack)
    gc.collect()
    assert old() is None
    assert session.generate(IDS[:9], **GREEDY).token_ids == fresh(model, IDS[:9])


def test_a_swap_while_a_call_begins_is_not_taken_for_the_memory_of_its_cache(
    model: Model, tiny_pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    session.generate(IDS[:9], **GREEDY)
    rewind = type(model.pipeline).rewind

    def swapping(*arguments: Any) -> None:
        monkeypatch.undo()
        model.swap_memory(tiny_pack)
        rewind(*arguments)

    monkeypatch.setattr(type(model.pipeline), "rewind", swapping)
    text = [*session.tokens, 7]
    session.generate(text, **GREEDY)
    reused = model.metrics.reused_tokens
    session.generate(text, **GREEDY)  # half of its cache was routed by the memory before
    assert model.metrics.reused_tokens == reused


def test_an_old_stream_that_is_collected_inside_a_step_locks_nothing(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = model.session()
    old = session.stream(IDS[:9], **GREEDY)
    next(old)
    cycle: list[Any] = [old]
    cycle.append(cycle)
    step = type(model.pipeline).step

    def collecting(*arguments: Any) -> Any:
        gc.collect()
        return step(*arguments)

    gc.disable()
    try:
        monkeypatch.setattr(type(model.pipeline), "step", collecting)
        del old, cycle
        found: list[tuple[int, ...]] = []
        write = lambda: found.append(session.generate(IDS[:9], **GREEDY).token_ids)  # noqa: E731
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(10)
    finally:
        gc.enable()
    monkeypatch.undo()
    assert found == [fresh(model, IDS[:9])]
    assert model.metrics.finished["cancelled"] == 1
    assert model.metrics.active == 0
