"""Which backend a model runs on, from what a caller asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from .bundle import Bundle
from .errors import BackendError, SettingError
from .gates.select import Backend
from .host import HostBackend, LayoutName, ModelBackend, check_layout

Device = Literal["cpu", "cuda"]
DEVICES: tuple[Device, ...] = get_args(Device)


def open_backend(
    bundle: Bundle,
    device: Device = "cpu",
    *,
    layout: LayoutName | None = None,
    gate: str | None = None,
    threads: int | None = None,
    engines: str | Path | None = None,
    keys: str | None = None,
    cuda_graph: bool | None = None,
) -> ModelBackend:
    """The backend of a device; the arguments are those of `Model.load`, None where not given.

    Raises:
        SettingError: If an option is given that the device does not have.
        BackendError, EngineError, DeviceError: As `HostBackend` and `DeviceBackend` do.
    """
    if layout is not None:
        check_layout(layout)
    if device == "cpu":
        _refuse(device, engines=engines, keys=keys, cuda_graph=cuda_graph)
        host_gate = cast(Backend, gate or "auto")  # checked where gates are made
        return HostBackend(bundle, layout=layout or "split", gate=host_gate, threads=threads)
    if device != "cuda":
        raise BackendError("device", "unknown", expected=DEVICES, found=device)
    _refuse(device, threads=threads)
    from .device.backend import DeviceBackend, DeviceGate, DeviceSettings
    from .engines.engine_set import find_engines

    settings = DeviceSettings(
        gate=cast(DeviceGate, gate or "cuda"),
        keys=keys or "float16",
        cuda_graph=cuda_graph is not False,
    )
    backend = DeviceBackend(bundle, engines or find_engines(bundle, layout=layout), settings)
    if layout not in (None, backend.layout_name):
        raise SettingError(
            "layout", "the engines are of the other layout", expected=backend.layout_name,
            found=layout, fix=f"Build them with `knnmoe engines build --layout {layout}`.",
        )  # fmt: skip
    return backend


def _refuse(device: Device, **options: object) -> None:
    for name, given in options.items():
        if given is not None:
            raise SettingError(name, f"has no meaning on device={device!r}", found=given)
