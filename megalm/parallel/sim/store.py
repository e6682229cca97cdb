"""The ranks' key-value store: a blocking read gives way to other ranks instead of blocking the only one that runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta

from torch.distributed import Store  # type: ignore[attr-defined]

from megalm.parallel.sim.fabric import Fabric
from megalm.parallel.wording import user_frames


@dataclass(eq=False)
class StoreWait:
    """A rank that waits for keys."""

    values: dict[str, bytes]
    keys: tuple[str, ...]
    frames: tuple[str, ...] = field(default_factory=user_frames)

    @property
    def done(self) -> bool:
        return all(key in self.values for key in self.keys)

    def __str__(self) -> str:
        return f"the key-value store for {', '.join(self.keys)}"


class SimulatedStore(Store):
    """One rank's view of the store."""

    def __init__(self, fabric: Fabric) -> None:
        super().__init__()
        self._fabric = fabric
        self._values = fabric.store

    def set(self, key: str, value: str | bytes) -> None:
        self._values[key] = value if isinstance(value, bytes) else str(value).encode()

    def get(self, key: str) -> bytes:
        self.wait([key])
        return self._values[key]

    def add(self, key: str, value: int) -> int:
        total = int(self._values.get(key, b"0")) + value
        self._values[key] = str(total).encode()
        return total

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        expected, desired = (v if isinstance(v, bytes) else v.encode() for v in (expected_value, desired_value))
        if self._values.get(key, b"") == expected:
            self._values[key] = desired
        return self._values.get(key, expected)

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def num_keys(self) -> int:
        return len(self._values)

    def set_timeout(self, timeout: timedelta) -> None:
        """Nothing: a wait without end is found as a deadlock."""

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        self._fabric.scheduler.wait([StoreWait(self._values, tuple(keys))])
