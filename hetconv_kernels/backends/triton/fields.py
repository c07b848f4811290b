# SPDX-License-Identifier: Apache-2.0
"""Places of the fields of the geometry tables, as the kernels read them; `geometry` fills them."""

from __future__ import annotations

import triton.language as tl

from .geometry import GATHER_FIELDS, WGRAD_FIELDS

# Of a class of fprop and dgrad.
_class = GATHER_FIELDS.index
SEGMENTS = tl.constexpr(_class("segments"))  # of filters
HEIGHT = tl.constexpr(_class("height"))  # pixels computed in one image, rows and columns
WIDTH = tl.constexpr(_class("width"))
PIXELS = tl.constexpr(_class("pixels"))  # of all images
LOAD_H = tl.constexpr(_class("load_h"))  # pixel (i, j) reads row base_h + i * load_h + tap * tap_h
LOAD_W = tl.constexpr(_class("load_w"))
BASE_H = tl.constexpr(_class("base_h"))
BASE_W = tl.constexpr(_class("base_w"))
TAP_H = tl.constexpr(_class("tap_h"))
TAP_W = tl.constexpr(_class("tap_w"))
IMAGE_H = tl.constexpr(_class("image_h"))  # of the operand that is read
IMAGE_W = tl.constexpr(_class("image_w"))
X_N = tl.constexpr(_class("x_n"))  # its strides; in units of UNIT but for the channels
X_H = tl.constexpr(_class("x_h"))
X_W = tl.constexpr(_class("x_w"))
X_C = tl.constexpr(_class("x_c"))
STORE_H = tl.constexpr(_class("store_h"))  # and writes row first_h + i * store_h
STORE_W = tl.constexpr(_class("store_w"))
FIRST_H = tl.constexpr(_class("first_h"))
FIRST_W = tl.constexpr(_class("first_w"))
Y_N = tl.constexpr(_class("y_n"))  # strides of the result, in units of ROW_UNIT but for the filters
Y_H = tl.constexpr(_class("y_h"))
Y_W = tl.constexpr(_class("y_w"))
Y_C = tl.constexpr(_class("y_c"))
CHANNELS = tl.constexpr(_class("channels"))  # of the operand that is read, in units of UNIT
TAPS = tl.constexpr(_class("taps"))  # the longer edge of the kernel within this class
LISTS = tl.constexpr(_class("lists"))  # of boxes: where its tiles' lists are found, see `borders`
CLASS_FIELDS = tl.constexpr(len(GATHER_FIELDS))

# Of wgrad.
_wgrad = WGRAD_FIELDS.index
WGRAD_HEIGHT = tl.constexpr(_wgrad("height"))  # of y, in pixels
WGRAD_WIDTH = tl.constexpr(_wgrad("width"))
WGRAD_PIXELS = tl.constexpr(_wgrad("pixels"))  # of all images
WGRAD_SPLIT = tl.constexpr(_wgrad("split"))  # pixels of one split, a multiple of BP
WGRAD_STRIDE_H = tl.constexpr(_wgrad("stride_h"))
WGRAD_STRIDE_W = tl.constexpr(_wgrad("stride_w"))
WGRAD_PAD_H = tl.constexpr(_wgrad("pad_h"))
WGRAD_PAD_W = tl.constexpr(_wgrad("pad_w"))
WGRAD_DILATION_H = tl.constexpr(_wgrad("dilation_h"))
WGRAD_DILATION_W = tl.constexpr(_wgrad("dilation_w"))
WGRAD_IMAGE_H = tl.constexpr(_wgrad("image_h"))  # of x
WGRAD_IMAGE_W = tl.constexpr(_wgrad("image_w"))
WGRAD_X_N = tl.constexpr(_wgrad("x_n"))  # strides in units of UNIT, but for the channels
WGRAD_X_H = tl.constexpr(_wgrad("x_h"))
WGRAD_X_W = tl.constexpr(_wgrad("x_w"))
WGRAD_X_C = tl.constexpr(_wgrad("x_c"))
WGRAD_Y_N = tl.constexpr(_wgrad("y_n"))  # strides in units of ROW_UNIT, but for the filters
WGRAD_Y_H = tl.constexpr(_wgrad("y_h"))
WGRAD_Y_W = tl.constexpr(_wgrad("y_w"))
WGRAD_Y_C = tl.constexpr(_wgrad("y_c"))
WGRAD_CHANNELS = tl.constexpr(_wgrad("channels"))  # in units
WGRAD_FILTERS = tl.constexpr(_wgrad("filters"))
WGRAD_PARTIAL = tl.constexpr(_wgrad("partial"))  # float32 values of one split, of all launches
WGRAD_FIRST = tl.constexpr(_wgrad("first"))  # those before this launch's
