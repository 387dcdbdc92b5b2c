"""What TensorRT's lean runtime, without a GPU, does with the plugin; see test_lean.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))

from knnmoe.runtime.errors import BackendError
from knnmoe.trt_plugins import library
from knnmoe.trt_plugins.flavours import create_plugin, import_flavour
from knnmoe.trt_plugins.harness import PluginHarness


def refusal(load: Callable[[], object]) -> str:
    try:
        load()
    except BackendError as error:
        return str(error)
    return "was not refused"


def main(path: Path, harness: Path) -> None:
    trt = import_flavour("tensorrt_lean")
    major = int(trt.__version__.partition(".")[0])
    built = library.build_info(path)
    assert built is not None
    if built.tensorrt_major != major:
        said = refusal(lambda: library.load(trt, path))
        assert "another major version" in said, said
        assert built.tensorrt in said, said
    creator = library.load(trt, path, other_major=True)
    assert (creator.name, creator.plugin_version) == ("KnnBlend", "1")
    assert creator.plugin_namespace == "knnmoe"
    assert "similarity" in [field.name for field in creator.field_names]
    assert library.load(trt, path) is not None  # there already

    for similarity in (b"cosine", b"rbf", b"rbf\0"):
        plugin = create_plugin(trt, creator, similarity=similarity)
        assert plugin is not None
        for kind in ("CORE", "BUILD", "RUNTIME"):
            assert plugin.get_capability_interface(getattr(trt.PluginCapabilityType, kind))
    for wrong in (
        {},
        {"similarity": b"dot"},
        {"similarity": np.array([1], np.int32)},
        {"similarity": b"rbf", "unheard_of": np.array([8], np.int32)},
    ):
        assert create_plugin(trt, creator, **wrong) is None, wrong

    # Python's bindings cannot ask a plugin in C++ for its fields: the harness does, in the library
    # that the registry holds; what it gives makes the same plugin again.
    fields = PluginHarness(path, fields={"similarity": "rbf"}, harness=harness).serialized()
    assert fields["similarity"] == "rbf"
    again = {
        name: value.encode() if isinstance(value, str) else value for name, value in fields.items()
    }
    assert create_plugin(trt, creator, **again) is not None
    print("taken by", trt.__version__)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
