# SPDX-License-Identifier: Apache-2.0
"""The search for secrets in an image finds a planted one, and nothing in a clean image."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from tests.cluster.images_secrets import CANARY, main

SECRET = "https://flora:0123456789abcdef0123456789abcdef@127.0.0.1/"
TOKEN = b"0123456789abcdef0123456789abcdef"
KEY = b"-----BEGIN OPENSSH PRIVATE KEY-----\n" + b"A" * 70 + b"\n"


def tar(files: dict[str, bytes]) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as opened:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            opened.addfile(entry, io.BytesIO(content))
    return made.getvalue()


def searched(folder: Path, layer: dict[str, bytes], settings: bytes = b"{}", text: str = "") -> int:
    """The exit code for an image of one layer."""
    clean = {"etc/ssh/ssh_config.d/flora.conf": b"# " + CANARY, "etc/motd": b"hello"}
    image = {"manifest.json": settings, "one/layer.tar": tar({**clean, **layer})}
    (folder / "image.tar").write_bytes(tar(image))
    (folder / "history").write_text(text)
    (folder / "pip_conf").write_text(f"[global]\nfind-links = {SECRET}\n")
    names = [str(folder / name) for name in ("image.tar", "history", "pip_conf")]
    return main(names[0], names[1], "--", names[2])


def test_a_clean_image_is_clean(tmp_path: Path) -> None:
    assert searched(tmp_path, {}) == 0


@pytest.mark.parametrize(
    "layer",
    [
        {"root/.bash_history": b"export A=" + TOKEN},
        {"home/flora/.ssh/client_key": KEY},
        {"etc/ssh/ssh_host_ed25519_key": b""},
        {"etc/pip.conf": b""},
    ],
    ids=["a line", "a key", "a host key", "an empty pip.conf"],
)
def test_a_secret_in_a_layer_is_found(tmp_path: Path, layer: dict[str, bytes]) -> None:
    assert searched(tmp_path, layer) == 1


def test_a_secret_in_the_settings_or_the_history_is_found(tmp_path: Path) -> None:
    assert searched(tmp_path, {}, settings=b'{"Env": ["A=' + TOKEN + b'"]}') == 1
    assert searched(tmp_path, {}, text=f"RUN pip install --find-links {SECRET}") == 1


def test_a_search_that_sees_no_layer_is_not_trusted(tmp_path: Path) -> None:
    assert searched(tmp_path, {"etc/ssh/ssh_config.d/flora.conf": b""}) == 1
