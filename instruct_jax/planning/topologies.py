"""Machines that are not here, as the devices a program can be compiled for.

    v5p:4x4x4    TPU chips of a slice, through libtpu (extra `plan`)
    h100:1x4x8   slices x hosts x cards, through the CUDA plugin (extra `gpu`)
    cpu:8        this CPU as so many devices

JAX itself must run on the CPU, or the plugin looks for its hardware: `prepare` sees to it.
"""

import importlib.util
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh

from instruct_jax.errors import ConfigError
from instruct_jax.models.costs import PEAKS, Peaks
from instruct_jax.training.mesh import AXES, parse_mesh

# Bytes/s of a ring over one mesh axis: on a TPU both directions of one axis of the torus, on a card
# NVLink in one direction. Between the hosts of cards the network is slower, which is not modelled.
LINKS = {"v4": 90e9, "v5e": 90e9, "v5p": 180e9, "v6e": 180e9, "h100": 450e9, "h200": 450e9}
# libtpu keeps a part of the memory for itself.
USABLE = {"v5e": 15.75 * 2**30, "v6e": 31.25 * 2**30}
TPUS = ("v4", "v5e", "v5p", "v6e")
CARDS = ("h100", "h200")

# Without these libtpu looks for the machine it is on, and complains, or finds another process that
# compiles beside this one.
_QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84929347584 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 28 }
runtime_version { major: 13 minor: 0 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_TARGETS = {
    "h100": _H100,
    "h200": _H100.replace("3352320000000", "4800000000000")
    .replace("84929347584", "150754820096")
    .replace("NVIDIA H100 80GB HBM3", "NVIDIA H200"),
}


@dataclass(frozen=True)
class Topology:
    """A machine by name, its chip and how many devices; nothing is asked of any plugin yet."""

    name: str
    chip: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Devices: chips, cards, or parts of this CPU."""
        return int(np.prod(self.shape))

    @property
    def peaks(self) -> Peaks | None:
        """What a device can do; None for a CPU."""
        return PEAKS.get(self.chip)

    @property
    def memory(self) -> float | None:
        """Bytes that a program may use on a device; None for a CPU."""
        if self.peaks is None:
            return None
        return USABLE.get(self.chip, self.peaks.memory)

    @property
    def link(self) -> float | None:
        """Bytes/s of a ring of devices; None for a CPU."""
        return LINKS.get(self.chip)


def parse_topology(name: str) -> Topology:
    """The topology called `name`; ConfigError with the forms that there are."""
    match = re.fullmatch(r"([a-z0-9]+):([1-9]\d*(?:x[1-9]\d*)*)", name)
    chip = match[1] if match else ""
    if match is None or chip not in (*TPUS, *CARDS, "cpu"):
        raise ConfigError(
            f"--topology={name}: expected CHIP:SHAPE such as v5p:4x4x4, v5e:4x4, h100:1x4x8 or "
            f"cpu:8; chips are {', '.join((*TPUS, *CARDS, 'cpu'))}"
        )
    shape = tuple(int(n) for n in match[2].split("x"))
    wanted = {"v4": 3, "v5p": 3, "v5e": 2, "v6e": 2, "cpu": 1}.get(chip, 3)
    if len(shape) != wanted:
        raise ConfigError(f"--topology={name}: the shape of {chip} has {wanted} numbers")
    return Topology(name, chip, shape)


def prepare(topology: Topology, cpu_flags: Sequence[str]) -> None:
    """Sets up jax to compile for `topology`; before anything asks it for its devices."""
    jax.config.update("jax_platforms", "cpu")
    if topology.chip in TPUS:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
    if topology.chip == "cpu":
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *cpu_flags])
        jax.config.update("jax_num_cpu_devices", topology.size)


def open_devices(topology: Topology) -> Sequence[Any]:
    """Devices to compile for. ConfigError where there is no plugin, with what to install."""
    if topology.chip == "cpu":
        devices = jax.devices("cpu")
        if len(devices) < topology.size:
            raise ConfigError(
                f"--topology={topology.name}: this process has {len(devices)} CPU devices; set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.size}"
            )
        return devices[: topology.size]
    tpu = topology.chip in TPUS
    try:
        if tpu:
            found = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
        else:
            target = {"target_config": _TARGETS[topology.chip]}
            shape = "x".join(map(str, topology.shape))
            found = topologies.get_topology_desc(platform="cuda", topology=shape, **target)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        extra = "plan" if tpu else "gpu"
        missing = not _plugin_is_there("libtpu" if tpu else "jax_cuda13_plugin")
        if missing:
            raise ConfigError(
                f"--topology={topology.name}: nothing here compiles for {topology.chip}; "
                f'pip install "instruct-jax[{extra}]"'
            ) from error
        raise ConfigError(f"--topology={topology.name}: {reason}") from error
    # v4 lists the two cores of a chip.
    return found.devices[:: len(found.devices) // topology.size]


def _plugin_is_there(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def compile_mesh(topology: Topology, spec: str, devices: Sequence[Any]) -> Mesh:
    """The mesh of `spec` over `devices`, laid out along the torus where there is one."""
    sizes = mesh_sizes(topology, spec)
    shape = tuple(sizes.values())
    count = int(np.prod(shape))
    if topology.chip in TPUS and count == len(devices):
        array = mesh_utils.create_device_mesh(shape, list(devices), allow_split_physical_axes=True)
    else:
        array = np.array(devices[:count], dtype=object).reshape(shape)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(topology: Topology, spec: str) -> dict[str, int]:
    """Sizes of the axes of `spec`; "auto" gives every device to fsdp."""
    return parse_mesh("fsdp:-1" if spec == "auto" else spec, topology.size)


def abstract_mesh(topology: Topology, spec: str) -> Any:
    """The mesh of `spec` without devices: enough for shapes and shardings, not for a compiler."""
    sizes = mesh_sizes(topology, spec)
    platform = "tpu" if topology.chip in TPUS else "gpu" if topology.chip in CARDS else "cpu"
    return jax.sharding.AbstractMesh(
        tuple(sizes.values()),
        tuple(sizes),
        axis_types=(AxisType.Auto,) * len(AXES),
        # What the models choose by the platform, they choose for an estimate too.
        abstract_device=jax.sharding.AbstractDevice(topology.chip, None, platform),
    )
