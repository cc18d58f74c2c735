# SPDX-License-Identifier: Apache-2.0
"""Measures what `import flora_dist` adds to the start of Python.

    python tests/bench/import_time.py

Each number is the median of fresh processes; an empty start of Python is measured beside it and
taken off. To see which module costs what: `python -X importtime -c "import flora_dist"`.
"""

import statistics
import subprocess
import sys
import time

RUNS = 20


def seconds(statement: str) -> float:
    """Returns the median wall time in seconds of `python -c statement` over RUNS processes."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    """Prints the start of Python, the start with the import, and the difference."""
    # Once unmeasured: the first start reads byte code from the disk or writes it.
    seconds("import flora_dist")
    empty, importing = seconds("pass"), seconds("import flora_dist")
    print(f"python -c pass                {empty * 1e3:7.1f} ms")
    print(f"python -c 'import flora_dist' {importing * 1e3:7.1f} ms")
    print(f"import flora_dist             {(importing - empty) * 1e3:7.1f} ms, median of {RUNS}")


if __name__ == "__main__":
    main()
