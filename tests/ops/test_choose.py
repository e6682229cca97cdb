"""The choice of kernels: who serves, who is refused with which reason, and what is left to defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megalm.config.schema import KernelsConfig
from megalm.errors import ConfigError
from megalm.ops import choose
from megalm.ops.choose import BUILT_IN, Decision, choose_kernels
from megalm.ops.kernels import PLAIN, Kernels
from megalm.ops.native.library import Absent, Library
from megalm.plugin.contract.kernels import OPERATIONS, KernelRequest
from megalm.plugin.manager import PluginManager

BUILT = Library(Path(), "cache", without_cuda=None, record={"architectures": ["sm_80", "sm_90"], "sources": "5" * 64})
WITHOUT_CUDA = Library(Path(), "cache", without_cuda="no nvcc", record={})


def _chosen(request: KernelRequest, name: str = "auto", manager: PluginManager | None = None) -> Decision:
    return choose_kernels([request], {request.operation: name}, manager)[1][0]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("device", "dtype", "library", "expected"),
    [
        ("cpu", "float32", BUILT, "cpu"),
        ("cuda", "bfloat16", BUILT, "cuda"),
        ("cuda", "bfloat16", WITHOUT_CUDA, None),
        ("cpu", "float32", Absent("no C++ compiler"), None),
        ("cpu", "float64", BUILT, None),
    ],
)
def test_auto_takes_the_first_that_serves(
    monkeypatch: pytest.MonkeyPatch, operation: str, device: Any, dtype: Any, library: Any, expected: str | None
) -> None:
    monkeypatch.setattr(choose, "library", lambda: library)
    request = KernelRequest(operation, device, dtype)
    decision = _chosen(request)
    if expected is None:
        expected = "reference" if BUILT_IN["torch"].supports(request) else "torch"
        assert device in decision.passed_over
    assert decision.implementation == expected
    assert decision.sources == ("5" * 64 if expected in ("cpu", "cuda") else None)
    assert set(decision.passed_over) <= {device, "torch"}
    assert expected in str(decision)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Capabilities of the GPUs that torch finds."""
    found: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: found[index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    return found


def test_kernels_without_code_for_a_gpu(monkeypatch: pytest.MonkeyPatch, gpus: list[tuple[int, int]]) -> None:
    """They would fail at their first launch."""
    monkeypatch.setattr(choose, "library", lambda: BUILT)
    request = KernelRequest("rms_norm", "cuda", "bfloat16")
    gpus += [(9, 0), (12, 0), (8, 6)]
    assert _chosen(request).implementation == "cuda"
    gpus.append((7, 5))
    decision = _chosen(request)
    assert decision.implementation == "torch"
    why = decision.passed_over["cuda"]
    assert "built for sm_80, sm_90, and GPU 3 is sm_75" in why
    assert 'MEGALM_CUDA_ARCH="75;86;90;120" builds others' in why
    assert why in str(decision)
    with pytest.raises(ConfigError, match=r'kernels\.rms_norm = "cuda": .*GPU 3 is sm_75: MEGALM_CUDA_ARCH='):
        _chosen(request, "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("a run on the processor wakes CUDA"))
    assert _chosen(KernelRequest("rms_norm", "cpu", "float32")).implementation == "cpu"


def test_what_torch_computes_of_a_native_operation_is_said_and_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "library", lambda: BUILT)
    decision = _chosen(KernelRequest("activation", "cpu", "float32"))
    assert str(decision) == "cpu (relu without a bias: torch, whose own is as fast or faster)"
    assert decision.as_dict()["parts"] == dict(decision.parts)
    assert _chosen(KernelRequest("layer_norm", "cpu", "float32")).parts
    assert not _chosen(KernelRequest("activation", "cuda", "bfloat16")).parts
    assert not _chosen(KernelRequest("rms_norm", "cpu", "float32")).parts
    calls: list[str] = []
    chosen = choose._PlainByTorch(lambda x, bias, kind: calls.append(kind) or x)
    x = torch.randn(3, 4)
    assert torch.equal(chosen(x, None, "relu"), x.relu())
    assert calls == []
    for bias, kind in ((torch.ones(4), "relu"), (None, "silu"), (None, "gelu"), (None, "gelu_tanh")):
        chosen(x, bias, kind)
    assert calls == ["relu", "silu", "gelu", "gelu_tanh"]


def test_a_name_is_taken_or_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "library", lambda: Absent("no C++ compiler"))
    assert _chosen(KernelRequest("rms_norm", "cpu", "float32"), "reference").implementation == "reference"
    requests = [KernelRequest("rms_norm", "cpu", "float32"), KernelRequest("layer_norm", "cpu", "float32")]
    with pytest.raises(ConfigError) as caught:
        choose_kernels(requests, {"rms_norm": "cuda", "layer_norm": "cpu"}, None)
    assert 'kernels.rms_norm = "cuda": the run is on cpu' in str(caught.value)
    assert 'kernels.layer_norm = "cpu": the kernels are not built: no C++ compiler' in str(caught.value)


def test_an_unknown_name_lists_those_there_are() -> None:
    manager = PluginManager.for_launch(None)
    with pytest.raises(ConfigError, match=r'kernels\.rms_norm: .*"apx".*did you mean "apex".*cuda, cpu, torch'):
        choose_kernels([KernelRequest("rms_norm", "cpu", "float32")], {"rms_norm": "apx"}, manager)


def test_what_nobody_requests_keeps_its_default() -> None:
    kernels, decisions = choose_kernels([], {"rms_norm": "cuda"}, None)
    assert kernels == PLAIN
    assert decisions == ()


def test_a_plugin_serves_and_what_it_leaves_out_is_made(fake_dist: Any) -> None:
    fake_dist(
        "third-kernels",
        {"third": "third_kernels"},
        {
            "third_kernels.py": """
            from megalm.api import Component, KernelProvider, hookimpl
            MEGALM_API = (1, 3)
            @hookimpl
            def megalm_kernels():
                return [Component("third", "third_kernels:Third"), Component("wrong", "third_kernels:Wrong")]
            class Third(KernelProvider):
                def supports(self, request):
                    return None if request.sizes["width"] % 8 == 0 else "the width must be a multiple of 8"
                def functions(self, request):
                    return {"rms_norm": lambda x, weight, eps: 2 * x * weight}
            class Wrong:
                pass
            """
        },
    )
    manager = PluginManager.for_launch(None)
    asked = {"rms_norm": "third"}
    kernels, decisions = choose_kernels([KernelRequest("rms_norm", "cpu", "float64", {"width": 16})], asked, manager)
    assert str(decisions[0]) == "third (asked for)"
    x, one = torch.full((16,), 3.0), torch.ones(16)
    assert torch.equal(kernels.rms_norm(x, one, 1e-5), 2 * x)
    normed, total = kernels.add_rms_norm(x, one, one, 1e-5)
    assert torch.equal(normed, 2 * (x + 1))
    assert torch.equal(total, x + 1)
    with pytest.raises(ConfigError, match="the width must be a multiple of 8"):
        choose_kernels([KernelRequest("rms_norm", "cpu", "float64", {"width": 12})], asked, manager)
    with pytest.raises(ConfigError, match=r"must be a subclass of megalm\.api\.KernelProvider"):
        choose_kernels([KernelRequest("rms_norm", "cpu", "float64")], {"rms_norm": "wrong"}, manager)


def test_every_operation_can_be_chosen_and_is_complete() -> None:
    assert set(KernelsConfig.model_fields) == set(OPERATIONS)
    functions = [name for names in OPERATIONS.values() for name in names]
    assert sorted(functions) == sorted(Kernels.__dataclass_fields__)
    for operation in OPERATIONS:
        for provider in BUILT_IN.values():
            request = KernelRequest(operation, "cpu", "float32", {})
            if provider.supports(request) is None:
                assert set(choose.completed(operation, provider.functions(request))) == set(OPERATIONS[operation])
