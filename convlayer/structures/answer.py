from convlayer.kernels.answer import Answer  # noqa: F401
