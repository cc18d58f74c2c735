# SPDX-License-Identifier: Apache-2.0
"""The Hugging Face Trainer with Flora: one script on every layout, and what it says before a step.

One call of a pool trains many times: a launch costs more than all of its trainings.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from deepspeed.ops.op_builder import CPUAdamBuilder
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainerState, TrainingArguments

import flora_dist.transformers
from flora_dist import Flora
from flora_dist.frameworks.transformers import check as checking
from flora_dist.frameworks.transformers.check import FloraCheck
from flora_dist.frameworks.transformers.optimizer import FloraFactory
from tests.conftest import launched_pool_of
from tests.hosts.small import LR, MODES, Samples, build, distance
from tests.hosts.trainer_runs import SKETCHES, Ran, Way, arguments, by_hand, resumed, trained

pytestmark = pytest.mark.deepspeed
Case = tuple[str, str]
"""A mode, and how Flora is asked for."""
RUNS: list[Case] = [
    *((mode, "argument") for mode in MODES),
    ("zero3", "word"),
    ("zero2", "json"),
    ("ddp", "object"),
    ("plain", "sketched"),
    ("ddp", "sketched"),
    ("fsdp2", "sketched"),
    ("zero2", "sketched"),
]
RESUMED: list[Case] = [
    ("plain", "argument"),
    ("ddp", "argument"),
    ("fsdp2", "sketched"),
    ("zero2", "argument"),
    ("zero3", "json"),
]


def all_trained(cases: list[Case], folder: str) -> dict[Case, Ran]:
    return {case: trained(*case, f"{folder}/{'-'.join(case)}") for case in cases}


def all_resumed(cases: list[Case], folder: str) -> dict[Case, tuple[Ran, bool]]:
    return {case: resumed(*case, f"{folder}/{'-'.join(case)}") for case in cases}


def on_processes(body: Any, cases: list[Case], folder: Path) -> dict[Case, Any]:
    """Of rank 0, or of this process where one is enough."""
    single = [case for case in cases if case[0] == "plain"]
    several = [case for case in cases if case[0] != "plain"]
    found: dict[Case, Any] = body(single, str(folder))
    return found | launched_pool_of(2)(body, several, str(folder))[0] if several else found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Ran]:
    found: dict[Case, Ran] = on_processes(all_trained, RUNS, tmp_path_factory.mktemp("runs"))
    return found


@pytest.fixture(scope="module")
def plain_loops() -> dict[str, Ran]:
    # A JSON names no groups, nor does the script's own Flora: everything decays.
    one_group, two_groups = by_hand(kept=set()), by_hand()
    sketched_groups = by_hand(sketches=SKETCHES)
    one_sketched = by_hand(kept=set(), sketches=SKETCHES)
    return {
        "argument": two_groups,
        "word": two_groups,
        "json": one_group,
        "object": one_group,
        "sketched": sketched_groups,
        "word-sketched": sketched_groups,
        "json-sketched": one_sketched,
        "object-sketched": one_sketched,
    }


def assert_same(found: Ran, expected: Ran, case: Case) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=1e-6)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    # fp32: the summation order of two ranks, six steps.
    assert distance(found.weights, expected.weights) < 1e-5
    assert found.names == set(expected.weights), case


@pytest.mark.parametrize("case", RUNS, ids="-".join)
def test_one_script_is_the_plain_loop_on_every_layout(
    case: Case, runs: dict[Case, Ran], plain_loops: dict[str, Ran]
) -> None:
    assert_same(runs[case], plain_loops[case[1]], case)


def test_a_run_resumes_from_the_trainers_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    """Under ZeRO the Trainer loads before any callback, and resuming needed an attached engine."""
    for case, (_, is_equal) in on_processes(all_resumed, RESUMED, tmp_path).items():
        assert is_equal, case


# ---- what is refused, and said

STATE = TrainerState(max_steps=6)
"""As a Trainer has it at its start, on process 0."""


def refused(modes: list[str], folder: str) -> dict[str, str]:
    """What each mode says to a Trainer that is given ``optimizers=``."""
    said = {}
    for mode in modes:
        # Beside offload accelerate builds DeepSpeedCPUAdam, which compiles for a minute.
        load = patch.object(CPUAdamBuilder, "load")
        kinds = (ValueError, RuntimeError)  # ours, the Trainer's
        with load, pytest.raises(kinds, match=r"optimizers") as raised:
            trained(mode, "object", f"{folder}/{mode}")
        said[mode] = str(raised.value)
    return said


def test_optimizers_that_the_trainer_would_not_step_are_refused(tmp_path: Path) -> None:
    """Under DeepSpeed it trained AdamW, without a word."""
    modes = ["fsdp2", "zero2", "zero3", "offload"]
    for said in launched_pool_of(2)(refused, modes, str(tmp_path)):
        assert "is not allowed if PyTorch FSDP is enabled" in said.pop("fsdp2")  # its own words
        for words in said.values():
            assert "AdamW" in words or "DeepSpeedCPUAdam" in words
            assert "drops optimizers=" in words
            assert "optimizer_cls_and_kwargs=flora_dist.transformers.flora" in words


@pytest.mark.parametrize("asked", ["optimizers", "argument", "word"])
def test_a_trainer_that_would_step_another_optimizer_is_stopped(asked: str, tmp_path: Path) -> None:
    model = build()
    way = Way(options={"optim": "flora"} if asked == "word" else {})
    args = arguments("plain", way, str(tmp_path))
    given = Flora(model.named_parameters()) if asked == "optimizers" else None
    check = FloraCheck()
    check.on_init_end(args, None, None, model=model, optimizer=given)
    if asked == "argument":
        FloraFactory()(model)
    other = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match="about to train with AdamW"):
        check.on_train_begin(args, STATE, None, model=model, optimizer=other)
    mine = Flora(model.named_parameters())
    check.on_train_begin(args, STATE, None, model=model, optimizer=mine)


def test_a_trainer_says_once_before_its_first_step_what_the_settings_will_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = build()
    options = {"optim": "flora", "optim_args": "rank=4,block=16,momentum=flora_strict"}
    args = arguments("plain", Way(options=options), str(tmp_path), max_steps=2)
    Trainer(model=model, args=args, train_dataset=Samples()).train()
    said = capsys.readouterr().err
    words = "Flora: warning: momentum='flora_strict' moves weights only inside 4 of 16 directions"
    assert said.count(words) == 1
    assert "2 steps at kappa=1000" in said
    another = replace(STATE, is_world_process_zero=False)
    strict = Flora(model.named_parameters(), momentum="flora_strict")
    FloraCheck().on_train_begin(args, another, None, model=model, optimizer=strict)
    assert capsys.readouterr().err == ""


def test_a_trainer_with_another_optimizer_is_left_alone(tmp_path: Path) -> None:
    args = arguments("plain", Way(options={"optim": "adafactor"}), str(tmp_path), max_steps=1)
    Trainer(model=build(), args=args, train_dataset=Samples()).train()


def test_rates_come_from_the_trainers_arguments_unless_given(tmp_path: Path) -> None:
    model = build()
    args = arguments("plain", Way(), str(tmp_path))
    kind, settings = flora_dist.transformers.flora(rank=4, block=16)
    Trainer(model=model, args=args, train_dataset=Samples(), optimizer_cls_and_kwargs=(kind, {}))
    decaying, others = kind()(model, **settings).param_groups
    assert (decaying["lr"], decaying["weight_decay"]) == (LR, 0.1)
    assert (others["lr"], others["weight_decay"], others["rank"]) == (LR, 0.0, 4)
    assert all("norm" in name for name in others["param_names"])
    own, _ = kind()(model, lr=0.5, weight_decay=0.25).param_groups
    assert (own["lr"], own["weight_decay"]) == (0.5, 0.25)


def test_a_model_of_no_trainer_needs_its_rates() -> None:
    with pytest.raises(ValueError, match=r"takes lr from the Trainer.*pass lr="):
        FloraFactory()(nn.Linear(4, 4))


def test_an_unknown_setting_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no setting 'rnak'\. Did you mean 'rank'"):
        flora_dist.transformers.flora(rnak=8)
    options = {"optim": "flora", "optim_args": "rank=4,blokc=16"}
    args = arguments("plain", Way(options=options), str(tmp_path))
    with pytest.raises(ValueError, match=r"no setting 'blokc'\. Did you mean 'block'"):
        Trainer.get_optimizer_cls_and_kwargs(args, build())


def test_roles_that_optim_args_cannot_hold_are_refused_when_the_trainer_is_made(
    tmp_path: Path,
) -> None:
    words = "rank=4,roles={'head':{'rank':16,'state_bits':8}}"
    args = arguments("plain", Way(options={"optim": "flora", "optim_args": words}), str(tmp_path))
    with pytest.raises(ValueError, match=r"got \"'state_bits':8}}\" in .*flora_dist.transformers"):
        Trainer(model=build(), args=args, train_dataset=Samples())
    one = "roles={'head':{'rank':None}}"
    args = arguments("plain", Way(options={"optim": "flora", "optim_args": one}), str(tmp_path))
    _, settings = Trainer.get_optimizer_cls_and_kwargs(args, build())
    assert settings["roles"] == {"head": {"rank": None}}


def test_words_beside_a_json_that_decides_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "is_under_deepspeed", lambda: True)
    model, options = build(), {"optim": "flora", "optim_args": "rank=4"}
    args = arguments("plain", Way(options=options), str(tmp_path))
    mine = Flora(model.named_parameters())
    with pytest.raises(ValueError, match=r"optim_args='rank=4' would be ignored.*\"optimizer\""):
        FloraCheck().on_train_begin(args, STATE, None, model=model, optimizer=mine)
    built = FloraFactory()(model, lr=LR, weight_decay=0.0)
    FloraCheck().on_train_begin(args, STATE, None, model=model, optimizer=built)


def test_the_word_is_known_on_a_command_line(tmp_path: Path) -> None:
    words = ["--output_dir", str(tmp_path), "--optim", "flora", "--optim_args", "rank=none,lr=0.5"]
    (args,) = HfArgumentParser([TrainingArguments]).parse_args_into_dataclasses(words)
    _, settings = Trainer.get_optimizer_cls_and_kwargs(args, build())
    assert settings == {"rank": None, "lr": 0.5, "weight_decay": 0.0}


# ---- the rest of the table


MODES_OF_WAYS = {
    **dict.fromkeys(("argument", "word", "sketched", "word-sketched"), MODES),
    **dict.fromkeys(("json", "json-sketched"), ("zero2", "zero3", "offload")),
    **dict.fromkeys(("object", "object-sketched"), ("plain", "ddp")),
}
TABLE: list[Case] = [(mode, way) for way, modes in MODES_OF_WAYS.items() for mode in modes]


@pytest.mark.slow
@pytest.mark.parametrize("case", TABLE, ids="-".join)
def test_every_way_is_the_plain_loop_and_resumes_on_every_layout(
    case: Case, tmp_path: Path, plain_loops: dict[str, Ran]
) -> None:
    ((whole, is_equal),) = on_processes(all_resumed, [case], tmp_path).values()
    assert_same(whole, plain_loops[case[1]], case)
    assert is_equal
