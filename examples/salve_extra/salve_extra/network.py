"""A backbone: a function that makes a network."""

from torch import nn


def make_net(num_classes: int, width: int = 16) -> nn.Module:
    """Three convolutions and a linear head: images ``[N, 3, H, W]`` to logits ``[N, num_classes]``.

    Args:
        num_classes: given by salve, since the function asks for it. width: channels of the first convolution.
    """

    def block(channels: int, more: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, more, 3, 2, 1), nn.BatchNorm2d(more), nn.ReLU())

    blocks = nn.Sequential(block(3, width), block(width, 2 * width), block(2 * width, 4 * width))
    return nn.Sequential(blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, num_classes))
