"""The runtime's public names: all there, each from its home, and cheap to import."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys

import pytest

import treadle
import treadle_fabric

MODULES = """accelerators attribute_dict batches checkpoint checks containers coordination data environments errors
fabric
    failures launchers loggers precision randomness rank_zero resolve setup strategies types wrappers""".split()
# What users of the runtime are told to import.
PROMISED = """
    Accelerator AttributeDict CheckpointIO ClusterEnvironment CPUAccelerator CSVLogger CUDAAccelerator DDPStrategy
    DistributedCheckpointIO DoublePrecision Fabric HalfPrecision KubeflowEnvironment LightningEnvironment Logger
    LSFEnvironment MisconfigurationException MixedPrecision MPIEnvironment MPSAccelerator Precision
    ResumableDataLoader SingleDeviceStrategy
    SLURMEnvironment Strategy TensorBoardLogger TorchCheckpointIO TorchElasticEnvironment TreadleError
    find_usable_cuda_devices is_wrapped isolate_rng move_data_to_device rank_zero_info rank_zero_only rank_zero_warn
    seed_everything
""".split()


@pytest.mark.parametrize("name", PROMISED)
def test_promised_names(name: str) -> None:
    assert name in treadle_fabric.__all__


def test_all_is_what_is_there() -> None:
    assert treadle_fabric.__all__ == sorted(set(treadle_fabric.__all__), key=treadle_fabric.__all__.index)
    for name in treadle_fabric.__all__:
        assert not name.startswith("_") or name == "__version__"
        assert getattr(treadle_fabric, name) is not None


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_is_public(module: str) -> None:
    home = importlib.import_module(f"treadle_fabric.{module}")
    assert home.__all__
    for name in home.__all__:
        assert hasattr(home, name)
        if name in treadle_fabric.__all__:
            assert getattr(treadle_fabric, name) is getattr(home, name)


def test_both_packages_have_one_version() -> None:
    assert treadle.__version__ == treadle_fabric.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+.*", treadle.__version__)


def test_errors_are_all_exported() -> None:
    from treadle_fabric import errors

    assert set(errors.__all__) <= set(treadle_fabric.__all__)


def test_heavy_packages_are_left_alone() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import treadle_fabric
heavy = ("tensorboard", "tqdm", "rich", "lightning.", "pandas", "matplotlib", "IPython", "torch._dynamo",
         "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch.utils.tensorboard")
print(sorted(m for m in set(sys.modules) - before if m.startswith(heavy)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


@pytest.mark.parametrize("before", ["enable", "disable"])
def test_the_garbage_collector_is_as_it_was_after_the_import(before: str) -> None:
    code = f"import gc, torch; gc.{before}(); import treadle; print(gc.isenabled())"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(before == "enable")
