"""Ways out: a native model as a stock one, with the same logits.

Layers of a native model may differ in size, those of a Llama may not. Zeros make them equal without
changing anything: a feed-forward unit or a head that nothing reads adds nothing. So every layer is padded to
the largest, and what comes out is an ordinary `LlamaForCausalLM` that any tool can load.

    >>> llama = to_llama(model)
    >>> llama.save_pretrained("exported")
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from cambia.errors import ExportError
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.models.config import CambiaConfig

_SAME_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)


def to_llama(model: CambiaForCausalLM) -> LlamaForCausalLM:
    """A stock Llama with the same logits; the native model stays as it is.

    Equal up to rounding. A float64 model's exported logits are only as good as the float32 in which stock
    Llama computes its norms and angles.

    Raises:
        ExportError: the model has no exact form as a Llama; the message says why.
    """
    config = llama_config(model.config)
    with torch.random.fork_rng(devices=[]):  # the random weights that are about to be replaced
        llama = LlamaForCausalLM(config)
    llama.to(dtype=model.dtype, device=model.device)
    source, targets = model.state_dict(), llama.state_dict()
    if source.keys() != targets.keys():
        odd = sorted(source.keys() ^ targets.keys())[0]
        raise ExportError(
            f"the tensor {odd!r} has no place in a Llama: merge or remove adapters and Parts before exporting"
        )
    llama.load_state_dict({name: _padded(source[name], target.shape) for name, target in targets.items()})
    llama.generation_config = model.generation_config
    return llama.train(model.training)


def llama_config(config: CambiaConfig) -> LlamaConfig:
    """The smallest Llama that holds a native model.

    Raises:
        ExportError: there is none.
    """
    if config.predictable_tokens is not None:
        raise ExportError(
            f"only the first {config.predictable_tokens} tokens can be predicted, and a Llama cannot hide "
            "the others: set model.config.predictable_tokens = None first; the loss then moves by their share"
        )
    layers = range(config.num_hidden_layers)
    shared = {config.num_heads(i) // config.num_kv_heads(i) for i in layers}
    if len(shared) > 1:
        raise ExportError(
            f"layers share a key/value head between {sorted(shared)} attention heads; a Llama has one ratio "
            "for all layers, and zero heads cannot change it"
        )
    (ratio,) = shared
    most = max(config.num_heads(i) for i in layers)
    # transformers wants the hidden size to be a multiple of the number of heads, whatever head_dim says.
    legal = [n for n in range(most, config.hidden_size + 1, ratio) if config.hidden_size % n == 0]
    if not legal:
        raise ExportError(
            f"no multiple of {ratio} from num_attention_heads={most} on divides "
            f"hidden_size={config.hidden_size}, as LlamaConfig demands"
        )
    return LlamaConfig(
        **{name: getattr(config, name) for name in _SAME_FIELDS},
        intermediate_size=max(config.ffn_size(i) for i in layers),
        num_attention_heads=legal[0],
        num_key_value_heads=legal[0] // ratio,
    )


def _padded(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Zeros behind the end of every axis; new heads come last, so old ones keep their groups."""
    missing = [(0, new - old) for old, new in zip(tensor.shape, shape, strict=True)]
    return F.pad(tensor, [size for pair in reversed(missing) for size in pair])
