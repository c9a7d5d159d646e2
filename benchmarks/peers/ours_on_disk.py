"""Cambia's side, from checkpoint to checkpoint without a live model.

python -m peers.ours_on_disk add_layers CHECKPOINT GROWN --amount 5
"""

from __future__ import annotations

import json
from pathlib import Path

from cambia.growth.disk.offline import grow_checkpoint
from peers.ours import OPERATORS
from peers.process import arguments

if __name__ == "__main__":
    options = arguments(__doc__ or "", OPERATORS)
    operators = OPERATORS[options.operation](options.amount)
    grow_checkpoint(Path(options.source), *operators, out=Path(options.target), check="no")
    print(json.dumps({}))
