# SPDX-License-Identifier: Apache-2.0
"""What people type wrong: each subcommand says it in one line with the remedy, and ends with 2."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from flora_dist.cli import main
from tests.trainer.support import TINY

FILES = {
    "empty": b"",
    "hosts": b"a b c\n",
    "latin.txt": "café ".encode("latin-1") * 99,
    "latin.yaml": "# café\n".encode("latin-1"),
    "latin.json": '{"model_type": "é"}'.encode("latin-1"),
    "broken.yaml": b"train: [1,\n",
    "list.yaml": b"- 1\n",
    "broken.json": b"{",
    "deep.json": b"[" * 100_000,
    "mamba.json": b'{"model_type": "mamba9"}',
    "broken.jsonl": b'{"text": "a"\n',
    "text.txt": b"Once upon a time, small models met. " * 99,
    "taken.npy": b"",
    "folder/empty": b"",
    "model/config.json": b'{"model_type": "llama", "hidden_size": 64}',
    "damaged/manifest.json": b"{",
}
TRAIN = f"train --config {TINY} --set data.corpus=text.txt --set"
PLAN = "plan --backend ddp --model"

# A command line -> what its one line says, of the rule, the value and the remedy.
WRONG = {
    "": ("flora-dist: ", "COMMAND", "'flora-dist --help'"),
    "trian": ("invalid choice: 'trian'", "train", "'flora-dist --help'"),
    "train": ("required: --config", "'flora-dist train --help'"),
    "train --config no.yaml": ("--config must name a file; 'no.yaml'", "Check the path"),
    "train --config folder": ("'folder' is not a file", "Check the path"),
    "train --config latin.yaml": ("UTF-8", "'latin.yaml'", "0xe9 at offset 5", "iconv"),
    "train --config broken.yaml": ("broken.yaml must be YAML", "line 2", "Correct the text"),
    "train --config list.yaml": ("a mapping of sections", "[1]", "configs/README.md"),
    f"{TRAIN} train.steps": ("section.key=value", "'train.steps'", "For example"),
    f"{TRAIN} train.step=5": ("'train.step' is unknown", "Did you mean 'train.steps'"),
    f"{TRAIN} train.steps=-5": ("train.steps must be at least 1", "-5", "Raise it"),
    f"{TRAIN} train.steps=5 --steps 5": ("unrecognized arguments: --steps 5", "--help"),
    f"{TRAIN} data.corpus=latin.txt": ("UTF-8", "latin.txt", "0xe9", "iconv"),
    f"{TRAIN} data.corpus=broken.jsonl": ("be whole", "broken.jsonl", "line 1", "Write it anew"),
    f"{TRAIN} data.tokenizer=folder": ("data.tokenizer must be", "folder", "save_pretrained"),
    f"{TRAIN} model.config=broken.json": ("broken.json", "configs/model"),
    f"{TRAIN} model.config=deep.json": ("deep.json", "configs/model"),
    f"{TRAIN} model.config=latin.json": ("latin.json", "configs/model"),
    f"{TRAIN} model.config=mamba.json": ("mamba9", "configs/model"),
    f"{TRAIN} output.folder=empty/x": ("empty/x", "output.folder"),
    "convert damaged": ("required: DST", "'flora-dist convert --help'"),
    "convert no out": ("a source must be a folder", "'no'", "Name a checkpoint"),
    "convert empty out": ("a source must be a folder", "'empty'", "Name a checkpoint"),
    "convert damaged out": ("damaged/manifest.json", "Load another"),
    "tokenize no.txt out.npy": ("CORPUS must exist", "'no.txt'", "Correct the path"),
    "tokenize latin.txt out.npy": ("UTF-8", "'latin.txt'", "iconv"),
    "tokenize text.txt out.txt": ("ends in .npy", "'out.txt'", "Name it so"),
    "tokenize text.txt taken.npy": ("overwrites nothing", "'taken.npy'", "Name another"),
    "tokenize text.txt no/out.npy": ("into a folder", "'no' is none", "Make it"),
    "tokenize text.txt out.npy --feild a": ("--feild a", "'flora-dist tokenize --help'"),
    "export run": ("required: OUT", "'flora-dist export --help'"),
    "export no out": ("the folder of a run", "'no'", "Name <output.folder>/<output.name>"),
    "export no folder": ("overwrites nothing", "'folder' exists", "Name another folder"),
    "generate no": ("required: --prompt", "'flora-dist generate --help'"),
    "generate no --prompt a": ("the folder of a run", "'no' is neither", "Name <output.folder>"),
    "generate model --prompt a": ("a model's whole weights", "'model'", "save_pretrained"),
    "generate no --prompt a --tokens -1": ("at least one token", "-1", "Correct --prompt"),
    "generate no --prompt a --tokens few": ("--tokens: invalid int value: 'few'", "--help"),
    f"generate no --prompt a --seed {1 << 64}": ("--seed must lie in", f"{1 << 64}", "Correct it"),
    "launch": ("required: PROGRAM.", "'flora-dist launch --help'"),
    "launch no.py": ("PROGRAM must be a script", "'no.py'", "Mend the path"),
    "launch folder": ("PROGRAM must be a script", "'folder'", "Mend the path"),
    "launch --hostfile no a.py": ("the hostfile must be", "'no'", "Name another"),
    "launch --hostfile latin.txt a.py": ("the hostfile must be", "'latin.txt'", "Name another"),
    "launch --hostfile hosts a.py": ("'name slots=N' a line", "hosts:1", "Write the host's name"),
    "launch --slots -1 a.py": ("--slots must be", "it is -1", "Give one per GPU"),
    "launch --timeout nan a.py": ("--timeout must be", "nan", "Raise it"),
    "launch --grace -1 a.py": ("--grace must be", "-1", "Correct it"),
    "launch --master-port 99999 a.py": ("--master-port must lie", "99999", "Correct it"),
    "launch --launcher ssh a.py": ("invalid choice: 'ssh'", "pdsh", "--help"),
    "launch --hots a a.py": ("unrecognized arguments: --hots", "'flora-dist launch --help'"),
    "doctor --hostfile folder": ("the hostfile must be", "'folder'", "Name another"),
    "doctor --timeout -1": ("--timeout must be above 0", "-1", "Raise it"),
    "doctor --master-port 0": ("--master-port must lie", "it is 0", "Correct it"),
    "doctor here": ("unrecognized arguments: here", "'flora-dist doctor --help'"),
    "plan": ("required: --model, --backend", "'flora-dist plan --help'"),
    "plan --model mamba.json": ("required: --backend", "'flora-dist plan --help'"),
    f"{PLAN} mamba.json --backend zero4": ("invalid choice: 'zero4'", "zero3", "--help"),
    f"{PLAN} mamba.json": ("of a known family", "'mamba9'", "by the nearest"),
    f"{PLAN} folder": ("'folder' gave", "config.json", "See configs/model"),
    f"{PLAN} broken.json": ("in JSON", "'broken.json' gave", "See configs/model"),
    f"{PLAN} deep.json": ("in JSON", "'deep.json' gave", "See configs/model"),
    f"{PLAN} latin.json": ("in JSON", "'latin.json' gave", "See configs/model"),
    f"{PLAN} model": ("must be a whole number of at least 1", "model/config.json", "Correct"),
    f"{PLAN} model --memory 0": ("--memory must be a number above 0", "0", "Pass a finite"),
    f"{PLAN} model --gpus two": ("--gpus: invalid int value: 'two'", "'flora-dist plan --help'"),
    f"{PLAN} model --picture empty/a.png": ("--picture must be in a folder", "Make the folder"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files and folders that are no good."""
    made = tmp_path_factory.mktemp("wrong")
    for name, content in FILES.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_bytes(content)
    return made


def code_of(words: list[str]) -> int | str | None:
    """What the command ends with."""
    try:
        return main(words)
    except SystemExit as ended:  # argparse ends the process itself
        return ended.code


@pytest.mark.parametrize("line", WRONG, ids=lambda line: line.replace(str(TINY), "tiny.yaml"))
def test_a_wrong_command_line_is_told_in_one_line_with_its_remedy(
    line: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert code_of(shlex.split(line)) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ")
    assert told.err.count("\n") == 1, told.err
    assert [words for words in WRONG[line] if words not in told.err] == [], told.err
    assert sorted(folder.rglob("*")) == before
