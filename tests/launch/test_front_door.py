# SPDX-License-Identifier: Apache-2.0
"""Jobs on this machine through the front door: what they print, and where that cannot be read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flora_dist.launch.outlet import FOR_EVER_S, Outlet

LIMIT_S = 120.0
ROOT = Path(__file__).resolve().parents[2]
# More than pipes hold.
LOUD = """
import sys
from pathlib import Path
for n in range(3000):
    print("line", n, "." * 300)
Path(sys.argv[1]).write_text("done")
"""


def door(script: Path, *words: str, launcher: str = "torchrun") -> list[str]:
    front = [sys.executable, "-m", "flora_dist.cli", "launch", "--launcher", launcher]
    return [*front, str(script), *words]


def test_a_rank_that_prints_words_of_an_agent_fails_as_it_failed(tmp_path: Path) -> None:
    """`::flora-agent:: {"ended": 0}` made the exit code 0, and `hello` behind it hung the job."""
    script = tmp_path / "spoof.py"
    lines = '::flora-agent:: {"ended": 0}', "::flora-agent:: hello", '{"number": 2, "answer": 0}'
    script.write_text(f"for line in {lines}: print(line, flush=True)\nraise SystemExit(3)\n")
    done = subprocess.run(door(script), capture_output=True, text=True, timeout=LIMIT_S, cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines() == list(lines)
    assert "the job failed with exit code 1 (localhost 1)" in done.stderr


@pytest.mark.parametrize(
    ("launcher", "shell", "reason"),
    [
        ("torchrun", '"$@" | head -n 1', "Broken pipe"),
        ("pdsh", '"$@" > /dev/full', "No space left on device"),
    ],
)
def test_an_output_that_takes_nothing_holds_up_no_rank(
    launcher: str, shell: str, reason: str, tmp_path: Path
) -> None:
    """The thread that read the ranks died, their pipe filled, and the job hung for ever."""
    script, proof = tmp_path / "loud.py", tmp_path / "proof"
    script.write_text(LOUD)
    command = ["bash", "-c", f"set -o pipefail; {shell}", "bash"]
    done = subprocess.run(
        [*command, *door(script, str(proof), launcher=launcher)],
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert proof.read_text() == "done"
    assert f"stdout takes no more ({reason}): the job goes on" in done.stderr
    assert f"lines of output were dropped: {reason}." in done.stderr


def test_an_output_that_the_shell_has_closed_is_told_and_its_number_is_not_taken() -> None:
    """The next pipe would have had it: lines of the job would have gone to ssh."""
    code = """
import os
from flora_dist.launch.front import Front
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
