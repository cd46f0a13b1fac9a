"""The ground floor stays light: a device encodes, and a script decodes, without torch."""

from __future__ import annotations

import pkgutil
import subprocess
import sys

from sidestream import contract


def test_no_module_of_the_contract_needs_torch() -> None:
    names = sorted(module.name for module in pkgutil.iter_modules(contract.__path__))
    assert "plan" in names and len(names) >= 8
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}:\n"
        "    importlib.import_module(f'sidestream.contract.{name}')\n"
        "    assert 'torch' not in sys.modules, f'sidestream.contract.{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
