"""Who decides what a batch trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cambia.data.batches import Batch
from cambia.records import Allocation, Signals


class PlainAllocator:
    """Every batch trains everything: pretraining."""

    def allocate(self, batch: Batch, signals: Signals) -> Allocation:
        return Allocation()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass
