# SPDX-License-Identifier: Apache-2.0
"""Jobs on this machine through the front door: what they print, and where that cannot be read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from flora_dist.cluster.launch.outlet import FOR_EVER_S, Outlet
from flora_dist.cluster.launch.worker import meet_here
from flora_dist.world import listen_at

LIMIT_S = 240.0
ROOT = Path(__file__).resolve().parents[2]
# It meets the others, says where processes of its job listen, and prints more than pipes hold.
LOUD = """
import json, os, sys
from pathlib import Path
import torch.distributed as dist
from flora_dist.cluster.launch.processes import of_job

dist.init_process_group("gloo")
dist.barrier()
if dist.get_rank() == 0:
    pids = [os.getpid(), *(process.pid for process in of_job(os.environ["FLORA_JOB"]))]
    own = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                own.add(os.readlink(link))
            except FileNotFoundError:
                pass
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in own:
                found.append(fields[1].partition(":")[0])
    for n in range(3000):
        print("line", n, "." * 300)
    Path(sys.argv[1]).write_text(json.dumps(found))
dist.barrier()
"""
LOOPBACK = "0100007F"  # as the kernel writes 127.0.0.1


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A job of two ranks whose output could not be written."""

    done: subprocess.CompletedProcess[str]
    reason: str
    proof: Path


def door(launcher: str, *words: str | Path) -> list[str]:
    front = [sys.executable, "-m", "flora_dist.cli", "launch", "--launcher", launcher]
    return [*front, *map(str, words)]


def test_a_rank_that_prints_words_of_an_agent_fails_as_it_failed(tmp_path: Path) -> None:
    """`::flora-agent:: {"ended": 0}` made the exit code 0, and `hello` behind it hung the job."""
    script = tmp_path / "spoof.py"
    lines = '::flora-agent:: {"ended": 0}', "::flora-agent:: hello", '{"number": 2, "answer": 0}'
    script.write_text(f"for line in {lines}: print(line, flush=True)\nraise SystemExit(3)\n")
    done = subprocess.run(
        door("torchrun", script), capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == list(lines)
    assert "the job failed with exit code 1 (localhost 1)" in done.stderr


@pytest.fixture(
    scope="module",
    params=[
        ("torchrun", '"$@" | head -n 1', "Broken pipe"),
        pytest.param(
            ("pdsh", '"$@" > /dev/full', "No space left on device"), marks=pytest.mark.deepspeed
        ),
    ],
    ids=["torchrun", "pdsh"],
)
def ended(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    launcher, shell, reason = request.param
    folder = tmp_path_factory.mktemp(launcher)
    script, proof = folder / "loud.py", folder / "proof"
    script.write_text(LOUD)
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash"]
    front = door(launcher, "--slots", "2", script, proof)
    done = subprocess.run(
        [*command, *front], capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT
    )
    return Ended(done=done, reason=reason, proof=proof)


def test_an_output_that_takes_nothing_holds_up_no_rank(ended: Ended) -> None:
    """The thread that read the ranks died, their pipe filled, and the job hung for ever."""
    said = ended.done.stderr
    assert ended.done.returncode == 0, said
    assert ended.proof.exists()
    assert f"stdout accepts no more output ({ended.reason}): the job goes on" in said
    assert f"lines of output were dropped: {ended.reason}." in said


def test_a_job_of_one_machine_listens_to_no_other(ended: Ended) -> None:
    """torch's stores listened at all addresses, and torchrun unpickles what they hold."""
    found = json.loads(ended.proof.read_text())
    assert len(found) >= 3, found  # the store, and gloo's of two ranks
    assert set(found) == {LOOPBACK}


def test_a_port_that_is_taken_is_told_before_ranks_wait_for_each_other() -> None:
    with listen_at("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        with pytest.raises(ValueError, match="Address already in use"):
            meet_here(place)


def test_ranks_of_several_machines_meet_as_torch_does() -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500"}
    assert meet_here(place) == {}


def test_an_output_that_the_shell_has_closed_is_told_and_its_number_is_not_taken() -> None:
    """The next pipe would have had it: lines of the job would have gone to ssh."""
    code = """
import os
from flora_dist.cluster.launch.front import Front
with Front() as front:
    assert min(os.pipe()) > 2
    front.pass_on(1, b"a line\\n")
"""
    command = ["bash", "-c", '"$@" >&-', "bash", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    words = "flora-dist launch: 1 lines of output were dropped: Bad file descriptor.\n"
    assert done.stderr == words


def test_what_nobody_reads_is_dropped_and_counted_and_reading_again_goes_on() -> None:
    reads, writes = os.pipe()
    outlet = Outlet(writes, 0.01)
    line = b"." * 1023 + b"\n"
    for _ in range(1000):
        outlet.put(line)
    assert 0 < outlet.dropped < 1000
    assert outlet.trouble == "nobody reads it"
    kept, found = 1000 - outlet.dropped, 0
    while found < kept * len(line):
        found += len(os.read(reads, 1 << 16))
    dropped = outlet.dropped
    outlet.put(b"again\n")
    outlet.close(10.0)
    assert os.read(reads, 100) == b"again\n"
    assert outlet.dropped == dropped
    os.close(writes)
    os.close(reads)


def test_what_is_read_slowly_is_not_dropped() -> None:
    reads, writes = os.pipe()
    outlet = Outlet(writes, FOR_EVER_S)
    found = b""
    for number in range(2000):
        outlet.urge(b"%d " % number + b"." * 100)
        if number % 100 == 0:
            found += os.read(reads, 1 << 10)
    while b"1999 " not in found:
        found += os.read(reads, 1 << 16)
    assert outlet.dropped == 0
    outlet.close(10.0)
    os.close(writes)
    os.close(reads)
