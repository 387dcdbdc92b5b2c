"""The search for a smaller memory: gates, ways and points are measured, and one is chosen.

Half of the domain's documents choose entries and gates, the other half judges. Other text is read
with what may be chosen alone: with the best, until one spares it, and with the points of the front.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from knnmoe.runtime.errors import InputError, VerificationError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import PackGate
from knnmoe.runtime.pack_writing import rewrite_settings
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.statistics import drawn_units, paired_share
from knnmoe.runtime.texts import TokenSequence, TokenText

from .bench import Bench, Progress
from .budget_report import BudgetReport, Point
from .calibrate import LEAST_PASSAGES, SWITCH_SHARE, check_held_out, read_texts
from .compress import compress_pack
from .confidence import MIN_SEQUENCES, Interval, Limits, Way, candidate, interval_of
from .controls import Background, background_of
from .costs import Costs, held_bytes, plain_bytes
from .evidence import measure_evidence
from .recipes import Prober, Recipe, Reducer, fitted, recipes, short_list
from .recorded import GateInputs, record_inputs
from .switching import joined

SHORT = 5  # recipes that are measured
Text = Literal["domain", "general", "switch"]
OTHERS: tuple[Text, ...] = ("general", "switch")
LADDER = (0.5, 0.35, 0.25, 0.15, 0.08)  # of the bytes, further points of a front


@dataclass(frozen=True)
class BudgetSettings:
    """How a memory within a budget is looked for.

    Attributes:
        candidates: R.
        max_general_loss, max_switch_loss: As in calibration.
        max_tokens: Tokens of each text.
        front: Also measure points of other sizes.
        device: Name for the costs.
        threads: Of the runtime.
    """

    candidates: int = 32
    max_general_loss: float = 0.002
    max_switch_loss: float = 5.0
    max_tokens: int | None = 12_000
    front: bool = False
    device: str = "this machine"
    threads: int | None = None


class Search:
    """One search; `run` is its order of things."""

    def __init__(
        self,
        pack: MemoryPack,
        gates: Sequence[PackGate],
        limit: int,
        settings: BudgetSettings,
        model: Model | None,
        rule: RoutingRule,
        domain: Sequence[str | Path],
        general: Sequence[str | Path],
        progress: Progress | None,
    ) -> None:
        self.pack, self.gates, self.limit = pack, list(gates), limit
        self.settings, self.model, self.rule = settings, model, rule
        self.limits = Limits(settings.max_general_loss, settings.max_switch_loss)
        self.costs: Costs | None = None
        self.background: Background = background_of(pack)
        self.asked: dict[int, GateInputs] = {}
        self.probed: dict[int, GateInputs] = {}
        self.gains: NDArray[np.float64] | None = None
        self.texts: dict[str, TokenText] = {}
        self.bench: Bench | None = None
        self.passages: dict[str, Sequence[TokenSequence]] = {}
        # What the recipes change in the domain's text, None the memory as it is.
        self.changes: dict[Recipe | None, NDArray[np.float64]] = {}
        if domain and model is not None:
            self._prepare(model, {"domain": domain, "general": general}, progress)

    def _prepare(
        self, model: Model, files: Mapping[str, Sequence[str | Path]], progress: Progress | None
    ) -> None:
        given = {name: paths for name, paths in files.items() if paths}
        self.texts = read_texts(model, given, 256, self.settings.max_tokens)
        check_held_out(self.pack, self.texts)
        own = self.texts["domain"]
        learn, judge = halves(own)
        passages = {"learn": learn.sequences, "domain": judge.sequences}
        if "general" in self.texts:
            passages["general"] = self.texts["general"].sequences
            most = self.settings.max_tokens
            room = None if most is None else int(SWITCH_SHARE * most)
            switches = joined(judge, self.texts["general"], room, least=LEAST_PASSAGES)
            if len(switches) >= MIN_SEQUENCES:
                passages["switch"] = switches
        self.passages = dict(passages)
        runs = SHORT + (len(LADDER) if self.settings.front else 0) + 3
        self.bench = Bench(
            model, self.pack, {"general": (), **passages}, self.background, progress,
            candidates=runs, domain_runs=len(self.gates) // 2,
        )  # fmt: skip

    def run(self, scratch: Path) -> BudgetReport:
        """Search, and leave the pack that was chosen in the scratch directory."""
        plain = self._plain()
        gains = self._gate_gains()
        dropped = tuple(gate for gate, gain in gains.items() if gain <= 0)
        if len(dropped) == len(self.gates):
            dropped = ()
        self.gates = [gate for gate in self.gates if gate.gate not in dropped]
        self._record()
        reducer = Reducer(self.pack, self.rule, self.asked, self.gains, self.background)
        prober = Prober(self.pack, self.gates, reducer, self.probed, self.settings.candidates)
        listed = self._listed(prober, self.limit, SHORT if self.bench else 1)
        if self.settings.front:
            for share in LADDER:
                more = self._listed(prober, int(share * plain.bytes), 1)
                listed += [recipe for recipe in more if recipe not in listed]
        written: list[tuple[Point, Path]] = []
        for number, recipe in enumerate(listed):
            folder = scratch / f"{number}"
            written.append((self._point(recipe, prober, reducer, folder), folder))
        chosen, path, calibration = self._choose(written)
        if self.settings.front and self.bench is not None:
            for index, one in enumerate(written):
                if one[0].general is None and _undominated(one[0], written):
                    written[index] = self._with_others(one)
        points = [
            plain,
            *sorted((self._final(p, chosen) for p, _ in written), key=lambda p: p.bytes),
        ]
        if self.bench is not None:
            self.bench.finish()
        report = BudgetReport(
            MemoryPack.open(path), self.limit, tuple(points), chosen,
            "recall" if self.bench is None else "likelihood", gains, dropped, calibration,
            self.costs, self.limits,
        )  # fmt: skip
        return replace(report, pack=self._stated(report, path))

    def _final(self, point: Point, chosen: Point) -> Point:
        """The chosen point as it was measured last."""
        return chosen if point.recipe == chosen.recipe else point

    def _plain(self) -> Point:
        """The memory as it is."""
        size, experts = self.pack.model.hidden_size, self.pack.model.num_experts
        by_gate = {g.gate: plain_bytes(g.entries, size, experts) for g in self.gates}
        point = Point(None, sum(by_gate.values()), by_gate, self.pack.bytes, 1.0, 0.0, None)
        point = self._measured(point, self.pack, "domain", *OTHERS)
        if point.domain is not None and not point.domain.mean < 0:
            raise VerificationError(
                self.pack.path, "gains nothing on this text, so there is no gain to keep",
                expected="a change of the domain's NLL below zero",
                found=f"{point.domain.mean:+.4f}",
                fix="Give text of the memory's own domain, or calibrate the memory first.",
            )  # fmt: skip
        if point.general is not None and point.general.high > self.limits.general:
            raise VerificationError(
                self.pack.path, "costs this general text too much as it is",
                expected=f"at most {self.limits.general:+.4f} nats a token, upper end",
                found=point.general,
                fix="Calibrate the memory, give more text, or allow more with --max-general-loss.",
            )  # fmt: skip
        if point.switch is not None:
            # Of few passages, so that a memory within its limit may seem beyond it; no worse, then.
            most = max(self.limits.switch, point.switch.high)
            self.limits = replace(self.limits, switch=most)
        return point

    def _measured(self, point: Point, pack: MemoryPack, *names: Text) -> Point:
        """The point with what a pack changes in some texts, as far as they were given."""
        if self.bench is None:
            return point
        for name in names:
            if not self.passages.get(name):
                continue
            change = self.bench.change(name, pack)
            found = self._interval(name, change)
            if name == "domain":
                self.changes.setdefault(point.recipe, change)
                point = replace(point, domain=found, kept=self._kept(change))
            elif name == "general":
                point = replace(point, general=found)
            else:
                point = replace(point, switch=found)
        return point

    def _kept(self, change: NDArray[np.float64]) -> Interval | None:
        """Share of the whole memory's gain, which is measured first; None where that is none."""
        assert self.bench is not None
        tokens, whole = self.bench.tokens("domain"), self.changes[None]
        if whole @ tokens >= 0:
            return None
        units, _ = drawn_units([passage.document for passage in self.passages["domain"]])
        return Interval(*paired_share(change * tokens, whole * tokens, units=units))

    def _interval(self, name: str, change: NDArray[np.float64]) -> Interval:
        assert self.bench is not None
        documents = np.array([passage.document for passage in self.passages[name]])
        return interval_of(change, self.bench.tokens(name), documents)

    def _gate_gains(self) -> dict[int, float]:
        """What each gate's retrieval gains: the memory beside it without that gate."""
        if self.bench is None or len(self.gates) == 1:
            return {}
        tokens = self.bench.tokens("learn")
        all_of_them = self.bench.change("learn", self.pack)
        unused = {gate.gate for gate in self.pack.gates if not gate.used}
        gains = {}
        for gate in self.gates:
            without = self.pack.with_settings(unused=unused | {gate.gate})
            change = self.bench.change("learn", without) - all_of_them
            gains[gate.gate] = float(change @ tokens / tokens.sum())
        return gains

    def _record(self) -> None:
        """Router inputs of the half that chooses, and what the memory gains with each token.

        Every third sequence is for probes alone: of the others entries are chosen, which on those
        would look better than they are.
        """
        if self.bench is None or self.model is None:
            return
        every = self.passages["learn"]
        parts = [[s for n, s in enumerate(every) if (n % 3 == 1) == kept] for kept in (0, 1)]
        for part, recorded in zip(parts, (self.asked, self.probed), strict=True):
            asked = record_inputs(self.model, [s.tokens for s in part], lambda _: None)
            recorded.update({gate.gate: asked[gate.gate] for gate in self.gates})
        sequences = parts[0]
        frozen = token_nll(self.model, sequences)
        self.model.swap_memory(self.pack)
        self.gains = frozen - token_nll(self.model, sequences)

    def _listed(self, prober: Prober, limit: int, count: int) -> list[Recipe]:
        fits = (
            fitted(recipe, self.pack, self.gates, self.settings.candidates, limit)
            for recipe in recipes(self.pack)
        )
        return short_list([recipe for recipe in fits if recipe is not None], prober.probed, count)

    def _point(self, recipe: Recipe, prober: Prober, reducer: Reducer, folder: Path) -> Point:
        """Write a recipe's pack and measure it."""
        settings = recipe.settings(self.settings.candidates)
        report = compress_pack(
            self.pack, folder, settings, gates=[gate.gate for gate in self.gates],
            reduced=lambda gate, entries: reducer.reduce(gate, entries, recipe),
        )  # fmt: skip
        probed = prober.probed(recipe)
        entries = {gate.gate: gate.entries for gate in report.pack.gates}
        shapes = {
            gate.gate: replace(
                recipe.shape(self.pack, gate, self.settings.candidates), entries=entries[gate.gate]
            )
            for gate in self.gates
        }

        by_gate = {gate: held_bytes(shape) for gate, shape in shapes.items()}
        ms = None if self.costs is None else self.costs.token_ms(list(shapes.values()))
        point = Point(
            recipe, sum(by_gate.values()), by_gate, report.pack.bytes, probed.recall, probed.error,
            ms,
        )  # fmt: skip
        return self._measured(point, report.pack, "domain")

    def _choose(
        self, written: list[tuple[Point, Path]]
    ) -> tuple[Point, Path, Literal["carried", "refitted"]]:
        """The likeliest that spares other text, which is measured until there is one.

        What gains most on little text does so by chance too: of those that gain not surely less,
        the one whose corrections are nearest to the memory's.
        """
        within = [one for one in written if one[0].bytes <= self.limit]
        if self.bench is None:
            point, path = min(within, key=lambda one: one[0].error)
            return point, path, "carried"

        def gain(one: tuple[Point, Path]) -> float:
            assert one[0].domain is not None
            return one[0].domain.mean

        spared = False
        most = self.changes[min(within, key=gain)[0].recipe]

        def order(one: tuple[Point, Path]) -> tuple[bool, float]:
            less = self._interval("domain", self.changes[one[0].recipe] - most).low > 0
            return less, gain(one) if less else one[0].error

        for best in sorted(within, key=order):
            index = written.index(best)
            best = written[index] = self._with_others(best)
            if spared := best[0].spares(self.limits):
                break
        else:
            best = min((one for one in written if one[0].bytes <= self.limit), key=gain)
        again = self._refitted(*best)
        if (
            again is not None
            and (not spared or gain((again[0], best[1])) < gain(best))
            and again[0].spares(self.limits)
        ):
            rewrite_settings(again[1], again[1].provenance)
            best, calibration = (again[0], best[1]), "refitted"
        else:
            calibration = "carried"
        point = best[0]
        assert point.domain is not None
        if not point.spares(self.limits) or not point.domain.high < 0:
            raise _refused(self.pack, point, self.limits)
        return point, best[1], calibration  # type: ignore[return-value]

    def _with_others(self, one: tuple[Point, Path]) -> tuple[Point, Path]:
        """With what it changes in text that is not the domain's."""
        point, path = one
        return self._measured(point, MemoryPack.open(path), *OTHERS), path

    def _refitted(self, point: Point, path: Path) -> tuple[Point, MemoryPack] | None:
        """The same pack with its gates fitted again, where they were fitted and text is there."""
        pack = MemoryPack.open(path)
        numbers = pack.gates[0].calibration
        if self.bench is None or self.model is None or not pack.calibrated:
            return None
        if not numbers.sharpness or "general" not in self.passages:
            return None
        way = Way(
            pack.variant, pack.neighbors, numbers.scale,
            "sequence" if numbers.sequence else "token", numbers.decay,
            _caution(pack), numbers.power, pack.evidence,
        )  # fmt: skip
        background = background_of(pack)
        evidence = [
            measure_evidence(
                self.model, pack, [p.tokens for p in self.passages[name]], pack.neighbors,
                lambda _: None, background,
            )
            for name in ("learn", "general")
        ]  # fmt: skip
        again = candidate(pack, way, *evidence, background=background is not None)
        applied = again.applied(pack)
        return self._measured(point, applied, "domain", *OTHERS), applied

    def _stated(self, report: BudgetReport, path: Path) -> MemoryPack:
        """The chosen pack with what was measured in its provenance."""
        chosen = report.chosen
        assert chosen.recipe is not None
        facts = {
            "recipe": chosen.recipe.name,
            "budget_bytes": report.limit,
            "bytes": chosen.bytes,
            "bytes_before": report.points[0].bytes,
            "judged_by": report.judge,
            "gain_kept": None if chosen.kept is None else chosen.kept.mean,
            "domain": None if chosen.domain is None else asdict(chosen.domain),
            "general": None if chosen.general is None else asdict(chosen.general),
            "dropped_gates": list(report.dropped),
            "calibration": report.calibration,
            "texts": {name: text.sha256 for name, text in self.texts.items()},
        }
        pack = MemoryPack.open(path)
        compressed = {**pack.provenance["compressed"], "budget": facts}
        return rewrite_settings(pack, {**pack.provenance, "compressed": compressed})


def _undominated(point: Point, written: Sequence[tuple[Point, Path]]) -> bool:
    """Whether nothing gains more in as many bytes: what another budget would take."""
    assert point.domain is not None
    return not any(
        other.bytes <= point.bytes and other.domain.mean < point.domain.mean
        for other, _ in written
        if other.domain is not None
    )


def halves(text: TokenText) -> tuple[TokenText, TokenText]:
    """A text's documents dealt into two; its sequences where documents are few.

    Raises:
        InputError: If it is too short for that.
    """
    _, numbers = np.unique([s.document for s in text.sequences], return_inverse=True)
    if numbers.max() + 1 < MIN_SEQUENCES:
        numbers = np.arange(len(text.sequences))
    parts = [
        tuple(s for s, number in zip(text.sequences, numbers, strict=True) if number % 2 == half)
        for half in (0, 1)
    ]
    if min(map(len, parts)) < 2:
        raise InputError(
            ", ".join(text.names), "too short to choose by one half and judge by the other",
            expected=f"at least {MIN_SEQUENCES} sequences", found=len(text.sequences),
            fix="Give more text of the domain.",
        )  # fmt: skip
    learn, judge = (replace(text, sequences=part) for part in parts)
    return learn, judge


def token_nll(model: Model, sequences: Sequence[TokenSequence]) -> NDArray[np.float64]:
    """NLL of what follows each token [T] of some sequences, 0 where that is not predicted."""
    parts = []
    for sequence in sequences:
        nll = -model.score(sequence.tokens).astype(np.float64)
        parts.append(np.append(np.where(sequence.credited, nll, 0), 0.0))
    return np.concatenate(parts)


def _caution(pack: MemoryPack) -> float:
    """What the pack's gates were fitted with; 4 if calibrated before it varied and was stated."""
    stated = pack.provenance.get("calibration")
    caution = stated.get("caution") if isinstance(stated, Mapping) else None
    return float(caution) if isinstance(caution, int | float) and caution > 0 else 4.0


def _refused(pack: MemoryPack, point: Point, limits: Limits) -> VerificationError:
    assert point.domain is not None
    found = f"{point.name}: domain {point.domain}"
    if point.general is not None:
        found += f", general {point.general}"
    if point.switch is not None:
        found += f", change of subject {point.switch}"
    return VerificationError(
        pack.path, "nothing within this budget both gains and spares other text",
        expected=f"domain below zero for sure, general text at most {limits.general:+.4f} nats a"
        f" token and a change of subject at most {limits.switch:g} nats, upper ends",
        found=found,
        fix="Allow more bytes, or give more text to measure on; nothing was written.",
    )  # fmt: skip
