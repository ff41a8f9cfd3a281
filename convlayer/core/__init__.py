"""The compiled core: loops over the rows of a batch, in C++17, for what torch's own operations are
too small to do fast. It stands in `src`, is compiled when the package is installed, into one library
for any processor and on x86-64 another for those of the last ten years, and is called by ctypes
through a plain C interface. Where none runs, everything is computed by torch, as without it.
"""
