"""What a configuration asks of its values, each in one line that names the value.

is_whole, is_number                                    whether a value is one
require                                                refuse with a message unless something holds
positive_whole_numbers, positive_numbers, booleans     refuse fields of a dataclass that are none
"""

from __future__ import annotations

from .errors import ConfigError

FLOAT32_MAX = (2 - 2**-23) * 2.0**127


def is_whole(value: object) -> bool:
    """Whether this is an int (True and False are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether this is an int or float within float32's range (True, False, infinity and NaN are not)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= FLOAT32_MAX


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message unless the condition holds."""
    if not condition:
        raise ConfigError(message)


def positive_whole_numbers(config: object, *names: str) -> None:
    """Raise ConfigError unless these fields are whole numbers above 0."""
    for name in names:
        value = getattr(config, name)
        require(is_whole(value) and value > 0, f"{name} must be a positive whole number, not {value!r}")


def positive_numbers(config: object, *names: str) -> None:
    """Raise ConfigError unless these fields are numbers above 0."""
    for name in names:
        value = getattr(config, name)
        require(is_number(value) and value > 0, f"{name} must be a number above 0, not {value!r}")


def booleans(config: object, *names: str) -> None:
    """Raise ConfigError unless these fields are true or false."""
    for name in names:
        value = getattr(config, name)
        require(isinstance(value, bool), f"{name} must be true or false, not {value!r}")
