"""A family with groups and a selection bias, from checkpoint to bundle to tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from biased import BIAS, RULE, biased_family, make_biased
from conftest import write_tiny_pack
from knnmoe.export.exporter import export
from knnmoe.export.families import FAMILIES
from knnmoe.runtime.bundle import SELECTION_BIAS, Bundle, describe_file
from knnmoe.runtime.errors import BundleError, CheckpointError
from knnmoe.runtime.memory import MemoryPack
from knnmoe.runtime.model import Model
from knnmoe.runtime.selection_bias import TENSOR, read_selection_biases

IDS = np.random.default_rng(5).integers(0, 256, 40)


@pytest.fixture(autouse=True)
def _family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "olmoe", biased_family())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_biased(tmp_path_factory.mktemp("biased"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Path:
    target = tmp_path_factory.mktemp("bundle") / "biased"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "olmoe", biased_family())
        export(checkpoint, target, experts_per_token=5)
    return target


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory, bundle: Path) -> MemoryPack:
    return write_tiny_pack(tmp_path_factory.mktemp("pack") / "random", bundle)


def test_the_bundle_states_the_rule_and_carries_the_biases(checkpoint: Path, bundle: Path) -> None:
    opened = Bundle.open(bundle)
    assert opened.manifest.routing == RULE
    assert json.loads((bundle / "manifest.json").read_text())["routing"] == {
        "top_k": 3, "score": "sigmoid", "renormalize": True, "scale": 2.5, "groups": 4,
        "top_groups": 2, "group_score": "top2", "selection_bias": True,
    }  # fmt: skip
    stored = load_file(checkpoint / "model.safetensors")
    for layer, bias in enumerate(read_selection_biases(opened)):
        np.testing.assert_array_equal(bias, stored[BIAS.format(layer=layer)])
    for spec in opened.manifest.gates.values():
        assert spec.inputs[2].name == "selection_bias"
    assert opened.manifest.fused is not None
    names = [spec.name for spec in opened.manifest.fused.inputs]
    assert [name for name in names if "bias" in name] == [f"selection_bias_{g}" for g in range(3)]


def test_it_computes_what_transformers_does_with_routers_of_deepseek(
    checkpoint: Path, bundle: Path, one_torch_thread: None
) -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    config = AutoConfig.from_pretrained(checkpoint)
    config.num_local_experts = config.num_experts
    stored = load_file(checkpoint / "model.safetensors")
    for number, layer in enumerate(model.model.layers):
        router = DeepseekV3TopkRouter(config)
        router.weight = layer.mlp.gate.weight
        bias = stored[BIAS.format(layer=number)]
        router.e_score_correction_bias.copy_(torch.from_numpy(bias))
        layer.mlp.gate = router
    with torch.inference_mode():
        expected = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    for options in ({"layout": "split"}, {"layout": "fused"}, {"gate": "numpy"}):
        found = Model.load(bundle, **options).logits(IDS)
        np.testing.assert_allclose(found, expected, atol=2e-4)


@pytest.mark.parametrize("variant", ["logits", "residual", "assignment"])
def test_every_gate_of_the_host_routes_alike(bundle: Path, pack: MemoryPack, variant: Any) -> None:
    used = pack.with_settings(variant=variant)
    expected = Model.load(bundle, memory=used, gate="numpy-float64").logits(IDS)
    frozen = Model.load(bundle, gate="numpy-float64").logits(IDS)
    assert np.abs(frozen - expected).max() > 0.1
    for gate in ("onnx", "numpy", "faiss", "two-stage"):
        model = Model.load(bundle, memory=used, gate=gate)
        np.testing.assert_allclose(model.logits(IDS), expected, atol=5e-4)
    if variant != "assignment":
        model = Model.load(bundle, memory=used, layout="fused")
        np.testing.assert_allclose(model.logits(IDS), expected, atol=5e-4)


def test_assignments_in_a_memory_are_those_of_each_gates_own_bias(
    bundle: Path, pack: MemoryPack
) -> None:
    used = pack.with_settings(variant="assignment")
    biases = read_selection_biases(Bundle.open(bundle, verify=False))
    for gate, bias in zip(used.gates, biases, strict=True):
        assert bias is not None
        entries = used.read(gate)
        learned = entries.router_logits + entries.residuals
        values = used.gate_memory(gate, RULE, bias).values
        np.testing.assert_array_equal(values, RULE.assignments(learned, bias))
        assert (values != RULE.assignments(learned, 0 * bias)).any()


def copied(bundle: Path, to: Path) -> Path:
    import shutil

    shutil.copytree(bundle, to)
    return to


def restated(bundle: Path) -> None:
    """State the biases' file as it is now."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    spec = describe_file(bundle / SELECTION_BIAS)
    manifest["files"][SELECTION_BIAS] = {"sha256": spec.sha256, "size": spec.size}
    (bundle / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({TENSOR: np.zeros((3, 15), np.float32)}, "holds other tensors; expected .*3, 16"),
        ({TENSOR: np.zeros((3, 16), np.float16)}, "holds other tensors"),
        ({"bias": np.zeros((3, 16), np.float32)}, "holds other tensors"),
        ({TENSOR: np.full((3, 16), np.nan, np.float32)}, "NaN"),
    ],
)
def test_biases_that_are_not_the_models_are_refused(
    tmp_path: Path, bundle: Path, tensors: dict[str, np.ndarray], problem: str
) -> None:
    broken = copied(bundle, tmp_path / "broken")
    save_file(tensors, broken / SELECTION_BIAS)
    restated(broken)
    with pytest.raises(BundleError, match=problem):
        Model.load(broken)
    (broken / SELECTION_BIAS).write_bytes(b"not safetensors")
    restated(broken)
    with pytest.raises(BundleError, match="not a readable safetensors file"):
        Model.load(broken)


def test_a_bundle_without_its_biases_is_refused(tmp_path: Path, bundle: Path) -> None:
    broken = copied(bundle, tmp_path / "broken")
    manifest = json.loads((broken / "manifest.json").read_text())
    del manifest["files"][SELECTION_BIAS]
    (broken / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"selection_bias\.safetensors is missing"):
        Bundle.open(broken)


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"n_group": 3}, "routing.groups does not divide the experts"),
        ({"topk_group": 5}, "routing.top_groups out of range"),
        ({"num_experts_per_tok": 9}, "routing.top_k is more than there are experts"),
        ({"routed_scaling_factor": -1}, "routed_scaling_factor: malformed"),
    ],
)
def test_a_config_whose_rule_cannot_be_is_refused(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        export(make_biased(tmp_path / "checkpoint", **config), tmp_path / "bundle")
