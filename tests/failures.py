"""Errors as the contract compares them."""

from __future__ import annotations


def kind(error: BaseException) -> type[BaseException]:
    """The class of the contract: NotImplementedError and the like are RuntimeErrors."""
    for cls in (TypeError, ValueError, RuntimeError):
        if isinstance(error, cls):
            return cls
    return type(error)


def failure(function, *args, **kwargs) -> Exception | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None
