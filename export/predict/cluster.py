"""A job's parts on a Ray cluster: tasks predict them, and those of a worker that ends are run again."""

import os
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shvit.environment import keep_freed_memory
from shvit.errors import CheckFailed, InputError, first_line

from .inputs import Inputs
from .job import Predicted, predict_batch
from .loading import Item, Place, load_batches
from .parts import JobPart
from .predictor import Predictor, opened_model

if TYPE_CHECKING:
    import ray

LOCAL, AUTO = "local", "auto"
CONNECT_S = 10.0
AHEAD = 4
"""Parts that are asked for at a time, for each core of the cluster."""
RETRIES = 3  # of a part, where the worker that predicts it ends


@contextmanager
def connect(address: str, workers: int | None) -> Iterator[None]:
    """Connect to a Ray cluster, in a block; one that the process is connected to already stays.

    Args:
        address: `local` to start one on this machine for the time of the block, `auto`, or its host and port.
        workers: number of cores of a local one; all if None.

    Raises:
        InputError: there is none.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # which Ray reads when it is imported, and reports at its end
    import ray

    if address not in (LOCAL, AUTO):
        _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    options = {"num_cpus": workers, "include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **options)
    except Exception as error:  # Ray's, gRPC's and the system's
        raise _no_cluster(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise InputError where nothing answers at a host and port, for which Ray waits two minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_S).close()
    except (OSError, ValueError, OverflowError) as error:
        raise _no_cluster(address, error) from error


def _no_cluster(address: str, error: Exception) -> InputError:
    return InputError(f"--ray {address}: no Ray cluster there ({first_line(error)}); give local, auto, or the HOST:PORT "
                      "of one")  # fmt: skip


def predict_on_ray(predictor: Predictor, top: int, batch_size: int, parts: Iterable[JobPart]) -> Iterator[Predicted]:
    """Yield the predictions for each part, in their order, of the cluster that the process is connected to.

    Args:
        top: number of classes of each image; 0 for features.

    Raises:
        InputError: a task raised it, or the workers that ran one ended each time.
    """
    import ray

    task = ray.remote(num_cpus=1, max_retries=RETRIES)(predict_part)
    rest, pending = iter(parts), deque[tuple[JobPart, Any]]()
    while True:
        cores = max(1, int(ray.cluster_resources().get("CPU", 1)))  # a cluster may grow meanwhile
        for part in islice(rest, max(0, AHEAD * cores - len(pending))):
            pending.append((part, task.remote(predictor, part, top, batch_size, str(Path.cwd()))))
        if not pending:
            return
        part, reference = pending.popleft()
        yield _result(reference, part)


def _result(reference: "ray.ObjectRef", part: JobPart) -> Predicted:
    import ray
    from ray.exceptions import NodeDiedError, RayTaskError, WorkerCrashedError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, InputError | CheckFailed):
            raise error.cause from error
        raise
    except (WorkerCrashedError, NodeDiedError) as error:
        name = part.images.filename(0) if hasattr(part.images, "filename") else part.images.path
        raise InputError(f"{name}: the worker that read it, or one of the images after it, ended {RETRIES + 1} times, "
                         "as one without memory does; find it with a smaller --part-size") from error  # fmt: skip


def predict_part(predictor: Predictor, part: JobPart, top: int, batch_size: int, folder: str) -> Predicted:
    """Return the predictions for a part of a job; what a worker runs.

    Args:
        folder: the working directory that relative paths are meant in.
    """
    with suppress(OSError):  # absolute paths do without
        os.chdir(folder)
    keep_freed_memory()
    model = opened_model(predictor)
    transform = model.spec.transform(normalize=False)
    items: list[Item] = []
    records, arrays = [], []
    for batch in load_batches(Inputs((part.images,)), Place(0, part.skipped), transform, batch_size):
        found, features = predict_batch(model, batch, top)
        places = (Place(part.start.part, part.start.offset + len(items) + index) for index in range(len(batch.items)))
        items += [replace(item, place=place) for item, place in zip(batch.items, places, strict=True)]
        records += found
        arrays.append(features)
    return Predicted(items, records, b"".join(arrays))
