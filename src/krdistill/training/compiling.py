"""Whether torch.compile translates the networks of a training."""

from __future__ import annotations

import os
import shutil
import sys
from typing import Literal

import torch

from ..config import TrainConfig
from ..distributed import World
from ..errors import ConfigError
from ..models.network import Network
from ..models.resnet import ResNet

CompileMode = Literal["none", "default", "reduce-overhead"]

LONG = 20_000
"""Steps from which compiling, some 20 s, is paid for by steps that are 6 % faster; see docs/performance.md."""


def compile_mode(
    config: TrainConfig, network: Network, *, steps: int, device: torch.device, world: World
) -> CompileMode:
    """What ``train.compile`` comes to.

    ``auto`` is ``default`` where that was measured to be faster and is worth its time: a ResNet of ours, trained by one
    process on a Linux machine's CPU for :data:`LONG` steps or more, with a C++ compiler at hand. It depends on nothing
    that changes from one run to the next: compiled networks add up in another order.

    Args:
        config: of the training.
        network: what is trained.
        steps: of the whole training.
        device: where.
        world: the processes that train together.

    Raises:
        ConfigError: compiling is asked for with many processes.
    """
    if config.compile != "auto":
        if config.compile != "none" and world.size > 1:
            raise ConfigError("train.compile: compiled networks are trained by one process; set it to none.")
        return config.compile
    pays = steps >= LONG and isinstance(network.backbone, ResNet)
    able = device.type == "cpu" and world.size == 1 and sys.platform == "linux" and cxx_compiler() is not None
    return "default" if pays and able else "none"


def cxx_compiler() -> str | None:
    """The C++ compiler that torch.compile would call for a CPU."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    return next((path for name in names if (path := shutil.which(name))), None)
