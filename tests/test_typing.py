"""Every public function and method says the type of all that it takes and returns."""

import importlib
import inspect

import pytest

PACKAGES = "", ".convert", ".diagnose", ".linen", ".nnx", ".optim", ".tf1"


def functions_of(package):
    module = importlib.import_module("jaxbn" + package)
    names = getattr(module, "__all__", None) or [n for n in vars(module) if n[0] != "_"]
    for value in (getattr(module, name) for name in names):
        if not getattr(value, "__module__", "").startswith("jaxbn"):
            continue
        if inspect.isfunction(value):
            yield value
        elif inspect.isclass(value):
            members = inspect.getmembers_static(value, inspect.isfunction)
            yield from (
                member
                for name, member in members
                if (name in ("__init__", "__call__") or name[0] != "_")
                and (member.__module__ or "").startswith("jaxbn")
                and inspect.getsourcefile(inspect.unwrap(member)).endswith(".py")
            )


@pytest.mark.parametrize("package", PACKAGES)
def test_public_functions_are_annotated(package):
    functions = list(functions_of(package))
    assert functions
    for function in functions:
        signature = inspect.signature(function)
        for parameter in list(signature.parameters.values()):
            known = parameter.annotation is not parameter.empty
            assert known or parameter.name == "self", (function, parameter)
        made = function.__name__ == "__init__"
        assert made or signature.return_annotation is not signature.empty, function
