"""What a layer is to the kernels, and how they cut it up: sizes alone, no library (kernels/ticketkit.h has the same structs)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ConvShape:
    """Geometry of a convolution, in the order of `tk_conv2d`; sizes in pixels. `groups` is 1, or all channels: depthwise.

    The layouts, of x and of output and residual, are "planes", C order, or "csr" and "bsr", tiles of `tile_pixels` (tk_layout).
    """

    in_channels: int
    in_h: int
    in_w: int
    out_channels: int
    kernel_h: int
    kernel_w: int
    stride_h: int = 1
    stride_w: int = 1
    pad_top: int = 0
    pad_left: int = 0
    pad_bottom: int = 0
    pad_right: int = 0
    dilation_h: int = 1
    dilation_w: int = 1
    groups: int = 1
    x_layout: str = "planes"
    y_layout: str = "planes"

    @property
    def cols(self) -> int:
        """Columns of the weight as a matrix."""
        return self.in_channels // max(self.groups, 1) * self.kernel_h * self.kernel_w

    @property
    def out_h(self) -> int:
        return (self.in_h + self.pad_top + self.pad_bottom - self.dilation_h * (self.kernel_h - 1) - 1) // self.stride_h + 1

    @property
    def out_w(self) -> int:
        return (self.in_w + self.pad_left + self.pad_right - self.dilation_w * (self.kernel_w - 1) - 1) // self.stride_w + 1


@dataclass(frozen=True)
class Tuning:
    """How a convolution is cut up (`tk_tuning`): vectors of pixels per tile (1 … 20), input channels per block, and tiles gathered at
    once; 0 leaves the choice to the library."""

    tile_vectors: int = 0
    block_channels: int = 0
    group_tiles: int = 0


@dataclass(frozen=True)
class Vectors:
    """What of an instruction set decides how layers are cut up: `tk_vectors` of kernels/ticketkit.h."""

    lanes: int
    registers: int
    tile: int
    good_tile: int
    block_tile: int
    reads_planes: int
    value_bytes: int


@dataclass(frozen=True)
class Cut:
    """How a layer would be cut up on some processor, in counts: `tk_cut` of kernels/ticketkit.h, where each is explained."""

    tiles: int
    tile_vectors: int
    vectors: int
    units: int
    blocks: int
    block_channels: int
    group_tiles: int
    strips: int
    window: int
    filled: int
    pieces: int
    waiting: int
    spans: int
    taps: int
    misaligned_taps: int
    pitch: int
    in_place: int
