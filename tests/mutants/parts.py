"""Defects of variants, averages, folding, TensorFlow 1, optimization and gathering."""

from tests.mutants.mutant import of

RENORM = "tests/laws/test_laws.py -k 'renorm and (oracle or gradients)'"
GOLDEN = "tests/test_golden.py -k"
EMA = "tests/test_ema_dropout.py"
FOLD = "tests/test_fold.py -k 'linear_layer or variant or harm or half'"
OPTIM = "tests/test_optim.py"

MUTANTS = [
    *of(
        "_layers/batch_renorm.py",
        (
            "renormalization tracks the deviation without epsilon",
            "std = jnp.sqrt(batch.var + epsilon)",
            "std = jnp.sqrt(batch.var)",
            RENORM,
        ),
        (
            "the two momentums of renormalization are swapped",
            "renorm_mean=moved(state.renorm_mean, batch.mean, slow)",
            "renorm_mean=moved(state.renorm_mean, batch.mean, rate)",
            RENORM,
        ),
        (
            "the offset d is not clipped below",
            "/ scale, -d_max, d_max)",
            "/ scale, -jnp.inf, d_max)",
            f"{RENORM} tests/laws/test_variants.py",
        ),
        (
            "the factor r is not clipped",
            "r = jnp.clip(std / scale, r_min, r_max)",
            "r = std / scale",
            "tests/laws/test_variants.py -k 'limits or plain'",
        ),
        (
            "a gradient flows through r and d",
            "lax.stop_gradient((state, batch))\n        mean, var, count, rest",
            "(state, batch)\n        mean, var, count, rest",
            "tests/laws/test_laws.py -k 'renorm and gradients'",
        ),
        (
            "a feature that the batch lacks is corrected",
            "return jnp.where(count > 0, r, 1), jnp.where(count > 0, d, 0)",
            "return r, d",
            "tests/laws/test_variants.py -k lacks",
        ),
    ),
    *of(
        "_layers/ghost_batches.py",
        (
            "strided and neighbouring ghost batches are swapped",
            "array, (self.size, groups) if self.strided else (groups, self.size)",
            "array, (self.size, groups) if not self.strided else (groups, self.size)",
            "tests/laws/test_laws.py -k 'oracle and ghosts'",
        ),
        (
            "ghost batches are averaged over the wrong axis",
            "rows = 0 if self.strided else 1",
            "rows = 1 if self.strided else 0",
            "tests/laws/test_laws.py -k 'oracle and ghosts'",
        ),
    ),
    *of(
        "_layers/ema_batch_norm.py",
        (
            "the first batch does not start the average",
            "return jnp.where(state.weight > 0, momentum, 0)",
            "return jnp.where(state.weight >= 0, momentum, 0)",
            "tests/test_convert.py tests/test_golden.py -k 'ema or equinox or eqx'",
        ),
    ),
    *of(
        "_layers/renorm_limits.py",
        (
            "the limits widen before their schedule begins",
            "done = jnp.asarray(step, jnp.float32) - begin",
            "done = jnp.asarray(step, jnp.float32)",
            "tests/laws/test_variants.py -k schedule",
        ),
    ),
    *of(
        "_layers/dropout.py",
        (
            "dropout keeps what it should drop",
            "mask = split_like(x, jax.random.bernoulli(key, kept, shape))",
            "mask = split_like(x, jax.random.bernoulli(key, 1 - kept, shape))",
            f"{EMA} -k dropout",
        ),
        (
            "dropout is scaled the wrong way",
            'jnp.asarray(1 / kept if scaled_at == "training" else kept, x.dtype)',
            'jnp.asarray(kept if scaled_at == "training" else 1 / kept, x.dtype)',
            f"{EMA} -k dropout",
        ),
    ),
    *of(
        "_averages.py",
        (
            "the decay that grows starts too high",
            "rate = jnp.maximum(rate, 9 / (10 + n))",
            "rate = jnp.maximum(rate, 1 / (10 + n))",
            EMA,
        ),
        (
            "the debiased average is not debiased",
            "rate = rate / jnp.where(weight > 0, weight, 1)",
            "rate = rate * 1",
            EMA,
        ),
        (
            "a gradient flows into an average",
            "value = lax.stop_gradient(jnp.asarray(value)).astype(average.dtype)",
            "value = jnp.asarray(value).astype(average.dtype)",
            EMA,
        ),
        (
            "an average of models counts each too much",
            "decay = state.count / (state.count + 1) if self.decay is None else None",
            "decay = state.count / (state.count + 2) if self.decay is None else None",
            f"{OPTIM} -k averaged",
        ),
        (
            "an average is kept in half precision",
            "return upcast(leaf) if jnp.issubdtype(leaf.dtype, jnp.inexact) else leaf",
            "return leaf",
            EMA,
        ),
    ),
    *of(
        "_fold/affine.py",
        (
            "a folded norm shifts by the mean as it is",
            "offset = -mean * slope if offset is None",
            "offset = -mean if offset is None",
            FOLD,
        ),
        (
            "a folded norm forgets its scale",
            '(part * arrays["scale"].astype(wide) for part in (slope, offset))',
            "(part for part in (slope, offset))",
            FOLD,
        ),
    ),
    *of(
        "_fold/kernels.py",
        (
            "the bias before a norm is not multiplied",
            "offset = offset + slope * bias.astype(wide)",
            "offset = offset + bias.astype(wide)",
            FOLD,
        ),
        (
            "the offset before a layer forgets its kernel's sum",
            "total = (grouped.sum(spatial) * offset).sum(1).reshape(-1)",
            "total = (grouped.mean(spatial) * offset).sum(1).reshape(-1)",
            FOLD,
        ),
        (
            "groups are counted on the wrong axis",
            'if self.groups_on == "in":\n            return kernel.reshape',
            'if self.groups_on == "out":\n            return kernel.reshape',
            FOLD,
        ),
    ),
    *of(
        "_fold/checks.py",
        (
            "padding with zeros is taken for harmless",
            "pads = not single and padding.upper() not in _HARMLESS",
            "pads = False",
            "tests/test_fold.py -k 'not_exact'",
        ),
    ),
    *of(
        "tf1/_implementation.py",
        (
            "the fused kernel of TensorFlow tracks the biased variance",
            "ddof=1 if implementation.fused else 0",
            "ddof=0",
            f"{GOLDEN} 'tf1 and fused'",
        ),
        (
            "the fused kernel of TensorFlow takes any epsilon",
            "return max(epsilon, FUSED_EPSILON) if self.fused else epsilon",
            "return epsilon",
            f"{GOLDEN} tf1",
        ),
        (
            "TensorFlow's ghost batches are neighbours",
            'self.virtual_batch_size, layout="strided", tracking="averaged"',
            'self.virtual_batch_size, layout="contiguous", tracking="averaged"',
            f"{GOLDEN} 'tf1 and vbs'",
        ),
    ),
    *of(
        "tf1/_layer.py",
        (
            "contrib's layers make no updates when they are not trainable",
            "(shaped.implementation.layer_class and not self.trainable)",
            "not self.trainable",
            f"{GOLDEN} 'tf1 and trainable'",
        ),
        (
            "TensorFlow's biased mean is not carried on",
            "mean=jnp.where(training, state[BIASED], stats.mean)",
            "mean=stats.mean",
            f"{GOLDEN} 'tf1 and debias'",
        ),
    ),
    *of(
        "tf1/_moving_averages.py",
        (
            "zero debiasing counts one step too few",
            "weight = 1 - jnp.asarray(decay).astype(wide) ** step.astype(wide)",
            "weight = 1 - jnp.asarray(decay).astype(wide) ** (step.astype(wide) + 1)",
            f"{GOLDEN} 'tf1 and debias'",
        ),
    ),
    *of(
        "optim.py",
        (
            "scales decay like kernels",
            'return map_roles(lambda role, _: role == "other", params)',
            'return map_roles(lambda role, _: role in ("other", "scale"), params)',
            f"{OPTIM} -k decay",
        ),
        (
            "the penalty pushes scales away from 0",
            "magnitude = wide * jnp.sign(wide).conj()",
            "magnitude = jnp.abs(wide)",
            f"{OPTIM} -k penalty",
        ),
        (
            "clipped scales ignore the update",
            "return (after - leaf).astype(change.dtype)",
            "return (after - leaf - change).astype(change.dtype)",
            f"{OPTIM} -k limits",
        ),
    ),
    *of(
        "_accumulation/gather.py",
        (
            "gathered ghost batches leave out how far their means lie apart",
            "return None if ghosts is None else ghosts._replace(averaged=False)",
            "return ghosts",
            "tests/test_reestimate.py -k 'microbatches_are'",
        ),
        (
            "gathered batches forget those before",
            "pooled = merge_moments(pooled, batch)",
            "pooled = batch",
            "tests/test_reestimate.py -k 'microbatches_are'",
        ),
    ),
    *of(
        "_accumulation/reestimate.py",
        (
            "renewed statistics keep a part of the old ones",
            "update_running(empty, batch, momentum=0.0, ddof=ddof)",
            "update_running(empty, batch, momentum=0.1, ddof=ddof)",
            "tests/test_reestimate.py -k 'population or definition or data_set'",
        ),
    ),
    *of(
        "_dtypes.py",
        (
            "sums of half precision accumulate in half precision",
            "return widest(dtype, jnp.float32)",
            "return dtype",
            "tests/laws/test_numerics.py -k half_precision",
        ),
    ),
]
