"""How a traced bundle says that it is one; for those who need no torch to know."""

from __future__ import annotations

from collections.abc import Iterator

from safetensors import safe_open

from knnmoe.runtime.bundle import Bundle, Manifest

PREFIX = "traced:"  # of the family's name in a manifest, before the model type
ROUTER = ".router"  # behind the name of a router's weight, which stays fp32 in every precision
CONSTANT = ".constant"  # behind that of a table that is no parameter, which stays fp32 as well
EXPERTS = ".experts."  # in the names of their stacks


def is_traced(manifest: Manifest) -> bool:
    """Whether a bundle was made of a trace, not by a description."""
    return manifest.family.startswith(PREFIX)


def stored_names(bundle: Bundle) -> Iterator[tuple[str, str]]:
    """Names and dtypes of all weights of a bundle, as its files have them, in order of segments."""
    for name in sorted(n for n in bundle.manifest.files if n.startswith("segments/")):
        if name.endswith(".safetensors"):
            with safe_open(bundle.file(name), "np") as file:
                for tensor in file.keys():  # noqa: SIM118 - it is no dict
                    yield tensor, str(file.get_slice(tensor).get_dtype())


def router_names(bundle: Bundle) -> list[str]:
    """The parameters of transformers that are the weights of the routers, gate by gate."""
    found = []
    for segment in bundle.manifest.segments[:-1]:
        file = bundle.file(segment.file.removesuffix(".onnx") + ".safetensors")
        with safe_open(file, "np") as opened:
            names = [n for n in opened.keys() if n.endswith(ROUTER)]  # noqa: SIM118
            ranks = {n: len(opened.get_slice(n).get_shape()) for n in names}
        found += [n.removesuffix(ROUTER) for n in names if ranks[n] == 2]
    return found
