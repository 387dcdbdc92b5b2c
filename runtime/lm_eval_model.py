r"""A bundle as a model of the lm-evaluation-harness (`lm_eval`), on this runtime.

The harness (0.4) finds models in its own package only, so a program that uses it imports this
module, which registers `knnmoe`; for a shell there is

    python -m knnmoe.runtime.lm_eval_model --model knnmoe \
        --model_args bundle=my-bundle,memory=my-memory --tasks …

which does that and then is `lm_eval`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .cli_support import outcome
from .errors import BackendError, SettingError

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import model_registry
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    if __name__ != "__main__":
        raise
    with outcome(False):
        raise BackendError(
            "lm_eval",
            f"needs the package {error.name}, which is not installed",
            fix="Run `pip install 'knnmoe[lm-eval]'`.",
        ) from error

from .model import Model

NAME = "knnmoe"
DEFAULT_NEW_TOKENS = 256

# What the harness says of every model, and what this one makes of it itself.
_IGNORED = frozenset({"batch_size", "max_batch_size", "device"})
_SAMPLING = ("do_sample", "top_k", "top_p", "min_p", "repetition_penalty")


class KnnMoeLM(TemplateLM):  # type: ignore[misc]  # the harness is an optional package, seen as Any
    """A bundle, perhaps with a memory, that the harness can score and let write.

    Args:
        bundle: Directory written by `knnmoe-export`.
        memory: Memory pack; none routes by the frozen router.
        max_length: Tokens of a window; by default all positions of the model.
        seed: Of sampling, where a task asks for it.
        **settings: Passed to `Model.load`, such as `threads=2` or `device=cuda`.

    Raises:
        SettingError: If a setting is unknown or out of its range.
        BundleError, MemoryPackError: See `Model.load`.
    """

    def __init__(
        self,
        bundle: str,
        memory: str | None = None,
        max_length: int | None = None,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        kept = {name: value for name, value in settings.items() if name not in _IGNORED}
        try:
            self.model = Model.load(str(bundle), memory=memory, **kept)
        except TypeError as error:
            raise SettingError("model_args", f"unknown ({error})", found=sorted(kept)) from error
        positions = self.model.pipeline.max_positions
        self.max_length = positions if max_length is None else int(max_length)
        if not 2 <= self.max_length <= positions:
            raise SettingError(
                "max_length", "out of range", expected=f"2 to {positions}", found=max_length
            )
        self.seed = int(seed)

    @property
    def eot_token_id(self) -> int:
        """A token that ends a text, or 0 where the model has none."""
        ends = self.model.generation_config.eos_token_ids
        return int(ends[0]) if ends else 0

    @property
    def tokenizer_name(self) -> str:
        """What caches of requests are kept apart by."""
        return str(self.model.identity.fingerprint)

    @property
    def prefix_token_id(self) -> int:
        """What the first token of a text is predicted from.

        The token that the tokenizer puts before every text, else the end of the text before.
        """
        return next(iter(self.model.tokenizer.added_before()), self.eot_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the special tokens that the tokenizer adds if not told otherwise.

        Empty for an empty string.
        """
        if not string:
            return []
        tokenizer = self.model.tokenizer
        if add_special_tokens is False:
            return tokenizer.encode_rendered(string)
        return tokenizer.encode(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        answers = []
        for texts, context, continuation in requests:
            if texts is not None and not texts[0] and continuation[:1] == context:
                # Older harnesses let the tokenizer put the prefix before what follows it.
                continuation = continuation[1:]
            answer = self._score(context, continuation)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
            answers.append(answer)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, every token once, each with as much before it as fits."""
        answers = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            total = sum(self._score(*make_disjoint_window(window))[0] for window in windows)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
            answers.append(total)
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """What the model writes until one of the strings that end it, which are left out."""
        answers = []
        for context, settings in (request.args for request in requests):
            answer = self._write(context, dict(settings))
            self.cache_hook.add_partial("generate_until", (context, settings), answer)
            answers.append(answer)
        return answers

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Log-likelihood of the continuation, and whether it is what greedy choice writes."""
        if not continuation:
            return 0.0, True
        ids = [*context, *continuation][-self.max_length :]
        count = min(len(continuation), len(ids) - 1)
        rows = self.model.logits(ids)[-count - 1 : -1].astype(np.float64)
        targets = np.asarray(ids[-count:])
        highest = rows.max(axis=1)
        total = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
        likelihood = float((rows[np.arange(count), targets] - total).sum())
        return likelihood, bool((rows.argmax(axis=1) == targets).all())

    def _write(self, context: str, settings: dict[str, Any]) -> str:
        until = settings.get("until")
        stop = [text for text in ([until] if isinstance(until, str) else until or ()) if text]
        count = min(int(settings.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.max_length - 1)
        options = {name: settings[name] for name in _SAMPLING if name in settings}
        if settings.get("temperature"):  # at 0, which tasks write for greedy choice, there is none
            options["temperature"] = settings["temperature"]
        else:
            options["do_sample"] = False
        prompt = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - count) :]
        return self.model.generate(
            prompt, max_new_tokens=count, stop=stop, seed=self.seed, **options
        ).text


if NAME not in model_registry:
    model_registry.register(NAME, target=KnnMoeLM)


def main() -> None:
    """`lm_eval`, with this model among those it knows."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
