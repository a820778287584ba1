"""Whole numbers on the host: Triton's own functions for them are made for kernels and take microseconds a call."""


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()


def channel_block(channels: int) -> int:
    """Channels of a program of a depthwise convolution, at most 32.

    A power of two that divides them wastes no lane; blocks below 16 waste memory transactions instead.
    """
    block = min(32, channels & -channels)
    return block if block >= 16 else min(32, power_of_2(channels))
