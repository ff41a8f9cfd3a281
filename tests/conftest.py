"""One torch thread: the tensors here are small, and threads that share a core spin."""

import torch

torch.set_num_threads(1)
