# SPDX-License-Identifier: Apache-2.0
"""What `flora-dist launch` is asked for: hosts, words and variables, and what it refuses."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flora_dist.cli import main
from flora_dist.cluster.launch.commands import LAUNCHERS
from flora_dist.cluster.launch.hosts import is_local, read_hostfile, read_nodes
from flora_dist.cluster.launch.locks import locks
from flora_dist.cluster.launch.variables import as_file, exported, held_back, own_file
from flora_dist.cluster.launch.worker import FOLDERS, decode, encode, settled

ROOT = Path(__file__).resolve().parents[2]
OF_DEEPSPEED = {"pdsh", "openmpi", "no_ssh"}
WITH_THEIR_NEEDS = [
    pytest.param(name, marks=[pytest.mark.deepspeed] if name in OF_DEEPSPEED else [])
    for name in sorted(LAUNCHERS)
]
STRANGE = ["a b", "", "$HOME", "`id`", "{x: [1, 'y']}", '"', "%n", "50%", "é", "a\nb", "--set", "*"]


def dry(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", "--dry-run", *words, "train.py", "an argument"]) == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", "--dry-run", *words, "train.py"]) == 2
    return capsys.readouterr().err


def test_words_pass_through_two_shells_and_a_percent_reader_unchanged() -> None:
    text = " ".join(encode(STRANGE))
    for _ in range(2):
        done = subprocess.run(
            ["bash", "-c", f"printf '%s ' {text}"], capture_output=True, text=True, check=True
        )
        text = done.stdout.strip()
    assert decode(text.split()) == STRANGE
    assert not {"%n", "%h", "%u"} & {text[i : i + 2] for i in range(len(text))}


def test_a_hostfile_is_read_as_deepspeed_and_mpi_read_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# two hosts\n\nnode1 slots=8\nnode2   slots=4 # fewer\n")
    assert [(host.name, host.slots) for host in read_hostfile(path)] == [("node1", 8), ("node2", 4)]


def test_the_example_of_a_hostfile_is_one() -> None:
    assert len(read_hostfile(ROOT / "launch" / "hostfile.example")) == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("node1\n", r"hostfile:1 is 'node1'"),
        ("node1 slots=0\n", "whole number from 1"),
        ("node1 slots=two\n", "whole number from 1"),
        ("node1 slots=1\nnode1 slots=2\n", "repeats node1"),
        ("-oProxyCommand=x slots=1\n", "a host's name may hold only letters"),
        ("me@node1 slots=1\n", "Write node1, and in ~/.ssh/config: Host node1, then User me"),
        (
            "fe80::1%eth0 slots=1\n",
            "IPv4 address; .*:1 names 'fe80::1%eth0'. .* a name that has one",
        ),
        ("[2001:db8::1]:22 slots=1\n", "write a name that has one"),
        ("node1:2222 slots=1\n", "~/.ssh/config: Host node1, then Port 2222"),
        ("me@node1:22 slots=1\n", "without a user.* Write node1, and"),
        ("node1 slots=2 max_slots=4\n", "has one 'name slots=N' a line"),
        ("# none\n", "names no host"),
    ],
)
def test_a_hostfile_with_a_mistake_is_refused_by_its_line(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hostfile(path)


def test_a_host_whose_name_is_gone_is_not_this_one() -> None:
    """A container's name goes with it: the end of its job then raised instead of its message."""
    assert is_local("localhost")
    assert not is_local("gone.invalid")


def test_a_missing_hostfile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Name another one"):
        read_hostfile(tmp_path / "none")


@pytest.mark.parametrize("text", ["me@node1:4", "::1", "node1,[fe80::1]:4"])
def test_a_list_of_nodes_with_a_user_or_ipv6_says_what_is_wrong(text: str) -> None:
    """`::1` was told to write a whole number of slots."""
    with pytest.raises(ValueError, match=r"without a user|its name or its IPv4 address"):
        read_nodes(text, 1)


def test_a_hostfile_of_another_editor_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_bytes(b"\xef\xbb\xbfnode1 slots=8\r\nnode2\tslots=4\r\n")
    assert [host.name for host in read_hostfile(path)] == ["node1", "node2"]


def test_a_list_of_nodes_has_slots_of_its_own() -> None:
    assert [(host.name, host.slots) for host in read_nodes("a, b:3", 2)] == [("a", 2), ("b", 3)]


@pytest.mark.parametrize("launcher", WITH_THEIR_NEEDS)
def test_a_dry_run_prints_what_a_shell_can_run(
    launcher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    text = dry(capsys, "--launcher", launcher, "--slots", "2", "--master-port", "29599")
    commands = [line for line in text.splitlines() if not line.startswith("#")]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "env"
        assert "OMP_NUM_THREADS=3" in words
        assert words[-3:] == ["flora_dist.cluster.launch.worker", "train.py", "an%20argument"]


def test_a_dry_run_starts_nothing_on_hosts_that_do_not_exist(
    capsys: pytest.CaptureFixture[str],
) -> None:
    nodes = ("--nodes", "a.invalid,b.invalid", "--master-addr", "10.1.2.3")
    text = dry(capsys, "--launcher", "torchrun", *nodes, "--least-nodes", "1")
    assert text.count("--nnodes 1:2") == 2
    assert "--rdzv-endpoint 10.1.2.3:29500" in text
    assert "--max-restarts 10" in text


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--nodes", "a.invalid"), "does not"),
        (("--master-addr", "::1"), "--master-addr names '::1'"),
        (("--slots", "0"), "--slots must be the number of processes on a host"),
        (("--launcher", "pdsh", "--restarts", "1"), "torchrun alone"),
        (("--least-nodes", "2"), "the number of hosts, 1; it is 2"),
        (("--restarts", "-1"), "--restarts must be 0 or more"),
        (("--timeout", "0"), "--timeout must be a number of minutes"),
        (("--grace", "-1"), "--grace must be a number of seconds"),
        (("--export", "NO_SUCH_VARIABLE"), "is not set"),
        (("--export", "1=2"), "NAME or NAME=VALUE"),
        (("--launcher", "slurm", "--nodes", "a:1,b:2"), "Make them equal"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    words: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in refusal(capsys, *words)


def test_a_launcher_that_is_not_installed_is_named_with_its_package(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "openmpi-bin on Debian" in refusal(capsys, "--launcher", "mpirun")


def test_secrets_travel_only_where_they_are_asked_for() -> None:
    shell = {"PATH": "/bin", "HF_TOKEN": "s3cret", "HF_HOME": "/h", "EDITOR": "vi"}
    found = exported(shell, [])
    assert "HF_TOKEN" not in found
    assert "EDITOR" not in found
    assert found["HF_HOME"] == "/h"
    assert exported(shell, ["HF_TOKEN", "A=b=c"])["HF_TOKEN"] == "s3cret"
    assert exported(shell, ["A=b=c"])["A"] == "b=c"


@pytest.mark.parametrize(
    "name",
    ["HF_token", "HF_AUTH", "NCCL_PASSWD", "HF_APIKEY", "DS_MY_KEY", "UCX_PWD", "HF_OIDC_ID_TOKEN"],
)
def test_names_of_secrets_are_known_in_every_spelling(name: str) -> None:
    """NCCL_PASSWD, HF_AUTH and HF_token were sent to every host."""
    assert name not in exported({name: "s3cret"}, [])
    assert held_back({name: "s3cret"}, {}) == [name]
    assert exported({name: "s3cret"}, [name])[name] == "s3cret"


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "NCCL_IB_PKEY", "UCX_IB_PKEY", "UCX_RKEY_MPOOL_MAX_MD"),
        *("UCX_RKEY_PTR_SEG_SIZE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "HF_TOKEN_PATH"),
        *("HF_STORED_TOKENS_PATH", "TORCH_COMPILE_STICKY_PGO_KEY", "TORCH_COMPILE_CACHE_KEY_TAG"),
    ],
)
def test_settings_whose_names_resemble_secrets_reach_the_hosts(name: str) -> None:
    """Without NCCL_IB_PKEY the other hosts took another fabric, and the job hung."""
    assert exported({name: "1"}, [])[name] == "1"


@pytest.mark.parametrize("launcher", WITH_THEIR_NEEDS)
def test_no_launcher_puts_a_secret_on_a_command_line_or_in_a_dry_run(
    launcher: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed writes every variable of a job on the command lines of pdsh and mpirun."""
    monkeypatch.setenv("HF_TOKEN", "s3 cret")
    text = dry(capsys, "--launcher", launcher, "--export", "HF_TOKEN", "--export", "MY_KEY=s3 cret")
    assert "s3 cret" not in text
    assert 'HF_TOKEN="$HF_TOKEN" ' in text


def test_a_rank_finds_the_secrets_of_its_job_in_a_folder_of_its_user_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flora-job-node1"
    folder.mkdir()
    (folder / "secrets").write_text('{"HF_TOKEN": "s3 cret"}')
    place = {"RANK": "0", "WORLD_SIZE": "1", FOLDERS: str(tmp_path / "flora-job-")}
    assert settled(place)["HF_TOKEN"] == "s3 cret"
    # Another user, who reads the job's name from a command line, may have made one.
    monkeypatch.setattr(os, "geteuid", lambda: folder.stat().st_uid + 1)
    assert "HF_TOKEN" not in settled(place)


def test_a_refused_line_or_value_is_not_printed(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("export HF_TOKEN=s3cret\n")
    with pytest.raises(ValueError, match=r"line 1 is 'export HF_TOKEN=\.\.\.'"):
        own_file([tmp_path], {})
    with pytest.raises(ValueError, match="FOO has") as refused:
        as_file({"FOO": "s3 cret"})
    assert "cret" not in str(refused.value)


def test_the_environment_of_python_comes_first_in_path() -> None:
    """ninja of another environment makes DeepSpeed compile its helper again at every start."""
    path = exported({"PATH": "/usr/bin"}, [])["PATH"].split(os.pathsep)
    assert path == [str(Path(sys.executable).parent), "/usr/bin"]


def test_a_line_on_which_deepspeed_would_raise_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\n\nB=2\n")
    with pytest.raises(ValueError, match="line 2 is ''"):
        own_file([tmp_path], {})


def test_the_users_own_file_is_read(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1=x\nB=2\n")
    assert own_file([tmp_path, tmp_path], {}) == {"A": "1=x", "B": "2"}


def test_a_value_that_launchers_quote_differently_is_refused() -> None:
    with pytest.raises(ValueError, match="torchrun, mpirun or slurm"):
        as_file({"FOO": "bar baz"})


def test_a_rank_is_told_the_interface_toward_process_zero() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    assert settled(place)["GLOO_SOCKET_IFNAME"] == "lo"
    assert settled({**place, "GLOO_SOCKET_IFNAME": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_lock_is_held_by_who_has_it_open(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 900,) * 2)
    [found] = locks(str(tmp_path))
    assert (found.path, found.is_held, found.age_s > 800) == (str(lock), False, True)
    with lock.open("rb"):
        [found] = locks(str(tmp_path))
    assert found.is_held
