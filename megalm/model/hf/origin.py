"""What an imported checkpoint remembers of the folder that it came from, in the state of its manifest.

With it an export gives back what was imported, byte for byte: the configuration with keys that megalm does not read,
the type of the weights, which tensors were not there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from megalm.errors import CheckpointError

KEY = "hugging_face"
"""Of the manifest's state."""
FOLDER = "hf"
"""Of a checkpoint: the files that are not tensors, as they were."""


class Origin(BaseModel):
    """The folder that was imported."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    config: dict[str, Any]
    lm_head: bool
    pooler: bool
    nsp: bool
    bare: bool
    """Names lacked the prefix that a backbone has inside a larger model."""
    dtype: str
    """Of the most tensors, and of all that are not named here:"""
    dtypes: dict[str, str] = {}
    """By Hugging Face's name."""
    seeded: list[str] = []
    """Logical tensors that the folder lacked: they have seeded initial values."""
    extra: list[str] = []
    """Logical tensors of the folder that the objective's model does not have."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Origin | None:
        """From a manifest's state; none where the checkpoint was not imported."""
        if KEY not in state:
            return None
        try:
            return cls.model_validate(state[KEY])
        except ValidationError as error:
            raise CheckpointError(f"the checkpoint's state.{KEY} is damaged: {error.errors()[0]['msg']}") from error


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` and its like."""
    return str(dtype).removeprefix("torch.")
