# SPDX-License-Identifier: Apache-2.0
"""Names of the Hugging Face hub in a config: fetched first, so that all else reads local files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Final

from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import HUB
from flora_dist.trainer.optional_imports import needs_train_extra

# No code and no pickles: what a model, a tokenizer and a text are read from.
_MODEL: Final = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_TOKENIZER: Final = ("*.json", "*.jinja", "*.txt", "*.model")


def fetched(config: Config) -> Config:
    """The config with every name of the hub replaced by the local folder of what it names.

    Each machine fetches once, into the hub's own cache; its processes wait for one another there.

    Raises:
        ValueError: it is neither in the cache nor to be had, or is no name of the hub.
    """
    model, data = config.model, config.data
    if model.pretrained is not None:
        model = replace(model, pretrained=local("model.pretrained", model.pretrained, _MODEL))
    tokenizer = local("data.tokenizer", data.tokenizer, _TOKENIZER)
    validation = data.validation and text("data.validation", data.validation)
    corpus = text("data.corpus", data.corpus)
    data = replace(data, corpus=corpus, validation=validation, tokenizer=tokenizer)
    return replace(config, model=model, data=data)


def tokenizer_of(key: str, value: str) -> str:
    """The local folder of a tokenizer; names that are none of the hub's stay.

    Raises:
        ValueError: as `fetched`.
    """
    return local(key, value, _TOKENIZER)


def local(key: str, value: str, patterns: tuple[str, ...]) -> str:
    """The folder of a model's files of such names; values that are no name of the hub stay."""
    if not value.startswith(HUB):
        return value
    return str(_snapshot(key, value, value.removeprefix(HUB), "model", patterns))


def text(key: str, value: str) -> str:
    """The file or folder of a data set that `hub:owner/name/path` names; other values stay."""
    if not value.startswith(HUB):
        return value
    owner, _, rest = value.removeprefix(HUB).partition("/")
    name, _, inside = rest.partition("/")
    if not inside:
        raise ValueError(
            f"{key} must say which file or folder of the hub's data set it means; {value!r} does "
            f"not. Write {HUB}owner/name/path."
        )
    patterns = (inside, f"{inside}/*")
    path = _snapshot(key, value, f"{owner}/{name}", "dataset", patterns) / inside
    if not path.exists():
        raise ValueError(
            f"{key} must name a file or folder of the hub's data set; {owner}/{name} has no "
            f"{inside!r}. Correct the path."
        )
    return str(path)


def _snapshot(key: str, value: str, name: str, kind: str, patterns: tuple[str, ...]) -> Path:
    with needs_train_extra():
        from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=list(patterns)))
    except Exception as error:  # of the name, the login, the hub or the way to it
        raise ValueError(
            f"{key} must be on the hub or in its cache on this machine; {value!r} gave: "
            f"{' '.join(str(error).split())} Correct the name, log in with `hf auth login`, or, "
            "without a network, name a local folder."
        ) from error
