"""Makes torchvision importable in this interpreter's environment, if torch is a CPU build there.

The package index has no torchvision for a CPU build of torch. The CUDA build's library does not load there,
and then torchvision fails on import, because it describes operators that nobody has defined. vLLM and the
video processors of transformers import torchvision, though nothing here calls these operators. This script
writes a hook into the environment that declares them when torchvision is imported. Where torchvision works,
nothing is written.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares torchvision's operators before it is imported. vrthinker wrote this file."""

import sys


class _Declaring:
    """Finds nothing; it only declares, once, when somebody asks for torchvision."""

    @staticmethod
    def find_spec(module, path=None, target=None):
        if module == "torchvision":
            sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Declaring]
            import torch

            global _library
            _library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _Declaring)
'''
NAME = "vrthinker_torchvision_ops"


def imports() -> subprocess.CompletedProcess[str]:
    """Imports torchvision in a fresh process."""
    return subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, text=True)


def main() -> int:
    """Writes the hook if it is needed; returns the exit code."""
    if imports().returncode == 0:
        return 0
    packages = Path(sysconfig.get_path("purelib"))
    (packages / f"{NAME}.py").write_text(HOOK, "utf-8")
    (packages / f"{NAME}.pth").write_text(f"import {NAME}\n", "utf-8")
    again = imports()
    if again.returncode:
        sys.stderr.write(f"torchvision cannot be imported: {again.stderr.strip().splitlines()[-1]}\n")
    return again.returncode


if __name__ == "__main__":
    sys.exit(main())
