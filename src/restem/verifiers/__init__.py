"""Verifiers by name: the ones that come with restem, installed plugins, and any function of yours.

A verifier is a function `(Problem, str) -> Grade`. Loading one imports its code, and so runs it; names come from
recipes, not from data. To run a verifier safely over model text use `restem.verifiers.pool.VerifierPool`.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from restem.errors import RestemError
from restem.types import Verifier

GROUP = "restem.verifiers"
"""The entry point group under which a package offers its verifiers."""

_BUILT_IN = {
    "code": "restem.verifiers.code:verify",
    "math": "restem.verifiers.math:verify",
    "bbh": "restem.verifiers.bbh:verify",
    "bbh-strict": "restem.verifiers.bbh:strict",
    "choice": "restem.verifiers.choice:verify",
    "exact": "restem.verifiers.choice:exact",
}


def names() -> list[str]:
    """The verifiers that `load` knows by name, sorted."""
    return sorted({*_BUILT_IN, *entry_points(group=GROUP).names})


def load(spec: str) -> Verifier:
    """Return the verifier called `spec`: a name, "package.module:function" or "path/to/file.py:function".

    A built-in name wins over a plugin of the same name. Raises RestemError when there is none.
    """
    if spec in _BUILT_IN:
        return _from_module(spec, *_BUILT_IN[spec].split(":"))
    place, colon, function = spec.rpartition(":")
    if colon and place.endswith(".py"):
        return _from_file(spec, Path(place), function)
    if place and function:
        return _from_module(spec, place, function)
    for entry in entry_points(group=GROUP, name=spec):
        try:
            return _checked(spec, entry.load())
        except (ImportError, AttributeError) as error:
            raise RestemError(f'the plugin verifier "{spec}" ({entry.value}) cannot be loaded: {error}') from error
    close = difflib.get_close_matches(spec, names(), n=1)
    hint = f' Did you mean "{close[0]}"?' if close else ""
    raise RestemError(
        f'there is no verifier "{spec}".{hint} There are: {", ".join(names())}; '
        'or name a function, as "package.module:function" or "path/to/file.py:function".'
    )


def _from_module(spec: str, module: str, function: str) -> Verifier:
    try:
        return _attribute(spec, importlib.import_module(module), function)
    except ModuleNotFoundError as error:
        raise RestemError(f'the verifier "{spec}" cannot be loaded: {error}') from error


def _from_file(spec: str, path: Path, function: str) -> Verifier:
    if not path.is_file():
        raise RestemError(f'the verifier "{spec}" cannot be loaded: there is no file {path.absolute()}')
    name = f"restem_file_{path.stem}_{abs(hash(str(path.resolve())))}"
    if name not in sys.modules:
        module_spec = importlib.util.spec_from_file_location(name, path)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[name] = module  # before running it: dataclasses look their module up
        try:
            module_spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return _attribute(spec, sys.modules[name], function)


def _attribute(spec: str, module: Any, function: str) -> Verifier:
    found = getattr(module, function, None)
    if found is None:
        public = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(function, public, n=1)
        hint = f' Did you mean "{close[0]}"?' if close else ""
        raise RestemError(f'the verifier "{spec}" cannot be loaded: {module.__name__} has no "{function}".{hint}')
    return _checked(spec, found)


def _checked(spec: str, found: Any) -> Verifier:
    if not callable(found):
        raise RestemError(f'the verifier "{spec}" is not a function but {type(found).__name__}')
    verifier: Verifier = found
    return verifier
