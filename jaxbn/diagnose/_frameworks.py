"""The frameworks that models come from: their defaults, and their words for a remedy."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Framework:
    """How a framework counts, and what its users write.

    Attributes:
        name: What it is called.
        epsilon: The default of its layers.
        decay: What a training step keeps of the statistics by default.
        argument: The argument that holds it, with {} for the number.
        counts_new: Whether that number is one minus the decay.
        keep: How training keeps the statistics.
        inference: How a layer is trained in inference mode.
        reestimate: How statistics are estimated anew from data.
        synchronize: How devices share their batches.
        pool: How statistics that differ become one.
        widen: How statistics stay in float32.
    """

    name: str
    epsilon: float
    decay: float
    argument: str
    counts_new: bool
    keep: str
    inference: str
    reestimate: str
    synchronize: str
    pool: str
    widen: str

    def told(self, decay: float) -> str:
        """Returns a decay as its users write it."""
        return self.argument.format(f"{1 - decay if self.counts_new else decay:.2g}")

    def as_decay(self, number: float) -> float:
        """Returns the decay of a number that its users gave."""
        return 1 - number if self.counts_new else number


JAX = Framework(
    name="jaxbn and Flax",
    epsilon=1e-5,
    decay=0.99,
    argument="momentum={}",
    counts_new=False,
    keep="Keep the statistics that each training step returns: the second value of "
    "bn.apply, updates['batch_stats'] of model.apply(..., mutable=['batch_stats']), or the "
    "NNX model in train() mode; and evaluate with the latest ones",
    inference="training=False, use_running_average=True or eval()",
    reestimate="reestimate the statistics from training data: jaxbn.reestimate, "
    "jaxbn.linen.reestimate or jaxbn.nnx.reestimate",
    synchronize="synchronize over devices with axis_name, use jaxbn.BatchRenorm",
    pool="Give the layer the axis_name of the devices, so that all track the same, or pool "
    "what they tracked with jaxbn.sync_state before evaluating or saving",
    widen="Keep them out of what casts the model, and cast these to float32 before "
    "training",
)
LINEN = dataclasses.replace(
    JAX,
    name="linen",
    keep="Keep updates['batch_stats'] of model.apply(..., mutable=['batch_stats']) in each "
    "training step, and evaluate with the latest",
    inference="use_running_average=True",
    reestimate="reestimate the statistics from training data: jaxbn.linen.reestimate",
)
NNX = dataclasses.replace(
    JAX,
    name="NNX",
    keep="Call model.train() before training, and let the training step return what "
    "changed in the model, as nnx.jit does",
    inference="model.eval()",
    reestimate="reestimate the statistics from training data: jaxbn.nnx.reestimate",
)
TORCH = Framework(
    name="PyTorch",
    epsilon=1e-5,
    decay=0.9,
    argument="momentum={}",
    counts_new=True,
    keep="Call model.train() before training, and save the state dict after it",
    inference="eval()",
    reestimate="reestimate the statistics from training data: "
    "torch.optim.swa_utils.update_bn(loader, model)",
    synchronize="use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)",
    pool="Use torch.nn.SyncBatchNorm.convert_sync_batchnorm(model), so that all track the "
    "same, or save the model of one replica after update_bn",
    widen="model.half() casts them too: use torch.autocast, or give the norms .float() "
    "before training",
)
TENSORFLOW = Framework(
    name="Keras and TensorFlow",
    epsilon=1e-3,
    decay=0.99,
    argument="momentum={}",
    counts_new=False,
    keep="Call the model with training=True in a training loop of your own; in "
    "TensorFlow 1, run the operations of tf.GraphKeys.UPDATE_OPS with each step",
    inference="training=False or trainable=False",
    reestimate="reestimate the statistics from training data: call the model with "
    "training=True on it for 3 / (1 - momentum) batches, and apply no gradients",
    synchronize="use BatchNormalization(synchronized=True)",
    pool="Use BatchNormalization(synchronized=True), so that all track the same",
    widen="Use the policy mixed_float16 or mixed_bfloat16, which keeps variables in "
    "float32",
)
HAIKU = Framework(
    name="Haiku",
    epsilon=1e-5,
    decay=0.99,
    argument="decay_rate={}",
    counts_new=False,
    keep="Keep the state that the apply function of transform_with_state returns in each "
    "training step with is_training=True, and evaluate with the latest",
    inference="is_training=False",
    reestimate="reestimate the statistics from training data: apply the model with "
    "is_training=True to it for 3 / (1 - decay_rate) batches, and keep the state alone",
    synchronize="use BatchNorm(cross_replica_axis=...)",
    pool="Use BatchNorm(cross_replica_axis=...), so that all track the same",
    widen="Use jmp, whose policy for BatchNorm keeps it in float32",
)


def framework_of(tree: Any, spelling: str, path: tuple[str, ...]) -> Framework:
    """Returns whose layer it is that names its running mean so, at that path of a tree."""
    named = {
        "running_mean": TORCH,
        "moving_mean": TENSORFLOW,
        "mean_ema/average": HAIKU,
    }
    if spelling in named:
        return named[spelling]
    if type(tree).__module__.startswith("flax.nnx"):
        return NNX
    return LINEN if "batch_stats" in path else JAX
