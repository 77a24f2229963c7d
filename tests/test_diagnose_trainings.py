"""diagnose: broken trainings are named, healthy ones of every shape are left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbn
import jaxbn.nnx
from jaxbn.diagnose import diagnose
from tests.trainings import (
    BN,
    LABELS,
    LAYERS,
    X,
    batches,
    cross_entropy,
    run,
    train,
    with_momentum,
)

FILE = {"apply": None, "batches": ()}
LABELLED = [(X[i : i + 64], LABELS[i : i + 64]) for i in range(0, 512, 64)]


def with_labels(variables, batch, training):
    return run(variables, batch[0], training)


def loss_of(logits, batch):
    return cross_entropy(logits, batch[1])


# Broken: how training or evaluation went wrong. ------------------------------------------


def dropped_statistics():
    asked = {"apply": with_labels, "batches": LABELLED, "loss": loss_of}
    return train(keep_stats=False)[0], asked


def too_few_steps():
    return train(steps=60, momentum=0.99)[0], {"apply": with_momentum(0.99)}


def momentum_of_pytorch():
    return train(momentum=0.1)[0], {"apply": with_momentum(0.1)}


def averaged_weights():
    (_, stats), average = train(rate=0.5)
    return (average, stats), {}


def small_batches():
    return train(batch=4, rate=0.02)[0], {"batches": batches(4, 16)}


def replicas_apart():
    params, stats = train()[0]
    tracked = []
    for replica in (0, 1):
        own = stats
        for batch in batches(seed=replica):
            _, (_, own) = run((params, own), batch, True)
        tracked.append(own)
    both = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), params)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *tracked)
    return (both, stacked), FILE | {"replica_axis": 0}


def other_preprocessing():
    return train()[0], {"batches": [batch * 10 for batch in batches()]}


def a_layer_of_another_run():
    (params, stats), _ = train()
    (_, others), _ = train(unit=100.0)
    return (params, stats | {"bn0": others["bn0"]}), {}


def raw_features():
    variables, _ = train(unit=1e6)
    return variables, {"batches": [batch * 1e6 for batch in batches()]}


def slimmed_channels():
    return train(l1=0.02)[0], {}


def one_camera_per_batch():
    offsets = np.random.default_rng(0).normal(size=(8, 1, 16)).astype(np.float32) * 2
    pairs = zip(batches(), offsets, strict=True)
    return train()[0], {"batches": [batch + np.repeat(o, 32, 0) for batch, o in pairs]}


def units_that_never_fire():
    return train(offset=-30.0)[0], {}


def statistics_in_half_precision():
    params, stats = train()[0]
    return (params, jax.tree.map(lambda a: a.astype(jnp.bfloat16), stats)), {}


def an_overflow():
    params, stats = train()[0]
    return (params, stats | {"bn1": stats["bn1"]._replace(mean=jnp.full(32, np.inf))}), FILE


# The cause, the layers, a word of the remedy.
BROKEN = {
    dropped_statistics: ("never-updated", LAYERS, "mutable"),
    too_few_steps: ("unconverged", LAYERS, "momentum=0.9"),
    momentum_of_pytorch: ("momentum", LAYERS, "Write momentum=0.9"),
    averaged_weights: ("averaged-weights", LAYERS, "averaged weights before"),
    small_batches: ("small-batch", LAYERS[:1], "axis_name"),
    replicas_apart: ("replicas", LAYERS, "sync_state"),
    other_preprocessing: ("drift", LAYERS[:1], "prepared otherwise"),
    a_layer_of_another_run: ("drift", LAYERS[:1], "estimate"),
    raw_features: ("exploding", LAYERS[:1], "learning rate"),
    slimmed_channels: ("dead", LAYERS, "prune"),
    one_camera_per_batch: ("unlike-batches", LAYERS, "Shuffle"),
    units_that_never_fire: ("dead", LAYERS[1:], "never fire"),
    statistics_in_half_precision: ("low-precision", LAYERS, "float32"),
    an_overflow: ("non-finite", LAYERS[1:2], "overflowed"),
}
EVALUATES_WRONG = (dropped_statistics, other_preprocessing, a_layer_of_another_run)


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_a_broken_training_is_named_with_its_remedy(broken):
    cause, layers, remedy = BROKEN[broken]
    variables, options = broken()
    report = diagnose(variables, **{"apply": run, "batches": batches(), **options})
    found = [finding for finding in report.findings if finding.cause == cause]
    assert {finding.layer for finding in found} >= set(layers[:1]), report
    assert {finding.layer for finding in found} <= set(layers), report
    assert report.causes <= {cause, "gap"}, report
    assert all(remedy in finding.remedy for finding in found), report
    assert all(isinstance(n, float) for f in found for n in f.evidence.values())
    assert "question" not in {finding.severity for finding in report.findings}
    assert cause in str(report)
    if broken in EVALUATES_WRONG:
        gap = next(finding for finding in report.findings if finding.cause == "gap")
        assert gap.layer == "bn0"


# Healthy: what looks odd and is right. ---------------------------------------------------


def a_plain_model():
    return train()[0], {"steps": 300}


def a_slow_average():
    return train(1, steps=500, momentum=0.99)[0], {
        "apply": with_momentum(0.99),
        "steps": 500,
    }


def a_rate_that_never_falls():
    """The slow average lags behind the params, in no layer and nowhere by much."""
    variables, _ = train(steps=6000, rate=0.03, momentum=0.999)
    return variables, {"apply": with_momentum(0.999), "steps": 6000}


def live_and_averaged():
    (params, stats), _ = train()
    (others, averaged), _ = train(1)
    return {
        "params": params,
        "batch_stats": stats,
        "ema_params": others,
        "ema_batch_stats": averaged,
    }, FILE


def a_projector_of_pytorch():
    """The last norm has neither scale nor bias, and all count their steps."""
    rng, arrays = np.random.default_rng(0), {}
    for name in ("fc.1", "fc.4", "fc.7"):
        arrays[f"{name}.running_mean"] = rng.normal(size=8)
        arrays[f"{name}.running_var"] = rng.uniform(0.5, 2, 8)
        arrays[f"{name}.num_batches_tracked"] = np.int64(400)
        if name != "fc.7":
            arrays[f"{name}.weight"] = rng.uniform(0.5, 2, 8)
            arrays[f"{name}.bias"] = rng.normal(size=8)
    return arrays, FILE


def a_normalizer_of_observations():
    """Four sensors are constant, one counts millions; a layer norm is as wide."""
    var = np.r_[np.zeros(4), np.ones(11), 1e14]
    obs = {"mean": np.r_[np.zeros(15), 1e7], "var": var, "count": np.float32(1e6)}
    norm = {"scale": np.zeros(16), "bias": np.zeros(16)}
    return (norm, obs), FILE


def a_residual_branch_that_began_at_zero():
    (params, stats), _ = train()
    small = params["bn2"]._replace(scale=params["bn2"].scale * 0.01)
    return (params | {"bn2": small}, stats), FILE


def a_converted_file():
    """TensorFlow's epsilon hides nothing, and a count of 0 is no count."""
    rng = np.random.default_rng(0)
    arrays = {
        "bn/gamma": rng.uniform(0.5, 2, 8),
        "bn/beta": rng.normal(size=8),
        "bn/moving_mean": rng.normal(size=8),
        "bn/moving_variance": rng.uniform(1e-4, 2, 8),
    }
    return arrays, FILE


def trained_in_inference_mode_elsewhere():
    """A frozen layer, whose statistics a training step reads and keeps."""
    params, stats = train()[0]

    def half(variables, x, training):
        params, stats = variables
        x, _ = BN.apply(params["bn0"], stats["bn0"], x @ params["kernel0"], False)
        y, after = BN.apply(params["bn1"], stats["bn1"], x @ params["kernel1"], training)
        return y, (params, stats | {"bn1": after})

    variables = params, stats
    step = jax.jit(half, static_argnums=2)
    for batch in batches(number=60, seed=1):
        _, variables = step(variables, batch, True)
    return variables, {"apply": step}


def images():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, training):
            x = nn.Conv(4, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(not training, momentum=0.9, use_scale=False)(x))
            return nn.Dense(2)(x.mean((1, 2)))

    seen = [jax.random.normal(jax.random.key(i), (8, 6, 6, 3)) for i in range(6)]
    variables = jax.jit(Net().init, static_argnums=2)(jax.random.key(0), seen[0], False)
    step = jax.jit(
        lambda v, x, t: Net().apply(v, x, t, mutable=["batch_stats"]), static_argnums=2
    )
    for i in range(60):
        variables = {**variables, **step(variables, seen[i % 6], True)[1]}
    return variables, {"apply": step, "batches": seen}


def an_nnx_model():
    rngs = nnx.Rngs(0)
    norm = jaxbn.nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
    graph, state = nnx.split(
        nnx.Sequential(nnx.Linear(16, 8, use_bias=False, rngs=rngs), norm)
    )

    def step(state, x, training):
        model = nnx.merge(graph, state)
        model.train() if training else model.eval()
        return model(x), nnx.state(model)

    step = jax.jit(step, static_argnums=2)
    for batch in batches(number=60, seed=1):
        _, state = step(state, batch, True)
    return state, {"apply": step}


def alone(normalizer):
    """Returns a normalizer by itself, after some batches."""

    def healthy():
        params, state = normalizer.init(16)

        def step(variables, x, training):
            y, after = normalizer.apply(*variables, x, training)
            return y, (variables[0], after)

        step = jax.jit(step, static_argnums=2)
        for batch in batches(number=60, seed=1):
            _, (_, state) = step((params, state), batch, True)
        return (params, state), {"apply": step}

    return healthy


# What is healthy, and the momentum that is measured, if any.
HEALTHY = {
    "a plain model": (a_plain_model, 0.9),
    "a slow average": (a_slow_average, 0.99),
    "a rate that never falls": (a_rate_that_never_falls, 0.999),
    "live and averaged": (live_and_averaged, None),
    "a projector of PyTorch": (a_projector_of_pytorch, None),
    "observations": (a_normalizer_of_observations, None),
    "a residual branch": (a_residual_branch_that_began_at_zero, None),
    "a converted file": (a_converted_file, None),
    "frozen": (trained_in_inference_mode_elsewhere, None),
    "images, no scale": (images, 0.9),
    "an NNX model": (an_nnx_model, 0.9),
    "debias": (alone(jaxbn.BatchNorm(momentum=0.9, debias=True)), 0.9),
    "cumulative": (alone(jaxbn.BatchNorm(momentum=None)), np.nan),
    "renorm": (alone(jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.9))), 0.9),
    "ghost": (alone(jaxbn.GhostBatchNorm(jaxbn.BatchNorm(momentum=0.9), 8)), 0.9),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_training_is_left_alone(name):
    healthy, momentum = HEALTHY[name]
    variables, options = healthy()
    options = {"apply": run, "batches": batches(), **options}
    report = diagnose(variables, **options)
    assert report.healthy, report
    if momentum is not None:
        measured = [row.momentum for row in report.layers]
        np.testing.assert_allclose(measured, momentum, atol=1e-4)
    if (
        isinstance(variables, tuple)
        and momentum in (0.9, np.nan)
        and len(report.layers) == 1
    ):
        _check_what_it_saw(report.layers[0], variables[1], options["batches"])


def _check_what_it_saw(row, state, seen):
    """The moments of the batches, without knowing the normalizer."""
    x = np.concatenate(seen).astype(np.float64)
    apart = (np.asarray(state.mean) - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(row.shift, np.sqrt(np.mean(apart**2)), rtol=2e-3)
    means = np.stack([batch.mean(0) for batch in seen])
    noise = np.sqrt(np.mean(means.var(0, ddof=1) / x.var(0)))
    np.testing.assert_allclose(row.noise, noise, rtol=2e-3)


# What the loss and the counters tell. ----------------------------------------------------


def test_trained_in_inference_mode_is_a_question_that_the_loss_answers():
    variables, _ = train(inference=True)
    asked = diagnose(variables, with_labels, LABELLED)
    assert {f.severity for f in asked.findings} == {"question"}, asked
    assert all("leave it as it is" in f.remedy for f in asked.findings if f.cause == "gap")
    told = diagnose(variables, with_labels, LABELLED, loss=loss_of)
    assert told.causes == {"never-updated"}, told
    assert {f.severity for f in told.findings} == {"question"}
    assert all("right as it is" in f.remedy for f in told.findings)
    assert told.loss < told.loss_of_batches
    lost = diagnose(train(keep_stats=False)[0], with_labels, LABELLED, loss=loss_of)
    assert {f.severity for f in lost.findings} == {"error"}
    assert lost.loss > lost.loss_of_batches


@pytest.mark.parametrize(
    ("count", "weight", "severity"),
    [(0, 2.0, "question"), (900, 2.0, "error"), (0, 1.0, "error"), (None, 2.0, "question")],
)
def test_counters_tell_whether_statistics_were_lost(count, weight, severity):
    arrays = {"running_mean": np.zeros(4), "running_var": np.ones(4), "bias": np.zeros(4)}
    arrays["weight"] = np.full(4, weight)
    if count is not None:
        arrays["num_batches_tracked"] = np.int64(count)
    [finding] = diagnose({f"bn.{name}": array for name, array in arrays.items()}).findings
    assert (finding.cause, finding.severity) == ("never-updated", severity)
    assert "model.train()" in finding.remedy


def test_passes_do_not_grow_with_the_layers():
    """Two, three for each batch, and one more where a gap is found."""
    healthy = diagnose(train()[0], run, batches())
    assert healthy.passes == 2 + 3 * 8
    assert "26 forward passes" in str(healthy)
    variables, options = other_preprocessing()
    found = diagnose(variables, run, options["batches"])
    assert found.passes == 2 + 3 * 8 + 1
    parts = [row.gap for row in found.layers]
    assert parts[0] > 0.5 * sum(parts)

    def opaque(variables, x, training):
        y, after = run(jax.tree.map(np.asarray, variables), x, training)
        return np.asarray(y), after

    slow = diagnose(variables, opaque, options["batches"])
    assert slow.passes == 2 + 3 * 8 + 1 + len(LAYERS)
    assert [f.layer for f in slow.findings if f.cause == "gap"] == ["bn0"]
