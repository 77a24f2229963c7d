"""The nets that are timed, written once for the layers of every peer.

A net is a function of `net`, which has `conv`, `dense` and `norm`, and of x; it returns
features, of which the training step takes the mean over all but the first and last axis.
"""

import jax
import jax.numpy as jnp

RESNET_STAGES = ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2))
# Expansion, features, depth, stride and kernel of the stages of EfficientNet-B0.
EFFICIENTNET_STAGES = (
    (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3),
)  # fmt: skip
UNET_FEATURES = (32, 64, 128, 256)


def _small_net(net, x):
    for _ in range(4):
        x = net.norm(net.conv(x, 32, 3))
    return x


def _resnet50(net, x):
    x = net.norm(net.conv(x, 64, 7, 2))
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    for features, depth, first_stride in RESNET_STAGES:
        for number in range(depth):
            stride = 1 if number else first_stride
            y = net.norm(net.conv(x, features, 1))
            y = net.norm(net.conv(y, features, 3, stride))
            y = net.conv(y, 4 * features, 1)
            if not number:
                x = net.norm(net.conv(x, 4 * features, 1, stride), relu=False)
            x = net.norm(y, residual=x)
    return x


def _efficientnet(net, x):
    x = jax.nn.silu(net.norm(net.conv(x, 32, 3, 2), relu=False))
    for expansion, features, depth, first_stride, size in EFFICIENTNET_STAGES:
        for number in range(depth):
            stride, wide, y = first_stride, x.shape[-1] * expansion, x
            if expansion > 1:
                y = jax.nn.silu(net.norm(net.conv(y, wide, 1), relu=False))
            y = net.conv(y, wide, size, 1 if number else stride, groups=wide)
            y = jax.nn.silu(net.norm(y, relu=False))
            squeezed = jax.nn.silu(net.dense(y.mean((1, 2)), max(x.shape[-1] // 4, 1)))
            y = y * jax.nn.sigmoid(net.dense(squeezed, wide))[:, None, None]
            y = net.norm(net.conv(y, features, 1), relu=False)
            x = x + y if number else y
    return jax.nn.silu(net.norm(net.conv(x, 1280, 1), relu=False))


def _unet(net, x):
    kept = []
    for features in UNET_FEATURES:
        if kept:
            x = x[:, ::2, ::2]
        x = net.norm(net.conv(net.norm(net.conv(x, features, 3)), features, 3))
        kept.append(x)
    for skipped in reversed(kept[:-1]):
        x = jax.image.resize(x, (*skipped.shape[:3], x.shape[-1]), "nearest")
        x = jnp.concatenate([x, skipped], -1)
        features = skipped.shape[-1]
        x = net.norm(net.conv(net.norm(net.conv(x, features, 3)), features, 3))
    return x


def _dcgan(net, x):
    """A generator and, on what it draws, a discriminator; x is the noise, of 4x4."""
    for features in (256, 128, 64, 32):
        x = net.norm(net.conv(x, features, 3))
        x = jax.image.resize(
            x, (x.shape[0], 2 * x.shape[1], 2 * x.shape[2], features), "nearest"
        )
    x = jnp.tanh(net.conv(x, 3, 3))
    for number, features in enumerate((32, 64, 128, 256)):
        x = net.conv(x, features, 5, 2)
        x = jax.nn.leaky_relu(net.norm(x, relu=False) if number else x, 0.2)
    return x


def _pointnet(net, x):
    """Clouds of points, the last quarter of each of which is padding."""
    present = jnp.arange(x.shape[1]) < x.shape[1] * 3 // 4
    mask = jnp.broadcast_to(present, x.shape[:2])
    for features in (64, 64, 64, 128, 1024):
        x = net.norm(net.dense(x, features), mask=mask)
    x = jnp.where(mask[..., None], x, jnp.zeros_like(x)).max(1)
    for features in (512, 256):
        x = net.norm(net.dense(x, features))
    return x


ARCHITECTURES = {
    "small net": _small_net,
    "ResNet-50": _resnet50,
    "EfficientNet-B0": _efficientnet,
    "U-Net": _unet,
    "DCGAN": _dcgan,
    "PointNet": _pointnet,
}
