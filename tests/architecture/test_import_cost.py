"""What `import treadle` costs over `import torch`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARE = 0.1  # of the time that `import torch` takes in the same process
MEGABYTES = 25.0
PACKAGES = ["treadle_fabric", "treadle"]

# Each belongs to the one module, or the one function, that uses it.
HEAVY = [
    "IPython",
    "bitsandbytes",
    "comet_ml",
    "deepspeed",
    "fsspec",
    "jsonargparse",
    "lightning",
    "matplotlib",
    "mlflow",
    "multiprocessing.managers",
    "omegaconf",
    "optuna",
    "pandas",
    "pytorch_lightning",
    "ray",
    "rich",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.onnx",
    "torch.utils.tensorboard",
    "torch_xla",
    "torchao",
    "torchmetrics",
    "tqdm",
    "trackio",
    "transformer_engine",
    "treadle.callbacks.model_pruning",
    "treadle.callbacks.weight_averaging",
    "treadle.searches.learning_rate",
    "treadle_fabric.loggers.wandb",
    "treadle_fabric.measuring",
    "treadle_fabric.precision.float8",
    "wandb",
    "zoneinfo",
]


def run(code: str) -> str:
    # As users import: compiled files, whatever a machine says of writing them, and with torch's own number of threads.
    unlike_users = ("PYTHONDONTWRITEBYTECODE", "OMP_NUM_THREADS")
    environ = {key: value for key, value in os.environ.items() if key not in unlike_users}
    result = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.alone
@pytest.mark.parametrize("package", PACKAGES)
def test_import_time(package: str) -> None:
    """Processor time, the least share of several fresh processes: other work on the machine only ever adds."""
    code = (
        "import time; a = time.process_time(); import torch; b = time.process_time()\n"
        f"import {package}; print((time.process_time() - b) / (b - a))"
    )
    shares = []
    for _ in range(8):
        shares.append(float(run(code)))
        if shares[-1] <= SHARE:
            return
    pytest.fail(f"import {package} takes {min(shares):.0%} of the time of import torch; the budget is {SHARE:.0%}")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("package", PACKAGES)
def test_import_memory(package: str) -> None:
    code = (
        "import os, torch\n"
        "def rss(): return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE') / 2**20\n"
        f"before = rss()\nimport {package}\nprint(rss() - before)"
    )
    megabytes = float(run(code))
    assert megabytes <= MEGABYTES, f"import {package} takes {megabytes:.1f} MB more than import torch"


@pytest.mark.parametrize("package", PACKAGES)
def test_light_imports(package: str) -> None:
    code = f"import torch, sys; before = set(sys.modules); import {package}; print(*sorted(set(sys.modules) - before))"
    loaded = set(run(code).split())
    assert package in loaded
    heavy = [name for name in HEAVY if name in loaded]
    assert not heavy, f"import {package} loads {heavy}: import them in the function that needs them"
    assert package == "treadle" or "treadle" not in loaded
