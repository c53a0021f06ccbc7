"""One run of `meshlm train` over the nodes of a Ray cluster.

    pip install "ray[train]"
    python train_ray.py --workers 2 --gpus 8 -- --run=/shared/runs/first --data=/shared/store \\
        --preset=gpt-j-6b --batch-size=64 --mesh.data=16

A worker is a process, the real command with all that Ray gives it. When one ends badly, Ray starts
all again (`--failures` times; the loss of a node does not count), and they go on from the newest
checkpoint. --run and --data lie on a file system that all nodes see. Ray's own ports and JAX's need
a private network.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.jax import JaxConfig, JaxTrainer

# Exit codes of `meshlm` that would come again: a wrong command line, damaged data.
NO_USE_TO_TRY_AGAIN = (2, 3)
_PR_SET_PDEATHSIG = 1


def work(options: dict[str, Any]) -> int:
    """Returns the command's exit code in one worker; raises where Ray is to start all again."""
    context = train.get_context()
    address = broadcast_from_rank_zero(_free_address() if context.get_world_rank() == 0 else None)
    variables = {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(context.get_world_size()),
        "JAX_PROCESS_ID": str(context.get_world_rank()),
    }
    # Ray ends a worker without asking: the command then is told to stop, and saves.
    command = [str(Path(sys.executable).with_name("meshlm")), "train", *options["words"]]
    code = subprocess.run(
        command, env=os.environ | variables, preexec_fn=_stop_with_the_worker
    ).returncode
    if code and code not in NO_USE_TO_TRY_AGAIN:
        raise RuntimeError(f"meshlm train ended with exit code {code}")
    return code


def _free_address() -> str:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return f"{ray.util.get_node_ip_address()}:{listener.getsockname()[1]}"


def _stop_with_the_worker() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> int:
    """Returns the exit code of the command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, required=True, help="processes, one a node")
    parser.add_argument("--gpus", type=int, default=0, help="of each worker [0]")
    parser.add_argument("--tpu", metavar="TYPE", help="such as TPU-V6E; with --topology")
    parser.add_argument("--topology", help="of the TPU slice, such as 4x4")
    parser.add_argument("--failures", type=int, default=20, help="after which Ray gives up [20]")
    parser.add_argument("words", nargs="+", help="options of meshlm train, after --")
    given = parser.parse_args()
    trainer = JaxTrainer(
        work,
        train_loop_config={"words": given.words},
        # The command connects its processes itself: Ray is to leave JAX alone.
        jax_config=JaxConfig(),
        scaling_config=train.ScalingConfig(
            num_workers=given.workers,
            use_gpu=given.gpus > 0,
            use_tpu=given.tpu is not None,
            accelerator_type=given.tpu,
            topology=given.topology,
            resources_per_worker={"GPU": given.gpus} if given.gpus else None,
        ),
        run_config=train.RunConfig(failure_config=train.FailureConfig(max_failures=given.failures)),
    )
    return trainer.fit().return_value


if __name__ == "__main__":
    sys.exit(main())
