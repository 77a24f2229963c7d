"""Population statistics: those of the input of each norm over a whole data set, exactly."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbn._accumulation.pool import Pool
from jaxbn._accumulation.state import Gathered, gather, is_state
from jaxbn._state import BatchStats, RunningStats
from jaxbn._statistics.moments import Moments
from jaxbn._statistics.running import check_ddof, update_running
from jaxbn._typing import PyTree


def reestimate(
    step: Callable[[PyTree, Any], PyTree],
    states: PyTree,
    batches: Iterable[Any],
    *,
    passes: int = 1,
    ddof: int = 0,
    progress: bool = False,
) -> PyTree:
    r"""Returns the states with the statistics of the whole data set.

    .. math::
        \mu = \frac{1}{n} \sum_b n_b \mu_b, \quad
        \sigma^2 = \frac{1}{n} \sum_b n_b \left(\sigma_b^2 + |\mu_b - \mu|^2\right)

    over all batches b and all applications of a norm in them, where n counts elements, or
    weights where the norm gets weights. What lies between the batches counts as much as
    what lies within, so the sizes and the order of the batches do not matter. The batches
    of all processes of `jax.distributed` count. They are pooled in float64 on the host.

    For a model whose running statistics do not fit its params: after averaging weights
    (SWA, EMA), after fine-tuning, on the data of another domain.

    A norm in training normalizes each batch with the batch's own statistics while those
    of its input are gathered, so one pass fills all norms, whatever their statistics were.
    Behind another norm, the inputs are then those of training, not quite those of
    inference. Called for inference, each norm normalizes with the statistics it has: one
    pass is exact for the norms that depend on no other, and each further pass for those
    one norm deeper; so follow a pass in training with some in inference, `passes` of them,
    and the statistics become those of what each norm sees in inference.

    Args:
        step: `step(states, batch) -> states`, one forward pass of a model whose norms are
            `Gather(bn)`: it is given states that gather and returns them after the batch.
            Pass a jitted function.
        states: The state of a norm, or any pytree of them.
        batches: What `step` takes, one after the other, of any sizes. Each process passes
            its own part, or, where the arrays span processes, the same global arrays.
        passes: How often to go through the batches, which must then be no iterator.
        ddof: 1 to store the unbiased variance, as PyTorch does.
        progress: Whether to show a progress bar, which needs the package tqdm.

    Returns:
        `states`, with new statistics in every `BatchStats` and `RenormStats`.

    Raises:
        ImportError: progress=True without tqdm.
        TypeError: `step` does not return the states that it was given, gathering.
        ValueError: A norm has seen nothing, or something that is not finite, which the
            message names; there is no state of a norm; the iterator allows one pass only.

    Example:
        >>> import jax, jax.numpy as jnp, jaxbn
        >>> bn = jaxbn.Gather(jaxbn.BatchNorm())
        >>> params, state = bn.init(1)
        >>> step = jax.jit(lambda state, x: bn.apply(params, state, x, training=True)[1])
        >>> batches = jnp.array([[-1.0], [1.0]]), jnp.array([[2.0], [4.0], [2.0], [4.0]])
        >>> state = jaxbn.reestimate(step, state, batches)
        >>> print(state.mean, state.var)
        [2.] [3.]

    References:
        Wu and Johnson, "Rethinking 'Batch' in BatchNorm", 2021, section 3.
        Izmailov et al., "Averaging Weights Leads to Wider Optima and Better
        Generalization", 2018, section 3.2.

    Differs from PyTorch's `update_bn`, which averages the variances of the batches: it
    ignores their sizes and how far their means lie apart.
    """
    ddof = check_ddof(ddof)
    if passes < 1 or (passes > 1 and iter(batches) is batches):
        raise ValueError(
            f"passes={passes} needs batches that can be gone through as often, got "
            f"{type(batches).__name__}. Use passes=1, or pass a list or a data loader."
        )
    for _ in range(passes):
        states = _one_pass(step, states, batches, ddof, progress)
    return states


def _one_pass(
    step: Callable[[PyTree, Any], PyTree],
    states: PyTree,
    batches: Iterable[Any],
    ddof: int,
    progress: bool,
) -> PyTree:
    start = gather(states)
    pool = Pool(_moments_of(start))
    # Fetched one batch late, so that the host prepares a batch while one is computed.
    running = None
    for batch in with_progress(batches, progress):
        seen = _moments_of(step(start, batch))
        if running is not None:
            pool.add(running)
        running = seen
    if running is not None:
        pool.add(running)
    total = pool.total()
    _check_fit(states, total)
    pooled = iter(total.values())

    def renewed(state: Any) -> Any:
        return _renewed(state, next(pooled), ddof) if is_state(state) else state

    return jax.tree.map(renewed, states, is_leaf=is_state)


def _check_fit(states: PyTree, total: dict[str, Moments]) -> None:
    """Raises if a state could not hold its new statistics as finite numbers."""
    norms = filter(is_state, jax.tree.leaves(states, is_leaf=is_state))
    for state, (name, batch) in zip(norms, total.items(), strict=True):
        for old, new in ((state.mean, batch.mean), (state.var, batch.var)):
            if not np.abs(new).max(initial=0) <= float(jnp.finfo(old.dtype).max):
                raise ValueError(
                    f"the statistics of {name} reach {np.abs(new).max():.3g}, more than "
                    f"its {old.dtype} holds. No state was changed. Scale the input down, "
                    "or keep the state in a wider dtype."
                )


def _moments_of(states: PyTree) -> dict[str, Moments]:
    """Returns what each norm has gathered, by its path in the pytree."""
    paths = jax.tree_util.tree_leaves_with_path(states, is_leaf=is_state)
    norms = {
        jax.tree_util.keystr(path, simple=True, separator="/") or "the norm": leaf
        for path, leaf in paths
        if is_state(leaf)
    }
    for name, state in norms.items():
        if not isinstance(state, Gathered):
            raise TypeError(
                f"step returned {type(state).__name__} at {name}, not the Gathered that "
                "it was given. Return the states after the batch, from Gather(bn).apply."
            )
    return {name: state.batch for name, state in norms.items()}


def _renewed(state: Any, pooled: Moments, ddof: int) -> RunningStats:
    """Returns `state` with the statistics of `pooled`, in its own dtypes."""
    batch = Moments(*map(jnp.asarray, pooled))
    # From 0, since old + (new - old) is not quite new.
    empty = BatchStats(jnp.zeros_like(state.mean), jnp.zeros_like(state.var))
    mean, var, _ = update_running(empty, batch, momentum=0.0, ddof=ddof)
    return state.renewed(mean, var)


def with_progress(batches: Iterable[Any], progress: bool) -> Iterable[Any]:
    """Returns `batches`, shown as they go by, on the first process."""
    if not progress or jax.process_index() != 0:
        return batches
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            "progress=True needs the package tqdm, which is not installed. Run "
            "pip install 'jaxbn[progress]', or leave progress out."
        ) from error
    return tqdm(batches, desc="statistics", unit="batch")
