# SPDX-License-Identifier: Apache-2.0
"""The doctor's command line, its pairs of hosts, and what it prints."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flora_dist.cluster import doctor
from flora_dist.cluster.doctor.arguments import checked
from flora_dist.cluster.doctor.reachability import ALL_PAIRS, pairs, rounds
from flora_dist.cluster.doctor.report import all_reduce, as_json, as_text
from flora_dist.cluster.doctor.rules_host import folder_exists
from flora_dist.cluster.doctor.survey import Survey
from tests.doctor.samples import asked, rank, survey


def _parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--slots", "0"], "--slots must be"),
        (["--timeout", "0"], "--timeout must be above 0"),
        (["--minimum", "-1"], "--minimum must be above 0"),
        (["--master-port", "70000"], "--master-port must lie in 1 to 65535"),
        (["--seed", str(1 << 63)], "--seed must lie"),
        (["--nodes", "a,a"], "each host must be named once"),
        (["--hostfile", "none/such"], "hostfile must be a readable text"),
    ],
)
def test_a_mistake_in_what_is_asked_is_exit_code_2(
    words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor.start(_parsed(*words)) == 2
    assert says in capsys.readouterr().err


def test_an_interface_goes_to_every_rank_and_the_master_is_no_loopback_on_a_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("NCCL_DEBUG=INFO\n")
    found = checked(_parsed("--nodes", "192.0.2.7:4,192.0.2.8", "--interface", "eth1"))
    assert found.master == "192.0.2.7"
    assert [host.slots for host in found.hosts] == [4, 1]
    assert found.environment["GLOO_SOCKET_IFNAME"] == "eth1"
    assert found.environment["NCCL_SOCKET_IFNAME"] == "eth1"
    assert found.environment["NCCL_DEBUG"] == "INFO"


def test_a_broken_environment_file_is_a_finding_and_no_mistake(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".deepspeed_env").write_text("\n")
    assert [line.number for line in checked(_parsed()).lines] == [1]


@pytest.mark.parametrize("count", [2, ALL_PAIRS, ALL_PAIRS + 1, 40])
def test_every_host_is_tried_with_two_others_and_no_round_uses_one_twice(count: int) -> None:
    names = [str(number) for number in range(count)]
    tried = pairs(names)
    assert len(set(map(frozenset, tried))) == len(tried)
    for name in names:
        assert sum(name in pair for pair in tried) >= min(2, count - 1)
    if count > ALL_PAIRS:
        assert len(tried) == 2 * (count - 1)
    together = rounds(tried)
    assert sorted(pair for each in together for pair in each) == sorted(tried)
    for each in together:
        assert len({name for pair in each for name in pair}) == 2 * len(each)


def test_the_bus_bandwidth_follows_its_formula_and_the_slowest_rank() -> None:
    seen = survey()
    found = all_reduce(seen)
    assert found is not None
    # 2 ranks: bytes x 2 (2 - 1) / 2 / 0.01 s.
    assert found["bus_bytes_per_s"] == pytest.approx((8 << 20) / 0.01)
    assert all_reduce(survey(ranks=(rank(0, "a"), rank(1, "b", result=None)))) is None


def test_text_has_a_row_for_each_host_and_one_line_for_each_finding() -> None:
    seen = survey(b={"folder": None}, notes=("no ranks were started (--quick)",))
    found = tuple(folder_exists(seen))
    text = as_text(Survey(asked=asked(), facts=seen.facts[:1], findings=found, notes=seen.notes))
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["host", "a", "b"]
    assert "note: no ranks were started (--quick)" in lines
    assert (
        "error: the working directory /work does not exist on b. Make it there (mkdir -p /work), "
        "or share it between hosts." in lines
    )
    assert lines[-1] == "1 error, 0 warnings"


def test_neither_end_loads_torch_before_a_rank_does() -> None:
    names = ("examination", "agent", "report")
    modules = ", ".join(f"flora_dist.cluster.doctor.{name}" for name in names)
    program = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


def test_json_holds_everything_that_was_seen() -> None:
    tree = json.loads(as_json(survey()))
    assert tree["ok"] is True
    assert [host["name"] for host in tree["hosts"]] == ["a", "b"]
    assert tree["ranks"][1]["result"]["torch"] == "2.13.0"
    assert tree["links"][0]["measured"]["there_mbit"] == 9000.0
