"""diagnose: models of Flax, reports, files of every style, which never crash it."""

import functools
import json
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import save_file

import jaxbn
import jaxbn.linen
import jaxbn.nnx
from jaxbn.diagnose import diagnose
from jaxbn.diagnose.__main__ import main
from tests.trainings import (
    LABELS,
    LAYERS,
    ROWS,
    WIDTH,
    X,
    batches,
    cross_entropy,
    init,
    run,
    train,
    with_momentum,
)


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
    assert {name.split("/")[2] for name in told if "layers/" in name} == {"dead"}
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
    slow = "0.01" if style == "torch" else "0.99"
    assert main([str(path), "--steps", "10", "--momentum", slow]) == 1
    assert "90% of the initial" in capsys.readouterr().out


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


def named(*layers, **arrays):
    """Returns arrays of PyTorch of layers, (name, value of the scale or None)."""
    state = {}
    for layer, weight in layers:
        state[f"{layer}.running_mean"] = np.full(4, 0.1)
        state[f"{layer}.running_var"] = np.full(4, 2.0)
        if weight is not None:
            state[f"{layer}.weight"] = np.full(4, weight)
            state[f"{layer}.bias"] = np.zeros(4)
    return state | arrays


STATS = {"mean": np.full(4, 0.1), "var": np.full(4, 2.0)}
SCALED = {"scale": np.r_[0.0, 1, 1, 1], "bias": np.zeros(4)}
PLAIN = {"scale": np.ones(4), "bias": np.zeros(4)}
# Trees, and how many dead channels each layer has by its own scale.
OWN_ARRAYS = {
    "a projector": (named(("fc.1", 0.0), ("fc.7", None)), {"fc/1": 4, "fc/7": 0}),
    "live and averaged": (
        {"model": named(("bn", 1.0)), "ema": named(("bn", 0.0))},
        {"model/bn": 0, "ema/bn": 4},
    ),
    "averaged collections": (
        {
            "params": {"bn": PLAIN},
            "batch_stats": {"bn": STATS},
            "ema_params": {"bn": SCALED},
            "ema_batch_stats": {"bn": STATS},
        },
        {"batch_stats/bn": 0, "ema_batch_stats/bn": 1},
    ),
    "averaged params alone": (
        {
            "ema_params": {"bn": SCALED},
            "params": {"bn": PLAIN},
            "batch_stats": {"bn": STATS},
        },
        {"bn": 0},
    ),
    "params and state": (({"bn": SCALED}, {"bn": STATS}), {"bn": 1}),
    "a tuple of more": ((np.ones(3), SCALED, STATS, np.ones(4)), {"model": 1}),
    "a layer norm beside it": ({"layers": {2: SCALED, 7: STATS}}, {"layers/7": 0}),
    "observations": (({"bn": SCALED}, {"bn": STATS | {"count": 9.0}}), {"1/bn": np.nan}),
}


@pytest.mark.parametrize("name", OWN_ARRAYS)
def test_each_layer_has_its_own_arrays(name):
    tree, dead = OWN_ARRAYS[name]
    rows = diagnose(tree).layers
    assert {row.name for row in rows} == set(dead)
    np.testing.assert_equal({row.name: row.dead for row in rows}, dead)


def dead(scale, var):
    """Returns the numbers of dead channels of two layers, the first of which is sound."""
    arrays = named(("a", 1.0)) | {"b.running_mean": np.zeros(100), "b.running_var": var}
    return [row.dead for row in diagnose(arrays | {"b.weight": scale}).layers]


@pytest.mark.parametrize("number", [1, 40, 60, 90, 100])
@pytest.mark.parametrize("small", [0.0, 1e-36, 1e-5])
def test_a_layer_may_be_dead_mostly_or_wholly(number, small):
    one, low = np.ones(100), np.where(np.arange(100) < number, small, 1.0)
    assert dead(low, one) == [0, number]
    assert dead(one, low**3) == [0, number]
    # All scales may be small, as behind a residual branch that began at 0.
    assert dead(one * 0.01, one) == [0, 0]


# Whose arrays these are, and what its users write.
WORDS = {
    "linen": ({"batch_stats": {"bn": STATS | {"mean": np.full(4, np.nan)}}}, "jaxbn.linen"),
    "nnx": (nnx.State({"bn": STATS | {"mean": np.full(4, np.nan)}}), "jaxbn.nnx"),
    "torch": (named(("bn", 1.0), **{"bn.bias": np.full(4, np.nan)}), "update_bn"),
    "keras": (
        {"moving_mean": np.full(4, np.nan), "moving_variance": np.ones(4)},
        r"3 / \(1 - momentum\) batches",
    ),
}


@pytest.mark.parametrize("framework", WORDS)
def test_remedies_are_in_the_words_of_the_framework(framework):
    tree, word = WORDS[framework]
    [finding] = diagnose(tree).findings
    assert finding.cause == "non-finite"
    assert re.search(word, finding.remedy), finding


def test_defaults_are_those_of_the_framework():
    few = named(("bn", 2.0), **{"bn.num_batches_tracked": np.int64(20)})
    [finding] = diagnose(few).findings
    assert (finding.cause, finding.severity) == ("unconverged", "question")
    assert "with momentum=0.1, the default, 12% of the initial" in finding.message
    # A running variance below the share that would be left refutes it.
    assert diagnose(few | {"bn.running_var": np.full(4, 0.1)}).healthy
    assert diagnose(few, momentum=0.2).healthy
    assert diagnose(few, momentum=0.05).findings[0].severity == "error"
    assert "Write momentum=0.1" in diagnose(few, momentum=0.9).findings[0].remedy
    # Variances of 1e-10 vanish in an epsilon of 1e-3, and not in one of 1e-10.
    keras = {"moving_mean": np.ones(4), "moving_variance": np.r_[1, 1, 1, 1e-10]}
    assert diagnose(keras).causes == {"dead"}
    assert diagnose(keras, epsilon=1e-10).healthy


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
    variables, inner = train(steps=60, momentum=0.99)[0], with_momentum(0.99)
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
