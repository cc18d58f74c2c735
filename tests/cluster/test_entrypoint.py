# SPDX-License-Identifier: Apache-2.0
"""The image's entry point, run for real in a home of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).resolve().parents[2] / "docker" / "entrypoint.sh"


def start(
    home: Path, environment: dict[str, str], *command: str
) -> subprocess.CompletedProcess[str]:
    """Runs the entry point with nothing but ``environment``."""
    given = {"PATH": os.defpath, "HOME": str(home), **environment}
    return subprocess.run(
        ["bash", str(ENTRYPOINT), *command], env=given, capture_output=True, text=True, timeout=60
    )


def written(environment: dict[str, str]) -> dict[str, str]:
    """What the entry point writes, as DeepSpeed's launcher reads it."""
    with tempfile.TemporaryDirectory() as home:
        done = start(Path(home), environment, "true")
        assert done.returncode == 0, done.stderr
        lines = (Path(home) / ".deepspeed_env").read_text().splitlines()
    return dict(line.split("=", maxsplit=1) for line in lines)


def test_the_entry_point_writes_what_training_needs_and_nothing_else() -> None:
    wanted = {
        "PATH": "/opt/flora/bin:/usr/bin:/bin",
        "TORCH_EXTENSIONS_DIR": "/opt/torch_extensions",
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
        "NCCL_IB_HCA": "mlx5_0:1,mlx5_1:1",
        "NCCL_IB_PKEY": "0x8001",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": "/workspace",
        "OMPI_MCA_btl_tcp_if_include": "eth0",
        "MY_OWN": "a=b",
    }
    others = {
        "HF_TOKEN": "secret",
        "NCCL_PASSWD": "secret",
        "OMPI_MCA_my_key": "secret",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "TORCH_CUDA_ARCH_LIST": "8.0 9.0",
    }
    empty = {"NCCL_DEBUG": "", "GLOO_EMPTY": ""}
    found = written({**wanted, **others, **empty, "FLORA_EXPORT": "MY_OWN"})
    assert found == wanted


@pytest.mark.parametrize("value", ["a b", "a\nb", "'a'", 'a"b', "a$b", "a;b", "a\tb", "é"])
def test_a_value_that_a_launcher_would_change_is_refused(tmp_path: Path, value: str) -> None:
    done = start(tmp_path, {"NCCL_DEBUG": value}, "true")
    assert done.returncode == 2
    assert "NCCL_DEBUG must consist of" in done.stderr
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_a_name_that_is_asked_for_and_not_set_is_refused(tmp_path: Path) -> None:
    done = start(tmp_path, {"FLORA_EXPORT": "MISSPELT"}, "true")
    assert done.returncode == 2
    assert "'MISSPELT' is not" in done.stderr


def test_the_entry_point_becomes_its_command_with_its_exit_code(tmp_path: Path) -> None:
    assert start(tmp_path, {}, "bash", "-c", "echo $PPID; exit 7").returncode == 7
    assert start(tmp_path, {}).returncode == 2


def test_a_node_without_keys_says_which_and_where(tmp_path: Path) -> None:
    done = start(tmp_path, {"FLORA_SECRETS": str(tmp_path / "none")}, "sshd")
    assert done.returncode == 2
    assert f"{tmp_path}/none/client_key" in done.stderr


def test_a_key_with_a_passphrase_or_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "client_key").write_text("no key\n")
    done = start(tmp_path, {"FLORA_SECRETS": str(tmp_path)}, "sshd")
    assert done.returncode == 2
    assert "must be a private ssh key without a passphrase" in done.stderr
