# SPDX-License-Identifier: Apache-2.0
"""Command lines whose mistakes are told as all others are: in one line, with the remedy."""

from __future__ import annotations

import argparse
from typing import NoReturn

_USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """argparse, without the block of usage that it prints above a mistake."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and end with exit code 2."""
        mistake = " ".join(message.split())
        remedy = f"'{self.prog} --help' says what it takes."
        self.exit(_USER_ERROR, f"error: {self.prog}: {mistake}. {remedy}\n")
