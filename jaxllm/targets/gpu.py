"""XLA:GPU for cards that are not there: a text that describes the card, and ptxas, are all that the compiler needs."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from jaxllm.spec.errors import TargetError

INSTALL = "pip install 'jax[cuda12-local]' nvidia-cuda-nvcc-cu12 installs it"
WHEELS = (("Linux", "x86_64"), ("Linux", "aarch64"))

# XLA plans a program for 80 % of the card's memory and recomputes by itself when that is short, which would put
# instructions into the ledger that nobody asked for. A card a thousand times larger never is.
UNBOUNDED = 1000


def environment(devices: int) -> dict[str, str]:
    settings = {
        "JAX_PLATFORMS": "cpu",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    }
    if ptxas := _ptxas():
        folder = str(ptxas.parent)
        if folder not in os.environ.get("PATH", "").split(os.pathsep):
            os.environ["PATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PATH", ""))))
    return settings


def devices(mesh: Any) -> list[Any]:
    """Descriptions of the cards of a mesh, node by node. Raises TargetError when the compiler is not installed."""
    if (here := (platform.system(), platform.machine())) not in WHEELS:
        raise TargetError(f"XLA:GPU has no wheel for {' '.join(here)}, only for Linux; --target cpu emulates the mesh.")
    if importlib.util.find_spec("jax_cuda12_plugin") is None and importlib.util.find_spec("jax_cuda13_plugin") is None:
        raise TargetError(f"the gpu compiler is not installed: {INSTALL}.")
    if _ptxas() is None:
        raise TargetError(f"the gpu compiler lacks ptxas: {INSTALL}.")
    from jax.experimental import topologies

    try:
        return list(
            topologies.get_topology_desc(
                platform="cuda", topology_name="", target_config=target_config(mesh.machine), topology=mesh.topology
            ).devices
        )
    except Exception as error:
        raise TargetError(
            f"XLA:GPU cannot describe {mesh.text}: {_first_line(error)}; correct [compiler] in its machine file, or "
            "emulate it with --target cpu."
        ) from error


def target_config(machine: Any) -> str:
    """The card as XLA:GPU's GpuTargetConfigProto in text form, with its memory unbounded."""
    card = machine.compiler
    major, minor = card["compute_capability"]
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 49152,
        "shared_memory_per_core": card["shared_memory_per_core"],
        "threads_per_core_limit": card["threads_per_core_limit"],
        "core_count": card["core_count"],
        "fpus_per_core": card["fpus_per_core"],
        "block_dim_limit_x": 2147483647,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": card["memory_bandwidth"],
        "l2_cache_size": card["l2_cache_size"],
        "clock_rate_ghz": card["clock_rate_ghz"],
        "device_memory_size": card["device_memory_size"] * UNBOUNDED,
        "shared_memory_per_block_optin": card["shared_memory_per_block_optin"],
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    lines = "\n".join(f"  {name}: {value}" for name, value in fields.items())
    return f"""
gpu_device_info {{
{lines}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
runtime_version {{ major: 12 minor: 9 patch: 0 }}
device_description_str: "{card["description"]}"
"""


def _ptxas() -> Path | None:
    """ptxas on the PATH, or the one that NVIDIA's wheels bring."""
    if found := shutil.which("ptxas"):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    for root in spec.submodule_search_locations if spec and spec.submodule_search_locations else ():
        for candidate in sorted(Path(root).glob("*/bin/ptxas")):
            return candidate
    return None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
