"""What every script of this project needs and no paper is about, in six rooms: patches, a vision
transformer, weights in and out, images, a run, and the command line. To use a script elsewhere, copy it
together with this file.

Letters in shapes: B images in a batch, C channels, H×W pixels, P patch size, h×w grid of patches, N = h·w
patches, n visible patches, T tokens, D width of the encoder, d width of the decoder, M images in a dataset.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from datetime import timedelta

# Threads that wait for work spin, and so starve other programs on a busy machine. A short spin keeps the
# speed of a machine left alone and nearly doubles that of a busy one. It counts only if it is set before
# torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont                           # Pillow comes with torchvision
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2


class UserError(ValueError):
    """Something the user can mend: on the command line it becomes one line, without a traceback."""


# -------------------------------------------------------------------------------------------------- patches

def to_pair(size):
    """224 → (224, 224), and [96, 160] → (96, 160): height, then width."""
    if isinstance(size, int):
        return size, size
    return (size[0], size[-1])


def patch_grid(img_size, patch_size):
    """Image size in pixels → (rows, columns) of patches. Raises UserError if the patches do not fit."""
    height, width = to_pair(img_size)
    if height % patch_size or width % patch_size:
        raise UserError(f"{height}×{width} pixels do not divide into patches of {patch_size}×{patch_size}")
    return height // patch_size, width // patch_size


def patchify(images, patch_size):
    """images (B, C, H, W) → patches (B, N, P·P·C), row by row; within a patch the order is row, column,
    channel. Any number of channels, square or not. Raises UserError if the patches do not fit."""
    h, w = patch_grid(images.shape[2:], patch_size)
    x = images.unflatten(3, (w, patch_size)).unflatten(2, (h, patch_size))  # (B, C, h, P, w, P)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches, patch_size, img_size):
    """patches (B, N, P·P·C) → images (B, C, H, W): the inverse of `patchify`. img_size: side or (height,
    width)."""
    x = patches.unflatten(2, (patch_size, patch_size, -1))
    x = x.unflatten(1, patch_grid(img_size, patch_size))              # (B, h, w, P, P, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(dim, grid):
    """The fixed two-dimensional sine-cosine table (N, dim) for a grid (rows, columns), as in MAE's code:
    the first half of the numbers encodes the column, the second the row. Raises UserError if dim is not a
    multiple of 4."""
    if dim % 4:
        raise UserError(f"sine-cosine positions need a width that is a multiple of 4, not {dim}")
    # Each half holds sin(place · f), then cos(place · f), for dim/4 frequencies f from 1 down to about
    # 1/10000. Nearby places differ in the fast waves, distant ones in the slow waves.
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, column = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).T
    waves = []
    for place in (column, row):
        angles = place[:, None] * frequencies                         # (N, dim/4)
        waves += [angles.sin(), angles.cos()]
    return torch.cat(waves, dim=1).float()


def gather_tokens(tokens, ids):
    """tokens (B, N, D), ids (B, n) → (B, n, D): the tokens with these numbers, chosen separately for each
    image."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------- transformer

def vit_size(embed_dim, depth, num_heads, patch_size=16):
    return dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, patch_size=patch_size)


VITS = {
    "nano": vit_size(128, 4, 4, patch_size=8),                        # for a laptop's CPU [not in the paper]
    "light": vit_size(384, 4, 6),                           # MRA's augmentor; its width is [not in the paper]
    "tiny": vit_size(192, 12, 3),
    "small": vit_size(384, 12, 6),
    "base": vit_size(768, 12, 12),                                    # the papers' ViT-B, ViT-L and ViT-H
    "large": vit_size(1024, 24, 16),
    "huge": vit_size(1280, 32, 16, patch_size=14),
}


class Attention(nn.Module):
    """Multi-head self-attention, x (B, T, D) → (B, T, D). Raises UserError if the heads do not divide the
    width."""

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        if embed_dim % num_heads:
            raise UserError(f"a width of {embed_dim} cannot be divided into {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def project(self, x):
        """x (B, T, D) → queries, keys and values, each (B, heads, T, D/heads)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        # One fused kernel (FlashAttention where the GPU has it): the T×T weights never exist in memory.
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def weights(self, x):
        """x (B, T, D) → (B, heads, T, T): how much each token attends to each other one. Every row sums to
        1. For looking at attention; `forward` never computes it."""
        q, k, _ = self.project(x)
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        return scores.softmax(dim=-1)


class Block(nn.Module):
    """A pre-norm transformer block, x (B, T, D) → (B, T, D): attention mixes tokens, the MLP works on each
    alone."""

    def __init__(self, embed_dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(embed_dim, 4 * embed_dim),
            act=nn.GELU(),
            fc2=nn.Linear(4 * embed_dim, embed_dim),
        ))
        # In training, skip a whole branch for some of the images: a regulariser for fine-tuning (stochastic
        # depth).
        self.drop_path = torchvision.ops.StochasticDepth(drop_path, "row")

    def forward(self, x):
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def init_weights(module):
    """MAE's initialisation: Xavier-uniform for linear layers, the patch projection seen as one; biases are
    zero."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)


def fixed_positions(dim, grid):
    """→ a table (1, 1+N, dim) that is not trained. Its first row belongs to the class token and is zero."""
    table = torch.cat([torch.zeros(1, dim), sincos_positions(dim, grid)])
    return nn.Parameter(table[None], requires_grad=False)


class ViT(nn.Module):
    """A vision transformer, split where a masked autoencoder needs it: `embed` turns every patch into a
    token, `encode` runs the blocks over whichever tokens are left. Argument and parameter names are timm's.

    vit(images (B, C, H, W)) → features (B, D), or logits (B, num_classes). The feature is the class token
    (global_pool="token") or the mean of the patch tokens ("avg"). Raises UserError if sizes do not divide.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, num_classes=0, embed_dim=768, depth=12,
                 num_heads=12, drop_path_rate=0.0, global_pool="token"):
        super().__init__()
        # What it takes to build this model again. Checkpoints keep it as args["vit"]; timm takes it as it is.
        self.config = dict(
            img_size=to_pair(img_size), patch_size=patch_size, in_chans=in_chans, num_classes=num_classes,
            embed_dim=embed_dim, depth=depth, num_heads=num_heads, drop_path_rate=drop_path_rate,
            global_pool=global_pool)
        for name, value in self.config.items():
            setattr(self, name, value)                                # self.patch_size and so on
        self.grid = patch_grid(img_size, patch_size)

        projection = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = fixed_positions(embed_dim, self.grid)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()     # deeper blocks are skipped more often
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, rate) for rate in rates))

        # With the mean of the patch tokens the last norm comes after the mean, under another name (as in
        # MAE's code).
        norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.norm = norm if global_pool == "token" else nn.Identity()
        self.fc_norm = norm if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def embed(self, images):
        """images (B, C, H, W) → tokens (B, N, D), one a patch, with its position; no class token yet."""
        x = self.patch_embed["proj"](images)                          # (B, D, h, w)
        return x.flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]

    def add_class_token(self, tokens):
        """tokens (B, n, D) → (B, 1+n, D): the class token comes first."""
        class_token = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([class_token.expand(tokens.shape[0], -1, -1), tokens], dim=1)

    def encode(self, tokens):
        """tokens (B, n, D), any subset of the patches → (B, 1+n, D), the class token first."""
        return self.norm(self.blocks(self.add_class_token(tokens)))

    def forward(self, images):
        x = self.encode(self.embed(images))
        x = x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(dim=1)
        return self.head(self.fc_norm(x))

    def attention_map(self, images):
        """images (B, C, H, W) → (B, heads, N): how much the class token attends to each patch in the last
        block."""
        x = self.add_class_token(self.embed(images))
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.weights(last.norm1(x))[:, :, 0, 1:]

    def feature_map(self, images, last=1):
        """images (B, C, H, W) → (B, last·D, h, w) for dense tasks: the patch tokens of the last blocks,
        each after the final norm, stacked along the channels."""
        x = self.add_class_token(self.embed(images))
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(self.norm(x)[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        return torch.cat(maps[-last:], dim=1)


class Decoder(nn.Module):
    """MAE's light decoder (section 3), with the parameter names of the released files. Grid, patch size,
    channels and input width come from the encoder.

    decoder(latent (B, 1+n, D), ids_restore (B, N)) → predicted patches (B, N, P·P·C).
    """

    def __init__(self, encoder, embed_dim=512, depth=8, num_heads=16):
        super().__init__()
        # Checkpoints keep this as args["decoder"].
        self.config = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        self.decoder_embed = nn.Linear(encoder.embed_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.decoder_pos_embed = fixed_positions(embed_dim, encoder.grid)
        self.decoder_blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, encoder.patch_size ** 2 * encoder.in_chans)
        self.apply(init_weights)

    def forward(self, latent, ids_restore):
        x = self.decoder_embed(latent)                                # (B, 1+n, d)

        # One learned mask token, copied, stands in for every hidden patch. The visible tokens come first,
        # the mask tokens after them; ids_restore then moves each to the place in the image that it belongs
        # to.
        hidden = ids_restore.shape[1] - (x.shape[1] - 1)
        mask_tokens = self.mask_token.expand(x.shape[0], hidden, -1).to(x.dtype)
        patches = torch.cat([x[:, 1:], mask_tokens], dim=1)           # (B, N, d) in shuffled order
        patches = gather_tokens(patches, ids_restore)                 # (B, N, d) in the image's order

        # Positions tell the mask tokens, which are all alike, what to predict.
        x = torch.cat([x[:, :1], patches], dim=1) + self.decoder_pos_embed  # (B, 1+N, d)
        x = self.decoder_norm(self.decoder_blocks(x))
        return self.decoder_pred(x[:, 1:])                            # (B, N, P·P·C)


# --------------------------------------------------------------------------------------- weights in and out

def read_checkpoint(path):
    """→ the dictionary in a checkpoint file, on the CPU. Nothing in a file can run code (`weights_only`).
    Raises UserError if the file is missing, damaged or something else."""
    if not os.path.isfile(path):                                      # a pipe or a device would never end
        raise UserError(f"there is no checkpoint file {path!r}")
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's release keeps its options in one
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UserError(f"{path} is damaged or not a checkpoint: {type(error).__name__}: {str(error)[:80]}")


RENAMES = [            # Hugging Face's parameter names, in files and in newer classes → timm's, in this order
    (r"^((module|model|backbone|vit)\.)+", ""),
    (r"^decoder\.(?=decoder_|mask_token)", ""),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"^decoder_layers\.", "decoder_blocks."),
    (r"attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.", r"attn.\2."),
    (r"attention\.(output\.dense|o_proj)", "attn.proj"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"\.output\.dense", ".mlp.fc2"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm", "norm"),
    (r"^classifier", "head"),
]


def read_weights(path, part):
    """→ the tensors of a checkpoint's "encoder" or "decoder" under timm's names, and its options, {} if it
    has none."""
    loaded = read_checkpoint(path)
    args = loaded.get("args", {})
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    state = loaded
    for key in ("state_dict", "model", part):
        if key in loaded:
            state = loaded[key]

    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if torch.is_tensor(tensor):
            renamed[name] = tensor

    # Hugging Face keeps queries, keys and values in three layers; timm stacks them into one.
    for name in [name for name in renamed if ".attn.q." in name]:
        parts = [renamed.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return renamed, args


def count_blocks(state, prefix):
    """→ how many transformer blocks have names that begin with prefix."""
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def stored_grid(table, guess):
    """→ the (rows, columns) of patches that a position table (1, 1+N, D) was made for. A fixed sine-cosine
    table says so itself: 144 places may be 12×12 or 9×16. A learned one is of the guess, if that has N
    places, or else square. Raises UserError if it cannot be square either."""
    places, dim = table.shape[1] - 1, table.shape[2]
    grids = [(rows, places // rows) for rows in range(1, places + 1) if places % rows == 0]
    for grid in grids:
        if dim % 4 == 0:
            fixed = sincos_positions(dim, grid)
            if torch.allclose(fixed, table[0, 1:].float(), atol=1e-4):
                return grid
    side = math.isqrt(places)
    for grid in (guess, (side, side)):
        if grid in grids:
            return grid
    raise UserError(f"{places} positions are not of a square image: give img_size=(height, width)")


def resize_positions(table, source, grid):
    """A position table (1, 1+N, D) for another grid, by bicubic interpolation, as MAE does for larger
    images."""
    if source == grid:
        return table
    print(f"positions resized from {source} to {grid} patches", flush=True)
    places = table[:, 1:].float().transpose(1, 2).unflatten(2, source)  # (1, D, rows, columns)
    places = F.interpolate(places, grid, mode="bicubic")
    return torch.cat([table[:, :1], places.flatten(2).transpose(1, 2)], dim=1)


def fill(module, state, path, optional=()):
    """Copies tensors into a module and prints what is left over. Only parameters whose names begin with
    `optional` may be missing. Raises UserError if others are, or if weights are not finite numbers."""
    wanted = module.state_dict()
    fitting = {}
    for name, tensor in state.items():
        if name in wanted and tensor.shape == wanted[name].shape:
            if not tensor.is_floating_point() or not tensor.isfinite().all():
                raise UserError(f"{path}: {name} holds something else than finite numbers")
            fitting[name] = tensor
    missing = [name for name in wanted if name not in fitting]
    unused = [name for name in state if name not in fitting]
    if not all(name.startswith(optional) for name in missing):
        raise UserError(f"{path} does not fit this model: missing or of another shape are {missing[:4]}")
    module.load_state_dict(fitting, strict=False)
    notes = f"; new: {', '.join(missing)}" if missing else ""
    notes += f"; not used: {', '.join(unused[:4])} …" if unused else ""
    print(f"loaded {len(fitting)} tensors from {path}{notes}", flush=True)


def load_encoder(path, **overrides):
    """→ a ViT built from what a file holds: a checkpoint of this project, of MAE's release (pre-trained or
    fine-tuned), of timm or of Hugging Face (ViTMAE, ViT). Any argument of `ViT` can be given instead; for
    another img_size the positions are resized. A fine-tuned file gives the whole classifier, head included.

    The ViT also has `classes` (names), `mean` and `std` (of its images, in pixel values 0 … 255), or None
    where the file does not say. Raises UserError if there is no such encoder in the file, or it does not
    fit the overrides.
    """
    state, args = read_weights(path, "encoder")
    if "patch_embed.proj.weight" not in state or "pos_embed" not in state:
        raise UserError(f"{path} has no encoder of this project, MAE's release, timm or Hugging Face")

    # Sizes come from the tensors themselves; the file's options are only asked for what tensors do not show.
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    depth = count_blocks(state, "blocks.")
    num_heads = max(1, embed_dim // 64)
    for size in VITS.values():
        if size["embed_dim"] == embed_dim and size["depth"] == depth:
            num_heads = size["num_heads"]
    saved = args.get("vit", {})
    height, width = to_pair(overrides.get("img_size") or saved.get("img_size", 0))
    grid = stored_grid(state["pos_embed"], (height // patch_size, width // patch_size))
    config = dict(
        img_size=(grid[0] * patch_size, grid[1] * patch_size),
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=len(state.get("head.weight", ())),
        embed_dim=embed_dim,
        depth=depth,
        num_heads=saved.get("num_heads", num_heads),
        global_pool="avg" if "fc_norm.weight" in state else "token",
    )
    encoder = ViT(**(config | overrides))
    state["pos_embed"] = resize_positions(state["pos_embed"], grid, encoder.grid)
    fill(encoder, state, path, optional=("head.", "norm.", "fc_norm."))
    encoder.classes, encoder.mean, encoder.std = args.get("classes"), args.get("mean"), args.get("std")
    return encoder


def load_decoder(path, encoder, **overrides):
    """→ the Decoder in a file, for the encoder from the same file. Any argument of `Decoder` can be given
    instead: most files do not say num_heads, which is then 16. Raises UserError if there is no decoder in
    it, or it does not fit."""
    state, args = read_weights(path, "decoder")
    if "decoder_embed.weight" not in state:
        raise UserError(f"{path} has no decoder: only files of pre-training have one")
    config = dict(
        embed_dim=len(state["decoder_embed.weight"]),
        depth=count_blocks(state, "decoder_blocks."),
        num_heads=args.get("decoder", {}).get("num_heads", 16),
    )
    decoder = Decoder(encoder, **(config | overrides))
    table = state["decoder_pos_embed"]
    state["decoder_pos_embed"] = resize_positions(table, stored_grid(table, encoder.grid), encoder.grid)
    fill(decoder, state, path)
    return decoder


# --------------------------------------------------------------------------------------------------- images
# A dataset is anything with __len__ and __getitem__(i) → (uint8 image (C, H, W), label). If it also has
# `targets` (all labels), `classes` (their names), `mean` and `std` (a number a channel, in pixel values 0 …
# 255), these are used.

def box(x, y, a, b):
    """Below zero inside a rectangle with half sides a and b."""
    return torch.maximum(x.abs() - a, y.abs() - b)


def star(x, y):
    """Below zero inside a star: on the inner side of at least four of its five lines."""
    sides = [math.sin(angle) * x + math.cos(angle) * y for angle in (0, 1.257, 2.513, 3.770, 5.027)]
    return torch.stack(sides).topk(2, dim=0).values[1] - 0.36


SHAPES = {                              # below zero inside the shape, in units of its radius, y pointing down
    "disc": lambda x, y: torch.hypot(x, y) - 0.82,
    "square": lambda x, y: box(x, y, 0.74, 0.74),
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.54,
    "star": star,
    "cross": lambda x, y: torch.minimum(box(x, y, 0.3, 0.95), box(x, y, 0.95, 0.3)),
    "ring": lambda x, y: (torch.hypot(x, y) - 0.66).abs() - 0.21,
    "crescent": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.95, 0.7 - torch.hypot(x - 0.48, y)),
    "heart": lambda x, y: torch.minimum(
        0.707 * (x.abs() + y.abs()), torch.hypot(x.abs() - 0.4, y + 0.4)) - 0.57,
    "arrow": lambda x, y: torch.minimum(
        torch.maximum(y - 0.1, 0.71 * (x.abs() - y) - 0.66), box(x, y - 0.4, 0.28, 0.5)),
    "bowtie": lambda x, y: torch.maximum(0.78 * (y.abs() - 0.8 * x.abs()) - 0.08, x.abs() - 0.88),
}


def draw_scenes(ids, size=64, seed=0):
    """Scenes number ids (B,) → images uint8 (B, 3, size, size), labels (B,) = ids mod 10, foreground masks
    bool (B, size, size). One of ten shapes in any colour, texture, size, tilt (±30°) and place, over slow
    waves of colour and thin stray lines. A scene depends on (seed, id, size) alone."""
    label = ids % 10
    # 64 random numbers for each scene, taken one after another by rand(): (B, 1, 1) each.
    numbers = [np.random.default_rng([seed, i]).random(64, np.float32) for i in ids.tolist()]
    numbers = iter(torch.from_numpy(np.stack(numbers, axis=1))[..., None, None])

    def rand(low=0.0, high=1.0):
        return low + (high - low) * next(numbers)

    def colour(low=0.0, high=1.0):
        return torch.stack([rand(low, high) for _ in range(3)], dim=1)  # (B, 3, 1, 1)

    def wave(x, y, low, high):
        """A sine wave in a random direction, with low to high periods in the width of the image."""
        turn = rand(0, 6.283)
        periods = 6.283 * rand(low, high)
        return torch.sin(x * (periods * turn.cos()) + (y * (periods * turn.sin()) + rand(0, 6.283)))

    # The background: a colour with two waves, and four stray lines that have nothing to do with the label.
    X = ((torch.arange(size) + 0.5 - size / 2) / size)[None]          # (1, size), from −1/2 to 1/2
    Y = X.T
    background = colour(0.1, 0.9)
    image = background + (wave(X, Y, 0.3, 1.0) + wave(X, Y, 0.3, 1.0))[:, None] * colour(-0.1, 0.1)
    for _ in range(4):
        turn, shift, thickness = rand(0, 3.1416), rand(-0.45, 0.45), rand(0.006, 0.014)
        distance = (X * turn.cos() + (Y * turn.sin() - shift)).abs_()
        opacity = distance.mul_(-size).add_(thickness * size + 0.5).clamp_(0, 1)
        image.lerp_(colour(), opacity[:, None])

    # The object in coordinates of its own: moved, turned and scaled, so that every shape function sees
    # radius 1.
    radius, turn = rand(0.3, 0.42), rand(-0.52, 0.52)
    x = X + rand(-1, 1) * (0.5 - 0.9 * radius)
    y = Y + rand(-1, 1) * (0.5 - 0.9 * radius)
    cos, sin = turn.cos() / radius, turn.sin() / radius
    x, y = x * cos + y * sin, y * cos - x * sin                       # (B, size, size)
    distance = torch.empty_like(x)
    for k, shape in enumerate(SHAPES.values()):
        distance[label == k] = shape(x[label == k], y[label == k])
    opacity = distance.mul_(-size * radius).add_(0.5).clamp_(0, 1)    # the border is one pixel soft

    # Its colour is clearly lighter or darker than the background, so that it can be seen.
    brightness = background.mean(dim=1, keepdim=True)
    tint = colour()
    tint = 0.8 * (tint - tint.mean(dim=1, keepdim=True)) + brightness
    tint = tint + (1 - 2 * (brightness > 0.5)) * rand(0.35, 0.55)[:, None]
    texture = wave(x, y, 0.5, 2.5) * rand(0, 0.12)
    image.lerp_(tint + texture[:, None], opacity[:, None])
    return image.clamp_(0, 1).mul_(255).round_().byte(), label, opacity > 0.5


class Images(torch.utils.data.TensorDataset):
    """A dataset in memory: images uint8 (M, C, H, W), targets (M,) with −1 for unknown, names of the
    classes, and foreground masks bool (M, H, W) where they are known. Training keeps all of it on the
    device."""

    def __init__(self, images, targets, classes, masks=None):
        self.images = images
        self.targets = torch.as_tensor(targets)
        self.classes = list(classes)
        self.masks = masks
        super().__init__(self.images, self.targets)


class Scenes(Images):
    """The `count` scenes from number `first` on, with their masks."""

    def __init__(self, count, size=64, seed=0, first=0):
        chunks = torch.arange(first, first + count).split(200)        # small enough for the processor's cache
        drawn = [draw_scenes(chunk, size, seed) for chunk in chunks]
        images, labels, masks = map(torch.cat, zip(*drawn))
        super().__init__(images, labels, SHAPES, masks)


Image.MAX_IMAGE_PIXELS = None                                        # Pillow's own limit is replaced by ours:
MAX_PIXELS = 100_000_000                 # a file of a few kB can claim billions of pixels and fill the memory


def read_image(path):
    """An image file of any kind that Pillow reads → uint8 (3, H, W). Grey, palette, transparent and CMYK
    images become RGB. Grey files of more than 8 bits become float32 with every level kept, scaled so that
    the file's largest value is 255. Raises OSError or another of Pillow's errors for a broken file."""
    with Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:                   # known from the header, before decoding
            raise OSError(f"it claims to have {image.width}×{image.height} pixels")
        if image.mode[0] in "IF":
            levels = torch.from_numpy(np.array(image, dtype=np.float32))
            return (levels * 255 / levels.max().clamp(min=1)).expand(3, -1, -1)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


class ImageFolder(torchvision.datasets.ImageFolder):
    """All image files below a folder. Its sub-folders are the classes; if there are images beside them, or
    fewer than two sub-folders, all labels are −1. A validation folder takes over the `classes` of the
    training folder. The next image stands in for an unreadable one."""

    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]    # ImageNet's

    def __init__(self, root, classes=None):
        self.given = classes
        self.skipped = Counter()
        super().__init__(root, loader=read_image, is_valid_file=self.is_image, allow_empty=True)
        print(f"{len(self)} images in {root}; files skipped: {dict(self.skipped)}", flush=True)
        if not self.samples:
            raise UserError(f"there is no image in {root} or below it")

    def is_image(self, path):
        ending = os.path.splitext(path)[1].lower()
        known = ending in (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif") and os.path.isfile(path)
        self.skipped.update([] if known else [ending])
        return known

    def find_classes(self, root):
        entries = list(os.scandir(root))
        folders = sorted(entry.name for entry in entries if entry.is_dir())
        loose = [entry for entry in entries if entry.is_file() and self.is_image(entry.path)]
        if loose or len(folders) < 2:
            return [], {".": -1}                                      # everything below the folder
        classes = self.given or folders
        unknown = set(folders) - set(classes)
        if unknown:
            raise UserError(f"{root} has classes without training images: {unknown}")
        return classes, {name: k for k, name in enumerate(classes)}

    def __getitem__(self, index):
        for i in range(index, index + 20):
            path, label = self.samples[i % len(self)]
            try:
                return read_image(path), label
            except Exception as error:                                # Pillow raises a dozen kinds
                print(f"unreadable, the next image stands in: {path}: {error}", file=sys.stderr, flush=True)
        raise UserError(f"20 images in a row are unreadable, the last is {path}")


IN_MEMORY = {                                                         # our names: torchvision's
    "mnist": "MNIST", "fashion-mnist": "FashionMNIST", "kmnist": "KMNIST", "cifar10": "CIFAR10",
    "cifar100": "CIFAR100", "stl10": "STL10"}
DECODED = {
    "imagenette": "Imagenette", "flowers102": "Flowers102", "food101": "Food101", "pets": "OxfordIIITPet"}
SPLITS = {"stl10": ("train+unlabeled", "test"), "imagenette": ("train", "val"), "pets": ("trainval", "test")}


def torchvision_dataset(name, root, train):
    """→ torchvision's dataset of this name, downloaded to root if need be. Raises UserError if that fails."""
    split = SPLITS.get(name, ("train", "test"))[0 if train else 1]
    options = {"split": split} if name in SPLITS or name in DECODED else {"train": train}
    try:
        make = getattr(torchvision.datasets, (IN_MEMORY | DECODED)[name])
        dataset = make(root, download=True, transform=v2.PILToTensor(), **options)
    except (RuntimeError, OSError) as error:
        raise UserError(f"{name} is not whole in {root}, and downloading it failed: {error}")
    if name in DECODED:
        return dataset
    images, labels = zip(*dataset)
    return Images(torch.stack(images), labels, dataset.classes)


def labels_of(dataset):
    """→ all labels (M,), −1 for unknown. Goes through all images only if the dataset has no list of
    labels."""
    for name in ("targets", "_labels"):                               # torchvision uses both
        if hasattr(dataset, name):
            return torch.as_tensor(getattr(dataset, name))
    return torch.tensor([dataset[i][1] for i in range(len(dataset))])


def open_data(args):
    """--data → (training dataset, validation dataset or None). Raises UserError if there is no such data."""
    if args.data is None:
        size = min(to_pair(args.size or 64))
        count, val_count = (min(number, args.limit or number) for number in (20_000, 4_000))
        return Scenes(count, size, args.seed), Scenes(val_count, size, args.seed, first=1 << 40)
    if args.data in IN_MEMORY or args.data in DECODED:
        return [torchvision_dataset(args.data, args.root, train) for train in (True, False)]
    if not os.path.isdir(args.data):
        names = ", ".join([*IN_MEMORY, *DECODED])
        raise UserError(f"--data {args.data} is neither a folder nor one of {names}")
    if not os.path.isdir(f"{args.data}/train"):
        return ImageFolder(args.data), None
    train = ImageFolder(f"{args.data}/train")
    if not os.path.isdir(f"{args.data}/val"):
        return train, None
    return train, ImageFolder(f"{args.data}/val", train.classes)


def prepare_data(args, run, train=None, val=None):
    """→ the training and validation dataset (or None) of --data, or those given. Puts into args what only
    the data tell: in_chans, size and patch if they are open, mean and std. Raises UserError if images and
    options do not fit."""
    if train is None:
        run.print(f"opening {args.data or 'scenes, drawn by this project'}")
        if run.local_rank:                                            # one process of a machine downloads
            dist.barrier()
        train, val = open_data(args)
        if run.world > 1 and not run.local_rank:
            dist.barrier()
    image, _ = train[0]
    if not torch.is_tensor(image) or image.ndim != 3:
        raise UserError("a dataset has to give (image, label), the image a uint8 tensor (C, H, W)")
    args.in_chans = len(image)

    # Left open, the size is the images' own, cut to what divides into patches. Files differ in size: they
    # become squares that this machine can handle.
    height, width = to_pair(args.size or image.shape[1:])
    if args.size is None and args.data is not None and not isinstance(train, Images):
        height = width = min(height, width, 224 if run.device.type == "cuda" else 64)
    if args.patch is None:                                        # the shorter side: about 12 patches at most
        args.patch = next((patch for patch in (4, 8) if min(height, width) // patch <= 12), 16)
    if args.size is None:
        height, width = height // args.patch * args.patch, width // args.patch * args.patch
    args.size = (height, width)

    if args.mean is None and hasattr(train, "mean"):
        args.mean, args.std = train.mean, train.std
    if args.mean is None or args.std is None:                         # measured over some 500 images
        pixels = torch.cat([train[i][0].flatten(1).float() for i in spread(len(train), 500)], dim=1)
        args.mean, args.std = pixels.mean(dim=1).tolist(), pixels.std(dim=1).clamp(min=1).tolist()
    if len(args.mean) != args.in_chans:
        raise UserError(f"the images have {args.in_chans} channels; --mean or --init is for {len(args.mean)}")
    return in_memory(train, run), in_memory(val, run)


def in_memory(dataset, run, limit=1_000_000_000):
    """→ a folder of images that are small at --size, read once and for all; any other dataset as it is."""
    size = run.args.size
    if not isinstance(dataset, ImageFolder) or max(size) > 96 or 3 * math.prod(size) * len(dataset) > limit:
        return dataset
    run.print(f"reading {len(dataset)} images into memory")
    plan = ((ids, 0) for ids in spread(len(dataset)).split(100))
    parts = list(file_batches(dataset, plan, run, view_transform(run.args, train=False)))
    images, labels = (torch.cat(part).cpu() for part in zip(*parts))
    return Images(images, labels, dataset.classes)


def spread(count, limit=None):
    """→ the numbers (m,) of `limit` of `count` images, evenly spread; of all without a limit."""
    return torch.linspace(0, count - 1, min(count, limit or count)).round().long()


def seed_for(*numbers):
    """→ one seed made of several whole numbers, the same on every machine."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def training_plan(ids, run, times=1):
    """Yields (ids (b,), seed) for each micro-batch of this process, from step run.step on.

    Which images a step sees, and the seed of its random numbers, depend only on (--seed, step) and on the
    place in the global batch. So a run that was killed continues exactly, and two processes see together
    what one would see. An epoch is a new order of all ids; those at its end that do not fill a batch are
    left out. times: so many times --batch.
    """
    size = run.micro_batch * times
    for step in range(run.step, run.total_steps):
        epoch, place = divmod(step, run.steps_per_epoch)
        generator = torch.Generator().manual_seed(seed_for(run.args.seed, epoch))
        order = ids[torch.randperm(len(ids), generator=generator)]
        for i in range(run.accumulate):
            # The number of this micro-batch among all micro-batches of the epoch, on all processes.
            turn = (place * run.world + run.rank) * run.accumulate + i
            chosen = torch.arange(turn * size, (turn + 1) * size) % len(ids)
            yield order[chosen], seed_for(run.args.seed, epoch, turn)


def view_transform(args, train, augment=None):
    """→ what is done to an image: a random crop and flip for training, then `augment`; for evaluation the
    centre."""
    bicubic = v2.InterpolationMode.BICUBIC
    if train:
        crop = v2.RandomResizedCrop(args.size, (args.crop, 1.0), interpolation=bicubic)
        flip = v2.RandomHorizontalFlip(0.5 * args.flip)
        return v2.Compose([crop, flip, augment or v2.Identity()])
    # As in the paper, the shorter side becomes 256 pixels for a crop of 224. A 1×20,000 image stays small.
    side = round(min(args.size) * max(1, 256 / max(224, min(args.size))))
    return v2.Compose([v2.Resize(side, bicubic, max_size=8 * side), v2.CenterCrop(args.size)])


class View(torch.utils.data.Dataset):
    """A dataset seen through a transform: view[i, seed] → image (C, h, w), label, seed. Random numbers
    depend on the seed and on i alone, whichever worker process reads the image."""

    def __init__(self, dataset, transform):
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, key):
        i, seed = key
        image, label = self.dataset[i]
        torch.manual_seed(seed_for(seed, i))
        return self.transform(image), label, seed


def ignore_signals(worker):
    """A terminal's Ctrl-C reaches worker processes too, but the main process wants to save first."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def file_batches(dataset, plan, run, transform):
    """Worker processes read and crop the images of the next batches while the device computes with this
    one."""
    loader = torch.utils.data.DataLoader(
        View(dataset, transform),
        batch_sampler=([(i, seed) for i in ids.tolist()] for ids, seed in plan),
        num_workers=run.workers, worker_init_fn=ignore_signals, pin_memory=run.device.type == "cuda")
    for images, labels, seeds in loader:
        torch.manual_seed(seeds[0].item())
        yield images.to(run.device, non_blocking=True), labels.to(run.device, non_blocking=True)


def memory_batches(dataset, plan, run, transform):
    """A dataset in memory moves to the device once, as uint8. For speed eight images are cropped at a time,
    all in the same way [not in the paper]. Foreground masks come along as one more channel."""
    pixels = dataset.images.to(run.device)
    if dataset.masks is not None:
        masks = 255 * dataset.masks[:, None].byte().to(run.device)
        pixels = torch.cat([pixels, masks], dim=1)
    targets = dataset.targets.to(run.device)
    for ids, seed in plan:
        torch.manual_seed(seed)
        ids = ids.to(run.device, non_blocking=True)
        yield torch.cat([transform(part) for part in pixels[ids].split(8)]), targets[ids]


def batches(dataset, plan, run, train=False, augment=None):
    """Yields a batch on the run's device for each (ids (b,), seed) of the plan: images float (b, C, h, w),
    normalised; labels (b,); foreground masks bool (b, h, w), or None. Torch's random numbers then start at
    the seed. train: with random crops and flips; augment: uint8 image → uint8 image, after these, in worker
    processes."""
    args, channels = run.args, len(run.args.mean)
    mean = torch.tensor(args.mean, device=run.device)[:, None, None]
    std = torch.tensor(args.std, device=run.device)[:, None, None]
    source, transform = file_batches, view_transform(args, train, augment)
    if isinstance(dataset, Images) and augment is None:
        source = memory_batches
        if not train:
            transform = v2.Resize(args.size)                          # all of the image
    for images, labels in source(dataset, plan, run, transform):
        masks = images[:, -1] > 127 if images.shape[1] > channels else None
        yield (images[:, :channels].float() - mean) / std, labels, masks


def to_pixels(images, args):
    """Normalised images (B, C, H, W) → uint8, on the CPU."""
    mean, std = torch.tensor(args.mean)[:, None, None], torch.tensor(args.std)[:, None, None]
    return (images.float().cpu() * std + mean).clamp(0, 255).byte()


def save_image_rows(path, rows):
    """Writes a PNG. rows: {title: uint8 images (n, C, H, W)}, all of one n; each row stands under its
    title. Of images with other than 1 or 3 channels the first is shown."""
    strips = []
    for title, images in rows.items():
        images = images if images.shape[1] == 3 else images[:, :1]
        images = F.interpolate(images, scale_factor=max(1, 128 // images.shape[3]))  # small images, larger
        strip = torchvision.utils.make_grid(images, nrow=len(images), padding=4, pad_value=255)
        strip = v2.functional.to_pil_image(F.pad(strip, (0, 0, 24, 0), value=255))
        ImageDraw.Draw(strip).text((4, 4), title, "black", ImageFont.load_default(15))
        strips.append(np.asarray(strip))
    Image.fromarray(np.concatenate(strips)).save(path)


# ------------------------------------------------------------------------------------------------------ run

def learning_rate(step, peak, warmup_steps, total_steps, floor=0.0):
    """The schedule of all four papers: a straight line up to the peak, then half a cosine down to the
    floor. The first step has 1/warmup_steps of the peak [not in the paper]; in MAE's code it has 0 and
    changes nothing."""
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(model, weight_decay, lr_scale=lambda name: 1.0):
    """→ parameter groups for AdamW. Biases, norms, class token, mask token and positions are not decayed
    [not in the paper: MAE's code spares what has one dimension; its tokens have three, and so are decayed].
    lr_scale(name) is the part of the learning rate that a parameter gets."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or name.endswith(("_token", "pos_embed"))
            key = (0.0 if spared else weight_decay, lr_scale(name))
            groups.setdefault(key, []).append(parameter)
    return [dict(params=members, weight_decay=decay, lr_scale=scale)
            for (decay, scale), members in groups.items()]


def write_atomically(path, write):
    """Calls write(file) so that a kill or a full disk leaves the file before it whole: the new one is
    written beside it, flushed to the disk, and renamed, which happens completely or not at all."""
    try:
        with open(f"{path}.part", "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.part", path)
    except (OSError, RuntimeError) as error:
        raise UserError(f"could not write {path}: {error}; if there was one before, it is whole")


class Run:
    """What a training loop needs around it: device, processes, precision, output folder, log, checkpoints.
    The loop stays the script's. Raises UserError if the options do not fit the machine or each other, or if
    the folder holds a run."""

    def __init__(self, args):
        # torchrun starts a script several times; these variables tell each process which one it is.
        self.args = args
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        precision, backend = "fp32", "gloo"
        if self.device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"there is no GPU number {self.local_rank}: fewer processes, or --device cpu")
            self.device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")                # TF32 for what stays float32
            # bf16 has the range of float32. fp16 has not: small gradients vanish in it unless they are
            # scaled.
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
            backend = "cpu:gloo,cuda:nccl"
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group(backend, timeout=timedelta(hours=2))
        precision = args.precision or precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        self.autocast = torch.autocast(self.device.type, dtype, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.workers = args.workers
        if args.workers is None:
            self.workers = min(16, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

        # --batch images a step, over all processes. Each takes its part in micro-batches; gradients add up.
        part = args.batch // self.world
        divisors = [size for size in range(1, min(part, 256) + 1) if part % size == 0]
        self.micro_batch = args.micro_batch or max(divisors, default=1)
        self.accumulate = part // self.micro_batch
        if self.world * self.accumulate * self.micro_batch != args.batch:
            raise UserError(f"--batch {args.batch} does not divide into {self.world} × micro-batches")
        if os.path.exists(f"{args.out}/args.json") and not args.resume and not args.overwrite:
            raise UserError(f"{args.out} holds a run: --resume continues it, --overwrite replaces it")
        self.step, self.seconds, self.signal = 0, 0.0, 0
        self.sums, self.numbers, self.history = {}, {}, []

    def print(self, text):
        """Prints, from process 0 alone. A closed terminal or pipe does not end the run."""
        try:
            if self.rank == 0:
                print(text, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")

    def wrap(self, model):
        """Moves a model to the device, compiles it, and under torchrun wraps it in DDP, which averages
        gradients."""
        model.to(self.device)
        for module in model.modules():
            # Keep only a block's input; the backward pass computes the rest once more.
            if self.args.checkpoint_blocks and isinstance(module, Block):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        if self.args.compile or (self.args.compile is None and self.device.type == "cuda"):
            self.print("compiling: the first step takes about a minute")
            model.compile(dynamic=False)
        if self.world > 1 and any(parameter.requires_grad for parameter in model.parameters()):
            return nn.parallel.DistributedDataParallel(model)
        return model

    def start(self, count=0, **parts):
        """Begins or, with --resume, continues a run that trains on `count` images. parts: the modules and
        optimizers that make up a checkpoint, OUT/last.pt. From here on the folder belongs to this run."""
        args, self.parts = self.args, parts
        self.steps_per_epoch = max(1, count // args.batch)
        if args.epochs is None:                                      # the preset says how many steps it takes
            args.epochs = math.ceil(args.updates / self.steps_per_epoch)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = self.total_steps / 10
        if args.warmup is not None:
            self.warmup_steps = args.warmup * self.steps_per_epoch
        if args.resume:
            saved = read_checkpoint(f"{args.out}/last.pt")
            for name, part in parts.items():
                part.load_state_dict(saved[name])
            self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
            self.sums = {name: value.to(self.device) for name, value in saved["sums"].items()}
        if self.rank == 0:
            self.claim_folder()
        if count:
            peak = args.lr * args.batch / 256
            self.print(f"{count} images, {self.total_steps} steps of {args.batch} on {self.world} × {self.device}; "
                       f"peak learning rate --lr × batch / 256 = {peak:.2g}")
        if count and self.total_steps < 300:
            self.print("fewer than 300 steps: enough for a try, too few to judge the method by")

    def claim_folder(self):
        """Removes what an older run left, and writes OUT/args.json: options, versions, device and commit."""
        folder = pathlib.Path(self.args.out)
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("args.json", "last.pt", "best.pt", "log.jsonl"):
            if name == "args.json" or not self.args.resume:
                (folder / name).unlink(missing_ok=True)
        code = pathlib.Path(__file__).parent
        git = subprocess.run(["git", "-C", code, "rev-parse", "HEAD"], capture_output=True, text=True)
        made_with = dict(
            torch=torch.__version__, cuda=torch.version.cuda, python=sys.version, commit=git.stdout.strip(),
            device_name=platform.machine())
        if self.device.type == "cuda":
            made_with["device_name"] = torch.cuda.get_device_name()
        with open(folder / "args.json", "x") as file:                 # x: of two runs at once, one fails here
            json.dump(vars(self.args) | made_with, file, indent=1)

    def log(self, **values):
        """Values for the epoch's line in log.jsonl: of tensors the mean over the epoch's micro-batches,
        without waiting for the device; numbers as they are."""
        for name, value in values.items():
            if torch.is_tensor(value):
                self.sums[name] = self.sums.get(name, 0) + value.detach().float() / self.accumulate
            else:
                self.numbers[name] = value

    def write_log(self, **values):
        """Adds a line to OUT/log.jsonl. The whole log is a part of every checkpoint, so a resumed run goes
        on with it."""
        self.history.append(values)
        if self.rank == 0:
            with open(f"{self.args.out}/log.jsonl", "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in self.history)

    def save(self, name, **values):
        """Writes a checkpoint OUT/name, from process 0 alone."""
        if self.rank == 0:
            values["args"] = vars(self.args)
            write_atomically(f"{self.args.out}/{name}", lambda file: torch.save(values, file))

    def steps(self):
        """Yields the numbers of the steps still to do. Between two steps it prints, logs and saves. After
        SIGTERM, SIGHUP or Ctrl-C it saves and stops when the step is done; a second Ctrl-C stops at
        once."""
        def stop(number, frame):
            if self.signal and number == signal.SIGINT and time.monotonic() > self.asked_at + 1:
                raise KeyboardInterrupt
            if not self.signal:
                self.signal, self.asked_at = number, time.monotonic()
                self.print("stopping after this step; Ctrl-C again stops at once, without saving")

        numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
        handlers = [signal.signal(number, stop) for number in numbers]
        self.began = self.saved_at = self.mark_time = time.monotonic()
        self.printed_at = self.began - 7
        self.mark_step, self.next_look, self.save_every = self.step, self.step, 30
        try:
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                self.after_step()
        finally:
            for number, handler in zip(numbers, handlers):
                signal.signal(number, handler)

    def ends_epoch(self, step, cost):
        """→ whether to evaluate `cost` images after this step: at the end of an epoch, or of several if
        they are short."""
        epochs = math.ceil(cost / (self.steps_per_epoch * self.args.batch))
        return (step + 1) % (epochs * self.steps_per_epoch) == 0 or step + 1 == self.total_steps

    def after_step(self):
        # About once a second, and at an epoch's end, the processes put together what each knows, so that
        # all decide alike: the loss, the seconds a step takes, whether someone was told to stop, the
        # seconds since saving.
        ends_epoch = self.step % self.steps_per_epoch == 0
        if self.step < self.next_look and not ends_epoch:
            return
        now = time.monotonic()
        done = (self.step - 1) % self.steps_per_epoch + 1             # steps of this epoch
        means = {name: (value / done).tolist() for name, value in self.sums.items()}
        pace = (now - self.mark_time) / (self.step - self.mark_step)
        facts = torch.tensor([means["loss"], pace, self.signal, now - self.saved_at]) / self.world
        if self.world > 1:
            dist.all_reduce(facts)
        means["loss"], pace, stop, unsaved = facts.tolist()
        self.next_look = self.step + max(1, round(1 / pace))
        if not math.isfinite(means["loss"]):
            raise UserError(f"the loss is {means['loss']} at step {self.step}: try a lower --lr, a longer "
                            f"--warmup or --precision fp32. {self.args.out}/last.pt is from before")

        last = self.step == self.total_steps
        seconds = self.seconds + now - self.began
        if last or now > self.printed_at + (2 if ends_epoch else 10):
            self.printed_at = now
            numbers = "  ".join(f"{name} {value:.3g}" for name, value in self.numbers.items())
            left = timedelta(seconds=round(pace * (self.total_steps - self.step)))
            self.print(f"epoch {self.step / self.steps_per_epoch:.1f}/{self.args.epochs}  "
                       f"step {self.step}/{self.total_steps}  loss {means['loss']:.4f}  {numbers}  "
                       f"{self.args.batch / pace:.0f} images/s  {left} left")
        if ends_epoch:
            self.write_log(
                step=self.step, epoch=self.step // self.steps_per_epoch, **means, **self.numbers,
                images_per_s=round(self.args.batch / pace, 1), seconds=round(seconds, 1))
            self.sums, self.numbers, self.mark_time, self.mark_step = {}, {}, now, self.step
        if stop or last or unsaved > self.save_every:
            parts = {name: part.state_dict() for name, part in self.parts.items()}
            self.save(
                "last.pt", **parts, step=self.step, seconds=seconds, sums=self.sums, history=self.history)
            self.saved_at = time.monotonic()
            self.save_every = max(30, 50 * (self.saved_at - now))     # saving takes 2 % of the time at most
        if stop:
            self.print(f"stopped and saved at step {self.step}: the same command with --resume goes on")
            raise SystemExit(128 + self.signal)


def entry(main):
    """Runs a script's main. What a user can mend ends with one line on stderr instead of a traceback."""
    code, message = 2, None
    try:
        main()
        code = 0
    except (UserError, OSError) as error:
        message = str(error).strip().split("\n")[-1]                  # of a worker's error the last line
    except torch.OutOfMemoryError:
        message = "the GPU's memory is full: try --checkpoint-blocks or a smaller --micro-batch"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as stop:
        code = stop.code
    if message:
        time.sleep(3 if int(os.environ.get("RANK", 0)) else 0)        # process 0 says it first
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr)
    if dist.is_initialized():
        os._exit(code or 0)                                           # other processes may have gone already
    sys.exit(code)


# --------------------------------------------------------------------------------------------- command line

def number(kind, low, high=math.inf):
    """→ an argparse type: an int or float from low to high."""
    def parse(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}")
        return value
    parse.__name__ = kind.__name__
    return parse


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the value that will be used to an option's help, if it is known before the data are."""

    def _get_help_string(self, action):
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def shared_options(description):
    """→ a parser with the options that mean the same in every script. A script adds its own and calls
    `parse_args`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=Help, add_help=False)
    switch = argparse.BooleanOptionalAction
    count, whole, amount = number(int, 1), number(int, 0), number(float, 0)
    add = parser.add_argument
    add("--data", help="a folder, or a torchvision dataset: cifar10 …; left out: scenes, drawn on the spot")
    add("--out", help="folder for checkpoints, log and images; left out: runs/SCRIPT")
    add("--init", help="checkpoint to take weights from: ours, MAE's, timm's or Hugging Face's")
    add("--model", choices=VITS, help="size of the encoder (paper: base)")
    add("--size", type=count, nargs="+", help="side of the images, or height and width (paper: 224)")
    add("--patch", type=count, help="side of a patch in pixels (paper: 16)")
    add("--epochs", type=count, help="how often every image is seen (paper: 800)")
    add("--batch", type=count, help="images a step, over all processes (paper: 4096)")
    add("--lr", type=amount, help="peak learning rate for a batch of 256; grows with --batch (paper: 1.5e-4)")
    add("--warmup", type=amount, help="epochs of rising learning rate; left out: a tenth of all (paper: 40)")
    add("--limit", type=count, help="use only so many images, for a quick try")
    add("--seed", type=whole, default=0, help="decides weights, order, crops and masks")
    add("--resume", action="store_true", help="continue the run in OUT, with the options it was started with")
    add("--overwrite", action="store_true", help="replace the run in OUT")

    add = parser.add_argument_group("advanced").add_argument
    add("--root", default="data", help="folder for torchvision's downloads")
    add("--weight-decay", type=amount, default=0.05, help="of weight matrices (paper: 0.05)")
    add("--crop", type=number(float, 0.01, 1), help="least part of the area in a random crop (paper: 0.2)")
    add("--flip", action=switch, default=True, help="flip images at random")
    add("--mean", type=float, nargs="+", help="mean of each channel, in pixel values 0 to 255")
    add("--std", type=amount, nargs="+", help="standard deviation of each channel, in pixel values")
    add("--workers", type=whole, help="processes that read images, for each training process")
    add("--micro-batch", type=count, help="images at once on a device; gradients add up (at most 256)")
    add("--device", choices=("cpu", "cuda", "mps"), help="where to compute (cuda where there is one)")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="of matrix products (GPU: bf16, CPU: fp32)")
    add("--compile", action=switch, help="torch.compile the model (on GPUs)")
    add("--checkpoint-blocks", action="store_true", help="less memory, a third slower: compute blocks twice")
    return parser


MAY_CHANGE = {"resume", "overwrite", "out", "epochs", "device", "precision", "workers", "compile", "root",
              "checkpoint_blocks", "micro_batch"}


def kind_of_data(args):
    """→ "scenes", "small" or "imagenet": which defaults fit --data. A folder is small unless it has 50,000
    files, and images of 100 pixels or more."""
    count, side = 0, 0
    for folder, _, names in os.walk(args.data or "scenes"):
        count += len(names)
        for name in names[:1]:
            with contextlib.suppress(OSError), Image.open(f"{folder}/{name}") as image:
                side = max(side, min(image.size))
        if count > 50_000 and side >= 100:
            return "imagenet"
    return "scenes" if args.data is None else "small"


def parse_args(parser, script, preset, arguments=None):
    """→ the options of a run. Those that are not given come from preset(args, kind of data), a dictionary;
    with --resume all come from the run, and only some that do not change what is learned may be given
    anew."""
    args, _ = parser.parse_known_args(arguments)
    task = getattr(args, "task", None)
    out = args.out or f"runs/{script}" + (f"-{task}" if task != parser.get_default("task") else "")
    if args.resume:
        saved = read_checkpoint(f"{out}/last.pt")["args"]
        parser.set_defaults(**saved)
    else:
        parser.set_defaults(**preset(args, kind_of_data(args)))
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    args = parser.parse_args(arguments)
    if args.out is None and task != parser.get_default("task") and os.path.exists(f"{out}/log.jsonl"):
        with open(f"{out}/log.jsonl") as file:                        # a finished evaluation may be replaced
            args.overwrite = args.overwrite or '"task"' in file.read()
    args.out, args.script = out, script
    if args.resume:
        for name, value in saved.items():
            if getattr(args, name, value) != value and name not in MAY_CHANGE:
                raise UserError(f"the run in {out} has --{name.replace('_', '-')} {value}: leave it out")
        args = argparse.Namespace(**(saved | vars(args)))
    return args
