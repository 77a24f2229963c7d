"""Runs the cases that were recorded from TensorFlow 1.15.5, in `jaxbn.tf1`."""

import jax

from tests.golden_runners.tf1_documents import run_handwritten, run_network
from tests.golden_runners.tf1_functions import (
    run_average,
    run_dropout,
    run_moments,
    run_normalization,
)
from tests.golden_runners.tf1_layers import LAYERS, TWICE, run_layer, run_shared

RUNNERS = {
    **dict.fromkeys(LAYERS, run_layer),
    **{f"{api}{TWICE}": run_shared for api in LAYERS},
    "tf.nn.moments": run_moments,
    "tf.nn.weighted_moments": run_moments,
    "tf.nn.sufficient_statistics": run_moments,
    "tf.nn.batch_normalization": run_normalization,
    "tf.nn.fused_batch_norm": run_normalization,
    "tf.train.ExponentialMovingAverage": run_average,
    "moving_averages.assign_moving_average": run_average,
    "tf.nn.dropout": run_dropout,
    "hand-written bn layer of document 002": run_handwritten,
    "hand-written bn layer of document 003": run_handwritten,
    "network of document 000": run_network,
}


def run(case):
    """Runs every step of a case; an interface that is not known is an error."""
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", case.meta["dtype"] == "float64")
    try:
        RUNNERS[case.meta["api"]](case)
    finally:
        jax.config.update("jax_enable_x64", before)
