"""Defects of what touches x: the reduction, the map, and their formulations."""

from tests.mutants.mutant import of

ORACLE = "tests/laws/test_laws.py -k 'equals_the_oracle and jit'"
GRADIENTS = "tests/laws/test_laws.py -k 'gradients_equal and jit'"
SECOND = "tests/laws/test_laws.py -k second_derivatives"
HIDDEN = "tests/laws/test_laws.py -k hidden_nan"
NUMERICS = "tests/laws/test_numerics.py"
PRECISION = "tests/laws/test_precision.py -k plain-one_device"
DERIVATIVES = "tests/laws/test_derivatives.py"
TILES = "tests/laws/test_tiles.py -k 'sums_are_those or plain or linear_loss'"
REAL = "tests/laws/test_real_sizes.py"
DIGITS = "tests/test_structure.py -k keeps_the_digits"
PAIRS = "tests/test_structure.py -k 'in_pairs or pairs_of_sums'"
FUSED = "tests/test_structure.py -k 'fused or backward_pass or small_batch'"

MUTANTS = [
    *of(
        "_kernels/gpu.py",
        (
            "pairs of sums mix both",
            "these[0] + those[0], these[1] + those[1]",
            "these[0] + those[0], these[1] + those[0]",
            PAIRS,
        ),
        (
            "squares of values are taken for squares of deviations",
            "deviation, deviation * deviation)",
            "deviation, deviation * upcast(of.x))",
            PAIRS,
        ),
        (
            "each sum of a pass is a reduction of its own",
            "if not whole:\n        return accelerator.sums",
            "if whole:\n        return accelerator.sums",
            "tests/test_structure.py -k in_one_reduction",
        ),
    ),
    *of(
        "_kernels/accelerator.py",
        (
            "deviations are taken from the wrong side of the sample's mean",
            "(axes, of.x)\n    return around(axes, of, shift, upcast(of.x) - shift)",
            "(axes, of.x)\n    return around(axes, of, shift, upcast(of.x) + shift)",
            DIGITS,
        ),
        (
            "arrays of unknown size are sampled",
            "of.weights is None and has_known_size(of.x) and not is_small(of.x)",
            "of.weights is None and not is_small(of.x)",
            "tests/test_export.py -k 'any_size'",
        ),
        (
            "E[x^2] - E[x]^2 serves however large the mean is",
            "ILL_CONDITIONED = 16.0",
            "ILL_CONDITIONED = 1e12",
            f"{NUMERICS} -k keeps_its_digits",
        ),
        (
            "sums of x itself are taken for sums of deviations",
            "around_zero = lax.full_like(total, 0), total, square",
            "around_zero = settled(mean), total, square",
            f"{NUMERICS} -k keeps_its_digits",
        ),
        (
            "the spread around a shift counts as the variance",
            "lax.max(spread - slip * slip, lax.full_like(spread, 0))",
            "lax.max(spread, lax.full_like(spread, 0))",
            DIGITS,
        ),
        (
            "what rounding left out of the mean is dropped",
            "return *two_sum(shift, slip), lax.max",
            "return shift + slip, lax.full_like(slip, 0), lax.max",
            "tests/laws/test_precision.py -k plain-one_device",
        ),
        (
            "weights play no part in sums",
            "weighted = values if of.weights is None else values * of.weights",
            "weighted = values",
            ORACLE,
        ),
        (
            "a square that overflowed meets its weight of 0",
            "weighted = values if of.weights is None else values * of.weights\n"
            "    return total_of(weighted if times is None else weighted * times, axes)",
            "weighted = values if times is None else values * times\n"
            "    return total_of(weighted if of.weights is None else weighted * of.weights,"
            " axes)",
            f"{NUMERICS} -k huge",
        ),
        (
            "sums of weight 0 are divided by 0",
            "return jnp.where(count > 0, count, jnp.ones_like(count))",
            "return count",
            f"{NUMERICS} -k nothing_to_average",
        ),
        (
            "an empty batch is divided by 0",
            "return max(count, 1)",
            "return count",
            f"{NUMERICS} -k moments_of_nothing",
        ),
        (
            "the map subtracts the mean in the dtype of x",
            "y = (x.astype(slope.dtype) - mean) * slope",
            "y = (x - mean.astype(x.dtype)).astype(slope.dtype) * slope",
            f"{NUMERICS} -k y_of_half",
        ),
        (
            "the residual is added behind the ReLU",
            "y = y if of.residual is None else y + of.residual.astype(y.dtype)\n"
            "    return ((jnp.maximum(y, 0) if settings.relu else y)"
            ".astype(settings.dtype),)",
            "y = jnp.maximum(y, 0) if settings.relu else y\n"
            "    y = y if of.residual is None else y + of.residual.astype(y.dtype)\n"
            "    return (y.astype(settings.dtype),)",
            "tests/laws/test_variants.py -k residual_and_activation",
        ),
        (
            "the gradient of a ReLU at 0 is 1",
            "return lax.select(y > 0, wide,",
            "return lax.select(y >= 0, wide,",
            DERIVATIVES,
        ),
        (
            "the tangent of the slope meets x that is not centered",
            "parts.append((of.x.astype(wide) - of.mean) * of.slope_tangent)",
            "parts.append(of.x.astype(wide) * of.slope_tangent)",
            SECOND,
        ),
        (
            "sums of tangents forget the weights",
            "    t = t if of.weights is None else t * of.weights.astype(dtype)\n",
            "",
            "tests/laws/test_laws.py -k 'second and weights'",
        ),
        (
            "the backward pass sums x that is not centered",
            "return t, (upcast(of.x) - of.mean).astype(dtype) * t",
            "return t, upcast(of.x).astype(dtype) * t",
            GRADIENTS,
        ),
        (
            "the sums of the backward pass ignore the ReLU",
            "t = opened(of, of.t.astype(dtype))",
            "t = of.t.astype(dtype)",
            DERIVATIVES,
        ),
    ),
    *of(
        "_kernels/affine_map.py",
        (
            "the mean moves y the wrong way",
            "by_mean = of.slope * -moving.mean",
            "by_mean = of.slope * moving.mean",
            GRADIENTS,
        ),
        (
            "the derivative of the standard deviation has the wrong sign",
            "return inverse, -0.5 * (inverse * (inverse * (inverse * tangents[0])))",
            "return inverse, 0.5 * (inverse * (inverse * (inverse * tangents[0])))",
            GRADIENTS,
        ),
        (
            "the cube of the inverse deviation underflows",
            "-0.5 * (inverse * (inverse * (inverse * tangents[0])))",
            "-0.5 * (inverse * inverse * inverse) * tangents[0]",
            f"{NUMERICS} -k large_spread",
        ),
        (
            "epsilon is added to the standard deviation",
            "return lax.rsqrt(var + epsilon)",
            "return 1 / (lax.sqrt(var) + epsilon)",
            ORACLE,
        ),
        (
            "the gradient of x lacks the slope",
            "by_x = gradient.astype(slope.dtype) * slope",
            "by_x = gradient.astype(slope.dtype)",
            GRADIENTS,
        ),
        (
            "the ReLU lets all gradients of x through",
            "gradient = opened(shown, gradient.astype(slope.dtype))",
            "gradient = gradient + 0 * shown.x.astype(gradient.dtype)",
            DERIVATIVES,
        ),
        (
            "a ReLU behind a residual lets all gradients through",
            "y if relu and of.residual is not None else None,",
            "None,",
            DERIVATIVES,
        ),
    ),
    *of(
        "_kernels/compensated.py",
        (
            "a sum forgets half of what its rounding lost",
            "return total, (a - (total - from_b)) + (b - from_b)",
            "return total, b - from_b",
            f"{NUMERICS} -k twice_the_precision",
        ),
        (
            "a product forgets what its rounding lost",
            "return product, rest + (last + low_rest)",
            "return product, rest * 0",
            "tests/laws/test_sync.py -k keeps_its_digits",
        ),
        (
            "halves keep too many digits to add up exactly",
            "high = _leading(a, (jnp.finfo(a.dtype).nmant + 1) // 2)",
            "high = _leading(a, jnp.finfo(a.dtype).nmant - 1)",
            "tests/laws/test_sync.py -k keeps_its_digits",
        ),
    ),
    *of(
        "_kernels/cpu.py",
        (
            "a sum shares what it reads, so that x is stored in float32",
            "return lax.optimization_barrier(arrays)[0]",
            "return arrays[0]",
            FUSED,
        ),
        (
            "a feature with all digits hides one that lost them",
            "return lax.select(holds, b[0], a[0]), lax.select(holds, b[1], a[1])",
            "return b",
            f"{NUMERICS} -k one_feature",
        ),
        (
            "sums over tiles ignore the ReLU",
            "return accelerator.addends(of._replace(x=x, t=t, **values))",
            "return accelerator.addends(Sums(x, values['mean'], None, None, None, t))",
            TILES,
        ),
        (
            "tiles of moments drop the weights",
            "cut = tiles.cut(of.x, axes, 1) if whole and of.weights is None else None",
            "cut = tiles.cut(of.x, axes, 1) if whole else None",
            "tests/laws/test_tiles.py -k weighted",
        ),
        (
            "tiles of tangents drop the weights",
            "cut = tiles.cut(of.x, axes, 2) if whole and of.weights is None else None",
            "cut = tiles.cut(of.x, axes, 2) if whole else None",
            "tests/laws/test_tiles.py -k weighted",
        ),
    ),
    *of(
        "_kernels/tiles.py",
        (
            "rows that fill no tile are left out",
            "    if rest:\n",
            "    if rest < 0:\n",
            TILES,
        ),
        (
            "one tile is read instead of its neighbours",
            "index * jnp.int32(step) + jnp.int32(at * tile[first])",
            "index * jnp.int32(step)",
            TILES,
        ),
        (
            "features that were repeated are not added up",
            "lax.reduce_sum(t, axes=(1,)).reshape(vectors[0].shape) for t in apart",
            "t[:, 0].reshape(vectors[0].shape) for t in apart",
            TILES,
        ),
    ),
    *of(
        "_kernels/reduction.py",
        (
            "NaN is hidden also where it counts",
            "jnp.where((weights > 0) | jnp.isfinite(x), x, jnp.zeros_like(x))",
            "jnp.where(jnp.isfinite(x), x, jnp.zeros_like(x))",
            f"{NUMERICS} -k not_finite",
        ),
        (
            "NaN of weight 0 is not hidden",
            "jnp.where((weights > 0) | jnp.isfinite(x), x, jnp.zeros_like(x))",
            "x",
            HIDDEN,
        ),
        (
            "weights of rows count once, however long the rows are",
            "jnp.sum(weights * repeats, axes, keepdims=True)",
            "jnp.sum(weights, axes, keepdims=True)",
            ORACLE,
        ),
        (
            "the variance of complex numbers leaves out the imaginary part",
            "for i in (0, 1)), re[2] + im[2]",
            "for i in (0, 1)), re[2]",
            f"{NUMERICS} -k complex",
        ),
        (
            "the backward pass forgets what rounding left out of the mean",
            "[2 * (product - rest * total)]",
            "[2 * product]",
            PRECISION,
        ),
        (
            "the variance moves half as far as it should",
            "[2 * (product - rest * total)]",
            "[product - rest * total]",
            GRADIENTS,
        ),
        (
            "the gradient of weights forgets the variance",
            "(jnp.square(centered) - var) * tangent",
            "jnp.square(centered) * tangent",
            f"{NUMERICS} -k learned",
        ),
        (
            "under vmap, sums run over the wrong axes",
            "return tuple(axis + 1 for axis in axes)",
            "return tuple(axes)",
            "tests/laws/test_laws.py -k 'gradients_equal and vmap'",
        ),
        (
            "the second derivative forgets the weights",
            "t = t if of.weights is None else t * of.weights\n    t = t if of.offset",
            "t = t if of.offset",
            SECOND,
        ),
    ),
    *of(
        "_kernels/operation.py",
        (
            "a batch of vmap on another axis is taken as the first",
            "else jnp.moveaxis(leaf, dim, 0)",
            "else jnp.moveaxis(leaf, 0, 0)",
            f"{NUMERICS} -k any_axis",
        ),
        (
            "tiles run over arrays that are spread over devices",
            "whole = is_for_one_device(context)",
            "whole = True",
            "tests/laws/test_tiles.py -k reads_large_arrays_once",
        ),
        (
            "no barrier stops XLA from storing what it can compute again",
            "return (x, *vectors) if is_small(x) else _hide(recomputes, (x, *vectors))",
            "return x, *vectors",
            FUSED,
        ),
    ),
]
