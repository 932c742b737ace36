"""Threads that compute beside the one that calls."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache


@cache
def executor() -> ThreadPoolExecutor:
    """Its threads are started when there is work for them."""
    return ThreadPoolExecutor(os.cpu_count(), "lowbit_optim")


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=executor.cache_clear)  # the child has none of the threads
