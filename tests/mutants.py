"""Broken copies of model.py, to prove that tests can fail."""

import inspect
import sys
from types import ModuleType

import nala_min.model

SOURCE = inspect.getsource(nala_min.model)


def load_model(source: str, filename: str = "mutant_of_model.py") -> ModuleType:
    """A module made from source, as if read from the file filename."""
    module = ModuleType(f"mutant_{abs(hash(source))}")
    sys.modules[module.__name__] = module  # where dataclasses look up a class's annotations
    exec(compile(source, filename, "exec"), module.__dict__)
    return module


def mutant(old: str, new: str) -> ModuleType:
    """model.py with its only occurrence of old replaced by new."""
    assert SOURCE.count(old) == 1, f"{SOURCE.count(old)} occurrences of {old!r} in model.py"
    return load_model(SOURCE.replace(old, new))
