# SPDX-License-Identifier: Apache-2.0
"""Looks for secrets in every file of every layer of a saved image, and in other files.

    python tests/cluster/images_secrets.py IMAGE.tar OTHER_FILE... -- SECRET_FILE...

Every word of a secret file that is long enough to be recognised is looked for. A canary proves
that the search sees what an image holds: a line of its ssh_config.
"""

from __future__ import annotations

import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

CANARY = b"How the nodes' ssh, and so pdsh and mpirun, reach each other"
# Shorter words, such as "global", are found in innocent files.
SHORTEST = 20
FORBIDDEN_NAME = re.compile(r"/etc/ssh/ssh_host_\w+_key$|/pip\.conf$|/run/secrets/.")
# Not those of other kinds: libraries hold keys for testing themselves.
PRIVATE_KEY = re.compile(rb"-----BEGIN OPENSSH PRIVATE KEY-----\n[A-Za-z0-9+/=\n]{40}")


def needles(paths: Sequence[str]) -> dict[bytes, str]:
    """Returns what must not be found, with the file it comes from."""
    found: dict[bytes, str] = {}
    for path in paths:
        for piece in re.findall(rb"[\w+/=]{%d,}" % SHORTEST, Path(path).read_bytes()):
            found[piece] = path
    return found


def blobs(image: IO[bytes], where: str = "") -> Iterator[tuple[str, bytes]]:
    """Yields every file of a tar and, in place of a layer, the files of that layer."""
    with tarfile.open(fileobj=image) as tar:
        for member in tar:
            name = f"{where}/{member.name}"
            opened = tar.extractfile(member) if member.isfile() else None
            if opened is None:
                yield name, b""
            elif not where and tarfile.is_tarfile(opened):
                opened.seek(0)
                yield from blobs(opened, member.name)
            else:
                opened.seek(0)
                yield name, opened.read()


def suspects(path: Path, wanted: dict[bytes, str]) -> Iterator[str]:
    """Yields what is wrong with a file, or with an image and everything in it."""
    pattern = re.compile(b"|".join(map(re.escape, [*wanted, CANARY])))
    is_image, canary = tarfile.is_tarfile(path), False
    with path.open("rb") as opened:
        for name, content in blobs(opened) if is_image else [(path.name, opened.read())]:
            matches = set(pattern.findall(content))
            canary |= CANARY in matches
            yield from (f"{name}: a line of {Path(wanted[m]).name}" for m in matches - {CANARY})
            if PRIVATE_KEY.search(content):
                yield f"{name}: a private key"
            if is_image and FORBIDDEN_NAME.search(f"/{name}"):
                yield f"{name}: a file of this name"
    if is_image and not canary:
        yield f"{path.name}: the canary was not found, so this search sees nothing"


def main(*arguments: str) -> int:
    """Returns 1 if anything was found."""
    cut = arguments.index("--")
    wanted = needles(arguments[cut + 1 :])
    found = [each for path in arguments[:cut] for each in suspects(Path(path), wanted)]
    places = " and ".join(Path(path).name for path in arguments[:cut])
    sys.stdout.write("".join(f"        {line}\n" for line in found))
    sys.stdout.write(f"        {len(wanted)} pieces of secrets in {places}: {len(found)} found\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
