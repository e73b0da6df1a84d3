"""What a file brings along as configuration: plain data, of which nothing is left to be resolved."""

from __future__ import annotations

from typing import Any

from okddip.errors import ConfigError

# No configuration is larger; a few bytes that repeat themselves may stand for billions of values
MOST_VALUES, DEEPEST = 100_000, 50


class NotTrusted(ConfigError):
    """A file names what is not called for it, or is to be resolved once more: it is not merely damaged."""


def plain(value: Any, key: str, source: object) -> Any:
    """A copy of a configuration from a file, of which nothing is left to be resolved.

    Args:
        value: a mapping, a list or a value.
        key: that it stands under, for messages; may be empty.
        source: where it comes from, for messages.

    Raises:
        NotTrusted: an interpolation, a value that is missing, or no plain data; names the key.
    """
    count = 0

    def copied(value: Any, key: str, depth: int) -> Any:
        nonlocal count
        count += 1
        if count > MOST_VALUES or depth > DEEPEST:
            raise NotTrusted(
                f"{source}: {key[:80]}: the configuration is too large or nested too deeply, as none is that"
                " this program writes."
            )
        if value is None or type(value) in (bool, int, float):
            return value
        if type(value) is str:
            if "${" in value:
                raise NotTrusted(
                    f"{source}: {key}={value[:80]}: holds an interpolation, ${{...}}, which is not followed"
                    " here. Only the value itself can stand there."
                )
            if value == "???":
                raise NotTrusted(f"{source}: {key}=???: the value is missing.")
            return value
        if type(value) is list:
            return [copied(item, f"{key}.{index}", depth + 1) for index, item in enumerate(value)]
        if isinstance(value, dict):
            for name in value:
                if not isinstance(name, str | int | float) or "${" in str(name):
                    raise NotTrusted(f"{source}: {key}: has the key {name!r}; a key must be plain text.")
            return {
                name: copied(item, f"{key}.{name}".lstrip("."), depth + 1) for name, item in value.items()
            }
        raise NotTrusted(
            f"{source}: {key}: is a {type(value).__name__}; a configuration holds text, numbers, true, false,"
            " null, lists and mappings."
        )

    return copied(value, key, 0)
