"""diagnose: broken trainings are named, healthy ones left alone, files never crash it."""

import functools
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn import optim
from jaxbn.diagnose import diagnose
from jaxbn.diagnose.__main__ import main

BN = jaxbn.BatchNorm(momentum=0.9)
LAYERS = ("bn0", "bn1", "bn2")
WIDTH, ROWS = 32, 2048


def draw_data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, 16)) * rng.uniform(0.5, 3, 16) + rng.normal(size=16)
    labels = np.argmax(np.tanh(x) @ rng.normal(size=(16, 4)), 1)
    return jnp.asarray(x.astype(np.float32)), jnp.asarray(labels)


X, LABELS = draw_data()


def init(seed=0):
    params, stats, size = {}, {}, X.shape[1]
    for i, name in enumerate(LAYERS):
        key = jax.random.fold_in(jax.random.key(seed), i)
        params[f"kernel{i}"] = jax.random.normal(key, (size, WIDTH)) / size**0.5
        params[name], stats[name] = BN.init(WIDTH)
        size = WIDTH
    return params | {"head": jnp.zeros((WIDTH, 4))}, stats


def apply(variables, x, training, momentum=0.9):
    params, stats = variables
    after = {}
    for i, name in enumerate(LAYERS):
        x, after[name] = BN.apply(
            params[name], stats[name], x @ params[f"kernel{i}"], training, momentum=momentum
        )
        x = jax.nn.relu(x)
    return x @ params["head"], (params, after)


run = jax.jit(apply, static_argnums=2)


def cross_entropy(logits, labels):
    chosen = jax.nn.one_hot(labels, 4)
    return -(jax.nn.log_softmax(logits) * chosen).sum(-1).mean()


@functools.partial(jax.jit, static_argnames=("steps", "batch", "keep_stats"))
def train(
    seed=0,
    *,
    steps=300,
    batch=32,
    rate=0.1,
    momentum=0.9,
    l1=0.0,
    unit=1.0,
    keep_stats=True,
):
    """Trains with SGD; returns the variables and an average of the params."""
    tx = optax.chain(optax.trace(0.9), optax.scale(-1.0))
    clip = optim.clip_scale(minimum=0.0)
    params, stats = init(seed)

    def step(carry, key):
        (params, stats), trace, average = carry
        rows = jax.random.randint(key, (batch,), 0, ROWS)

        def loss(params):
            logits, (_, after) = apply((params, stats), X[rows] * unit, True, momentum)
            penalty = optim.scale_penalty(params, l1=1.0) * l1
            return cross_entropy(logits, LABELS[rows]) + penalty, after

        grads, after = jax.grad(loss, has_aux=True)(params)
        updates, trace = tx.update(jax.tree.map(lambda g: rate * g, grads), trace)
        updates, _ = clip.update(updates, optax.EmptyState(), params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.99 * a + 0.01 * p, average, params)
        return ((params, after if keep_stats else stats), trace, average), None

    start = (params, stats), tx.init(params), params
    keys = jax.random.split(jax.random.key(seed + 1), steps)
    (variables, _, average), _ = jax.lax.scan(step, start, keys)
    return variables, average


def batches(size=32, number=8, seed=3):
    rng = np.random.default_rng(seed)
    return [X[rng.integers(0, ROWS, size)] for _ in range(number)]


def dropped_statistics():
    return train(keep_stats=False)[0], {}


def too_few_steps():
    return train(steps=60, momentum=0.99)[0], {
        "apply": jax.jit(functools.partial(apply, momentum=0.99), static_argnums=2)
    }


def momentum_of_pytorch():
    return train(momentum=0.1)[0], {
        "apply": jax.jit(functools.partial(apply, momentum=0.1), static_argnums=2)
    }


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
    return (both, jax.tree.map(lambda *leaves: jnp.stack(leaves), *tracked)), {
        "apply": None,
        "batches": (),
        "replica_axis": 0,
    }


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


# How training or evaluation went wrong: the cause, the layers, a word of the remedy.
BROKEN = {
    dropped_statistics: ("never-updated", LAYERS, "mutable"),
    too_few_steps: ("unconverged", LAYERS, "momentum to 0.9"),
    momentum_of_pytorch: ("momentum", LAYERS, "Write momentum=0.9"),
    averaged_weights: ("averaged-weights", LAYERS, "averaged weights before"),
    small_batches: ("small-batch", LAYERS[:1], "axis_name"),
    replicas_apart: ("replicas", LAYERS, "sync_state"),
    other_preprocessing: ("drift", LAYERS[:1], "prepared otherwise"),
    a_layer_of_another_run: ("drift", LAYERS[:1], "estimate"),
    raw_features: ("exploding", LAYERS[:1], "learning rate"),
    slimmed_channels: ("dead", LAYERS, "prune"),
    one_camera_per_batch: ("unlike-batches", LAYERS, "Shuffle"),
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
    json.dumps([finding.evidence for finding in found])
    assert cause in str(report)
    if broken in EVALUATES_WRONG:
        gap = next(finding for finding in report.findings if finding.cause == "gap")
        assert gap.layer == "bn0"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_a_healthy_training_is_left_alone(seed, momentum):
    steps = 300 if momentum == 0.9 else 500
    variables, _ = train(seed, steps=steps, momentum=momentum)
    inner = jax.jit(functools.partial(apply, momentum=momentum), static_argnums=2)
    report = diagnose(variables, inner, batches(seed=seed), steps=steps)
    assert report.healthy, report
    for row in report.layers:
        np.testing.assert_allclose(row.momentum, momentum, atol=1e-5)
    assert diagnose(variables, steps=steps, momentum=momentum).healthy


class Linen(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, training):
        for _ in range(2):
            x = nn.Dense(WIDTH)(x)
            x = nn.relu(self.norm(use_running_average=not training, momentum=0.9)(x))
        return nn.Dense(4)(x)


@functools.cache
def train_linen(norm):
    model = Linen(norm)
    variables = model.init(jax.random.key(0), X[:2], False)

    def step(variables, rows):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params}, X[rows], True, mutable=["batch_stats"]
            )
            return cross_entropy(logits, LABELS[rows]), updates

        grads, updates = jax.grad(loss, has_aux=True)(variables["params"])
        params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], grads)
        return {"params": params, **updates}, None

    rows = jax.random.randint(jax.random.key(1), (200, 32), 0, ROWS)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables, _ = jax.jit(lambda v: jax.lax.scan(step, v, rows))(variables)

    def linen_apply(variables, x, training):
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            return model.apply(variables, x, training, mutable=["batch_stats"])

    return variables, linen_apply


@pytest.mark.parametrize("norm", [jaxbn.linen.BatchNorm, nn.BatchNorm])
def test_linen_models_healthy_and_poisoned(norm):
    variables, linen_apply = train_linen(norm)
    report = diagnose(variables, jax.jit(linen_apply, static_argnums=2), batches())
    assert report.healthy, report
    assert [row.name for row in report.layers] == ["BatchNorm_0", "BatchNorm_1"]
    np.testing.assert_allclose([row.momentum for row in report.layers], 0.9, atol=1e-5)
    _, updates = linen_apply(variables, X[:8].at[0].set(jnp.inf), True)
    poisoned = diagnose({**variables, **updates})
    # Flax's layer lets one overflow into the statistics for good.
    assert poisoned.causes == (set() if norm is jaxbn.linen.BatchNorm else {"non-finite"})


def test_nnx_models_healthy_and_never_switched_to_training():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(16, WIDTH, rngs=rngs),
        jaxbn.nnx.BatchNorm(WIDTH, momentum=0.9, rngs=rngs),
        nnx.relu,
        nnx.Linear(WIDTH, 4, rngs=rngs),
    )
    graph, state = nnx.split(model)

    def nnx_apply(state, x, training):
        model = nnx.merge(graph, state)
        model.train() if training else model.eval()
        with jax.numpy_rank_promotion("allow"):
            return model(x), nnx.state(model)

    inner = jax.jit(nnx_apply, static_argnums=2)
    assert diagnose(state, inner, batches()).causes == {"never-updated", "gap"}
    for batch in batches(number=60, seed=1):
        _, state = inner(state, batch, True)
    for tree in (state, nnx.to_pure_dict(state)):
        assert diagnose(tree).healthy
    report = diagnose(state, inner, batches())
    assert report.healthy, report
    assert [row.name for row in report.layers] == ["layers/1"]


@pytest.mark.parametrize(
    ("normalizer", "momentum"),
    [
        (jaxbn.BatchNorm(momentum=0.9, debias=True), 0.9),
        (jaxbn.BatchNorm(momentum=None), np.nan),
        (jaxbn.BatchRenorm(jaxbn.BatchNorm(momentum=0.9)), 0.9),
        (jaxbn.GhostBatchNorm(jaxbn.BatchNorm(momentum=0.9), 8), 0.9),
    ],
    ids=["debias", "cumulative", "renorm", "ghost"],
)
def test_what_a_layer_sees_is_what_it_is_given(normalizer, momentum):
    """The moments of the batches, and the momentum, without knowing the normalizer."""
    params, state = normalizer.init(16)
    for batch in batches(number=60, seed=1):
        _, state = normalizer.apply(params, state, batch, True)

    def one(variables, x, training):
        y, after = normalizer.apply(*variables, x, training)
        return y, (variables[0], after)

    seen = batches()
    report = diagnose((params, state), one, seen)
    assert report.healthy, report
    [row] = report.layers
    np.testing.assert_allclose(row.momentum, momentum, atol=1e-4)
    x = np.concatenate(seen).astype(np.float64)
    apart = (np.asarray(state.mean) - x.mean(0)) / x.std(0)
    np.testing.assert_allclose(row.shift, np.sqrt(np.mean(apart**2)), rtol=2e-3)
    means = np.stack([batch.mean(0) for batch in seen])
    noise = np.sqrt(np.mean(means.var(0, ddof=1) / x.var(0)))
    np.testing.assert_allclose(row.noise, noise, rtol=2e-3)


def test_a_frozen_layer_is_not_run_with_other_statistics():
    frozen, trained = train()[0]

    def half(variables, x, training):
        params, stats = variables
        x, _ = BN.apply(params["bn0"], stats["bn0"], x @ params["kernel0"], False)
        y, after = BN.apply(params["bn1"], stats["bn1"], x @ params["kernel1"], training)
        return y, (params, stats | {"bn1": after})

    variables = frozen, trained
    for batch in batches(number=60, seed=1):
        _, variables = half(variables, batch, True)
    report = diagnose(variables, half, batches())
    assert report.healthy, report
    assert np.isnan(report.layers[0].momentum)
    assert report.layers[1].momentum == pytest.approx(0.9, abs=1e-5)


def test_a_report_is_a_table_and_a_picture(tmp_path):
    report = diagnose(train(momentum=0.1)[0], momentum=0.1)
    lines = str(report).splitlines()
    assert lines[0].split()[:3] == ["layer", "features", "momentum"]
    assert [line.split()[0] for line in lines[1:4]] == list(LAYERS)
    assert len({line.index("momentum") for line in lines[1:4]}) == 1
    assert "ERROR momentum in bn0 and 2 more" in lines
    for path in (tmp_path / "report.png", tmp_path / "report.svg"):
        report.plot(path)
        assert path.stat().st_size > 1000
    assert str(report.findings[0]).startswith("bn0: momentum (error): ")


def test_a_report_is_numbers_for_a_logger():
    variables, _ = train(momentum=0.1)
    numbers = diagnose(variables, run, batches()).to_dict()
    assert json.loads(json.dumps(numbers)) == numbers
    assert numbers["layers/bn1/momentum"] == pytest.approx(0.9, abs=1e-5)
    told = diagnose(variables, momentum=0.1).to_dict()
    assert told["errors"] == told["found/momentum"] == 3
    assert told["warnings"] == told["found/dead"] == 0
    # What was not measured has no name, and what was not found has its 0.
    assert not [name for name in told if name.startswith("layers/")]
    assert {n for n in told if "found/" in n} == {n for n in numbers if "found/" in n}


STYLES = {
    "torch": ("{}.{}", ("weight", "bias", "running_mean", "running_var")),
    "keras": ("model/{}/{}", ("gamma", "beta", "moving_mean", "moving_variance")),
    "tf1": ("net/{}/BatchNorm/{}:0", ("gamma", "beta", "moving_mean", "moving_variance")),
    "flax": ("{}/{}", ("scale", "bias", "mean", "var")),
}


def arrays_of(style, variables):
    params, stats = variables
    form, names = STYLES[style]
    kernels = {form.format(f"dense{i}", "kernel"): params[f"kernel{i}"] for i in range(3)}
    return kernels | {
        form.format(layer, name): np.asarray(array)
        for layer in LAYERS
        for name, array in zip(names, (*params[layer], *stats[layer][:2]), strict=True)
    }


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_files_of_every_style_are_read(style, ending, tmp_path, capsys):
    path = tmp_path / f"model.{ending}"
    write = (
        (lambda arrays: np.savez(path, **arrays))
        if ending == "npz"
        else (lambda arrays: save_file({k: np.asarray(v) for k, v in arrays.items()}, path))
    )
    write(arrays_of(style, train()[0]))
    assert main([str(path)]) == 0
    assert "3 layers, nothing found" in capsys.readouterr().out
    write(arrays_of(style, init()))
    assert main([str(path), "--plot", str(tmp_path / "report.png")]) == 1
    out = capsys.readouterr().out
    assert "ERROR never-updated in" in out
    assert re.search("bn0.* and 2 more", out)
    assert (tmp_path / "report.png").exists()
    write(arrays_of(style, train()[0]))
    assert main([str(path), "--steps", "10", "--momentum", "0.99"]) == 1
    assert "unconverged" in capsys.readouterr().out


def test_folders_of_orbax_are_read(tmp_path, capsys):
    tree = dict(zip(("params", "stats"), train()[0], strict=True))
    tree = jax.tree.map(
        np.asarray, {"params": tree["params"], "batch_stats": tree["stats"]}
    )
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "plain", tree)
    with ocp.CheckpointManager(tmp_path / "many") as manager:
        for step in (2, 10):
            broken = jax.tree.map(lambda leaf: leaf + np.float32("nan"), tree)
            manager.save(step, args=ocp.args.StandardSave(tree if step == 10 else broken))
    for name in ("plain", "many", "many/10"):
        assert main([str(tmp_path / name)]) == 0, capsys.readouterr()
        assert "bn2" in capsys.readouterr().out
    assert main([str(tmp_path / "many/2")]) == 1
    assert "non-finite" in capsys.readouterr().out
    for file in (tmp_path / "plain").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert main([str(tmp_path / "plain")]) == 2
    assert "plain" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 2
    assert "_METADATA" in capsys.readouterr().err


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_a_damaged_file_is_refused_with_its_name(ending, tmp_path, capsys):
    path, arrays = tmp_path / f"model.{ending}", arrays_of("torch", train()[0])
    if ending == "npz":
        np.savez(path, **arrays)
    else:
        save_file({name: np.asarray(array) for name, array in arrays.items()}, path)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    damaged = [whole[: int(len(whole) * share)] for share in (0, 0.01, 0.3, 0.9, 0.999)]
    damaged += [b"not a checkpoint", rng.bytes(len(whole)), whole[:40] + whole[80:]]
    for content in damaged:
        path.write_bytes(content)
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert str(path) in captured.err
        assert not captured.out


def test_an_unfit_file_is_refused(tmp_path, capsys):
    objects = tmp_path / "objects.npz"
    np.savez(objects, mean=np.array([print], object), allow_pickle=True)
    other = tmp_path / "other.npz"
    np.savez(other, kernel=np.ones((2, 3)))
    for path, message in (
        (objects, "objects.npz"),
        (other, "no running mean and variance.*kernel"),
        (tmp_path / "none.npz", "does not exist"),
        (tmp_path / "none", "does not exist"),
    ):
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert re.search(message, captured.err), captured.err
        assert not captured.out


def test_the_command_line_needs_no_flax(tmp_path):
    path = tmp_path / "model.npz"
    np.savez(path, **arrays_of("torch", init()))
    code = (
        "import sys; from jaxbn.diagnose.__main__ import main; code = main(sys.argv[1:]); "
        "print({'flax', 'optax', 'orbax', 'matplotlib'} & set(sys.modules)); sys.exit(code)"
    )
    for command in (["-c", code], ["-m", "jaxbn.diagnose"]):
        done = subprocess.run(
            [sys.executable, *command, str(path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 1, done.stderr
        assert "never-updated" in done.stdout
        assert command[0] == "-m" or "set()" in done.stdout


VARIABLES = init()
NAN = jaxbn.BatchStats(jnp.zeros(2), jnp.array([1.0, -1.0]))


def test_the_arrays_alone_tell_of_single_channels():
    params, stats = init()[0]["bn0"], train()[0][1]["bn0"]
    assert diagnose((jaxbn.init(2)[0], NAN)).causes == {"negative-variance"}
    for scale, cause in ((1e3, "exploding"), (1e-5, "dead"), (30.0, None), (0.01, None)):
        scaled = params._replace(scale=params.scale.at[3].set(scale))
        found = diagnose((scaled, stats)).findings
        assert [finding.cause for finding in found] == ([cause] if cause else [])
        assert all(finding.evidence["channels"] == 1 for finding in found)


def test_counted_steps_overrule_a_pattern_that_looks_like_too_few():
    variables, options = too_few_steps()
    inner = options["apply"]
    assert "unconverged" in diagnose(variables, inner, batches()).causes
    assert "unconverged" in diagnose(variables, inner, batches(), steps=60).causes
    assert "unconverged" not in diagnose(variables, inner, batches(), steps=5000).causes


@pytest.mark.parametrize(
    ("call", "error", "fact", "remedy"),
    [
        (lambda: diagnose({"kernel": X}), ValueError, "1 arrays.*kernel", "nnx.state"),
        (lambda: diagnose({}), ValueError, "0 arrays", "linen"),
        (lambda: diagnose({"mean": ["a"], "var": ["b"]}), ValueError, "no running", "Pass"),
        (lambda: diagnose({"mean": "a", "var": "b"}), TypeError, "str", "arrays"),
        (lambda: diagnose(VARIABLES, run), ValueError, "no batches", "training"),
        (lambda: diagnose(VARIABLES, lambda *_: X, [X]), TypeError, "pair", "mutable"),
        (
            lambda: diagnose(VARIABLES, lambda *_: (X, X), [X]),
            ValueError,
            "another",
            "Return",
        ),
        (lambda: diagnose(VARIABLES, momentum=1.5), ValueError, "1.5", "PyTorch"),
        (lambda: diagnose(VARIABLES, steps=-1), ValueError, "-1", "Count"),
    ],
)
def test_a_mistake_gets_a_fact_and_a_remedy(call, error, fact, remedy):
    with pytest.raises(error, match=fact) as caught:
        call()
    assert re.search(remedy, str(caught.value)), caught.value
