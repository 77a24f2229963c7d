"""Defects of the arithmetic of vectors: moments, running statistics, sums over devices."""

from tests.mutants.kernels import DERIVATIVES, GRADIENTS, NUMERICS, ORACLE, PRECISION
from tests.mutants.mutant import of

PROPERTIES = "tests/laws/test_properties.py"
SPREAD = "tests/laws/test_sync.py -k 'spread_batch and (pmap or shard_map) and default'"
KEEPS = "tests/laws/test_sync.py -k keeps_its_digits"
STATES = "tests/test_mixed_precision.py -k 'does_not_fit or poisons'"
GATHERED = "tests/test_reestimate.py -k 'microbatches_are_tracked'"

MUTANTS = [
    *of(
        "_statistics/moments.py",
        (
            "merged batches lie too far apart",
            "between = part * (1 - part) * jnp.square(jnp.abs(apart))",
            "between = part * jnp.square(jnp.abs(apart))",
            PROPERTIES,
        ),
        (
            "merged variances are weighted the other way round",
            "(1 - part) * a.var + part * b.var + between",
            "part * a.var + (1 - part) * b.var + between",
            PROPERTIES,
        ),
        (
            "averaged ghost batches are weighted by their counts",
            "share = used / jnp.maximum(used.sum(0), 1)[None]",
            "share = parts.count / divisor(count)[None]",
            "tests/laws/test_laws.py -k 'oracle and ghosts_strided'",
        ),
        (
            "pooled ghost batches lose what rounding left out of their means",
            "apart = (parts.mean - around[None]) + parts.rest",
            "apart = parts.mean - around[None]",
            "tests/laws/test_precision.py -k ghosts_renorm",
        ),
        (
            "pooled variances leave out how far the means lie apart",
            "var = parts.var if averaged else parts.var + jnp.square(jnp.abs(apart))",
            "var = parts.var",
            "tests/laws/test_laws.py -k 'oracle and ghosts'",
        ),
    ),
    *of(
        "_statistics/running.py",
        (
            "Bessel's correction is left out",
            "var = batch.var * _bessel(batch.count, ddof) if ddof else batch.var",
            "var = batch.var",
            ORACLE,
        ),
        (
            "Bessel's correction divides by 0",
            "enough = count > ddof",
            "enough = count >= ddof",
            "tests/laws/test_numerics.py tests/test_golden.py -k 'batch1 or one_row'",
        ),
        (
            "the momentum is the share of the new batch",
            "return 1 - momentum, None",
            "return momentum, None",
            ORACLE,
        ),
        (
            "the debiased average gives the first batch too little weight",
            "return (1 - momentum) / jnp.where(weight > 0, weight, 1), weight",
            "return 1 - momentum, weight",
            ORACLE,
        ),
        (
            "the cumulative mean counts a batch that is not there",
            "return 1 / weight, weight",
            "return 1 / (weight + 1), weight",
            ORACLE,
        ),
        (
            "a feature that the batch lacks is tracked",
            "sound = count > 0\n",
            "sound = count >= 0\n",
            f"{NUMERICS} -k nothing_to_average",
        ),
        (
            "a state takes what is no finite number",
            "sound = sound if array is None else sound & jnp.isfinite(array)",
            "sound = sound if array is None else sound & True",
            f"{NUMERICS} -k not_finite",
        ),
        (
            "a state takes what its dtype rounds to infinity",
            "else new.astype(old.dtype) for new, old in pairs]",
            "else new for new, old in pairs]",
            STATES,
        ),
        (
            "a gradient flows into the running statistics",
            "state, batch = lax.stop_gradient((state, batch))\n    batch = like_state",
            "batch = like_state",
            f"{NUMERICS} -k running_statistics",
        ),
    ),
    *of(
        "_statistics/sync.py",
        (
            "variances of devices count alike, however much each has seen",
            "words = [count * var, *halves(count)]",
            "words = [var, *halves(count)]",
            SPREAD,
        ),
        (
            "what rounding left out is dropped between devices",
            "return mean, rest, within / n, count",
            "return mean, jnp.zeros_like(rest), within / n, count",
            "tests/laws/test_precision.py -k plain-pmap",
        ),
        (
            "the square of the mean is subtracted once too little",
            "interleaved(square, less), -cross, late)",
            "interleaved(square, less), cross, late)",
            KEEPS,
        ),
        (
            "the variance of devices forgets the distance of their means backward",
            "count * tvar + 2 * count * apart * tmean",
            "count * tvar",
            "tests/laws/test_sync.py -k pooled_moments",
        ),
        (
            "groups of devices are ignored",
            "return lax.psum(x, axis_name, axis_index_groups=groups)",
            "return lax.psum(x, axis_name)",
            "tests/laws/test_sync.py -k groups_share",
        ),
        (
            "groups without JAX's help read the slot of another group",
            "== jnp.arange(len(groups))",
            ">= jnp.arange(len(groups))",
            "tests/laws/test_sync.py -k groups_share",
        ),
        (
            "complex means lose their imaginary part between devices",
            "mean, rest = (lax.complex(a[0], a[1]) for a in (mean, rest))",
            "mean, rest = (lax.complex(a[0], 0 * a[1]) for a in (mean, rest))",
            "tests/laws/test_sync.py -k pooled_moments",
        ),
    ),
    *of(
        "_statistics/replicas.py",
        (
            "replicas of weight 0 are divided by 0",
            "count = jnp.where(total > 0, count, jnp.ones_like(count))",
            "count = count + 0 * total",
            "tests/laws/test_sync.py -k 'replicas or pool'",
        ),
    ),
    *of(
        "_layers/rule.py",
        (
            "the offset forgets what rounding left out of the mean",
            "    if rest is not None:\n        offset = _followed",
            "    if False:\n        offset = _followed",
            PRECISION,
        ),
        (
            "what the batch lacks is normalized by its statistics all the same",
            "seen = None if plan.certain else own.count > 0",
            "seen = None if plan.certain else own.count >= 0",
            f"{NUMERICS} -k nothing_to_average",
        ),
        (
            "the adjustment comes before the correction",
            "given_pairs = _correction(plan, batch, correcting), given.adjustment",
            "given_pairs = given.adjustment, _correction(plan, batch, correcting)",
            "tests/laws/test_variants.py -k follows_the_correction",
        ),
        (
            "the scale leaves out the offset",
            "slope, offset = slope * factor, None if offset is None else offset * factor",
            "slope = slope * factor",
            "tests/laws/test_variants.py -k adjustment",
        ),
        (
            "inference is corrected and adjusted too",
            "tuple(where_alike(flag, a, b) for a, b in zip(pair, (1, 0), strict=True))",
            "tuple(pair)",
            "tests/laws/test_variants.py -k adjustment",
        ),
        (
            "dx is rounded twice",
            "x_moving = None if x_moving is None else upcast(x_moving)",
            "x_moving = x_moving",
            f"{DERIVATIVES} -k bfloat16",
        ),
        (
            "devices keep their gradients to themselves",
            "totals = sum_over_devices(totals, layer.axis_name, layer.axis_index_groups)",
            "pass",
            SPREAD,
        ),
        (
            "statistics are taken for constants backward",
            "if batch is not None and moves:",
            "if batch is None and moves:",
            GRADIENTS,
        ),
    ),
    *of(
        "_layers/normalizer.py",
        (
            "a traced flag tracks in inference, not in training",
            "jnp.where(flag, new, old), after, state)",
            "jnp.where(flag, old, new), after, state)",
            "tests/laws/test_laws.py -k 'oracle and traced'",
        ),
        (
            "NaN of weight 0 is normalized as it is",
            "seen = x if weights is None else hide_unweighted(x, weights)",
            "seen = x",
            "tests/laws/test_laws.py -k hidden_nan",
        ),
        (
            "a state below float32 stalls without a word",
            'refuse_half(state, "state")',
            "pass",
            "tests/test_mixed_precision.py -k refuses",
        ),
    ),
]
