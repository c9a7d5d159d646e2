"""Whether a folder of experts holds what was written: `cambia verify DIR`.

Every file is compared with its SHA-256, the tensors of every expert with theirs, and the model that they
stand beside, where it is there, with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cambia.errors import CheckpointError
from cambia.models.hashing import fingerprint
from cambia.models.parts.folder import ADAPTERS, EXPERTS, base_folder, opened
from cambia.models.parts.peft_format import read_adapter
from cambia.models.saved import load_model


@dataclass(frozen=True)
class CheckedExpert:
    """One expert of a folder."""

    name: str
    state: str
    parameters: int
    sha256: str
    """Of its tensors, as experts.json says."""
    held: bool | None
    """Whether they are these; None: it could not be asked, without the model."""


@dataclass(frozen=True)
class ExpertFolder:
    """What a folder of experts holds."""

    folder: Path
    base: str
    """The class of the model."""
    experts: tuple[CheckedExpert, ...]
    damaged: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def held(self) -> bool:
        """Whether all is what was written."""
        return not self.damaged and all(expert.held is not False for expert in self.experts)


def is_expert_folder(path: str | Path) -> bool:
    """Whether experts are to be in a folder."""
    return (Path(path) / EXPERTS).is_file()


def verify_experts(path: str | Path) -> ExpertFolder:
    """Compare a folder of experts with the hashes that stand in it."""
    folder = Path(path)
    try:
        about = opened(folder)
    except CheckpointError as error:
        return ExpertFolder(folder, "", (), (str(error),), ())
    lines: list[Mapping[str, Any]] = about["experts"]
    damaged, notes, model = list[str](), list[str](), None
    try:
        model = load_model(base_folder(folder))
    except CheckpointError as error:
        notes.append(f"the model itself could not be compared: {error}")
    if model is not None and fingerprint(model) != about["base"]["sha256"]:
        damaged.append(
            f"the model in {base_folder(folder)} is not the one that the experts were trained beside"
        )
    checked = []
    for line in lines:
        held = None
        if model is not None and not damaged:
            part = read_adapter(folder / ADAPTERS / line["name"], line["name"], model)
            held = part.sha256 == line["sha256"]
        checked.append(CheckedExpert(line["name"], line["state"], line["parameters"], line["sha256"], held))
    return ExpertFolder(folder, about["base"]["class"], tuple(checked), tuple(damaged), tuple(notes))
