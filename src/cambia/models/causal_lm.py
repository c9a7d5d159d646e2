"""The native language model: a decoder in Llama's layout whose layers may differ in size.

Parameter names, arithmetic and defaults are Llama's, so with equal sizes its logits are those of
`LlamaForCausalLM`, and tools that know Llama know it: PEFT, `generate`, the Hub. Three things differ. Each
layer reads its own sizes from the config, so it can grow alone. A training step moves less memory
(`cambia.nn.fused`). And the loss can be had without the logits:

    >>> model = CambiaForCausalLM(CambiaConfig(vocab_size=256))
    >>> model(input_ids, labels=input_ids).logits                       # as in Hugging Face, (B, T, V)
    >>> model(input_ids, shift_labels=targets, skip_logits=True).loss   # targets: what follows each position
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    initialization,
)
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from cambia.errors import ConfigError
from cambia.models.config import CambiaConfig
from cambia.nn.attention import CausalAttention, RotaryTables
from cambia.nn.ffn import ExpandableFFN
from cambia.nn.fused import IGNORE_INDEX, RMSNorm, cross_entropy, linear_cross_entropy

# B batch, T time, S keys (cached ones and T new), C hidden size, V vocabulary


class CambiaDecoderLayer(GradientCheckpointingLayer):
    """Attention and feed-forward, each reading a normed copy of the residual stream and adding to it."""

    def __init__(self, config: CambiaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = CausalAttention(config, layer_idx)
        self.mlp = ExpandableFFN(config.hidden_size, config.ffn_size(layer_idx), bias=config.mlp_bias)
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden: Tensor,
        rotary: RotaryTables,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """(B, T, C) -> (B, T, C); the arguments are those of `CausalAttention`."""
        hidden = hidden + self.self_attn(
            self.input_layernorm(hidden),
            rotary,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
        )
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class CambiaPreTrainedModel(PreTrainedModel):
    """What transformers must know about native models."""

    config: CambiaConfig
    config_class = CambiaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CambiaDecoderLayer"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """As in transformers, and then the layers fall silent if the configuration says so."""
        super().initialize_weights()
        if self.config.zero_init_residual:
            for layer in self.modules():
                if isinstance(layer, CambiaDecoderLayer):
                    # transformers' own zeros_ leaves alone what was loaded from a file
                    initialization.zeros_(layer.self_attn.o_proj.weight)
                    initialization.zeros_(layer.mlp.down_proj.weight)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the weights then lie in aligned memory, so that it repeats its bits."""
        loaded = super().from_pretrained(*args, **kwargs)
        align_memory(loaded[0] if isinstance(loaded, tuple) else loaded)  # output_loading_info=True gives two
        return loaded


@torch.no_grad()
def align_memory(model: nn.Module) -> None:
    """Move each tensor to memory of its own.

    Tensors read from a safetensors file lie wherever the file puts them, seldom at a multiple of 64 bytes.
    Vectorized kernels then begin and end their blocks elsewhere and round sums in another order: measured,
    a resumed run left the uninterrupted one by the last bit after one backward pass.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


class CambiaModel(CambiaPreTrainedModel):
    """The trunk: embedding, layers, final norm."""

    def __init__(self, config: CambiaConfig):
        super().__init__(config)
        config.check_sizes()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(CambiaDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Token ids (B, T), or embeddings (B, T, C), to the normed residual stream (B, T, C)."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ConfigError("the model takes exactly one of input_ids= and inputs_embeds=")
        if kwargs.get("output_attentions"):
            raise ConfigError("output_attentions=True is not possible: the scores never exist as a whole")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        mask = self._mask(hidden, attention_mask, position_ids, past_key_values)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(seen, seen + hidden.shape[1], device=hidden.device).unsqueeze(0)
        rotary = RotaryTables.of(self.config, position_ids, dtype=hidden.dtype)

        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        between: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                between.append(hidden)
            hidden = layer(hidden, rotary, attention_mask=mask, past_key_values=past_key_values)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*between, hidden) if output_hidden_states else None,
        )

    def _mask(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
    ) -> Tensor | None:
        """(B, 1, T, S), or None where plain causality is all there is to say, as in most training."""
        if attention_mask is None and position_ids is None and past_key_values is None:
            return None
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        return cast("Tensor | None", mask)


class CambiaForCausalLM(CambiaPreTrainedModel, GenerationMixin):
    """The trunk and a head that predicts the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: CambiaConfig):
        super().__init__(config)
        self.model = CambiaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V), and with `labels` or `shift_labels` the mean loss in nats per token.

        Args:
            labels: (B, T), the input ids again; position t is scored on label t + 1. -100 is ignored.
            shift_labels: (B, T), what follows each position; takes the place of `labels`.
            logits_to_keep: only the last n positions' logits, or those at the given indices; 0 for all.
            skip_logits: compute the loss alone; the logits then never exist as a whole and come back as None.
            num_items_in_batch: divide the summed loss by this instead of the number of targets.

        Raises:
            ConfigError: `skip_logits` without targets.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = outputs.last_hidden_state
        targets = shift_labels
        if targets is None and labels is not None:
            targets = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        loss, logits = self._head(hidden, targets, logits_to_keep, skip_logits, num_items_in_batch)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
        )

    def _head(
        self,
        hidden: Tensor,
        targets: Tensor | None,
        logits_to_keep: int | Tensor,
        skip_logits: bool,
        num_items: Tensor | int | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss and logits, each None where it was not asked for."""
        if targets is None and skip_logits:
            raise ConfigError(
                "skip_logits=True leaves nothing to compute; pass labels= or shift_labels= with it"
            )
        predictable = self.config.predictable_tokens
        if targets is not None and skip_logits and _is_bare(self.lm_head):
            weight = self.lm_head.weight[:predictable]
            return linear_cross_entropy(hidden, weight, targets, num_items=num_items), None
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden[:, kept])  # (B, T, V)
        if predictable is not None:
            is_hidden = torch.arange(logits.shape[-1], device=logits.device) >= predictable
            logits = logits.masked_fill(is_hidden, -torch.inf)
        if targets is None:
            return None, logits
        loss = cross_entropy(logits, targets[:, kept], num_items=num_items)
        return loss, None if skip_logits else logits


def _is_bare(head: nn.Module) -> bool:
    """Whether calling the head multiplies with its weight and does nothing more: no adapter, hook or bias."""
    hooks = len(head._forward_hooks) + len(head._forward_pre_hooks)
    return type(head) is nn.Linear and head.bias is None and not hooks


AutoConfig.register("cambia", CambiaConfig)
AutoModel.register(CambiaConfig, CambiaModel)
AutoModelForCausalLM.register(CambiaConfig, CambiaForCausalLM)
