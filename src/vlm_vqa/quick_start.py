"""Load torch's and transformers' modules quickly, for a process that answers a few questions and compiles nothing."""

import gc
import sys
from collections.abc import Callable, Generator, MutableSequence
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_LATER = ("torch._dynamo", "torch._dynamo.utils", "torch._dynamo._trace_wrapped_higher_order_op", "scipy.optimize")


class _Later(ModuleType):
    """Stands for a module while others are imported; the decorators of torch's compiler leave functions as they are."""

    __path__: MutableSequence[str] = []

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("__"):
            raise AttributeError(name)

        def use(*arguments: Any, **options: Any) -> Any:
            if sys.modules.get(self.__name__) is not self:
                return getattr(import_module(self.__name__), name)(*arguments, **options)
            return arguments[0] if arguments and callable(arguments[0]) else lambda function: function

        return use


@contextmanager
def quick_start() -> Generator[None]:
    """Import and load models without torch's compiler and without collecting garbage: half of the time that it takes.
    torchvision and transformers import the compiler for a few decorators and two functions that compiled models use, and
    SciPy's optimizers for losses of detectors; what is called later is imported then."""
    names = [name for name in _LATER if name not in sys.modules]
    sys.modules.update({name: _Later(name) for name in names})
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
        for name in names:
            del sys.modules[name]
