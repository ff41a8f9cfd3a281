"""A measurement in a process of its own, where memory is counted from scratch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any


def alone(
    module: str, *arguments: object, timeout: float = 120, **environment: str
) -> dict[str, Any]:
    """`python -m module arguments`, which prints one JSON object last; `environment` beside this
    process's own."""
    command = [sys.executable, "-W", "ignore", "-m", module, *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env=os.environ | environment,
    )
    if done.returncode:
        raise RuntimeError(
            (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        )
    return json.loads(done.stdout.strip().splitlines()[-1])
