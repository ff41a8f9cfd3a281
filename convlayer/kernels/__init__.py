"""Batched kernels in plain torch, one problem a file; they know nothing of CVXPY."""
