"""The operator's process has one Kubernetes client in memory, and kopf works with it."""

from __future__ import annotations

import subprocess
import sys

LOADED = """
import sys
from checkpoint_operator.controller import slim
slim.without_synchronous_client()
import kopf
import checkpoint_operator.controller.commands
import checkpoint_operator.controller.main
print(*(name for name, module in sys.modules.items() if module and name.startswith("kubernetes.")))
"""


def test_the_synchronous_client_is_not_loaded_beside_the_other() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    names = done.stdout.split()
    assert "kubernetes.aio.client" in names
    assert [name for name in names if not name.startswith("kubernetes.aio")] == []
