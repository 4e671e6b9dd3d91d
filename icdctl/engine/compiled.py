"""torch.compile for the part of a step that calls the student, with a fallback to plain calls where it fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

import torch

_BACKEND = "inductor"

F = TypeVar("F", bound=Callable[..., Any])


class Compiler:
    """Compiles one function of each student of a process; once that fails, all of them run uncompiled."""

    def __init__(self, message: Callable[[str], None]) -> None:
        """
        Args:
            message: receives one warning where compiling fails.
        """
        self._message = message
        self.is_on = True
        """Whether it still compiles: False once it has failed."""

    def give_up(self, error: Exception) -> None:
        """Stop compiling, and stop calling what was compiled."""
        if self.is_on:
            self.is_on = False
            cause = getattr(error, "inner_exception", error)  # where torch wraps what its backend said
            reason = (str(cause).splitlines() or ["no reason given"])[0]
            self._message(f"warning: students run without torch.compile, with another rounding: {reason}")

    def compiled(self, method: F) -> F:
        """A bound method, compiled at its first call with each size of batch; if that fails, it is called as it is."""
        try:
            fast: Callable[..., Any] = torch.compile(_apart(method), backend=_BACKEND, fullgraph=True, dynamic=False)
        except RuntimeError as error:  # this Python or system does not support it
            self.give_up(error)
            return method

        def run(*arguments: Any) -> Any:
            if self.is_on:
                try:
                    # The whole function is one graph: nothing has run where compiling fails.
                    with warnings.catch_warnings():
                        # Products are in float32 on purpose: the reference's are.
                        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
                        # torch 2.6 makes an instance of an autograd function itself.
                        warnings.filterwarnings(
                            "ignore", message=".*should not be instantiated", category=DeprecationWarning
                        )
                        return fast(*arguments)
                except Exception as error:  # torch's own warnings; a warning of the function itself appears again below
                    self.give_up(error)
            return method(*arguments)

        return cast(F, run)


def _apart(method: Any) -> Any:
    """The same method with its own code object: torch counts compilations by code, and gives up after a few."""
    function = method.__func__
    code = function.__code__.replace()
    own = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    return MethodType(own, method.__self__)
