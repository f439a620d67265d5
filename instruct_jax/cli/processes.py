"""Several processes that are one run: how they find each other, and how they end.

Every process runs the same command. They are told of each other by SLURM (`srun`), Open MPI
(`mpirun`), a TPU slice on GCE or GKE or an indexed Kubernetes job, as `jax.distributed` detects
them; or by three variables, which `experiments/launch.py` sets and any other launcher may:

    INSTRUCT_JAX_COORDINATOR=HOST:PORT   where process 0 listens, and nowhere else
    INSTRUCT_JAX_PROCESSES=N             how many there are
    INSTRUCT_JAX_PROCESS=I               which one this is, from 0

Where nothing says so there is one process, and nothing here costs it any time. A process that dies
takes the others with it: a dead one is missed after HEARTBEAT seconds.
"""

import errno
import os
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path

from instruct_jax.errors import ConfigError, Interrupted, RunError

COORDINATOR, COUNT, INDEX = (
    f"INSTRUCT_JAX_{name}" for name in ("COORDINATOR", "PROCESSES", "PROCESS")
)
# Seconds. What hangs for this long is taken for dead; what does not end by itself after the others
# is left behind.
HEARTBEAT = 10
SHUTDOWN = 120

_joined = False


def announced(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `environment` says that this may be one process of several."""
    if any(name in environment for name in (COORDINATOR, COUNT, INDEX)):
        return True
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in environment for name in slurm):
        return environment.get("SLURM_NTASKS", "1") != "1"
    if environment.get("OMPI_COMM_WORLD_SIZE", "1") != "1":
        return True
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        return True
    if environment.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    # On a TPU machine jax asks its metadata; the chips are what can be seen without jax.
    chips = any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))
    return chips and find_spec("libtpu") is not None


def join() -> None:
    """Meets the other processes; nothing where jax finds none. ConfigError where it is told badly.

    To be called before anything touches a device.
    """
    global _joined
    import jax

    # It would take SIGTERM for itself; the loop asks all processes instead (training/loop.py).
    jax.config.update("jax_enable_preemption_service", False)
    limits = {"heartbeat_timeout_seconds": HEARTBEAT, "shutdown_timeout_seconds": SHUTDOWN}
    if not any(name in os.environ for name in (COORDINATOR, COUNT, INDEX)):
        try:
            jax.distributed.initialize(**limits)
        except ValueError:  # no cluster, or one that does not say who is in it
            return
    else:
        coordinator, count, index = _told()
        if count == 1:
            return
        bind = _bound(coordinator) if index == 0 else None
        try:
            jax.distributed.initialize(
                coordinator, count, index, coordinator_bind_address=bind, **limits
            )
        except ValueError as error:
            raise ConfigError(f"{COORDINATOR}={coordinator}: {error}") from error
    _joined = jax.process_count() > 1


def _told() -> tuple[str, int, int]:
    texts = {name: os.environ.get(name) for name in (COORDINATOR, COUNT, INDEX)}
    if missing := [name for name, text in texts.items() if not text]:
        raise ConfigError(f"{', '.join(missing)} not set; experiments/launch.py sets all three")
    coordinator, count, index = (str(text) for text in texts.values())
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
        raise ConfigError(f"{INDEX}={index}, {COUNT}={count}: expected 0 <= process < processes")
    host, port = _address(coordinator)
    if int(count) > 1:
        _addresses(coordinator, host, port)
    return coordinator, int(count), int(index)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")  # as IPv6 addresses are written
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigError(
            f"{COORDINATOR}={coordinator}: expected HOST:PORT, the port from 1 to 65535"
        )
    return host, int(port)


def _addresses(coordinator: str, host: str, port: int) -> list[str]:
    """The addresses that `host` stands for. ConfigError where it stands for none."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"{COORDINATOR}={coordinator}: no host {host!r} ({error})") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def _bound(coordinator: str) -> str:
    """HOST:PORT that process 0 listens on: no interface but those of the host that it was told.

    All of them where that would not do: the name of this machine may stand for a loopback address
    in its own /etc/hosts, and a service or a translated address is none that it has. ConfigError
    where it may not listen there; jax would end in a segmentation fault.
    """
    host, port = _address(coordinator)
    addresses = _addresses(coordinator, host, port)
    local = {address for address in addresses if ip_address(address).is_loopback}
    named = host == "localhost" or host in local
    if named or not local:
        errors = [_cannot_listen(address, port) for address in addresses]
        # A machine may have one of two families of addresses.
        usable = [a for a, error in zip(addresses, errors, strict=True) if error is None]
        absent = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
        taken = next((e for e in errors if e is not None and e.errno not in absent), None)
        if taken is not None:
            raise _refused(coordinator, port, taken)
        if usable:
            return f"[{usable[0]}]:{port}" if ":" in usable[0] else f"{usable[0]}:{port}"
    everywhere = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    if (error := _cannot_listen(everywhere, port)) is not None:
        raise _refused(coordinator, port, error)
    print(
        f"note: {COORDINATOR}={coordinator} is here no address that others reach; process 0 listens"
        " on all that this machine has",
        file=sys.stderr,
    )
    return f"[::]:{port}" if everywhere == "::" else f"{everywhere}:{port}"


def _cannot_listen(address: str, port: int) -> OSError | None:
    """Why no socket of this process can listen there, or None."""
    ipv6 = ":" in address
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        with socket.create_server((address, port), family=family, dualstack_ipv6=address == "::"):
            return None
    except OSError as error:
        return error


def _refused(coordinator: str, port: int, error: OSError) -> ConfigError:
    return ConfigError(
        f"{COORDINATOR}={coordinator}: process 0 cannot listen on port {port} ({error.strerror});"
        " choose another port"
    )


def index() -> int:
    """Which process this is, from 0."""
    if not _joined:
        return 0
    import jax

    return jax.process_index()


def agreed(ok: bool) -> bool:
    """What process 0 gives as `ok`, in all processes; all must ask."""
    if not _joined:
        return ok
    import numpy as np
    from jax.experimental.multihost_utils import broadcast_one_to_all

    return bool(broadcast_one_to_all(np.int32(ok)))


@contextmanager
def together() -> Iterator[None]:
    """Within it, a process that fails alone ends at once, and so do the others.

    A process of several that just left would wait for the others, and they for it.
    """
    try:
        yield
    except (Exception, Interrupted) as error:
        if not _joined or (isinstance(error, RunError) and error.everywhere):
            raise
        code = 1
        if isinstance(error, RunError):
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            code = error.exit_code
        elif isinstance(error, Interrupted):
            print(error, file=sys.stderr)
            code = error.exit_code
        else:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
