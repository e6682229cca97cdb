"""NVIDIA apex's fused norms.

apex is built from source, and PyPI's project of that name is another one, an authentication toolkit for the Pyramid web
framework. Whoever runs ``pip install apex`` gets that, so it is looked for and explained.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.api import KernelProvider, KernelRequest

if TYPE_CHECKING:
    from torch import Tensor

_BUILD = "see https://github.com/NVIDIA/apex for how to build it, with --cuda_ext"


class Apex(KernelProvider):
    """rms_norm and layer_norm on CUDA."""

    def supports(self, request: KernelRequest) -> str | None:
        if request.operation not in ("rms_norm", "layer_norm"):
            return f"apex is used for rms_norm and layer_norm, not for {request.operation}"
        if request.device != "cuda":
            return "apex computes on CUDA alone"
        if request.dtype == "float64":
            return "it is for float32, bfloat16 and float16"
        return problem()

    def functions(self, request: KernelRequest) -> Mapping[str, Callable[..., Any]]:
        import torch

        fused = importlib.import_module("apex.normalization.fused_layer_norm")

        def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, offset: float = 0.0) -> Tensor:
            scale, shift = weight + offset if offset else weight, torch.zeros_like(weight) if bias is None else bias
            out: Tensor = fused.fused_layer_norm_affine(x, scale, shift, weight.shape, eps)
            return out

        def rms_norm(x: Tensor, weight: Tensor, eps: float, *, offset: float = 0.0) -> Tensor:
            out: Tensor = fused.fused_rms_norm_affine(x, weight + offset if offset else weight, weight.shape, eps)
            return out

        return {"layer_norm": layer_norm} if request.operation == "layer_norm" else {"rms_norm": rms_norm}


def problem(extension: str = "fused_layer_norm_cuda") -> str | None:
    """Why apex, with one of its compiled extensions, cannot be used here; none where it can."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return f"apex is not installed; {_BUILD}"
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    if not any((folder / "normalization").is_dir() for folder in folders):
        where = spec.origin or next(map(str, folders), "unknown")
        return (
            f"the apex that is installed ({where}) is not NVIDIA's but PyPI's project of the same name; "
            f"pip uninstall apex, then {_BUILD}"
        )
    if importlib.util.find_spec(extension) is None:
        return f"apex was installed without its CUDA extensions; {_BUILD}"
    return None
