# SPDX-License-Identifier: Apache-2.0
"""How fast moving averages forget. Standard library only."""


def corrected(beta: float, step: int) -> float:
    """Adam's bias correction as a moving rate: beta (1 - beta^(t-1)) / (1 - beta^t) at step t.

    >>> corrected(0.99, 1)
    0.0
    """
    return beta * (1.0 - beta ** (step - 1)) / (1.0 - beta**step)
