"""What uses NVIDIA apex, where there is no apex, where PyPI's other project is, and where NVIDIA's is (a stand-in)."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.errors import PluginError
from megalm.plugin.contract.kernels import KernelRequest
from megalm.plugin.manager import PluginManager

REQUEST = KernelRequest("rms_norm", "cuda", "bfloat16", {"width": 64})

STAND_IN = """
import torch
def fused_rms_norm_affine(x, weight, shape, eps):
    return torch.nn.functional.rms_norm(x, shape, weight, eps)
def fused_layer_norm_affine(x, weight, bias, shape, eps):
    return torch.nn.functional.layer_norm(x, shape, weight, bias, eps)
"""


@pytest.fixture(autouse=True)
def _nothing_imported() -> Iterator[None]:
    """What a test imports as apex is gone after it."""
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("apex", "fused_layer_norm_cuda")]:
        del sys.modules[name]


def _apex():  # type: ignore[no-untyped-def]
    return PluginManager.for_launch(None).load_class("kernels", "apex")()


def _package(root: Path, name: str, source: str = "") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(source)
    return folder


def test_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    why = _apex().supports(REQUEST)
    assert why is not None
    assert "apex is not installed" in why
    assert "github.com/NVIDIA/apex" in why


def test_the_other_project_is_explained_and_not_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _package(tmp_path, "apex", "raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    why = _apex().supports(REQUEST)
    assert why is not None
    assert "not NVIDIA's" in why
    assert "pip uninstall apex" in why
    assert str(tmp_path) in why


def test_without_its_extensions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _package(_package(tmp_path, "apex"), "normalization")
    monkeypatch.syspath_prepend(tmp_path)
    assert "without its CUDA extensions" in _apex().supports(REQUEST)


def test_serves_what_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = _package(_package(tmp_path, "apex"), "normalization")
    (folder / "fused_layer_norm.py").write_text(STAND_IN)
    (tmp_path / "fused_layer_norm_cuda.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    apex = _apex()
    assert apex.supports(REQUEST) is None
    assert "CUDA alone" in apex.supports(KernelRequest("rms_norm", "cpu", "float32"))
    assert "float32" in apex.supports(KernelRequest("rms_norm", "cuda", "float64"))
    assert "not for rope" in apex.supports(KernelRequest("rope", "cuda", "float32"))
    x, weight = torch.randn(3, 64), torch.randn(64)
    found = apex.functions(REQUEST)["rms_norm"](x, weight, 1e-5, offset=1.0)
    torch.testing.assert_close(found, torch.nn.functional.rms_norm(x, (64,), weight + 1, 1e-5))
    layer = apex.functions(KernelRequest("layer_norm", "cuda", "float32"))["layer_norm"]
    expected = torch.nn.functional.layer_norm(x, (64,), weight, None, 1e-5)
    torch.testing.assert_close(layer(x, weight, None, 1e-5), expected)


class FusedAdam(torch.optim.AdamW):
    """Counts as apex's does: in the groups, and state is made where there is none."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] = torch.tensor(float(group["step"] - 1))
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                del self.state[p]["step"]


def test_adamw_goes_on_from_the_state_that_a_checkpoint_has() -> None:
    counted = importlib.import_module("megalm_plugins.optimizers.apex_adamw").counted
    start, gradients = torch.randn(7), torch.randn(6, 7)

    def steps(optimizer: torch.optim.Optimizer, weight: torch.Tensor, which: range) -> None:
        for i in which:
            weight.grad = gradients[i].clone()
            optimizer.step()

    whole = start.clone()
    steps(torch.optim.AdamW([whole], lr=0.1), whole, range(6))
    first = start.clone()
    optimizer = counted(FusedAdam)([first], lr=0.1, adam_w_mode=True)
    steps(optimizer, first, range(3))
    assert {key for key, value in optimizer.state[first].items() if value.dim() == 0} == {"step"}
    second = first.clone()
    resumed = counted(FusedAdam)([second], lr=0.1, adam_w_mode=True)
    resumed.state[second] = {key: value.clone() for key, value in optimizer.state[first].items()}
    steps(resumed, second, range(3, 6))
    torch.testing.assert_close(second, whole)


def test_adamw_says_what_is_missing() -> None:
    plugin = PluginManager.for_launch(None).load_class("optimizers", "apex_adamw")
    with pytest.raises(PluginError, match=r'"apex_adamw": apex is not installed.*"adamw" is torch'):
        plugin.build({"w": torch.zeros(2)}, 0.1, plugin.Config())
