"""The ways from parameters to a solution and back: the cone program, kernels, and what stands
around them."""
