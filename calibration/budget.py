"""A memory within a budget of bytes: which way of making it smaller keeps most of its gain.

Ways are many and running a model is slow, so probes (probes.py) rank them, a few are written to
a scratch directory and measured as they would be served, and the best of those that spare other
text is the one (budget_search.py).
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from knnmoe.runtime.atomic import check_copy, new_directory
from knnmoe.runtime.errors import SettingError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.pack_parts import PackGate
from knnmoe.runtime.projection import WIDTH_STEP
from knnmoe.runtime.routing import RoutingRule
from knnmoe.runtime.two_stage import check_candidates

from .bench import Progress
from .budget_report import BudgetReport
from .budget_search import BudgetSettings, Search
from .compress import check_compressible
from .costs import Costs, measure_costs, plain_bytes
from .recipes import LEAST_ENTRIES, smallest

_DEFAULTS = BudgetSettings()
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9,
          "kib": 2**10, "mib": 2**20, "gib": 2**30}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """How much the runtime may hold of a memory.

    Attributes:
        bytes: That many, or None.
        share: That share of what it holds of the memory uncompressed, or None.
    """

    bytes: int | None = None
    share: float | None = None

    @staticmethod
    def parse(text: str) -> Budget:
        """`64MB`, `64MiB`, `25%`, or a number of bytes.

        Raises:
            SettingError: If it is none of these, or not above zero.
        """
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*|%)", text.strip())
        unit = match[2].lower() if match else None
        number = float(match[1]) if match else 0.0
        if match is None or number <= 0 or not (unit == "%" or unit in _UNITS):
            raise SettingError(
                "budget", "is no size", expected="a size such as 64MB, 64MiB or 25%", found=text
            )
        return (
            Budget(share=number / 100) if unit == "%" else Budget(int(number * _UNITS[str(unit)]))
        )

    def limit(self, whole: int) -> int:
        """Bytes, of a memory of which the runtime holds `whole`."""
        return int((self.share or 0) * whole) if self.bytes is None else self.bytes


def compress_to_budget(
    path: str | Path,
    target: str | Path,
    budget: Budget,
    settings: BudgetSettings = _DEFAULTS,
    *,
    bundle: str | Path | None = None,
    domain: Sequence[str | Path] = (),
    general: Sequence[str | Path] = (),
    costs: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BudgetReport:
    """Write the copy of a pack that keeps most of its gain within a budget of bytes.

    Args:
        path: The pack.
        target: The directory to write.
        budget: For all gates together.
        settings: How to look for it.
        bundle: The model's; needed with text.
        domain: Held-out text of the domain; without it recall alone chooses.
        general: Text that must not suffer; without it nothing is known of that.
        costs: Record of a device; measured here, and written to it, if it is not there.
        overwrite: Replace what is there.
        progress: Called as text is scored.

    Raises:
        SettingError: If the budget is too small for any memory, or larger than the memory.
        VerificationError: If the memory gains nothing on the text, or nothing within the budget
            both gains and spares other text; nothing is written.
        MemoryPackError: If the pack is damaged, compressed already, or of another model.
        InputError: If a text cannot be used, or is in the memory.
        OutputError: If the directory cannot be written.
    """
    pack = MemoryPack.open(path)
    check_copy(pack.path, Path(target), overwrite=overwrite)
    check_candidates(settings.candidates, pack.neighbors)
    check_compressible(pack, WIDTH_STEP, "as-stored")
    if bundle is None and (domain or general or costs):
        raise SettingError(
            "bundle", "missing", expected="the bundle of the model, to run the text or read costs",
            found="none", fix="Give it with --bundle.",
        )  # fmt: skip
    if general and not domain:
        raise SettingError(
            "domain", "missing", expected="text of the domain beside the general text",
            found="none", fix="Give it with --domain.",
        )  # fmt: skip
    gates = [gate for gate in pack.gates if gate.used]
    limit = _limit(pack, gates, budget, settings.candidates)
    model = None if bundle is None else Model.load(bundle, threads=settings.threads)
    if model is not None:
        pack.check_belongs_to(model.identity)
    rule = RoutingRule(1) if model is None else model.bundle.manifest.routing
    search = Search(pack, gates, limit, settings, model, rule, domain, general, progress)
    if model is not None:
        search.costs = _costs(model, pack, settings, costs)
    scratch = Path(tempfile.mkdtemp(prefix=".compress-", dir=Path(target).absolute().parent))
    try:
        report = search.run(scratch)
        with new_directory(Path(target), overwrite=overwrite) as folder:
            for file in sorted(report.pack.path.iterdir()):
                shutil.copyfile(file, folder / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return replace(report, pack=MemoryPack.open(target))


def _limit(pack: MemoryPack, gates: Sequence[PackGate], budget: Budget, candidates: int) -> int:
    size, experts = pack.model.hidden_size, pack.model.num_experts
    plain = sum(plain_bytes(gate.entries, size, experts) for gate in gates)
    limit, least = budget.limit(plain), smallest(pack, gates, candidates)
    if limit >= plain:
        raise SettingError(
            "budget", "is not below what the memory takes as it is: there is nothing to do",
            expected=f"less than {plain:,} bytes", found=f"{limit:,} bytes",
            fix="Use the pack as it is, or compress it for speed, without --budget.",
        )  # fmt: skip
    if limit < least:
        raise SettingError(
            "budget", "is too small for any memory of these gates",
            expected=f"at least {least:,} bytes, {LEAST_ENTRIES} entries for each of"
            f" {len(gates)} gates",
            found=f"{limit:,} bytes", fix="Allow more, or build a memory of fewer gates.",
        )  # fmt: skip
    return limit


def _costs(
    model: Model, pack: MemoryPack, settings: BudgetSettings, path: str | Path | None
) -> Costs:
    """Of the record, or measured."""
    if path is None or not Path(path).exists():
        costs = measure_costs(model, pack, settings.candidates, settings.device, settings.threads)
        if path is not None:
            costs.write(Path(path))
        return costs
    costs = Costs.read(Path(path))
    own = (pack.model.hidden_size, pack.model.num_experts)
    if (costs.hidden_size, costs.experts) != own:
        raise SettingError(
            path, "is a record of other gates", expected=f"hidden size and experts {own}",
            found=(costs.hidden_size, costs.experts), fix="Measure costs with this model.",
        )  # fmt: skip
    return costs
