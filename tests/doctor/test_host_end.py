# SPDX-License-Identifier: Apache-2.0
"""What runs on a host: how it looks at itself, measures, and ends with whoever asked."""

from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest

from flora_dist.cluster.doctor import host_facts as look
from flora_dist.cluster.doctor.facts import Kernels, as_tree, from_tree
from flora_dist.cluster.doctor.links import Listener, measure
from flora_dist.cluster.launch.near_end import Lost, Session, far_command
from tests.doctor.samples import facts


def test_a_host_looks_at_itself_and_its_facts_survive_json(tmp_path: Path) -> None:
    seen = look.look(
        name="here", master="127.0.0.1", names={"localhost": ""}, config=None, mpi=False,
        folder=str(tmp_path),
    )  # fmt: skip
    assert seen.network.toward == "lo"
    assert "torch" in seen.packages
    assert from_tree(json.loads(json.dumps(as_tree(seen)))) == seen


def test_a_host_says_which_kernels_step_there_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert look.kernels_of({}) == Kernels(path="native", reason="")
    assert look.kernels_of({"FLORA_DIST_KERNELS": "torch"}) == Kernels(path="torch", reason="")
    refused = look.kernels_of({"FLORA_DIST_KERNELS": "fast"})
    assert refused.path == "none"
    assert "got 'fast'" in refused.reason
    monkeypatch.setattr(look.presence, "package_folder", lambda: tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    without = look.kernels_of({})
    assert without.path == "torch"
    assert without.reason.startswith("none are installed. Compile them once: python -m")


def test_facts_of_another_version_are_refused() -> None:
    with pytest.raises(TypeError):
        from_tree({**as_tree(facts("a")), "new": 1})


def test_the_digest_of_sources_sees_contents_and_names(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = look.source_digest(tmp_path)
    (tmp_path / "a.py").write_text("x = 2\n")
    second = look.source_digest(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert len({first, second, look.source_digest(tmp_path)}) == 3


def test_bad_lines_of_an_environment_file_are_numbered_and_show_no_value(tmp_path: Path) -> None:
    lines = ["A=1", "", "# comment", "B=x y", "1A=2", 'C="q"', "D=/a:b"]
    (tmp_path / ".deepspeed_env").write_text("\n".join(lines))
    found = look.env_lines([tmp_path, tmp_path], {})
    assert [(line.number, line.breaks) for line in found] == [
        (2, True), (3, True), (4, False), (5, True), (6, False),
    ]  # fmt: skip
    assert [line.text for line in found] == ["", "# comment", "B=...", "1A=...", "C=..."]


def test_a_config_shows_its_seeds_by_path(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text('{"seed": 3, "optimizer": {"params": {"seed": 4, "lr": 1}}}')
    assert dict(look.read_config(path).seeds) == {"seed": "3", "optimizer.params.seed": "4"}
    other = tmp_path / "run.yaml"
    other.write_text("train: {seed: 5}\n")
    assert dict(look.read_config(other).seeds) == {"train.seed": "5"}
    other.write_text("train: [\n")
    assert "YAML" in str(look.read_config(other).trouble)
    assert look.read_config(tmp_path / "none").trouble == "No such file or directory"


def test_a_connection_is_measured_both_ways() -> None:
    listener = Listener("token", "127.0.0.1")
    port = listener.open(0)
    assert isinstance(port, int)
    seen = measure("127.0.0.1", port, "token", 5.0, True)
    assert seen["trouble"] is None
    assert min(seen["trip_ms"], seen["there_mbit"], seen["back_mbit"]) > 0
    assert listener.open(port) == "Address already in use"
    listener.close()
    assert measure("127.0.0.1", port, "token", 5.0, True)["trouble"] == "Connection refused"


def test_a_stranger_at_the_port_is_told_nothing() -> None:
    listener = Listener("token", "127.0.0.1")
    port = listener.open(0)
    assert isinstance(port, int)
    trouble = measure("127.0.0.1", port, "nekot", 5.0, False)["trouble"]
    # Which of them depends on who is quicker.
    closed = {"the other end closed the connection", "Connection reset by peer", "Broken pipe"}
    assert trouble in closed
    # An order beyond what the doctor's own end would ask for.
    with socket.create_connection(("127.0.0.1", port)) as peer:
        peer.sendall(b"token" + b"G" + (1 << 40).to_bytes(8, "big"))
        assert peer.recv(1) == b""
    listener.close()


def _session(*changes: str) -> Session:
    words = [
        "from flora_dist.cluster.doctor import agent",
        "from flora_dist.cluster.launch import far_end",
    ]
    program = "; ".join([*words, *changes, "far_end.serve(agent.DoctorAgent)"])
    return Session("here", [sys.executable, "-u", "-c", program], {}, lambda _stream, _data: None)


def test_what_a_login_prints_is_no_answer() -> None:
    session = _session("print('Welcome!', end='')")
    assert session.hello(20.0)
    session.close()


def test_an_agent_ends_when_the_link_falls_silent() -> None:
    session = _session("far_end.SILENCE_S = 0.5")
    session.hello(20.0)
    # The next sign of life would come after 5 s.
    with pytest.raises(Lost, match="ended with code 0"):
        session.ask("ranks", 20.0, ranks=[0], environment={}, limit_s=60.0, program=["-c", _SLEEP])
    session.close()


_SLEEP = "import time; time.sleep(60)"


def test_a_question_that_a_host_cannot_answer_says_why() -> None:
    session = _session()
    session.hello(20.0)
    with pytest.raises(Lost, match="KeyError: 'nonsense'"):
        session.ask("nonsense", 20.0)
    session.close()


def test_ranks_end_soon_after_one_has_failed_and_the_one_is_known() -> None:
    session = _session()
    session.hello(20.0)
    program = "import os, sys, time; os.environ['RANK'] == '1' and sys.exit('no memory')"
    began = time.monotonic()
    words = ["-c", f"{program}; {_SLEEP}"]
    said = session.ask("ranks", 100.0, ranks=[0, 1], environment={}, limit_s=90.0, program=words)
    session.close()
    assert [(each["code"], each["error"]) for each in said] == [(None, ""), (1, "no memory")]
    # Not after the limit of 90 s, nor the sleeper's 60.
    assert time.monotonic() - began < 50.0


def test_an_agent_starts_where_its_folder_is_missing_and_no_variable_shows_on_its_command_line(
    tmp_path: Path,
) -> None:
    """Every line of .deepspeed_env was there: whoever is on the host reads it with ps."""
    environment = {"PYTHONPATH": str(Path.cwd()), "MY_SETTING": "for us alone"}
    missing = str(tmp_path / "a b'c")
    command = far_command("flora_dist.cluster.doctor.agent", sys.executable, missing, environment)
    assert "for us alone" not in " ".join(command)
    session = Session("here", command, environment, lambda _stream, _data: None)
    assert session.hello(20.0)
    said = session.ask(
        "ranks", 20.0, ranks=[0], environment={}, limit_s=15.0,
        program=["-c", "import os, sys; sys.exit(os.environ['MY_SETTING'])"],
    )  # fmt: skip
    session.close()
    assert [each["error"] for each in said] == ["for us alone"]


def test_what_a_library_prints_in_a_rank_is_no_word_of_it() -> None:
    """A line with a brace first was read as the rank's own: the host's answer was lost."""
    session = _session()
    program = """
import sys
from flora_dist.cluster.doctor import ranks
from flora_dist.cluster.doctor import trial
def run(settings, say):
    print('{0: 1}', '{"stage": "lost", "result": 1}', sep=chr(10), flush=True)
    return {"sum": 2}
trial.run = run
sys.argv[1:] = ["{}"]
ranks.main()
"""
    [said] = session.ask(
        "ranks", 60.0, ranks=[0], environment={}, limit_s=50.0, program=["-c", program]
    )
    session.close()
    assert (said["code"], said["stage"], said["result"]) == (0, "done", {"sum": 2})
