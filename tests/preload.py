"""What the system may refuse: C functions that a process finds in place of the system's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Each fails where an environment variable is set, which a process may do on its way: setenv of the C library.
REFUSALS = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
ssize_t pread(int fd, void* to, size_t n, off_t at) {
    ssize_t (*real)(int, void*, size_t, off_t) = dlsym(RTLD_NEXT, "pread");
    if (getenv("DISK_HANGS")) pause();
    if (getenv("DISK_IS_SLOW")) usleep(20000);
    if (getenv("DISK_FAILS")) { errno = EIO; return -1; }
    return real(fd, to, n, at);
}
int pthread_create(pthread_t* thread, const pthread_attr_t* how, void* (*run)(void*), void* what) {
    int (*real)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*) = dlsym(RTLD_NEXT, "pthread_create");
    return getenv("NO_THREADS") ? EAGAIN : real(thread, how, run, what);
}
// With MANY_CPUS, as on a machine of 2,048: a smaller set is refused, and who is bound to the 1,500th says so.
int pthread_getaffinity_np(pthread_t thread, size_t bytes, cpu_set_t* set) {
    int (*real)(pthread_t, size_t, cpu_set_t*) = dlsym(RTLD_NEXT, "pthread_getaffinity_np");
    return getenv("MANY_CPUS") && bytes < 2048 / 8 ? EINVAL : real(thread, bytes, set);
}
int pthread_setaffinity_np(pthread_t thread, size_t bytes, const cpu_set_t* set) {
    int (*real)(pthread_t, size_t, const cpu_set_t*) = dlsym(RTLD_NEXT, "pthread_setaffinity_np");
    if (!getenv("MANY_CPUS") || !CPU_ISSET_S(1500, bytes, set)) return real(thread, bytes, set);
    return dprintf(1, "bound\n") < 0;
}
"""


def run(script: str, folder: Path, *arguments: str, timeout: float = 60) -> str:
    """What a Python script prints in a process with these functions. Skips where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler to refuse anything with")
    (folder / "refusals.c").write_text(REFUSALS)
    library = folder / "refusals.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "refusals.c", "-ldl"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=os.environ | {"LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=True,
    )
    return done.stdout
