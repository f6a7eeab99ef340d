"""The function behind ``torch.compile(..., backend="quark")``: Inductor with this package's passes and lowerings."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from quark_inductor.schemes.errors import OptionError, QuarkInductorError

if TYPE_CHECKING:
    from quark_inductor.patterns.base import Options

PREFIX = "quark."
# Inductor's hooks where our rules run, and our late decomposition.
BEFORE, AFTER = "joint_custom_pre_pass", "post_grad_custom_post_pass"


def split_options(mode: str | None, options: Mapping[str, Any] | None) -> tuple["Options", dict[str, Any]]:
    """Tell our options from Inductor's.

    Args:
        mode: ``torch.compile``'s ``mode=``, mapped to Inductor options.
        options: ``torch.compile``'s ``options=``: keys that start with ``quark.`` are ours, every other one must be a
        key
            of ``torch._inductor.config``.

    Raises:
        OptionError: an unknown mode or key, or a value of the wrong type.
    """
    from quark_inductor.lowering.base import provider_names
    from quark_inductor.patterns._inductor import config, list_mode_options
    from quark_inductor.patterns.base import Options

    modes = list_mode_options()
    if mode is not None and mode not in (*modes, "default"):
        raise OptionError(f"there is no mode {mode!r}; expected one of {', '.join(sorted({*modes, 'default'}))}")
    theirs: dict[str, Any] = dict(modes.get(mode, {})) if mode else {}
    known = config.get_config_copy()
    ours: dict[str, Any] = {}
    fields = {f.name for f in dataclasses.fields(Options)}
    for key, value in (options or {}).items():
        if not isinstance(key, str):
            raise OptionError(f"there is no option {key!r}: options are strings")
        if key.startswith(PREFIX):
            if key.removeprefix(PREFIX) not in fields:
                raise OptionError(
                    f"there is no option {key!r}; ours are {', '.join(sorted(PREFIX + f for f in fields))}"
                )
            ours[key.removeprefix(PREFIX)] = value
        elif key.replace("-", "_") in known:
            name = key.replace("-", "_")
            if known[name] is not None and value is not None and type(value) is not type(known[name]):
                raise OptionError(f"option {key!r} is {value!r}, expected a {type(known[name]).__name__}")
            theirs[name] = value
        else:
            raise OptionError(
                f"there is no option {key!r}: ours start with {PREFIX!r}, "
                "every other must be a key of torch._inductor.config"
            )
    if not isinstance(ours.get("strict", False), bool):
        raise OptionError(f"quark.strict is {ours['strict']!r}; expected True or False")
    if ours.get("provider") not in (None, *provider_names()):
        raise OptionError(f"quark.provider is {ours['provider']!r}; expected one of {', '.join(provider_names())}")
    return Options(**ours), theirs


def quark(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph. Called by ``torch.compile``, which finds it by the name ``"quark"``.

    The passes a user has set in ``torch._inductor.config`` or in ``options`` run too: before our rules, and after our
    late decomposition.
    """
    return compile_graph(gm, example_inputs, *split_options(mode, options))


def users_passes(theirs: Mapping[str, Any], hook: str) -> list[Any]:
    """The passes a user has put into one of Inductor's hooks, by options or in ``torch._inductor.config``."""
    from quark_inductor.patterns._inductor import config

    passes = theirs.get(hook, getattr(config, hook))
    return list(passes) if isinstance(passes, list | tuple) else [passes] if passes else []


def compile_graph(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    own: "Options",
    theirs: Mapping[str, Any],
    inner_compile: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Compile a graph that Dynamo made.

    Args:
        gm: the graph.
        example_inputs: its inputs.
        own: options of this package.
        theirs: Inductor's options.
        inner_compile: what makes code of the rewritten graph; Inductor by default.
    """
    # Always: code from a cache calls the ops, and its kernels were made by these lowerings.
    from quark_inductor.lowering import registry as lowerings  # noqa: F401
    from quark_inductor.lowering.base import forcing
    from quark_inductor.patterns._inductor import atomic_builds, compile_fx, pass_list
    from quark_inductor.patterns.pipeline import LateDecompositionPass, RulesPass
    from quark_inductor.progress import progress
    from quark_inductor.schemes import registry as schemes  # noqa: F401

    patches = dict(theirs)
    compilers: dict[str, Any] = {} if inner_compile is None else {"inner_compile": inner_compile}

    patches[BEFORE] = pass_list([*users_passes(theirs, BEFORE), RulesPass(own)])
    patches[AFTER] = pass_list([LateDecompositionPass(own), *users_passes(theirs, AFTER)])
    with forcing(own.provider), atomic_builds(), progress():
        compiled: Any = compile_fx(gm, example_inputs, config_patches=patches, **compilers)
    return compiled


def aoti_configs(options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``torch._inductor.aoti_compile_and_package(exported, inductor_configs=aoti_configs())`` wants.

    An exported program knows no backend: these are the passes, for AOTInductor to run.

    Args:
        options: as in ``torch.compile(backend="quark")``, but for ``quark.provider``.

    Raises:
        OptionError: an unknown option, or ``quark.provider``.
    """
    from quark_inductor.lowering import registry as lowerings  # noqa: F401
    from quark_inductor.patterns._inductor import pass_list
    from quark_inductor.patterns.pipeline import LateDecompositionPass, RulesPass
    from quark_inductor.schemes import registry as schemes  # noqa: F401

    own, theirs = split_options(None, options)
    if own.provider is not None:
        raise OptionError("quark.provider is not known to AOTInductor, which lowers without this backend")
    return {
        **theirs,
        BEFORE: pass_list([*users_passes(theirs, BEFORE), RulesPass(own)]),
        AFTER: pass_list([LateDecompositionPass(own), *users_passes(theirs, AFTER)]),
    }


@contextlib.contextmanager
def unwrapped_errors() -> Iterator[None]:
    """Inside, an error of ours that Dynamo wrapped comes out as it was raised."""
    try:
        yield
    except torch._dynamo.exc.BackendCompilerFailed as e:
        raise (e.inner_exception if isinstance(e.inner_exception, QuarkInductorError) else e) from e


def _reset() -> None:
    from quark_inductor.patterns._inductor import reset_cudagraph_trees

    reset_cudagraph_trees()


# Called by torch._dynamo.reset(); mode="reduce-overhead" records CUDA graphs.
quark.reset = _reset  # type: ignore[attr-defined]
