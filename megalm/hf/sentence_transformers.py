"""The files that make a Hugging Face folder one of sentence-transformers: which vector of a text is taken, the linear
layer after it, and that vectors have length 1.

They are written as sentence-transformers wrote them before its version 5, which later versions read as well.
"""

from __future__ import annotations

from pathlib import Path

import torch

from megalm.hf import files
from megalm.plugin.contract.hugging_face import HuggingFaceHead

MODULES = "modules.json"
_POOLINGS = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
_MODES = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken")


def write_modules(
    folder: Path, told: HuggingFaceHead, width: int, longest: int, layer: dict[str, torch.Tensor]
) -> None:
    """Write them beside the model's. ``width``: of its vectors; ``longest``: a row in tokens; ``layer``: weight
    (outputs, width) and bias of the head's linear layer, empty where there is none.
    """
    names = ["Transformer", "Pooling", *(["Dense"] if layer else []), "Normalize"]
    paths = ["", *(f"{number}_{name}" for number, name in enumerate(names[1:], 1))]
    listed = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
        for number, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
    for path in paths[1:]:
        (folder / path).mkdir()
    files.write_json(folder / MODULES, listed)
    files.write_json(folder / "sentence_bert_config.json", {"max_seq_length": longest, "do_lower_case": False})
    files.write_json(folder / "config_sentence_transformers.json", {"similarity_fn_name": "cosine"})
    chosen = _POOLINGS[str(told.pooling)]
    files.write_json(
        folder / paths[1] / files.CONFIG,
        {"word_embedding_dimension": width, **{f"pooling_mode_{mode}": mode == chosen for mode in _MODES}},
    )
    if layer:
        outputs = layer["weight"].shape[0]
        files.write_json(
            folder / paths[2] / files.CONFIG,
            {
                "in_features": width,
                "out_features": outputs,
                "bias": True,
                "activation_function": "torch.nn.modules.linear.Identity",
            },
        )
        files.write_tensors(folder / paths[2], {f"linear.{leaf}": each for leaf, each in layer.items()}, 10**12)
