"""Several domains: a bank of running statistics, of which each row has its own."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxbn._layers.bank import Bank
from jaxbn._layers.by_domain import as_ids
from jaxbn._layers.checks import in_our_words
from jaxbn._layers.normalizer import Normalizer, Params, State, apply_normalizer
from jaxbn._layers.required import require
from jaxbn._layers.wrapper import Wrapper
from jaxbn._typing import Array, ArrayLike, PairLike
from jaxbn._values.canonical import as_whole

AFFINES = ("shared", "separate")


@jax.tree_util.register_static
@in_our_words
@dataclasses.dataclass(frozen=True, repr=False)
class DomainBatchNorm(Wrapper[Params, State]):
    r"""Normalization by the statistics of the domain that a row belongs to.

    .. math::
        y_i = \frac{x_i - \mu_{k(i)}}{\sqrt{\sigma_{k(i)}^2 + \epsilon}}\,
            \gamma_{k(i)} + \beta_{k(i)}

    where k(i) is the domain of row i, in training with the mean and the variance of the
    rows of that domain in the batch, over all devices, and otherwise with its running ones.
    For domain adaptation, the clean and the adversarial batches of AdvProp, the inner
    steps of MAML, the clients of a federation.

    The arrays of the state are those of `bn` with an axis in front, one entry for each
    domain; a domain that a batch does not hold keeps its own as they are. x is read as
    often as by `bn`. With an id for each row, sums of rows are read `num_domains` times.

    Example:
        >>> import jax.numpy as jnp, jaxbn
        >>> norm = jaxbn.DomainBatchNorm(jaxbn.BatchNorm(momentum=0.0), 2)
        >>> params, state = norm.init(1)
        >>> x = jnp.array([[1.0], [3.0], [10.0], [30.0]])
        >>> ids = jnp.array([0, 0, 1, 1])
        >>> y, state = norm.apply(params, state, x, training=True, domains=ids)
        >>> print(y.round(3).ravel(), state.mean.ravel())
        [-1.  1. -1.  1.] [ 2. 20.]

    Attributes:
        bn: What normalizes the rows of a domain: a `BatchNorm`, a `BatchRenorm`, a
            `GhostBatchNorm`, or one of your own.
        num_domains: How many domains there are.
        affine: "shared" for one scale and bias, "separate" for those of each domain, whose
            arrays then have the axis in front, too.

    Raises:
        TypeError: bn is no normalizer that keeps statistics of one domain; num_domains is
            not an int.
        ValueError: num_domains is not positive; affine is unknown.

    References:
        Chang et al., "Domain-Specific Batch Normalization for Unsupervised Domain
        Adaptation", 2019. Xie et al., "Adversarial Examples Improve Image Recognition",
        2020. Antoniou et al., "How to train your MAML", 2019.

    Differs from a list of layers in that rows of several domains may share a batch, in any
    order, with ids that are traced, and in that all domains meet in one collective.
    """

    bn: Normalizer[Params, State]
    num_domains: int
    _: dataclasses.KW_ONLY
    affine: Literal["shared", "separate"] = "shared"

    def __post_init__(self) -> None:
        wanted = "init", "standardize", "track", "correction", "running"
        require("DomainBatchNorm", self.bn, *wanted)
        if getattr(self.bn, "bank", None) is not None:
            raise TypeError(
                f"DomainBatchNorm.bn must keep statistics of one domain, got {self.bn}. "
                "Number all combinations of domains, and write one DomainBatchNorm."
            )
        size = as_whole("num_domains", self.num_domains, "Write the number of domains.")
        object.__setattr__(self, "num_domains", size)
        if size < 1:
            raise ValueError(f"num_domains must be positive, got {size}. Write 2 or more.")
        if self.affine not in AFFINES:
            raise ValueError(f"unknown affine {self.affine!r}. Choose one of {AFFINES}.")

    @property
    def wrapped(self) -> Any:
        """What normalizes the rows of a domain."""
        return self.bn

    @property
    def bank(self) -> Bank:  # pyright: ignore[reportIncompatibleVariableOverride]
        """How many domains have statistics of their own."""
        return Bank(self.num_domains)

    def init(
        self, num_features: int | tuple[int, ...], *_: Any, **options: Any
    ) -> tuple[Params, State]:
        """Returns the params and the state before training, all domains alike.

        Takes num_features and the keywords of `bn.init`.
        """
        params, state = self.bn.init(num_features, **options)

        def repeated(leaf: Array) -> Array:
            return jnp.repeat(leaf[None], self.num_domains, 0)

        if self.affine == "separate":
            params = jax.tree.map(repeated, params)
        return params, jax.tree.map(repeated, state)

    @in_our_words
    def apply(
        self,
        params: Params,
        state: State,
        x: ArrayLike,
        training: bool | Array,
        *_: Any,
        domains: ArrayLike | None = None,
        weights: ArrayLike | None = None,
        residual: ArrayLike | None = None,
        adjustment: PairLike | None = None,
        **options: Any,
    ) -> tuple[Array, State]:
        """Returns the normalized `x` and the state after it, as `BatchNorm.apply` does.

        Args:
            params: As `init` returned them, or trained since.
            state: As `init` or the last call returned it.
            x: What `bn` takes.
            training: A bool, or a boolean scalar array, which may be traced.
            domains: From 0 to num_domains - 1: an integer for all of x, or one for each of
                its rows; may be traced, and differ between devices. A traced id that is
                out of range belongs to no domain: its rows come out as NaN, as those of
                `jnp.take` do, and count in no statistics and, where the loss leaves their
                y out by `jnp.where`, in no gradient. It is never clamped.
            weights: As for `BatchNorm.apply`.
            residual: As for `BatchNorm.apply`.
            adjustment: As for `BatchNorm.apply`.
            **options: Further keywords of `bn.apply`, such as `momentum`.

        Returns:
            `(y, state)`.

        Raises:
            TypeError: domains are missing or no integers; and as `bn.apply` does.
            ValueError: domains do not fit the rows of x, or are known to be out of range;
                and as `bn.apply` does.
        """
        return apply_normalizer(
            self,
            params,
            state,
            x,
            training,
            domains=domains,
            weights=weights,
            residual=residual,
            adjustment=adjustment,
            **options,
        )

    def of_domain(
        self, params: Params, state: State, domain: int | Array
    ) -> tuple[Params, State]:
        """Returns the params and the state of one domain, those of a layer `bn`.

        To fold, export or convert a domain, or to go on with it alone.

        Args:
            params: Those of this layer.
            state: Likewise.
            domain: Its id; a traced one that is out of range gives NaN.

        Returns:
            `(params, state)`.

        Raises:
            TypeError: domain is no integer.
            ValueError: domain is no scalar, or known to be out of range.

        Example:
            >>> import jaxbn
            >>> norm = jaxbn.DomainBatchNorm(jaxbn.BatchNorm(), 2)
            >>> params, state = norm.of_domain(*norm.init(3), 1)
            >>> jaxbn.as_affine(params, state, norm.bn).scale.shape
            (3,)
        """
        index, _ = as_ids(self, domain, ())

        def chosen(leaf: Array) -> Array:
            return leaf.at[index].get(mode="fill", fill_value=jnp.nan)

        if self.affine == "separate":
            params = jax.tree.map(chosen, params)
        return params, jax.tree.map(chosen, state)
