"""The lm-evaluation-harness runs a task of this test's own on a tiny bundle, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'knnmoe[lm-eval]'")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and what it imports

from knnmoe.runtime.errors import SettingError  # noqa: E402
from knnmoe.runtime.lm_eval_model import KnnMoeLM  # noqa: E402

QUESTIONS = (
    {"question": "two and two", "choices": ["four", "five"], "answer": 0},
    {"question": "a heron is", "choices": ["a fish", "a bird", "a stone"], "answer": 1},
)
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\ntest_split: test\n"
TASKS = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{question}}:'\n"
    "doc_to_choice: choices\ndoc_to_target: answer\nmetric_list:\n  - metric: acc\n",
    "local_rolling": "output_type: loglikelihood_rolling\ndoc_to_text: ''\n"
    "doc_to_target: '{{question}}'\nmetric_list:\n  - metric: byte_perplexity\n",
    "local_writing": "output_type: generate_until\ndoc_to_text: '{{question}}'\n"
    "doc_to_target: '{{choices[0]}}'\ngeneration_kwargs:\n  until: ['.']\n  max_gen_toks: 8\n"
    "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with three tasks over one local file."""
    for name in ("HF_DATASETS_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "questions.jsonl"
    data.write_text("\n".join(json.dumps(one) for one in QUESTIONS), encoding="utf-8")
    for name, text in TASKS.items():
        stated = f"task: {name}\n{COMMON.format(data=data)}{text}"
        (folder / f"{name}.yaml").write_text(stated, encoding="utf-8")
    return folder


def test_the_command_runs_tasks_on_a_bundle_with_its_memory(
    tasks: Path, tiny_bundle: Path, tiny_pack: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "knnmoe.runtime.lm_eval_model", "--model", "knnmoe",
         "--model_args", f"bundle={tiny_bundle},memory={tiny_pack},threads=1",
         "--tasks", ",".join(TASKS), "--include_path", str(tasks),
         "--output_path", str(tmp_path / "out")],
        env={**os.environ}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (written,) = (tmp_path / "out").rglob("results*.json")
    results: dict[str, Any] = json.loads(written.read_text(encoding="utf-8"))["results"]
    assert set(results) == set(TASKS)
    model = KnnMoeLM(str(tiny_bundle), str(tiny_pack), threads=1)
    right = 0
    for one in QUESTIONS:
        scores = []
        for choice in one["choices"]:
            ids = model.tok_encode(f"{one['question']}: {choice}")
            start = len(model.tok_encode(f"{one['question']}:"))
            scores.append(float(model.model.score(ids)[start - 1 :].sum()))
        right += int(np.argmax(scores)) == one["answer"]
    assert results["local_choice"]["acc,none"] == right / len(QUESTIONS)
    total, size = 0.0, 0
    for one in QUESTIONS:
        ids = [model.prefix_token_id, *model.tok_encode(one["question"])]
        total += float(model.model.score(ids).sum())
        size += len(one["question"].encode())
    found = results["local_rolling"]["byte_perplexity,none"]
    assert found == pytest.approx(np.exp(-total / size), rel=1e-4)


def test_the_memory_changes_what_the_harness_sees(tiny_bundle: Path, tiny_pack: Path) -> None:
    request = [(("a", "b"), [1, 2, 3], [4, 5])]
    with_memory = KnnMoeLM(str(tiny_bundle), str(tiny_pack), threads=1)
    frozen = KnnMoeLM(str(tiny_bundle), threads=1)
    (a, _), (b, _) = (m._loglikelihood_tokens(request)[0] for m in (with_memory, frozen))
    assert a != b
    assert b == pytest.approx(float(frozen.model.score([1, 2, 3, 4, 5])[2:].sum()), abs=1e-4)


def test_what_the_tokenizer_puts_before_a_text_is_not_predicted(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Mixtral's tokenizer and DeepSeek's do."""
    from lm_eval.api.instance import Instance

    model = KnnMoeLM(str(tiny_bundle), threads=1)
    tokenizer = model.model.tokenizer
    plain = tokenizer.encode("a heron")
    monkeypatch.setattr(tokenizer, "encode", lambda text: [7, *tokenizer.encode_rendered(text)])
    monkeypatch.setattr(tokenizer, "added_before", lambda: [7])
    expected = float(model.model.score([7, *plain]).sum())
    rolling = Instance("loglikelihood_rolling", {}, ("a heron",), 0)
    assert model.loglikelihood_rolling([rolling])[0] == pytest.approx(expected, abs=1e-4)
    pair = Instance("loglikelihood", {}, ("", "a heron"), 0)
    assert model.loglikelihood([pair])[0][0] == pytest.approx(expected, abs=1e-4)


def test_greedy_continuations_are_known_for_what_they_are(tiny_bundle: Path) -> None:
    model = KnnMoeLM(str(tiny_bundle), threads=1)
    best = int(model.model.logits([1, 2, 3])[-1].argmax())
    assert model._score([1, 2, 3], [best])[1]
    assert not model._score([1, 2, 3], [(best + 1) % 256])[1]


def test_what_is_too_long_loses_its_beginning(tiny_bundle: Path) -> None:
    model = KnnMoeLM(str(tiny_bundle), max_length=8, threads=1)
    long, kept = list(range(20)), list(range(13, 20))
    assert model._score(long, [5]) == model._score(kept, [5])


def test_generation_ends_before_the_string_that_ends_it(tiny_bundle: Path) -> None:
    model = KnnMoeLM(str(tiny_bundle), threads=1)
    whole = model._write("In the evening", {"max_gen_toks": 12})
    stop = whole[3]
    cut = model._write("In the evening", {"max_gen_toks": 12, "until": [stop, ""]})
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("wrong", [{"max_length": 1}, {"max_length": 10_000}, {"nonsense": 1}])
def test_wrong_arguments_are_stated_failures(wrong: dict[str, Any], tiny_bundle: Path) -> None:
    with pytest.raises(SettingError, match=r"max_length|model_args"):
        KnnMoeLM(str(tiny_bundle), **wrong)
