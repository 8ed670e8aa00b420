"""Choices by name: one wording for what there is not."""

from __future__ import annotations

from collections.abc import Iterable


def check_choice(argument: str, value: object, choices: Iterable[object]) -> None:
    """Refuse what is not among some choices.

    Parameters
    ----------
    argument : str
        What the caller calls the value.
    value : object
    choices : iterable
        Compared by ``==``; named in this order.

    Raises
    ------
    ValueError
        With the argument, the value and the choices.
    """
    choices = tuple(choices)
    if value not in choices:
        expected = ", ".join(map(str, choices))
        raise ValueError(f"{argument} must be one of {expected}, got {value!r}")
