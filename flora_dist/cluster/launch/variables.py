# SPDX-License-Identifier: Apache-2.0
"""Which variables go with a job to every host, and DeepSpeed's file of them."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from flora_dist.cluster.launch.locks import extensions_folder

DEEPSPEED_FILE = ".deepspeed_env"
# ssh sessions have none of these: not PATH, by which ninja is found, nor what a container sets.
_NAMES = ("LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH", "TOKENIZERS_PARALLELISM")
_PREFIXES = ("DEEPSPEED_", "DS_", "FLORA_", "GLOO_", "HF_", "NCCL_", "TORCH_", "UCX_")
# In any case of letters, as a word of the name or within one: HF_token, NCCL_PASSWD, HF_APIKEY.
_SECRET = re.compile(
    r"TOKEN(?!IZER)|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE"
    r"|(?:^|_)(?:PASS|PWD|PW|CREDS?|JWT|PAT)(?:_|$)"
    r"|(?<!_[LMPQR])KEY",  # PKEY, RKEY ...: keys of InfiniBand, without which a job hangs
    re.IGNORECASE,
)
# The path of a secret is not a secret, nor are these names of torch and Hugging Face.
_PUBLIC = re.compile(
    r"\w+_(?:PATH|FILE|DIR)|TORCH_COMPILE_(?:CACHE_KEY_TAG|STICKY_PGO_KEY)"
    r"|HF_HUB_DISABLE_IMPLICIT_TOKEN|HF_DEVICE_CODE_OAUTH_CLIENT_ID"
)
_NAME = re.compile(r"[A-Za-z_]\w*")
# What DeepSpeed's launcher puts in quotes, which Open MPI then takes for a part of the value.
_UNSAFE = re.compile(r"[^\w@%+=:,./-]")


def exported(environment: Mapping[str, str], asked: Iterable[str]) -> dict[str, str]:
    """The variables of a job: those that decide how ranks run, and those asked for.

    ``asked``: NAME, or NAME=VALUE. What looks like a secret goes only where it is asked for.

    Raises:
        ValueError: a word that is not a variable's name, or a variable that is not set here.
    """
    found = {name: environment[name] for name in _wanted(environment) if not is_secret(name)}
    own = str(Path(sys.executable).parent)
    path = environment.get("PATH", os.defpath).split(os.pathsep)
    found["PATH"] = os.pathsep.join([own, *(each for each in path if each != own)])
    found["TORCH_EXTENSIONS_DIR"] = str(extensions_folder(environment))
    found.pop("DS_ENV_FILE", None)  # the front door writes its own
    for word in asked:
        name, given, value = word.partition("=")
        if not _NAME.fullmatch(name):
            raise ValueError(f"--export takes NAME or NAME=VALUE; it got {word!r}. Correct it.")
        if not given and name not in environment:
            raise ValueError(
                f"--export {name} sends a variable of this shell; {name} is not set. Set it, or "
                f"write --export {name}=VALUE."
            )
        found[name] = value if given else environment[name]
    return found


def held_back(environment: Mapping[str, str], variables: Mapping[str, str]) -> list[str]:
    """What a job would have been sent but for names like those of secrets."""
    return [name for name in _wanted(environment) if is_secret(name) and name not in variables]


def is_secret(name: str) -> bool:
    """Whether a variable's value looks like one that nobody else may read.

    >>> [is_secret(name) for name in ("HF_TOKEN", "HF_token", "TOKENIZERS_PARALLELISM")]
    [True, True, False]
    """
    return bool(_SECRET.search(name)) and not _PUBLIC.fullmatch(name)


def _wanted(environment: Mapping[str, str]) -> list[str]:
    return [name for name in environment if name in _NAMES or name.startswith(_PREFIXES)]


def own_file(folders: Iterable[Path], environment: Mapping[str, str]) -> dict[str, str]:
    """What the user's own .deepspeed_env says, in the order in which DeepSpeed reads them.

    Raises:
        ValueError: a line on which DeepSpeed's launcher would raise.
    """
    found: dict[str, str] = {}
    name = environment.get("DS_ENV_FILE", DEEPSPEED_FILE)
    for path in dict.fromkeys(folder / name for folder in folders):
        if not path.is_file():
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            variable, given, value = line.partition("=")
            if not given or not _NAME.fullmatch(variable.strip()):
                shown = f"{variable}=..." if given else line  # the value may be a secret
                raise ValueError(
                    f"every line of {path} must be NAME=VALUE; line {number} is {shown!r}, on "
                    "which DeepSpeed's launcher ends with a traceback. Remove or correct it."
                )
            found[variable.strip()] = value.strip()
    return found


def as_file(variables: Mapping[str, str]) -> str:
    """The text of a .deepspeed_env.

    Raises:
        ValueError: a value that pdsh and Open MPI would read differently.
    """
    for name, value in variables.items():
        if odd := sorted(set(_UNSAFE.findall(value))):
            raise ValueError(
                "a variable of a DeepSpeed job may hold only letters, digits and @%+=:,./-_, "
                f"since its launchers quote other characters differently; {name} has {odd}. "
                "Change it, or use --launcher torchrun, mpirun or slurm."
            )
    return "".join(f"{name}={value}\n" for name, value in sorted(variables.items()))
