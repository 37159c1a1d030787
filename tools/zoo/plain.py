"""Models written here in plain PyTorch: one for each connection pattern that pruning and patch schedules meet."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .model import BATCH_SIZES, FIXED_IDS, IDS, TEXT_SIZES, VOCAB, Field, Sizes, ZooModel, entry


def conv_bn(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> nn.Sequential:
    """A convolution that keeps the size (up to its stride), and a batch norm."""
    padding = dilation * (kernel - 1) // 2
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two convolutions around a shortcut: identity where shape allows, a projection where it does not."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(inputs, outputs, stride=stride), nn.ReLU(), conv_bn(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(inputs, outputs, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Add the shortcut, then rectify."""
        return torch.relu(self.branch(x) + self.shortcut(x))


class InvertedResidual(nn.Module):
    """Expand, filter each channel by itself, project back without a non-linearity (MobileNetV2)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1, expand: int = 3) -> None:
        super().__init__()
        wide = inputs * expand
        self.branch = nn.Sequential(
            conv_bn(inputs, wide, kernel=1),
            nn.ReLU6(),
            conv_bn(wide, wide, stride=stride, groups=wide),
            nn.ReLU6(),
            conv_bn(wide, outputs, kernel=1),
        )
        self.identity = inputs == outputs and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        """Add the input where the shape did not change."""
        return x + self.branch(x) if self.identity else self.branch(x)


class SqueezeExcite(nn.Module):
    """A residual block that weighs its channels by their means (two linear layers)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(conv_bn(channels, channels), nn.ReLU(), conv_bn(channels, channels))
        self.squeeze = nn.Linear(channels, squeezed)
        self.excite = nn.Linear(squeezed, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Scale the branch channel by channel before the sum."""
        y = self.branch(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean(dim=(2, 3))))))
        return torch.relu(x + y * gate[:, :, None, None])


class Dense(nn.Module):
    """Every layer reads the concatenation of all before it (DenseNet)."""

    def __init__(self, channels: int, growth: int, layers: int) -> None:
        super().__init__()
        widths = [channels + growth * layer for layer in range(layers)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, growth, 3, padding=1)) for width in widths
        )

    def forward(self, x: Tensor) -> Tensor:
        """Append each layer's channels to all before."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Shuffle(nn.Module):
    """Grouped convolutions with a channel shuffle between, so that groups see each other (ShuffleNet)."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.reduce = conv_bn(channels, channels, kernel=1, groups=groups)
        self.filter = conv_bn(channels, channels, groups=channels)
        self.expand = conv_bn(channels, channels, kernel=1, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """Interleave the groups between the grouped convolutions."""
        y = torch.relu(self.reduce(x))
        y = y.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)
        return torch.relu(x + self.expand(self.filter(y)))


class Classifier(nn.Module):
    """A stem, the given body, global average pooling and a linear layer."""

    def __init__(self, body: nn.Module, inputs: int, outputs: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, inputs, stride=2), nn.ReLU())
        self.body = body
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(outputs, classes)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores of an image of any size."""
        return self.head(torch.flatten(self.pool(self.body(self.stem(image))), 1))


class Segmenter(nn.Module):
    """Dilated convolutions: a wide receptive field at full resolution, one prediction for each pixel."""

    def __init__(self, channels: int = 16, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_bn(3, channels), nn.ReLU())
        self.context = nn.ModuleList(conv_bn(channels, channels, dilation=rate) for rate in (1, 2, 4))
        self.head = nn.Conv2d(channels, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        """Class scores of every pixel."""
        x = self.stem(image)
        for layer in self.context:
            x = x + torch.relu(layer(x))
        return self.head(x)


class TextEncoder(nn.Module):
    """`nn.TransformerEncoderLayer`s over token embeddings, mean-pooled."""

    def __init__(self, layers: int, norm_first: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 32)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, activation="gelu", batch_first=True, norm_first=norm_first)
            for _ in range(layers)
        )
        self.head = nn.Linear(32, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Class scores of a sequence."""
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(dim=1))


class Recurrent(nn.Module):
    """Token embeddings through a recurrent layer, a prediction at each step."""

    def __init__(self, cell: type[nn.LSTM] | type[nn.GRU]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 16)
        self.cell = cell(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Class scores at each step."""
        states, _ = self.cell(self.embed(input_ids))
        return self.head(states)


PICTURE = Field("image", ("B", 3, "H", "W"))
PICTURE_SIZES: tuple[Sizes, Sizes, Sizes] = (
    {"B": 2, "H": 32, "W": 40},
    {"B": 1, "H": 40, "W": 32},
    {"B": 3, "H": 27, "W": 51},
)


def network(
    name: str, construct: Callable[[], nn.Module], blocks: tuple[int, ...] | None, identity_blocks: int | None = None
) -> ZooModel:
    """A fully convolutional network: any image size."""
    return entry(name, "plain", construct, (PICTURE,), PICTURE_SIZES, blocks, identity_blocks=identity_blocks)


def text(name: str, construct: Callable[[], nn.Module], blocks: tuple[int, ...] | None) -> ZooModel:
    """A model of token ids."""
    return entry(name, "plain", construct, (IDS,), TEXT_SIZES, blocks)


def recurrent(name: str, cell: type[nn.LSTM] | type[nn.GRU]) -> ZooModel:
    """A recurrent network over a fixed number of steps."""
    note = "the length is fixed: the cell stays one operator, but torch.export guards its length by running the steps"
    return entry(name, "plain", lambda: Recurrent(cell), (FIXED_IDS,), BATCH_SIZES, None, note=note)


def residual() -> nn.Module:
    """Three residual blocks; the second halves the resolution and projects its shortcut."""
    body = nn.Sequential(Residual(16, 16), Residual(16, 24, stride=2), Residual(24, 24))
    return Classifier(body, 16, 24)


def inverted_residual() -> nn.Module:
    """Four inverted residual blocks; the second changes shape and has no shortcut."""
    body = nn.Sequential(
        InvertedResidual(8, 8), InvertedResidual(8, 16, stride=2), InvertedResidual(16, 16), InvertedResidual(16, 16)
    )
    return Classifier(body, 8, 16)


def separable() -> nn.Module:
    """Depthwise and pointwise convolutions in turn, no shortcuts (MobileNetV1)."""

    def layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
        depthwise = conv_bn(inputs, inputs, stride=stride, groups=inputs)
        return nn.Sequential(depthwise, nn.ReLU(), conv_bn(inputs, outputs, kernel=1), nn.ReLU())

    return Classifier(nn.Sequential(layer(8, 16, 1), layer(16, 24, 2), layer(24, 24, 1)), 8, 24)


def dense() -> nn.Module:
    """Two dense blocks with a transition between."""
    transition = nn.Sequential(conv_bn(28, 16, kernel=1), nn.ReLU(), nn.AvgPool2d(2))
    return Classifier(nn.Sequential(Dense(16, 6, 2), transition, Dense(16, 6, 3)), 16, 34)


PLAIN: tuple[ZooModel, ...] = (
    network("plain_resnet", residual, (3,), 2),
    network("plain_separable", separable, None),
    network("plain_inverted_residual", inverted_residual, (4,), 3),
    network("plain_dilated", Segmenter, (3,), 3),
    network("plain_densenet", dense, None),
    network("plain_shuffle", lambda: Classifier(nn.Sequential(Shuffle(16, 4), Shuffle(16, 4)), 16, 16), (2,), 2),
    network(
        "plain_squeeze_excite",
        lambda: Classifier(nn.Sequential(SqueezeExcite(16, 4), SqueezeExcite(16, 4)), 16, 16),
        (2,),
        2,
    ),
    text("plain_transformer", lambda: TextEncoder(3, norm_first=False), (3,)),
    text("plain_transformer_prenorm", lambda: TextEncoder(2, norm_first=True), (2,)),
    recurrent("plain_lstm", nn.LSTM),
    recurrent("plain_gru", nn.GRU),
)
