"""The ground floor stays light: a device encodes, and a script decodes, without torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import contract


def test_only_the_side_network_and_the_output_head_need_torch() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(contract.__path__))
    assert "side_network" in names and len(names) >= 8
    names.remove("side_network")
    names.remove("output_head")
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(f'contract.{name}')\n"
        "    assert 'torch' not in sys.modules, f'contract.{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
