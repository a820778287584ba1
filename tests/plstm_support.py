"""Inputs of pLSTM's operator for its tests."""

import random

import torch

TURNS = {"propagation": ("T_dl", "T_ru"), "L": ("T_ru",), "R": ("T_dl",), "none": ()}
"""Turns that are given, by mode or chirality."""


def plstm_inputs(
    batch=2, size=(3, 4), heads=2, key_dim=3, value_dim=5, orientations=4, states=1, turns="propagation", direct=True
):
    """Keyword arguments of `plstm2d`, in the order of its signature; transitions are below 1."""
    nodes = (batch, *size, heads)
    inputs = {name: torch.randn(*nodes, width) for name, width in zip("QKV", (key_dim, key_dim, value_dim))}
    gate, transition = (*nodes, orientations, states), (*nodes, orientations, states, states)
    inputs |= {name: torch.rand(gate) for name in ("S_r", "S_d")}
    for name in ("T_rl", "T_du", "T_dl", "T_ru"):
        given = name in ("T_rl", "T_du", *TURNS[turns])
        inputs[name] = torch.randn(transition).tanh() / states if given else None
    inputs |= {name: torch.randn(gate) for name in ("M_l", "M_u")}
    return inputs | {"D": torch.randn(nodes) if direct else None}


def random_options(number):
    """Options of `plstm_inputs` for a random grid: every third is a row or a column."""
    draw = random.Random(number)
    sides = [draw.randint(2, 9), draw.randint(2, 9)]
    if number % 3 == 0:
        sides[number % 2] = 1
    return dict(
        batch=draw.randint(1, 2),
        size=tuple(sides),
        heads=draw.randint(1, 2),
        key_dim=draw.randint(1, 4),
        value_dim=draw.randint(1, 4),
        orientations=draw.choice([1, 4]),
        states=draw.choice([1, 1, 2, 3]),
        turns=draw.choice(list(TURNS)),
        direct=draw.random() < 0.7,
    )
