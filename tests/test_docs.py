# SPDX-License-Identifier: Apache-2.0
"""What README and docs show runs: every Python block, every JSON, every command."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flora_dist import cli
from flora_dist.trainer.configfile import load_config
from tests.docs_blocks import ROOT, blocks

PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.deepspeed
@pytest.mark.timeout(240)
def test_every_python_block_runs_as_it_stands() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.docs_blocks"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    every = [name for name, _ in blocks("python")]
    assert set(every) <= set(done.stdout.splitlines())
    assert f"ran {len(every)} blocks" in done.stdout
    assert len(every) >= 9


def test_every_block_has_a_language_that_is_tested() -> None:
    languages = {
        language
        for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
        for language in re.findall(r"^```(\w*)[^\n]*\n.*?^```$", page.read_text(), re.M | re.S)
    }
    assert languages <= {"python", "json", "yaml", "bash"}


def test_every_page_is_in_the_list_of_pages_and_on_the_site() -> None:
    listed = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    site = (ROOT / "docs" / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        path = page.relative_to(ROOT / "docs")
        assert f"docs/{path}\n" in site, path
        assert path.parent.name or path.name == "README.md" or f"]({path})" in listed, path


def test_no_recipe_of_the_readme_is_longer_than_twelve_lines() -> None:
    recipes = [code for name, code in blocks("python") if name.startswith("README")]
    assert len(recipes) == 4  # the fifth is DeepSpeed's JSON
    assert max(len(code.splitlines()) for code in recipes) <= 12
    assert all(len(line) <= 100 for code in recipes for line in code.splitlines())


def test_every_json_block_is_json() -> None:
    assert all(json.loads(code) for _, code in blocks("json"))


def test_every_yaml_block_is_of_sections_that_a_config_has(tmp_path: Path) -> None:
    shown = [yaml.safe_load(code) for _, code in blocks("yaml")]
    assert len(shown) >= 2
    for name in ("answers.jsonl", "chats.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "my-tokenizer").mkdir()
    tree = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text(encoding="utf-8"))
    tree["model"]["config"] = str(ROOT / "configs" / "model" / "llama_tiny.json")
    for sections in shown:
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree | sections))
        config = load_config(tmp_path / "run.yaml")
        assert config.data.tokenizer == str(tmp_path / "my-tokenizer")


def fault_of(command: str) -> str | None:
    """What is wrong with a command of a bash block; None: its program would take it."""
    words = shlex.split(command, comments=True)
    match words:
        case ["flora-dist", *arguments]:
            try:
                cli._parser().parse_args(arguments)
            except SystemExit:
                return "flora-dist does not take it"
        case ["pip", "install", *_, what]:
            extras = re.findall(r"\w+", what)
            known = all(re.search(rf"^{extra} = \[", PYPROJECT, re.M) for extra in extras)
            return None if known else "an extra that there is not"
        case [program, *_] if program.startswith("./"):
            return None if os.access(ROOT / program, os.X_OK) else "no such program"
        case [python, "-m", module, *_] if python.endswith("python"):
            return None if importlib.util.find_spec(module) else "no such module"
        case ["source", _]:
            return None
        case _:
            return "nobody tests it"
    return None


def commands() -> list[str]:
    lines = [code.replace("\\\n", " ").splitlines() for _, code in blocks("bash")]
    return [line for each in lines for line in each if line.strip()]


def test_every_command_is_one_that_its_program_takes() -> None:
    assert len(commands()) >= 10
    assert {line: fault for line in commands() if (fault := fault_of(line)) is not None} == {}


def test_a_command_that_nobody_takes_is_noticed(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in (
        *("flora-dist trian --config x", "pip install '.[tain]'", "./launch/no.sh", "rm -r x"),
        "python -m tests.nothing",
    ):
        assert fault_of(wrong) is not None
    capsys.readouterr()


def planned(gpus: int, *more: str) -> dict[str, float]:
    """GiB per GPU by method, as the planner's command in docs/clusters.md computes them."""
    (command,) = (line for line in commands() if "llama_1b" in line)
    words = shlex.split(command)[1:]
    words[words.index("--gpus") + 1] = str(gpus)
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
        assert cli.main([*words, *more, "--json"]) == 0
    plans = json.loads(told.getvalue())["plans"]
    return {plan["method"]: plan["total_bytes"] / 2**30 for plan in plans}


def test_the_bytes_of_the_readmes_table_are_the_planners() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| GiB per GPU: llama, 1.3 billion parameters |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    shown = {
        re.sub(r"\*| \(.*\)", "", name): [float(value.removesuffix(" GiB")) for value in values[:3]]
        for name, *values in rows
    }
    state, gradients = ("--state-bits", "4"), ("--gradients", "compressed")
    full = ("--momentum-dtype", "float32")
    dense, exact, small, least = (
        [planned(gpus, *how) for gpus in (1, 2, 8)]
        for how in ((), full, state, (*state, *gradients))
    )
    methods = {
        "AdamW": ("AdamW", dense),
        "8-bit AdamW": ("AdamW, 8-bit", dense),
        "Flora": ("Flora 1/4, dense", dense),
        'Flora, `state_dtype="float32"`': ("Flora 1/4, dense", exact),
        "Flora, `state_bits=4`": ("Flora 1/4, dense", small),
        "the same, gradients in 4 bits, whole on each": ("Flora 1/4, compressed, 4 bits", least),
        "the same, bf16 weights, no fp32 masters": (
            "Flora 1/4, compressed, 4 bits, bf16 alone",
            least,
        ),
        "and rank 4, `orthogonalise=64`": ("Flora 1/16, dense", exact),
        "GaLore, rank 512": ("GaLore, rank 512 (ddp)", dense),
        "LoRA, rank 64": ("LoRA, rank 64", dense),
    }
    assert shown == {
        name: [round(plan[label], 1) for plan in plans] for name, (label, plans) in methods.items()
    }


def test_the_five_minutes_of_the_readme_work_on_a_text_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    Path("mytext.txt").write_text("Once upon a time there was a small model. " * 400)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme.partition("## Your own data in five minutes")[2].partition("\n## ")[0]
    (block,) = re.findall(r"^```bash\n(.*?)^```$", section, re.M | re.S)
    for line in block.splitlines():
        words = shlex.split(line, comments=True)[1:]
        shorter = ["--set", "train.steps=40"] if words[0] == "train" else []
        assert cli.main([*words, *shorter]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "\nOnce" in said
    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained("mine-hf").config.vocab_size == 257
