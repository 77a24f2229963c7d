"""The public surface: what it holds, how it is called, and that it is documented."""

import inspect
import subprocess
import sys

import pytest

import jaxbn

PUBLIC = {
    "Affine": "(scale, bias)",
    "as_affine": "(params, state, normalizer)",
    "check_fold": "(apply_before, apply_after, *inputs, tolerance)",
    "find_pairs": "(variables)",
    "fold": "(kernel, bias, affine, *, in_axis, out_axis, groups, groups_on)",
    "fold_into_next": "(kernel, bias, affine, *, padding, transposed, in_axis, out_axis, "
    "groups, groups_on)",
    "fold_tree": "(variables, *, epsilon, pairs, options, norms)",
    "Gather": "(inner)",
    "Gathered": "(stats, start, batch)",
    "gather": "(states)",
    "reestimate": "(step, states, batches, *, passes, ddof, progress)",
    "track_gathered": "(states)",
    "BatchNorm": "(*, feature_axes, momentum, epsilon, use_scale, use_bias, ddof, debias, "
    "activation, axis_name, axis_index_groups, dtype, param_dtype)",
    "BatchNormParams": "(scale, bias)",
    "BatchRenorm": "(bn, *, momentum, limits)",
    "DomainBatchNorm": "(bn, num_domains, *, affine)",
    "pool_states": "(states, weights)",
    "Ema": "(decay, *, debias)",
    "EmaState": "(average, weight)",
    "GhostBatchNorm": "(inner, virtual_batch_size, *, layout, tracking)",
    "RenormLimits": "(r_min, r_max, d_max)",
    "RenormStats": "(mean, var, std, renorm_mean, renorm_std)",
    "BatchStats": "(mean, var, weight)",
    "Moments": "(mean, var, count)",
    "Normalizer": "(*args, **kwargs)",
    "RunningStats": "(*args, **kwargs)",
    "register_stats": "(kind)",
    "apply": "(params, state, x, training, normalizer, **options)",
    "dropout": "(key, x, rate, training, *, broadcast_axes, scaled_at)",
    "renorm_limits": "(step, *, start, r_steps, d_steps, r_max, d_max)",
    "axis_groups": "(num_devices, group_size)",
    "replica_differences": "(tree, *, axis)",
    "sync_state": "(state, axis_name, *, weight, axis_index_groups)",
    "sync_moments": "(moments, axis_name, *, axis_index_groups)",
    "init": "(num_features, normalizer, **options)",
    "merge_moments": "(a, b)",
    "moments": "(x, *, feature_axes, weights)",
    "normalize": "(x, mean, var, scale, bias, *, feature_axes, epsilon, dtype)",
    "update_running": "(state, batch, *, momentum, ddof)",
}
METHODS = {
    "BatchRenorm.init": "(self, num_features, *, scale_init, bias_init, mean_init, "
    "var_init, key)",
    "BatchRenorm.apply": "(self, params, state, x, training, *, weights, residual, "
    "adjustment, momentum, limits)",
    "Gather.init": "(self, num_features, *_, **options)",
    "Gather.apply": "(self, params, state, x, training, *_, **options)",
    "GhostBatchNorm.init": "(self, num_features, *_, **options)",
    "GhostBatchNorm.apply": "(self, params, state, x, training, *_, **options)",
    "Ema.init": "(self, tree)",
    "Ema.update": "(self, state, tree, *, decay, num_updates)",
    "Ema.value": "(self, state, like)",
    "DomainBatchNorm.apply": "(self, params, state, x, training, *_, domains, weights, "
    "residual, adjustment, **options)",
    "BatchNorm.init": "(self, num_features, *, scale_init, bias_init, mean_init, var_init, "
    "key)",
    "BatchNorm.apply": "(self, params, state, x, training, *, weights, residual, "
    "adjustment, momentum)",
}


def names_of(signature):
    bare = [
        parameter.replace(default=parameter.empty, annotation=parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=signature.empty))


def test_the_public_names_are_these():
    assert set(jaxbn.__all__) == set(PUBLIC)


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_signatures_are_kept(name):
    owner = jaxbn
    for part in name.split("."):
        owner = getattr(owner, part)
    assert names_of(inspect.signature(owner)) == {**PUBLIC, **METHODS}[name]


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_with_an_example_that_runs(name):
    # The examples themselves are run by --doctest-modules.
    docstring = inspect.getdoc(getattr(jaxbn, name))
    assert "Example:\n" in docstring
    assert ">>> " in docstring
    if inspect.isfunction(getattr(jaxbn, name)):
        for section in ("Args:\n", "Returns:\n", "Raises:\n"):
            assert section in docstring, section


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import jaxbn", "flax optax torch numpy.testing tqdm safetensors jax.extend"),
        ("import jaxbn.convert", "flax optax torch safetensors orbax h5py"),
        ("from jaxbn import *", "flax optax torch"),
    ],
)
def test_nothing_is_loaded_before_it_is_used(statement, absent):
    code = f"import sys; {statement}; print(set({absent.split()}) & set(sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert output.stdout.strip() == "set()"


def test_the_free_functions_take_any_normalizer_last():
    bn = jaxbn.BatchNorm(use_bias=False, feature_axes=1)
    params, state = jaxbn.init(3, bn)
    assert params.bias is None
    x = jaxbn.init(6)[1].var.reshape(2, 3)
    y, after = jaxbn.apply(params, state, x, True, bn)
    want, _ = bn.apply(params, state, x, True)
    assert (y == want).all()
    assert after.mean.shape == (3,)
