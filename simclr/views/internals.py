"""What is borrowed of torch's compiler though it is not public; tests/test_internals.py says whether it is still
there and still means this."""

from contextlib import AbstractContextManager

import torch

# A function that cannot be compiled for what it is called with: once more would fail once more.
CompilingFailed = torch._dynamo.exc.TorchDynamoException
# Compiled for as many shapes as `shapes_compiled` allows: those go on.
TooManyShapes = torch._dynamo.exc.FailOnRecompileLimitHit


def shapes_compiled(limit: int) -> AbstractContextManager[None]:
    """Within it torch compiles a function for so many shapes; by itself for eight."""
    return torch._dynamo.config.patch(recompile_limit=limit)
