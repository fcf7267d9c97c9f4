"""Fast paths: the same numbers as the plain definitions, compiled for the CPU (numba) or CUDA (Triton).

Nothing here is imported before it is used, and without the compilers plain torch does the work.
"""
