# SPDX-License-Identifier: Apache-2.0
"""Makes installed packages, with all they need and nothing else, importable in another environment.

    python launch/_link_packages.py OTHER_VENV torch pip

Links, because a copy of torch takes hundreds of megabytes. Both environments must have the same
Python.
"""

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

_QUERY = "import sysconfig; print(sysconfig.get_path('purelib'))"


def closure(names: list[str]) -> dict[str, importlib.metadata.Distribution]:
    """Returns what `names` need, themselves included, as far as it is installed; no extras."""
    found: dict[str, importlib.metadata.Distribution] = {}
    pending = list(names)
    while pending:
        name = pending.pop()
        key = re.sub(r"[-_.]+", "-", name).lower()
        if key in found:
            continue
        try:
            found[key] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            # A requirement for another system or Python; pip complains if it was for this one.
            continue
        needed = [line for line in found[key].requires or [] if "extra ==" not in line]
        pending.extend(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in needed)
    return found


def top_level(distribution: importlib.metadata.Distribution) -> set[Path]:
    """Returns the files and folders of a distribution directly inside its site-packages."""
    files = distribution.files
    if files is None:
        raise SystemExit(f"{distribution.name} must list its files (RECORD); reinstall it with pip")
    first_parts = {file.parts[0] for file in files}
    # Scripts lie outside site-packages, byte code beside the modules it belongs to.
    root = Path(str(distribution.locate_file("")))
    return {root / part for part in first_parts - {"..", "__pycache__"}}


def main() -> None:
    """Links each top-level file or folder into the site-packages of the other environment."""
    venv, names = Path(sys.argv[1]), sys.argv[2:]
    command = [str(venv / "bin" / "python"), "-c", _QUERY]
    site = Path(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())
    distributions = closure(names)
    for source in set().union(*map(top_level, distributions.values())):
        (site / source.name).symlink_to(source.resolve())
    sys.stdout.write(f"linked {', '.join(sorted(distributions))}\n")


if __name__ == "__main__":
    main()
