"""A policy as something that writes, wherever a model's own `generate` would.

>>> continue_text(model, tokenizer, ["Once upon"], writer=PolicyWriter(policy, model, seed=1))
"""

# B rows, T time

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from cambia.decoding.drawing import Noise
from cambia.decoding.odds import RowParameters
from cambia.decoding.parameters import DecodingParameters
from cambia.decoding.policy import DecodingPolicy


class PolicyWriter:
    """Writes with a policy; of what `generate` is told only lengths and the tokens that end and fill count.

    Args:
        policy: whose weights and parameters are used.
        model: that writes.
        seed: of what is drawn, call after call.
        writer: whose `generate` writes, as in `DecodingPolicy.generate`.
        rows: parameters of each row of the batch, in place of the policy's own.
    """

    def __init__(
        self,
        policy: DecodingPolicy,
        model: PreTrainedModel,
        *,
        seed: int = 0,
        writer: Any = None,
        rows: Sequence[DecodingParameters] | None = None,
    ):
        self._policy, self._model, self._writer = policy, model, writer
        self._row_parameters = RowParameters.by_row(rows or [policy.parameters], model.device)
        greedy = all(each.is_greedy for each in rows or [policy.parameters])
        self._noise = None if greedy else Noise(seed)

    @property
    def device(self) -> torch.device:
        return self._model.device

    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, generation_config: GenerationConfig
    ) -> Tensor:
        """(B, T) -> (B, T + what was written)."""
        return self._policy.written(
            self._model,
            input_ids,
            attention_mask,
            self._noise,
            given=self._row_parameters,
            writer=self._writer,
            max_new_tokens=generation_config.max_new_tokens,
            eos_token_id=generation_config.eos_token_id,
            pad_token_id=generation_config.pad_token_id,
        )
