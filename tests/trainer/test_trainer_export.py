# SPDX-License-Identifier: Apache-2.0
"""A run's weights in the form of transformers, what they write, and runs that start from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flora_dist.cli import main
from flora_dist.trainer.config import Config
from flora_dist.trainer.configfile import load_config
from flora_dist.trainer.data import IGNORED, evenly_spread
from flora_dist.trainer.model import build_model, sum_of_losses
from flora_dist.trainer.preflight import check_run
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from flora_dist.trainer.tokenizer import ByteTokenizer
from tests.trainer.support import TINY, metrics, tiny_overrides

Tiny = Callable[..., Config]
FLORA = "optimizer={name: flora, lr: 1e-2}"
ALONE = World(process_rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 60 steps that has learned the words of the corpus."""
    folder = tmp_path_factory.mktemp("runs")
    steps = ("train.steps=60", "evaluation.every=60", "train.log_every=60", "checkpoint.every=60")
    assert run(load_config(TINY, tiny_overrides(corpus, folder, FLORA, *steps))) == 0
    return folder / "tiny"


def test_an_export_loads_in_transformers_with_the_loss_of_the_run_and_generates(
    trained: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "exported"
    assert main(["export", str(trained), str(out)]) == 0
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    corpus = check_run(tiny(), ALONE).corpus
    inputs, labels = corpus.validation.batch(evenly_spread(len(corpus.validation), 10))
    with torch.no_grad():
        loss = float(sum_of_losses(model.eval(), inputs, labels)) / int((labels != IGNORED).sum())
    assert loss == pytest.approx(metrics(trained)[-1]["validation_loss"], abs=1e-5)
    assert loss < 3.5  # an untrained model has log(257) = 5.55
    encoded = tokenizer("fox jumps", return_tensors="pt", add_special_tokens=False)
    written = model.generate(**encoded, max_new_tokens=5, do_sample=False, pad_token_id=256)
    assert tokenizer.decode(written[0]).startswith("fox jumps")

    capsys.readouterr()
    for place in (trained, out):
        assert main(["generate", str(place), "--prompt", "the ", "--tokens", "8"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second
    assert first.startswith("the ")
    assert len(first) > len("the ")


def test_the_exported_byte_tokenizer_is_the_one_that_trained(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "Grüße, \x00\t\n  <|en 日本 \U0001f600 don't"
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert numbers == ByteTokenizer().encode(text).tolist()
    assert tokenizer.decode(numbers, clean_up_tokenization_spaces=False) == text
    assert (len(tokenizer), tokenizer.eos_token_id) == (257, 256)


def test_a_run_starts_from_the_weights_of_another_and_none_of_its_state(
    trained: Path, tiny: Tiny, tmp_path: Path
) -> None:
    warm = tiny(FLORA, "output.name=warm", "model.config=null", f"model.pretrained={trained}")
    weights = build_model(warm.model, check_run(warm, ALONE).network, seed=0).state_dict()
    exported = tmp_path / "exported"
    assert main(["export", str(trained), str(exported)]) == 0
    same = AutoModelForCausalLM.from_pretrained(exported).state_dict()
    assert weights.keys() == same.keys()
    assert all(torch.equal(weights[name], same[name]) for name in weights)
    assert run(warm) == 0
    assert metrics(tmp_path / "warm")[0]["loss"] < 3.5


def test_what_cannot_be_exported_is_refused_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    below_a_file = tmp_path / "file" / "out"
    below_a_file.parent.write_text("")
    for arguments, message in (
        (
            ["export", tmp_path, tmp_path / "out"],
            f"an export takes the folder of a run; '{tmp_path}",
        ),
        (["export", trained, trained], "an export overwrites nothing"),
        (["export", trained, below_a_file], f"Not a directory: '{below_a_file.parent}"),
        (["generate", tmp_path, "--prompt", "a"], "a trained model is the folder of a run"),
        (["generate", trained, "--prompt", ""], "generating needs a prompt"),
        (["generate", trained, "--prompt", "a", "--temperature", "nan"], "generating needs"),
    ):
        capsys.readouterr()
        assert main(list(map(str, arguments))) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_model_writes_up_to_its_last_position_and_not_beyond(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def written(length: int, tokens: int) -> int:
        capsys.readouterr()
        prompt, count = "a" * length, str(tokens)
        return main(["generate", str(trained), "--prompt", prompt, "--tokens", count])

    assert written(250, 6) == 0  # the tiny llama has 256 positions, and a byte is a token
    for length, tokens, message in (
        (250, 7, "has 250 tokens and --tokens asks for 7 more. Lower --tokens to 6 or less."),
        (256, 1, "has 256 tokens and --tokens asks for 1 more. Shorten the prompt."),
    ):
        assert written(length, tokens) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_a_run_without_a_whole_checkpoint_has_nothing_to_export(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Path(shutil.copytree(trained, tmp_path / "damaged"))
    (weights,) = (trained / "checkpoints").glob("step-*/*.distcp")
    weights.write_bytes(weights.read_bytes()[:-1])
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert weights.name in capsys.readouterr().err
    shutil.rmtree(trained / "checkpoints")
    assert main(["export", str(trained), str(tmp_path / "out")]) == 2
    assert "checkpoint.every" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
