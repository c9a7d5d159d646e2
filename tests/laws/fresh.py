"""A process of its own that reads saved models, stock ones without this library."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from tests.laws.examples import logits

READER = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)

def read(kind):
    for folder in sorted(Path(sys.argv[1]).glob(kind + "/*")):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            said = model(input_ids=load_file(folder / "batch.st")["batch"], use_cache=False).logits
        save_file({"logits": said}, folder / "said.st")

read("stock")
assert not [name for name in sys.modules if name.partition(".")[0] == "cambia"]
if Path(sys.argv[1], "native").exists():
    import cambia.models.causal_lm
    read("native")
"""


def write(model: PreTrainedModel, root: Path, name: str, batch: Tensor) -> tuple[Path, Tensor]:
    """Save a model for the reader; the folder, and the logits that it should find."""
    kind = "native" if type(model).__module__.startswith("cambia.") else "stock"
    folder = root / kind / name
    model.save_pretrained(folder)
    save_file({"batch": batch}, folder / "batch.st")
    return folder, logits(model, batch)


def check_read(root: Path, expected: dict[Path, Tensor]) -> None:
    """Have everything under `root` read by one fresh process; the logits must be the same bits."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", READER, str(root)], env=environment, check=True, timeout=240)
    for folder, said in expected.items():
        assert torch.equal(load_file(folder / "said.st")["logits"], said), folder.name
