"""`knnmoe profile show`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..cli_support import outcome
from .common import PATH, json_option, output
from .profile_outputs import Outputs, output_options, print_answer, print_device

if TYPE_CHECKING:
    from ..profiling.budget import Answer
    from ..profiling.from_device import DeviceResults
    from ..profiling.record import ProfileRecord

EXAMPLE = """\b
Example:
  knnmoe profile show record.json --html report.html
  knnmoe profile show record.json --budget-ms 12 --memory pack \\
      --write-run-config run.json
  knnmoe profile --from-device jetson-results
"""


@click.command(short_help="A record's tables, report and budget.", epilog=EXAMPLE)
@click.argument("record", type=PATH, required=False)
@click.option(
    "--from-device",
    type=PATH,
    metavar="DIR",
    help="What was recorded on a device: RECORD is then a file in it, if there are several.",
)
@click.option("--memory", type=PATH, metavar="PACK", help="The pack, for --write-run-config.")
@output_options
@json_option
def show(
    record: Path | None,
    from_device: Path | None,
    memory: Path | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Show what `knnmoe profile --output` recorded, here or on another machine.

    With --from-device also the sensor logs and the engines' layer profiles of the directory
    (docs/formats.md says what it may hold). With --json everything that was read is printed, or
    with --budget-ms the answer.
    """
    if record is None and from_device is None:
        raise click.UsageError("Give RECORD or --from-device DIR.")
    outputs = Outputs.taken_from(settings)
    with outcome(as_json) as result:
        from ..memory import MemoryPack
        from ..profiling.from_device import read_device_results
        from ..profiling.record import read_record

        outputs.check_files()
        device = None if from_device is None else read_device_results(from_device)
        found = None
        if device is None:
            assert record is not None
            found = read_record(record)
        elif record is not None or device.records or outputs.of_a_record:
            found = device.record(None if record is None else str(record))
        answer = None
        if found is not None:
            pack = None if memory is None else MemoryPack.open(memory)
            answer = outputs.answer(found, pack, device)
        read = found if device is None else device
        assert read is not None
        figures = read.to_json() if answer is None else answer.to_json()
        result(figures, lambda: _print(found, device, answer))


def _print(
    record: ProfileRecord | None, device: DeviceResults | None, answer: Answer | None
) -> None:
    console = output()
    if record is not None:
        from ..profiling.report import print_record

        print_record(record, console)
    if device is not None:
        print_device(device, console)
    if answer is not None:
        print_answer(answer, console)
