"""What happens when a GPU's memory does not suffice."""

from __future__ import annotations

import gc
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIBIBYTE = 2**30


@contextmanager
def asked_memory(device: torch.device) -> Iterator[None]:
    """Makes an allocation on a device all or nothing.

    Raises:
        MemoryError: if it fails; the message says how much was asked for and how much is free. Once the caller's
            objects are gone, nothing that was allocated meanwhile stays so.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.memory_allocated(device)
    try:
        yield
    except torch.OutOfMemoryError as error:
        made = torch.cuda.memory_allocated(device) - before
        failed = re.search(r"Tried to allocate ([\d.]+ \w+)", str(error))
        free = torch.cuda.mem_get_info(device)[0]
        message = (
            f"the caches and buffers do not fit on {device}: {failed[1] if failed else 'more'} was asked for after "
            f"{made / GIBIBYTE:.2f} GiB had been allocated, and {free / GIBIBYTE:.2f} GiB are free; "
            "a smaller capacity or batch needs less"
        )
    else:
        return
    gc.collect()
    torch.cuda.empty_cache()
    raise MemoryError(message)
