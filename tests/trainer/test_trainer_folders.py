# SPDX-License-Identifier: Apache-2.0
"""Folders of models and tokenizers that bring code of their own: it is not run, nobody is asked."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.model import read_model_config
from flora_dist.trainer.run import run
from flora_dist.trainer.tokenizer import ByteTokenizer, FolderTokenizer

CODE = """
from pathlib import Path
Path({proof!r}).touch()
from transformers import PretrainedConfig, PreTrainedTokenizer
class Config(PretrainedConfig):
    model_type = "mine"
class Tokenizer(PreTrainedTokenizer):
    pass
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One whose code would leave a file; on stdin somebody says yes to everything."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    found = tmp_path / "model"
    found.mkdir()
    (found / "mine.py").write_text(CODE.format(proof=str(tmp_path / "has run")))
    config = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (found / "config.json").write_text(json.dumps(config))
    names = {"AutoTokenizer": ["mine.Tokenizer", None]}
    tokenizer = {"tokenizer_class": "Tokenizer", "auto_map": names}
    (found / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return found


def test_code_of_a_model_is_not_run_and_nobody_is_asked(folder: Path) -> None:
    """transformers asked on stdin, where a rank waits for ever or reads somebody else's word."""
    with pytest.raises(ValueError, match="Code that comes with a model is never run"):
        read_model_config(ModelConfig(config=None, pretrained=str(folder)), ByteTokenizer(), 16)
    assert not (folder.parent / "has run").exists()
    assert sys.stdin.tell() == 0


def test_code_of_a_tokenizer_is_not_run_and_nobody_is_asked(folder: Path) -> None:
    with pytest.raises(ValueError, match="Code that comes with it is never run"):
        FolderTokenizer(folder)
    assert not (folder.parent / "has run").exists()
    assert sys.stdin.tell() == 0


def test_a_folder_without_a_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="or a folder that holds a tokenizer") as caught:
        FolderTokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_that_only_seems_writable_is_refused_in_one_line(
    tiny: Callable[..., Config],
) -> None:
    # Root may write everywhere, by what the system says beforehand.
    with pytest.raises(ValueError, match=r"folder must be writable; '/proc/no.*[Cc]hange output"):
        run(tiny("output.folder=/proc/no"))
