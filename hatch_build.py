# SPDX-License-Identifier: Apache-2.0
"""Compiles the kernels into the wheel, where a compiler and torch's headers are at hand.

Without them the wheel is pure: the optimizer then steps with torch's operators and says how to
compile. An editable install has the library beside its sources. ``FLORA_DIST_KERNELS=torch`` leaves
the kernels out of a wheel, as it does of a run.
"""

from __future__ import annotations

import importlib.util
import os
import site
import sys
import sysconfig
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_PACKAGE = Path("flora_dist") / "kernels"


class KernelsHook(BuildHookInterface[Any]):
    """Hatch's hook of this name: ``[tool.hatch.build.targets.wheel.hooks.custom]``."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile before the files of the wheel are gathered."""
        del version
        source = Path(self.root) / _PACKAGE / "compiler.py"
        if not source.is_file():  # an image installs what we need before our sources are there
            return
        if os.environ.get("FLORA_DIST_KERNELS") == "torch":
            return
        compiler = _compiler(source)
        torch = next(filter(None, map(compiler.torch_at, _site_packages())), None)
        if torch is None:
            self.app.display_warning(
                "torch is not installed here: the wheel has no compiled kernels. Install torch "
                "first, or run python -m flora_dist.kernels.build afterwards."
            )
            return
        try:
            library = compiler.build(torch, Path(self.root) / _PACKAGE)
        except compiler.CannotBuildError as error:
            self.app.display_warning(f"the wheel has no compiled kernels: {error}")
            return
        build_data["force_include"][str(library)] = str(_PACKAGE / library.name)
        # Nothing of it depends on the version of Python or torch, all on the platform.
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{platform}"
        build_data["pure_python"] = False


def _compiler(path: Path) -> ModuleType:
    """The module, without the package: that imports torch, which a build environment lacks."""
    name = "flora_dist_compiler"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _site_packages() -> list[Path]:
    """Where packages are installed: pip hides these from a build, but they are on disk."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path]
    folders += site.getsitepackages()
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]
