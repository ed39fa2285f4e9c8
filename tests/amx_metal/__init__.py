"""fourfold's AMX kernels, executed: a program without an operating system, on an emulator that has the tile unit."""
