# SPDX-License-Identifier: Apache-2.0
"""ResNet trunks (He et al., 2015), torchvision's arrangement: the stride of a bottleneck sits on its 3x3 convolution."""

from __future__ import annotations

from torch import Tensor, nn

from pyvseg.layers.conv import fast_conv


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that stays what its checkpoint says: no statistics of the batch, no gradient, no counter.

    Without a checkpoint it is the identity.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.num_batches_tracked = None
        self.running_var -= self.eps
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FrozenBatchNorm2d:
        return super().train(False)


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, bias: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=bias)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=bias)
        self.bn2 = norm(outputs)
        self.downsample = _downsample(inputs, outputs, stride, bias, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y))
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()


class Bottleneck(nn.Module):
    expansion = 4
    activates_input, activates_output = False, True

    def __init__(self, inputs: int, width: int, outputs: int, stride: int, bias: bool, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=bias)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=bias)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=bias)
        self.bn3 = norm(outputs)
        self.downsample = _downsample(inputs, outputs, stride, bias, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x)).relu_()
        y = self.bn2(self.conv2(y)).relu_()
        y = self.bn3(self.conv3(y))
        return y.add_(x if self.downsample is None else self.downsample(x)).relu_()

    def for_inference(self) -> nn.Module:
        """Of a block whose batch norms have been folded."""
        return _FastBottleneck(self)


class _FastBottleneck(nn.Module):
    """Additions and ReLUs inside the convolutions."""

    def __init__(self, block: Bottleneck) -> None:
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (fast_conv(conv) for conv in (block.conv1, block.conv2, block.conv3))
        self.downsample = None if block.downsample is None else fast_conv(block.downsample[0])
        self.activates_input, self.activates_output = block.activates_input, block.activates_output

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu() if self.activates_input else x
        y = self.conv2(self.conv1(x, relu=True), relu=True)
        return self.conv3(y, residual=x if self.downsample is None else self.downsample(x), relu=self.activates_output)


def _downsample(inputs: int, outputs: int, stride: int, bias: bool, norm: type[nn.Module]) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=bias), norm(outputs))


class ResNet(nn.Module):
    """The trunk of a ResNet without its classifier.

    blocks     residual blocks per stage; its length says how many stages there are
    block      `BasicBlock` (ResNet-18/34) or `Bottleneck` (ResNet-50/101)
    inputs     input channels
    bias       whether the convolutions have a bias (the value encoder of STCN does)
    width      inner channels of the first stage; stage i has `width * 2**i`
    stem       channels of the stem, None: `width`
    outputs    channels of the first stage's map, None: `width * block.expansion`; stage i has `outputs * 2**i`
    norm       `nn.BatchNorm2d` or `FrozenBatchNorm2d`
    first_stride   of the first stage
    dilated    the last stage keeps the size of the one before it, its kernels from the second block on are twice as wide (DC5);
               bottlenecks only

    forward takes (B, inputs, H, W) and returns one feature map per stage, at strides 4, 8, 16, ...
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        block: type[nn.Module],
        *,
        inputs: int = 3,
        bias: bool = False,
        width: int = 64,
        stem: int | None = None,
        outputs: int | None = None,
        norm: type[nn.Module] = nn.BatchNorm2d,
        first_stride: int = 1,
        dilated: bool = False,
    ) -> None:
        super().__init__()
        before, outputs = stem or width, outputs or width * block.expansion
        self.conv1 = nn.Conv2d(inputs, before, 7, 2, 3, bias=bias)
        self.bn1 = norm(before)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        self.channels = tuple(outputs * 2**i for i in range(len(blocks)))
        for i, (count, after) in enumerate(zip(blocks, self.channels)):
            wide = dilated and i == len(blocks) - 1
            strides = [1 if j or wide else 2 if i else first_stride for j in range(count)]
            stage = [block(after if j else before, width * 2**i, after, stride, bias, norm) for j, stride in enumerate(strides)]
            for inner in stage[1:] if wide else ():
                inner.conv2.dilation = inner.conv2.padding = (2, 2)
            setattr(self, f"layer{i + 1}", nn.Sequential(*stage))
            before = after

    def stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.bn1(self.conv1(x)).relu_())

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.stem(x)
        features = []
        for i in range(len(self.channels)):
            x = getattr(self, f"layer{i + 1}")(x)
            features.append(x)
        return features
