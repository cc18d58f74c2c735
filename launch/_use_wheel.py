# SPDX-License-Identifier: Apache-2.0
"""Uses an installed flora_dist that has torch beside it and none of its extras.

Run it isolated, so that neither the current folder nor this one is on the path:

    OTHER_VENV/bin/python -I launch/_use_wheel.py
"""

import importlib.metadata
import importlib.util
import sys
from pathlib import Path

import flora_dist

_OF_THE_EXTRAS = ("datasets", "matplotlib", "yaml", "rich", "tensorboard", "transformers")


def main() -> None:
    """Imports the package, looks at what came with it, takes one step."""
    assert "torch" not in sys.modules, "import flora_dist must not import torch"
    home = Path(flora_dist.__file__).parent
    assert home.is_relative_to(sys.prefix), f"flora_dist comes from {home}, not from the wheel"
    assert (home / "py.typed").is_file(), "the wheel must contain py.typed"
    assert importlib.metadata.version("flora-dist") == flora_dist.__version__
    present = [name for name in _OF_THE_EXTRAS if importlib.util.find_spec(name)]
    assert not present, f"this environment must be bare to prove anything; it has {present}"

    import torch

    weight = torch.nn.Parameter(torch.zeros(64, 128))
    optimizer = flora_dist.Flora([("weight", weight)], lr=1e-2)
    weight.grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    moved = weight.detach().abs().mean().item()
    assert 0.0 < moved < 1.0, f"one step at lr 1e-2 moved the weights by {moved} on average"
    kernels = optimizer.report().kernels
    assert kernels.startswith("native"), f"the wheel must bring its kernels; {kernels}"
    sys.stdout.write(
        f"flora_dist {flora_dist.__version__} from the wheel: one step taken, kernels {kernels}\n"
    )


if __name__ == "__main__":
    main()
