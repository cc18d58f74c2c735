# SPDX-License-Identifier: Apache-2.0
"""What a run is made of: the config's sections for the network and for its text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from flora_dist.trainer.optional_imports import needs_train_extra

with needs_train_extra():
    from pydantic import (
        AfterValidator,
        ConfigDict,
        Field,
        StrictBool,
        StrictFloat,
        StrictInt,
        StrictStr,
        ValidationInfo,
    )
    from pydantic.dataclasses import dataclass

STDLIB: Final = "python-stdlib"
BYTE: Final = "byte"
HUB: Final = "hub:"
"""What a name of the Hugging Face hub begins with, so that nothing is fetched unasked."""

_OF_THE_HUB = frozenset({"model.pretrained", "data.corpus", "data.validation", "data.tokenizer"})

KNOWN = ConfigDict(extra="forbid", allow_inf_nan=False)
Positive = Annotated[StrictInt, Field(ge=1)]


def found(key: str, reserved: str | None = None) -> AfterValidator:
    """Finds a path of a file's config: from the working directory, else from the file's folder."""

    def find(value: str, info: ValidationInfo) -> str:
        folder: Path | None = info.context  # None where there is no file
        if folder is None or value == reserved:
            return value
        if value.startswith(HUB) and key in _OF_THE_HUB:
            return value
        for candidate in (Path(value), folder / value):
            if candidate.exists():
                return str(candidate)
        also = f" (the one built in is {reserved!r})" if reserved else ""
        hub = f", or write {HUB}{value} for the hub's" if _may_be_of_the_hub(key, value) else ""
        raise ValueError(
            f"{key} must name something that exists; {value!r} does not, neither from the working "
            f"directory nor from {str(folder)!r}. Correct the path{also}{hub}."
        )

    return AfterValidator(find)


def _may_be_of_the_hub(key: str, value: str) -> bool:
    """Whether it looks like `owner/name`, and with a path behind it for texts."""
    return key in _OF_THE_HUB and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)+", value) is not None


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class LoraConfig:
    """Adapters of peft (arXiv 2106.09685): two factors of each matrix train, and nothing else."""

    rank: Positive
    """Of the two factors."""
    alpha: Positive | None = None
    """The adapter is scaled by alpha / rank; None: twice the rank."""
    dropout: StrictFloat = 0.0
    """Of the adapter's input."""
    targets: tuple[StrictStr, ...] | None = None
    """Ends of the names of the linear layers that get one; None: all but the head."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"model.lora.dropout must be at least 0 and below 1; it is {self.dropout!r}. "
                "Correct it."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class ModelConfig:
    """Which network is trained, what of it, and how it computes.

    The vocabulary is always the tokenizer's.
    """

    config: Annotated[StrictStr, found("model.config")] | None = None
    """A transformers config (.json); its weights are drawn from `train.seed`."""
    pretrained: Annotated[StrictStr, found("model.pretrained")] | None = None
    """A local folder written by `save_pretrained`, or that of a run: its newest weights, without
    optimizer state, are the starting point. `hub:owner/name` fetches one of the hub first."""
    frozen: tuple[StrictStr, ...] = ()
    """Patterns of names of parameters that stand still, such as `model.embed_tokens.*`."""
    lora: LoraConfig | None = None
    """Train adapters in place of the network."""
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = "auto"
    """Which of transformers' kinds of attention; `auto`: its own choice."""
    checkpointing: StrictBool = False
    """Keep each layer's inputs alone and compute its activations again in the backward pass."""
    loss_chunk: Positive | None = None
    """Tokens whose logits exist at once, and the loss is their sum; None: all of a micro-batch."""
    compile: StrictBool = False
    """`torch.compile` each of the transformer's layers."""

    def __post_init__(self) -> None:
        if (self.config is None) == (self.pretrained is None):
            raise ValueError(
                "model needs exactly one of config and pretrained; "
                f"config={self.config!r}, pretrained={self.pretrained!r}. Remove one or set one."
            )


@dataclass(frozen=True, kw_only=True, config=KNOWN)
class DataConfig:
    """Which text is read, what of it counts, and how it is cut into sequences."""

    corpus: Annotated[StrictStr, found("data.corpus", STDLIB)]
    """A file, a folder of files, `python-stdlib`: the sources of the Python that runs, or
    `hub:owner/name/path`: a file or folder of a data set of the hub."""
    validation: Annotated[StrictStr, found("data.validation")] | None = None
    """Text of the same form to validate on; None: some of the corpus is held out."""
    format: Literal["auto", "text", "jsonl", "parquet", "tokens"] = "auto"
    """`auto` goes by the file's ending: .jsonl/.json, .parquet, .npy (tokens that `flora-dist
    tokenize` wrote, read from disk as they are needed), everything else is text."""
    field: StrictStr = "text"
    """The column of jsonl and parquet files that holds the document."""
    prompt: StrictStr | None = None
    """With `response`, the columns of an instruction and its answer: only the answer counts."""
    response: StrictStr | None = None
    """See `prompt`."""
    messages: StrictStr | None = None
    """The column of conversations, lists of `{role, content}`: only the assistant's turns count."""
    tokenizer: Annotated[StrictStr, found("data.tokenizer", BYTE)] = BYTE
    """`byte` (256 bytes and one end-of-document token), a local Hugging Face folder, or
    `hub:owner/name`."""
    sequence_length: Positive = 256
    """Tokens per sequence."""
    validation_every: Annotated[StrictInt, Field(ge=2)] = 20
    """Every so many documents, one goes to validation and never to training."""
    cache: StrictStr | None = None
    """A folder where corpora are kept as tokens: one process tokenizes, and all of this and later
    runs map what it wrote. None: every process tokenizes at each start."""

    def __post_init__(self) -> None:
        if (self.prompt is None) != (self.response is None):
            raise ValueError(
                "data.prompt and data.response belong together; "
                f"they are {self.prompt!r} and {self.response!r}. Set both or none."
            )
        if self.messages is not None and self.prompt is not None:
            raise ValueError(
                "a corpus holds conversations or prompts with responses; data.messages="
                f"{self.messages!r} and data.prompt={self.prompt!r}. Remove one."
            )
