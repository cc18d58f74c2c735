# SPDX-License-Identifier: Apache-2.0
"""Trackers beside metrics.jsonl, MFU, and names of the hub."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flora_dist.trainer.arrange import arranged
from flora_dist.trainer.config import Config
from flora_dist.trainer.config_data import ModelConfig
from flora_dist.trainer.mfu import flops_per_token, load_of_a_token
from flora_dist.trainer.model import build_model, read_network, sum_of_losses
from flora_dist.trainer.replicated import World
from flora_dist.trainer.run import run
from flora_dist.trainer.token_files import tokenize
from tests.trainer.support import ROOT, metrics

Tiny = Callable[..., Config]
ALONE = World(process_rank=0, size=1, device=torch.device("cpu"))
QUICK = ("optimizer={name: flora, lr: 1e-2}", "train.steps=2")
LISTENER = """
import json
class Listener:
    def __init__(self, run):
        self.path = run.folder / "heard.json"
        facts = [run.name, run.label, run.first_step, run.config["train"]["steps"]]
        self.said = [facts]
    def add(self, step, values):
        self.said.append({"step": step, **values})
    def close(self):
        self.path.write_text(json.dumps(self.said))
"""


@pytest.fixture
def listener(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that offers the tracker `listener`."""
    site = tmp_path / "site"
    facts = site / "listening-1.0.dist-info"
    facts.mkdir(parents=True)
    (site / "listening.py").write_text(LISTENER)
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: listening\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[flora_dist.trackers]\nlistener = listening:Listener\n"
    )
    monkeypatch.syspath_prepend(str(site))


@pytest.mark.usefixtures("listener")
def test_a_tracker_that_nobody_offers_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"'lissener' is neither \(listener offered\)"):
        run(tiny(*QUICK, "output.tracker=lissener"))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize(
    ("package", "setting"),
    [("wandb", "output.tracker=wandb"), ("tensorboard", "output.tensorboard=true")],
)
def test_a_tracker_without_its_package_is_refused_with_the_remedy(
    package: str, setting: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"'{package}', which is not installed. Run: pip install"):
        run(tiny(*QUICK, setting))
    assert not (tmp_path / "tiny").exists()


class UsageError(Exception):
    """What wandb raises."""


def stand_in(mode: str, said: list[Any]) -> ModuleType:
    """What of wandb 0.31 is called; the package itself was tried by hand, without a network."""
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)

    def login(*, prompt: bool) -> None:
        assert not prompt
        raise UsageError("No API key\nconfigured.")

    def init(**facts: Any) -> Any:
        said.append((facts["name"], facts["group"], facts["config"]["train"]["steps"]))
        return SimpleNamespace(
            log=lambda values, *, step: said.append((step, sorted(values))),
            finish=lambda: said.append("finished"),
        )

    settings = SimpleNamespace(settings=SimpleNamespace(mode=mode))
    for name, value in {
        "setup": lambda: settings,
        "login": login,
        "init": init,
        "errors": SimpleNamespace(Error=UsageError),
    }.items():
        setattr(module, name, value)
    return module


def test_wandb_gets_the_records_of_each_optimizer_as_a_run_of_its_own(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[Any] = []
    monkeypatch.setitem(sys.modules, "wandb", stand_in("offline", said))
    beside = "compare={name: adamw, lr: 1e-3}"
    assert run(tiny(*QUICK, beside, "output.tracker=wandb")) == 0
    first, second = said[:4], said[4:]
    assert first[0] == ("tiny, Flora", "tiny", 2)
    assert second[0] == ("tiny, AdamW, compare", "tiny", 2)
    for each in (first, second):
        assert [step for step, _ in each[1:3]] == [1, 2]
        assert {"loss", "validation_loss"} <= set(each[2][1])
        assert each[3] == "finished"


def test_wandb_without_a_login_is_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", stand_in("online", []))
    with pytest.raises(ValueError, match=r"No API key configured\. Log in with `wandb login`, or"):
        run(tiny(*QUICK, "output.tracker=wandb"))
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", ["llama_tiny", "gpt2"])
@pytest.mark.parametrize("frozen", [(), ("*mlp*",)], ids=["all", "frozen"])
def test_the_flops_of_a_token_are_those_that_torch_counts(
    name: str, frozen: tuple[str, ...]
) -> None:
    path = ROOT / "configs" / "model" / f"{name}.json"
    network = read_network(path)
    for key in ("n_layer", "n_embd", "vocab_size"):  # GPT-2 small, smaller
        if name == "gpt2":
            setattr(network, key, {"n_layer": 2, "n_embd": 24, "vocab_size": 50}[key])
    # Eager: the fused kind's backward pass multiplies once more than its forward pass asks for.
    config = ModelConfig(config=str(path), frozen=frozen, attention="eager")
    model = arranged(build_model(config, network, seed=0), config)
    tokens = torch.randint(0, 50, (2, 16))
    with FlopCounterMode(display=False) as counter:
        sum_of_losses(model, tokens, tokens).backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert flops_per_token(model, network, 16) == counted


def test_experts_have_no_flops_by_this_formula() -> None:
    path = ROOT / "configs" / "model" / "llama_tiny.json"
    network = read_network(path)
    model = build_model(ModelConfig(config=str(path)), network, seed=0)
    network.num_local_experts = 8
    assert flops_per_token(model, network, 16) is None


@pytest.mark.usefixtures("listener")
def test_a_tracker_of_another_package_hears_every_record_with_mfu_where_the_peak_is_known(
    tiny: Tiny, tmp_path: Path
) -> None:
    config = tiny(*QUICK, "backend.peak_tflops=1e-3", "output.tracker=listener")
    assert run(config) == 0
    network = read_network(Path(config.model.config or ""))
    model = build_model(config.model, network, seed=0)
    load = load_of_a_token(model, network, config, ALONE)
    assert load == (6 * (41_536 - 257 * 32) + 12 * 2 * 2 * 16 * 32) / 1e9
    records = metrics(tmp_path / "tiny")
    for record in records:
        assert record["mfu"] == pytest.approx(load * record["tokens_per_second"])
    facts, *heard = json.loads((tmp_path / "tiny" / "heard.json").read_text())
    assert facts == ["tiny", "Flora", 0, 2]
    assert heard == records
    with pytest.raises(ValueError, match=r"peak_tflops must be above 0"):
        tiny("backend.peak_tflops=0.0")


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache on this machine, empty, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def keep(cache: Path, name: str) -> Path:
    """The folder where the hub's library has what it fetched under a name."""
    (cache / name / "refs").mkdir(parents=True)
    (cache / name / "refs" / "main").write_text("abc")
    return cache / name / "snapshots" / "abc"


def test_names_of_the_hub_are_read_from_what_was_fetched(
    cached: Path, corpus: Path, word_tokenizer: Path, tiny: Tiny, tmp_path: Path
) -> None:
    tokenizer = keep(cached, "models--someone--words")
    tokenizer.parent.mkdir()
    tokenizer.symlink_to(word_tokenizer)
    texts = keep(cached, "datasets--someone--texts") / "data"
    texts.mkdir(parents=True)
    (texts / "part.jsonl").write_text(corpus.read_text())
    named = ("data.tokenizer=hub:someone/words", "data.corpus=hub:someone/texts/data")
    assert run(tiny(*QUICK, *named)) == 0
    local = (f"data.tokenizer={word_tokenizer}", f"data.corpus={texts}", "output.name=local")
    assert run(tiny(*QUICK, *local)) == 0
    losses = [[record["loss"] for record in metrics(tmp_path / name)] for name in ("tiny", "local")]
    assert losses[0] == losses[1]
    part, target = "hub:someone/texts/data/part.jsonl", tmp_path / "tokens.npy"
    assert tokenize(part, target, tokenizer="hub:someone/words", field="text") > 1000


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.tokenizer=hub:someone/none", "data.tokenizer must be on the hub or in its cache"),
        ("data.corpus=hub:someone/none/x", "without a network, name a local folder"),
        ("data.corpus=hub:someone/none", "Write hub:owner/name/path"),
        ("data.corpus=someone/none/x.jsonl", "or write hub:someone/none/x.jsonl for the hub's"),
        ("checkpoint.resume=hub:someone/none", "must name something that exists"),
    ],
)
@pytest.mark.usefixtures("cached")
def test_a_name_of_the_hub_that_cannot_be_had_is_refused_with_the_remedy(
    setting: str, words: str, tiny: Tiny, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run(tiny(*QUICK, setting))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "tiny").exists()
