# SPDX-License-Identifier: Apache-2.0
"""Layers of well-known networks, as data: where a user would put a structured-sparse convolution.

Each is (images, channels, filters, height, width, kernel edge, stride). Images are as many as a
two-core machine computes in some tens of milliseconds.
"""

from __future__ import annotations

LayerShape = tuple[int, int, int, int, int, int, int]

NETWORK_SHAPES: dict[str, LayerShape] = {
    # VGG-16 at 224², arXiv 1409.1556
    "vgg-conv1_2": (1, 64, 64, 224, 224, 3, 1),
    "vgg-conv2_1": (1, 64, 128, 112, 112, 3, 1),
    "vgg-conv2_2": (1, 128, 128, 112, 112, 3, 1),
    "vgg-conv3_1": (1, 128, 256, 56, 56, 3, 1),
    "vgg-conv3_2": (1, 256, 256, 56, 56, 3, 1),
    "vgg-conv4_1": (1, 256, 512, 28, 28, 3, 1),
    "vgg-conv4_2": (1, 512, 512, 28, 28, 3, 1),
    "vgg-conv5": (1, 512, 512, 14, 14, 3, 1),
    # ResNet-50 at 224², arXiv 1512.03385: the strided ones; the others are in the speed table
    "resnet-conv3s2": (8, 128, 128, 56, 56, 3, 2),
    "resnet-conv4s2": (8, 256, 256, 28, 28, 3, 2),
    "resnet-conv5s2": (8, 512, 512, 14, 14, 3, 2),
    # DenseNet-121 at 224², arXiv 1608.06993: each layer makes 32 maps of 128
    "densenet-block1": (8, 128, 32, 56, 56, 3, 1),
    "densenet-block2": (8, 128, 32, 28, 28, 3, 1),
    "densenet-block3": (8, 128, 32, 14, 14, 3, 1),
    "densenet-block4": (8, 128, 32, 7, 7, 3, 1),
    # U-Net at 256², arXiv 1505.04597, with padding
    "unet-enc1": (1, 64, 64, 256, 256, 3, 1),
    "unet-enc3": (1, 256, 256, 64, 64, 3, 1),
    "unet-bottom": (1, 1024, 1024, 16, 16, 3, 1),
    "unet-dec4": (1, 1024, 512, 32, 32, 3, 1),
    "unet-dec1": (1, 128, 64, 256, 256, 3, 1),
    # DnCNN, arXiv 1608.03981: a training patch batch, and a photograph of BSD68
    "dncnn-patch": (8, 64, 64, 40, 40, 3, 1),
    "dncnn-photo": (1, 64, 64, 321, 481, 3, 1),
    # Detection: the heads of RetinaNet on an 800×1333 image, arXiv 1708.02002
    "fpn-p3": (1, 256, 256, 100, 167, 3, 1),
    "fpn-p4": (1, 256, 256, 50, 84, 3, 1),
    "fpn-p5": (1, 256, 256, 25, 42, 3, 1),
    "fpn-p6": (1, 256, 256, 13, 21, 3, 1),
    "fpn-p7": (1, 256, 256, 7, 11, 3, 1),
    # the backbones of SSD300, arXiv 1512.02325, and of YOLOv3 at 416², arXiv 1804.02767
    "ssd-conv4_3": (1, 512, 512, 38, 38, 3, 1),
    "yolo-52": (1, 128, 256, 52, 52, 3, 1),
    "yolo-26": (1, 256, 512, 26, 26, 3, 1),
    "yolo-13": (1, 512, 1024, 13, 13, 3, 1),
}
# Sizes and counts that no tile divides.
ODD_SHAPES: dict[str, LayerShape] = {
    "odd-65x67": (2, 65, 67, 31, 33, 3, 1),
    "odd-97": (8, 97, 97, 27, 29, 3, 1),
    "odd-33x65s2": (8, 33, 65, 37, 41, 3, 2),
    "odd-61k5": (4, 61, 61, 19, 23, 5, 1),
    "odd-130k7": (4, 130, 70, 15, 17, 7, 1),
}
# Also self-grouped, beside HetConv of p = 4, which all are.
SELF_GROUPED = ("vgg-conv1_2", "vgg-conv3_2", "vgg-conv5", "resnet-conv4s2", "fpn-p4", "unet-enc1")

# Names of the cases of the default run, one of each kind: the whole of it stays below two minutes.
_QUICK = {
    "8x64x56-het4",
    "8x128x28-het4",
    "8x128x28-het128",
    "8x128x28-sg70",
    "8x128x28-sg90",
    "1x128x28-het4",
    "8x128x28-het4-training",
    "8x128x28-het4-amp",
    "8x256x14-k1-sg90",
    "8x128x28-dense",
    "lose-tiny",
    "lose-irregular-50",
    "hetconv-3",
    "condensenet-3",
    "pytorch-43544",
    "densenet-block2-het4",
    "unet-enc3-het4",
    "dncnn-patch-het4",
    "fpn-p5-het4",
    "odd-97-het4",
}
