"""What one example costs a network: multiply-accumulates, counted while it answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import ArgumentError


def multiply_accumulates(network: nn.Module, rows: Tensor) -> int | None:
    """Multiply-accumulates of all convolutions, matrix products and attentions, for one example.

    Args:
        network: answers ``rows``; it is asked in evaluation mode and left in the mode it was in.
        rows: a batch as it takes them, shape ``(B, ...)``; the first example is asked alone.

    Returns:
        Half of the floating-point operations that PyTorch counts (a multiply and an add are two). None where it sees
        none: a network that runs in another library.

    Raises:
        ArgumentError: no rows.

    As :func:`krdistill.deploy.measuring.count_graph` counts them in an exported file.
    """
    if not len(rows):
        raise ArgumentError("rows: expected an example to count with, got none.")
    training = network.training
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(rows[:1])
    finally:
        network.train(training)
    return counter.get_total_flops() // 2 or None
