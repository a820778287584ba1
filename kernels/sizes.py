"""Whole numbers on the host: Triton's own functions for them are made for kernels and take microseconds a call."""


def ceil_div(number: int, divisor: int) -> int:
    return -(-number // divisor)


def power_of_2(number: int) -> int:
    """The smallest power of two that is at least `number`, which is positive."""
    return 1 << (number - 1).bit_length()
