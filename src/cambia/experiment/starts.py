"""What a run starts from: a native model from scratch, or a checkpoint that exists.

Both say, before any text is prepared, whether they can be what the settings ask for, and then make the model.

    >>> start = PretrainedModel(path="checkpoints/llama")
    >>> start.check(sequence_length=512)
    >>> model = start.build(tokenizer, sequence_length=512)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Lt
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel

from cambia import files, rundir
from cambia.config import FieldError
from cambia.continual.methods.experts import EXPERTS_FOLDER
from cambia.data.tokenizers import BpeTokenizer, BytesTokenizer, ModelTokenizer, Tokenizer, TokenizerConfig
from cambia.errors import ConfigError, RunError
from cambia.models.architectures import ARCHITECTURES
from cambia.models.causal_lm import CambiaForCausalLM
from cambia.models.config import CambiaConfig
from cambia.models.parts.folder import EXPERTS, base_folder
from cambia.models.parts.lora_experts import LoraExperts
from cambia.models.parts.merging import merged
from cambia.models.saved import AVERAGED, load_model
from cambia.rundir import RunReader

MODELS: dict[str, str] = {
    "native": "cambia.experiment.starts:NativeModel",
    "pretrained": "cambia.experiment.starts:PretrainedModel",
}


class StartModel(ABC):
    """The model at the start of a run."""

    @abstractmethod
    def check(self, sequence_length: int) -> None:
        """Refuse settings that cannot become a model, as soon as they are read.

        Raises:
            FieldError: what is wrong, with its place in the tree.
        """

    @abstractmethod
    def read_by(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        """The tokenizer of the settings, or the one that this model has by default.

        Raises:
            FieldError: the model cannot be read with it.
        """

    @abstractmethod
    def ready(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        """Refuse a model that is not there or cannot be trained, before any text is prepared.

        Returns:
            The tokenizer to build, where the settings mean the model's own.

        Raises:
            FieldError: what is wrong, with its place in the tree.
        """

    @abstractmethod
    def can_grow(self) -> None:
        """Refuse a model whose own shape cannot change, where rules would change it.

        Raises:
            FieldError: with the families that can grow.
        """

    @abstractmethod
    def fit(self, tokenizer: Tokenizer) -> None:
        """Refuse a tokenizer whose ids the model has no place for.

        Raises:
            FieldError: with what repairs it.
        """

    @abstractmethod
    def build(self, tokenizer: Tokenizer, *, sequence_length: int) -> PreTrainedModel:
        """Make the model, on the CPU."""


@dataclass
class NativeModel(StartModel):
    """The native growable model, from scratch. Its fields are those of `CambiaConfig`."""

    hidden_size: Annotated[int, Gt(0)] = 128
    """Width of the residual stream."""
    intermediate_size: int | list[int] = 384
    """Width of the feed-forward layers, one for all or one for each."""
    num_hidden_layers: Annotated[int, Gt(0)] = 4
    """Depth."""
    num_attention_heads: int | list[int] = 4
    """Query heads."""
    num_key_value_heads: int | list[int] | None = None
    """Key/value heads; as many as query heads where it is left out."""
    head_dim: Annotated[int, Gt(0)] | None = None
    """Size of a head; hidden_size / num_attention_heads where it is left out."""
    tie_word_embeddings: bool = True
    """One matrix for the embedding and the head."""
    attention_bias: bool = False
    """Biases in attention."""
    mlp_bias: bool = False
    """Biases in the feed-forward layers."""
    attention_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0
    """Dropout on attention weights while training."""
    rope_theta: Annotated[float, Gt(0)] = 10000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: Annotated[float, Gt(0)] = 1e-5
    """Epsilon of the norms."""
    initializer_range: Annotated[float, Gt(0)] = 0.02
    """Standard deviation of new weights."""
    zero_init_residual: bool = False
    """Layers start silent: what they add to the residual stream is zero at first. Learns faster."""
    max_position_embeddings: Annotated[int, Gt(0)] | None = None
    """Longest sequence it is meant for; training.sequence_length where it is left out. Generation reads
    the last half of a longer text again as a prompt."""

    def check(self, sequence_length: int) -> None:
        try:
            self.config(vocab_size=1, eos_token_id=0, sequence_length=sequence_length)
        except ConfigError as error:
            raise FieldError(["model"], str(error)) from None
        if sequence_length > (self.max_position_embeddings or sequence_length):
            raise FieldError(
                ["training", "sequence_length"],
                f"{sequence_length} is longer than the model's max_position_embeddings "
                f"{self.max_position_embeddings}: raise --model.max_position_embeddings",
            )

    def read_by(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        if isinstance(tokenizer, ModelTokenizer):
            raise FieldError(
                ["tokenizer"], "a model from scratch has no tokenizer of its own: take bytes, bpe or hf"
            )
        return tokenizer or BytesTokenizer()

    def ready(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        return self.read_by(tokenizer)

    def can_grow(self) -> None:
        """It can."""

    def fit(self, tokenizer: Tokenizer) -> None:
        """It is made to the tokenizer's measure."""

    def build(self, tokenizer: Tokenizer, *, sequence_length: int) -> CambiaForCausalLM:
        return CambiaForCausalLM(
            self.config(
                vocab_size=tokenizer.vocab_size,
                eos_token_id=tokenizer.eos_id,
                sequence_length=sequence_length,
            )
        )

    def config(self, *, vocab_size: int, eos_token_id: int, sequence_length: int) -> CambiaConfig:
        """The model's config; the vocabulary is padded to a multiple of 8, which kernels like."""
        values = dict(vars(self))
        values["max_position_embeddings"] = self.max_position_embeddings or sequence_length
        theta = values.pop("rope_theta")
        return CambiaConfig(
            vocab_size=-(-vocab_size // 8) * 8,
            bos_token_id=eos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=eos_token_id,
            rope_parameters={"rope_type": "default", "rope_theta": theta},
            **values,
        )


@dataclass
class PretrainedModel(StartModel):
    """A checkpoint: a Hugging Face folder of a family that can grow, or a run or checkpoint of Cambia.

    Sizes are the checkpoint's, and so is the tokenizer unless `tokenizer` names another.
    """

    path: str = ""
    """A folder with config.json and .safetensors files, or the name of a run (its latest checkpoint)."""
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Of the weights while they train, and of the optimizer's moments, which are as precise as the weights.
    float32: small updates count, 16 bytes a parameter with AdamW; training.precision bfloat16 still computes
    in bfloat16 · bfloat16: 8 bytes a parameter, and updates below about 1/256 of a weight are lost to
    rounding · auto: as the checkpoint says, and float32 for one in float16, where second moments vanish."""
    expert: str | None = None
    """Of a checkpoint with experts: begin with the model that has this one in its weights."""
    keep_experts: bool = True
    """Of a checkpoint that learned with the method `experts`, when a run with that method begins: go on with
    its experts and with what is known of their texts. false: begin with the model alone."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("a pretrained model needs `path`: a folder with a model, or the name of a run")

    def check(self, sequence_length: int) -> None:
        # A folder that is not there is refused by `ready`, when it is needed: so a recipe can be shown
        # anywhere, and a run be read whose first checkpoint has moved.
        if self._place() is None:
            return
        longest = self.longest()
        if longest is not None and sequence_length > longest:
            raise FieldError(
                ["training", "sequence_length"],
                f"{sequence_length} is longer than the {longest} positions of the model {self.path}: give "
                f"--training.sequence_length {longest} or less",
            )

    def read_by(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        if isinstance(tokenizer, BytesTokenizer | BpeTokenizer):
            raise FieldError(
                ["tokenizer"],
                f"a {type(tokenizer).__name__} is for models from scratch: take the pretrained model's "
                "own, --tokenizer.type model, or another with --tokenizer.type hf and --tokenizer.path",
            )
        return tokenizer or ModelTokenizer()

    def ready(self, tokenizer: TokenizerConfig | None) -> TokenizerConfig:
        self.config()
        chosen = self.read_by(tokenizer)
        return chosen.of(self.folder()) if isinstance(chosen, ModelTokenizer) else chosen

    def can_grow(self) -> None:
        family = self.config().model_type
        if family not in ARCHITECTURES:
            raise self._wrong(
                f"holds a model of type {family!r}; those that can grow are {', '.join(ARCHITECTURES)}: "
                "leave out the growth rules, or let them add LoRA experts (cambia learn)"
            )

    def fit(self, tokenizer: Tokenizer) -> None:
        rows = self.config().vocab_size
        if tokenizer.vocab_size > rows:
            raise FieldError(
                ["tokenizer"],
                f"has {tokenizer.vocab_size} ids and the model {self.path} has {rows} rows of embedding: "
                f"add rows first, grow(model, AddTokens(to={tokenizer.vocab_size})) and save_pretrained, or "
                "read with the model's own tokenizer, --tokenizer.type model",
            )

    def build(self, tokenizer: Tokenizer, *, sequence_length: int) -> PreTrainedModel:
        model = load_model(self.folder(), dtype=self._dtype())
        if self.expert is not None:
            model = self._with_expert(model, self.expert)
        _end_with(model, tokenizer.eos_id)
        return model

    def _with_expert(self, model: PreTrainedModel, name: str) -> PreTrainedModel:
        experts = experts_beside(self.path, model)
        names = experts.names if experts is not None else []
        if experts is None or name not in names:
            known = f"its experts are {', '.join(names)}" if names else "it has no experts"
            raise FieldError(["model", "expert"], f"there is no {name!r} beside {self.path}: {known}")
        return merged(model, experts[name])

    def folder(self) -> Path:
        """Where the model's files are.

        Raises:
            FieldError: there is no model that can be opened safely.
        """
        folder = self._place()
        if folder is None:
            raise self._wrong("is no folder here, nor a run's name (`cambia runs list` shows the runs)")
        if not (folder / "config.json").is_file():
            adapter = (folder / "adapter_config.json").exists()
            hint = ": it is an adapter, merge it into its model first (merge_and_unload)" if adapter else ""
            raise self._wrong(f"has no config.json{hint}")
        if not any(folder.glob("*.safetensors")):
            pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            if not pickles:
                raise self._wrong("has no .safetensors file: the weights are missing")
            raise self._wrong(
                f"holds {pickles[0]} and no .safetensors; a pickle can run code when it is opened. Where you "
                'trust its source: python -c "from transformers import AutoModelForCausalLM as A; '
                f"A.from_pretrained('{folder}').save_pretrained('{folder}')\""
            )
        return folder

    def config(self) -> PreTrainedConfig:
        """The checkpoint's config.

        Raises:
            FieldError: it is of a family that transformers does not know, or quantised.
        """
        folder = self.folder()
        plain = files.read_json(folder / "config.json")
        family = plain.get("model_type") if isinstance(plain, dict) else None
        if family not in CONFIG_MAPPING:
            raise self._wrong(f"holds a model of type {family!r}, which this transformers does not know")
        if plain.get("quantization_config"):
            kind = plain["quantization_config"].get("quant_method", "quantised")
            raise self._wrong(
                f"is quantised ({kind}), and quantised weights neither train nor grow: take the original, or "
                "write model.dequantize() with save_pretrained"
            )
        return AutoConfig.from_pretrained(folder, local_files_only=True)

    def longest(self) -> int | None:
        """The positions of the model; None where they have no end (ALiBi)."""
        return getattr(self.config(), "max_position_embeddings", None)

    def _place(self) -> Path | None:
        """The model's folder, whether or not a model is in it; None where there is none."""
        for folder in (files.expanded(self.path), rundir.runs_root() / self.path):
            if (folder / rundir.CONFIG_YAML).is_file():
                try:
                    return model_folder(folder)
                except RunError as error:
                    raise FieldError(["model", "path"], str(error)) from None
            if folder.is_dir():
                return averaged_folder(folder)
        return None

    def _dtype(self) -> torch.dtype | None:
        if self.dtype != "auto":
            return {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        return torch.float32 if self.config().dtype == torch.float16 else None

    def _wrong(self, problem: str) -> FieldError:
        return FieldError(["model", "path"], f"{self.path} {problem}")


def _end_with(model: PreTrainedModel, eos_id: int) -> None:
    """Generation stops at the token that ends the documents of this run, too."""
    settings: Any = model.generation_config
    ends = settings.eos_token_id
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if eos_id not in known:
        settings.eos_token_id = [*known, eos_id] if known else eos_id
    # Some checkpoints name a temperature and leave sampling off; transformers would not save that again.
    said = settings.to_diff_dict()
    if any(said.get(name) is not None for name in ("temperature", "top_p", "top_k")):
        settings.do_sample = True


# ---- models of runs ------------------------------------------------------------------------------


def model_folder(path: str | Path) -> Path:
    """The folder that holds the model of a run, a checkpoint (also RUN/ckpt_step200), or of Hugging Face.

    Of a run that averages its weights it is the averaged model, and of a folder of experts the model that
    they stand beside.

    Raises:
        RunError: there is none.
    """
    path = Path(path)
    for folder in (path, rundir.runs_root() / path):
        if (folder / EXPERTS).is_file():
            return base_folder(folder)
        if (folder / "config.json").exists() and any(folder.glob("*.safetensors")):
            return averaged_folder(folder)
    reader = RunReader(path)
    saved = reader.checkpoints()
    if not saved:
        raise RunError(f"the run {reader.name!r} has no checkpoint yet; wait until it saved one")
    return averaged_folder(saved[0])


def experts_beside(path: str | Path, model: PreTrainedModel) -> LoraExperts | None:
    """The experts of a run, a checkpoint or a folder of experts, beside its model; None where there are none.

    Args:
        model: loaded from `model_folder` of the same.

    Raises:
        CheckpointError: a file or an expert is not what was written, or the model is another one.
    """
    path = Path(path)
    given = next((p for p in (path, rundir.runs_root() / path) if (p / EXPERTS).is_file()), None)
    folder = given or model_folder(path) / EXPERTS_FOLDER
    return LoraExperts.from_pretrained(folder, model) if (folder / EXPERTS).is_file() else None


def averaged_folder(checkpoint: Path) -> Path:
    """The averaged model beside a checkpoint's own, where the run keeps one; else the checkpoint."""
    folder = checkpoint / AVERAGED
    return folder if folder.is_dir() else checkpoint
