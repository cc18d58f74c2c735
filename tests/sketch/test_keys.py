# SPDX-License-Identifier: Apache-2.0
import hashlib
import os
import subprocess
import sys

import pytest

from flora_dist.core.sketch.keys import Purpose, canonical_name, derive_key, name_key

ONE = {
    "seed": 7,
    "name_key": 0xFEDCBA9876543210,
    "purpose": Purpose.GRADIENT,
    "window": 3,
    "matrix": 2,
}


@pytest.mark.parametrize(
    "wrapped",
    [
        "layers.0.weight",
        "module.layers.0.weight",
        "_orig_mod.layers.0.weight",
        "module._orig_mod._fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight",
        "layers._checkpoint_wrapped_module.0._orig_mod.weight",
        "module.module.layers.0.weight",
    ],
)
def test_wrappers_do_not_change_a_name(wrapped: str) -> None:
    assert canonical_name(wrapped) == "layers.0.weight"
    assert name_key(wrapped) == name_key("layers.0.weight")


@pytest.mark.parametrize("name", ["module", "module._orig_mod", "_fsdp_wrapped_module", ""])
def test_a_name_of_wrappers_only_stays(name: str) -> None:
    assert canonical_name(name) == name


@pytest.mark.parametrize("name", ["submodule.weight", "module_list.0.weight", "a.modules.b"])
def test_only_whole_components_are_removed(name: str) -> None:
    assert canonical_name(name) == name


def test_a_name_key_is_the_head_of_sha256() -> None:
    assert name_key("module.wé") == int(hashlib.sha256("wé".encode()).hexdigest()[:16], 16)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"seed": -7},
        {"name_key": 0xFEDCBA9876543211},
        {"name_key": 0x7EDCBA9876543210},
        {"purpose": Purpose.MOMENTUM},
        {"purpose": Purpose.ROUND_WEIGHT},
        {"window": 4},
        {"matrix": 0},
        {"window": 2, "matrix": 3},
    ],
)
def test_every_part_of_a_key_matters(change: dict[str, int]) -> None:
    assert derive_key(**ONE) != derive_key(**{**ONE, **change})


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1])
def test_every_signed_64_bit_seed_gives_a_64_bit_key(seed: int) -> None:
    assert 0 <= derive_key(**{**ONE, "seed": seed}) < 2**64


@pytest.mark.parametrize("seed", [2**63, -(2**63) - 1])
def test_a_longer_seed_is_an_error_that_names_it(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed must lie in .*seed={seed}\. Take it modulo"):
        derive_key(**{**ONE, "seed": seed})


def test_another_process_derives_the_same_keys() -> None:
    code = (
        "from flora_dist.core.sketch.keys import *;"
        "print(derive_key(seed=1, name_key=name_key('a.b'), purpose=Purpose.MOMENTUM, window=0))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    here = derive_key(seed=1, name_key=name_key("a.b"), purpose=Purpose.MOMENTUM, window=0)
    assert int(run.stdout) == here


def test_the_keys_are_frozen() -> None:
    assert {purpose.name: purpose.value for purpose in Purpose} == {
        "MOMENTUM": 1,
        "GRADIENT": 2,
        "ROUND_WEIGHT": 3,
        "ROUND_MOMENTUM": 4,
        "ROUND_GRADIENT": 5,
        "ROUND_MEAN": 6,
    }
    assert name_key("layers.0.weight") == GOLDEN_NAME
    assert derive_key(**ONE) == GOLDEN_KEY
    del_matrix = {part: value for part, value in ONE.items() if part != "matrix"}
    assert derive_key(**del_matrix) == derive_key(**{**ONE, "matrix": 0})


GOLDEN_NAME = 0x68457CADF01DA2D3
GOLDEN_KEY = 0x1F02D6B53BD8F588
