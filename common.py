"""What every script needs and no paper is about, in six sections: patches, vision transformer, loading
weights, images, a run, and the command line. To use a script elsewhere, copy it together with this file.

Letters in shapes: B images in a batch, C channels, H×W pixels, P patch size, h×w grid of patches, N = h·w
patches, n visible patches, T tokens, D width of the encoder, d width of the decoder, M images in a dataset,
K classes, b images in a micro-batch.
"""

import argparse
import atexit
import contextlib
import functools
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import platform
import re
import signal
import subprocess
import sys
import time
from collections import Counter, OrderedDict
from dataclasses import dataclass
from datetime import timedelta

# OpenMP threads spin while they wait, and so starve other programs on a busy machine. With a short spin an
# idle machine is as fast, and a busy one nearly twice as fast. It has to be set before torch is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont                           # Pillow comes with torchvision
from torch import distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import tv_tensors
from torchvision.transforms import v2


class UserError(ValueError):
    """Something the user can fix: on the command line it becomes one line, without a traceback."""


def say(text):
    """Prints, under torchrun from process 0 alone. A closed terminal or pipe does not end the run."""
    try:
        if os.environ.get("RANK", "0") == "0":
            print(text, flush=True)
    except OSError:
        sys.stdout = open(os.devnull, "w")


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
    channel. Any number of channels, square or not. RuntimeError, by PyTorch, if the patches do not fit."""
    # Split each side in two: which patch, and where within it. Then move the axes within a patch to the end,
    # and flatten them to P·P·C, the others to N.
    x = images.unflatten(3, (-1, patch_size)).unflatten(2, (-1, patch_size))  # (B, C, h, P, w, P)
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
    # Each half holds sin(position · f), then cos(position · f), for dim/4 frequencies f from 1 down to about
    # 1/10000. Near positions differ in the fast waves, distant ones in the slow waves.
    frequencies = 10000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    positions = torch.cartesian_prod(*map(torch.arange, grid)).flip(1)  # (N, 2): column, row
    angles = positions[..., None] * frequencies                       # (N, 2, dim/4)
    return torch.cat([angles.sin(), angles.cos()], dim=2).flatten(1).float()


def gather_tokens(tokens, ids):
    """tokens (B, N, D), ids (B, n) → (B, n, D): the tokens at these indices, chosen separately for each
    image. This is how hidden patches are dropped, and how a shuffled order is undone."""
    return tokens.gather(1, ids[..., None].expand(-1, -1, tokens.shape[-1]))


# ---------------------------------------------------------------------------------------------- transformer

# A ViT has `depth` blocks of `num_heads` heads each, and tokens of `embed_dim` numbers.

def vit_size(embed_dim, depth, num_heads):
    return dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)


VITS = {
    "nano": vit_size(128, 4, 4),                                      # for a laptop's CPU [not in the paper]
    "light": vit_size(384, 4, 6),                           # MRA's augmentor; its width is [not in the paper]
    "tiny": vit_size(192, 12, 3),
    "small": vit_size(384, 12, 6),
    "base": vit_size(768, 12, 12),                                    # the papers' ViT-B, ViT-L and ViT-H
    "large": vit_size(1024, 24, 16),
    "huge": vit_size(1280, 32, 16),
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
        # One matrix makes all three for all heads at once.
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x):
        # One fused kernel (FlashAttention where the GPU has it): the T×T weights never exist in memory.
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))

    def attention_weights(self, x):
        """x (B, T, D) → (B, heads, T, T): how much each token attends to each other one. Every row sums to
        1. For looking at attention; `forward` never computes it."""
        q, k, _ = self.project(x)
        return (q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=-1)


LayerNorm = functools.partial(nn.LayerNorm, eps=1e-6)                # PyTorch's own eps is ten times as large


class Block(nn.Module):
    """A pre-norm transformer block, x (B, T, D) → (B, T, D): attention mixes tokens, the MLP works on each
    alone."""

    def __init__(self, embed_dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = LayerNorm(embed_dim)
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = LayerNorm(embed_dim)
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
    """MAE's initialisation: Xavier-uniform for linear layers, of which the patch projection is one. Biases
    are zero, the projection's too [not in the paper]; MAE's code leaves that one as PyTorch makes it."""
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.xavier_uniform_(module.weight.view(len(module.weight), -1))
        nn.init.zeros_(module.bias)


def fixed_positions(dim, grid):
    """→ a table (1, 1+N, dim) that only fine-tuning trains. Its first row, the class token's, is zero."""
    table = torch.cat([torch.zeros(1, dim), sincos_positions(dim, grid)])
    return nn.Parameter(table[None], requires_grad=False)


class ViT(nn.Module):
    """A vision transformer, split where a masked autoencoder needs it: `embed` turns every patch into a
    token, `encode` runs the blocks over whichever tokens are left. Argument and parameter names are timm's.

    vit(images (B, C, H, W)) → features (B, D), or logits (B, num_classes). The feature is the class token
    (global_pool="token") or the mean of the patch tokens ("avg"). Raises UserError if sizes do not divide.
    """

    classes = mean = std = norm_pixels = None                         # `load_encoder` sets them

    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=0,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.0,
        global_pool="token",
    ):
        super().__init__()
        # What it takes to build this model again. Checkpoints keep it as args["vit"]. timm's
        # VisionTransformer(**checkpoint["args"]["vit"]) is the same model, and its load_state_dict takes
        # checkpoint["encoder"].
        self.config = dict(
            img_size=to_pair(img_size),
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            drop_path_rate=drop_path_rate,
            global_pool=global_pool,
        )
        vars(self).update(self.config)                                # self.patch_size and so on
        self.grid = patch_grid(img_size, patch_size)

        # A convolution whose stride is its size is a linear layer on each patch: `embed` uses it as one.
        projection = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed = nn.ModuleDict({"proj": projection})        # named as in timm: patch_embed.proj
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.pos_embed = fixed_positions(embed_dim, self.grid)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()     # deeper blocks are skipped more often
        self.blocks = nn.Sequential(*(Block(embed_dim, num_heads, rate) for rate in rates))

        # With "avg" the last norm comes after the mean and is called fc_norm, as in MAE's code.
        norm = LayerNorm(embed_dim)
        self.norm = norm if global_pool == "token" else nn.Identity()
        self.fc_norm = norm if global_pool == "avg" else nn.Identity()
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(init_weights)

    def embed(self, images):
        """images (B, C, H, W) → tokens (B, N, D), one per patch, with its position; no class token yet."""
        if images.shape[2:] != self.img_size:                         # another grid may have as many patches
            raise UserError(f"the encoder is for images of {self.img_size}, not {tuple(images.shape[2:])}")
        # A product of matrices, because on a GPU the same convolution takes nine times as long.
        projection = self.patch_embed["proj"]
        weight = projection.weight.permute(0, 2, 3, 1).flatten(1)     # (D, P·P·C), in patchify's order
        x = F.linear(patchify(images, self.patch_size), weight, projection.bias)  # (B, N, D)
        return x + self.pos_embed[:, 1:]

    def add_class_token(self, tokens):
        """tokens (B, n, D) → (B, 1+n, D): the class token comes first. It stands for no patch; attention
        gathers in it what the whole image is about."""
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
        x = self.blocks[:-1](self.add_class_token(self.embed(images)))
        last = self.blocks[-1]
        return last.attn.attention_weights(last.norm1(x))[:, :, 0, 1:]

    def feature_map(self, images, last=1):
        """images (B, C, H, W) → (B, last·D, h, w) for dense tasks: the patch tokens of the `last` last
        blocks, each after the final norm, stacked along the channels."""
        x = self.add_class_token(self.embed(images))
        maps = []
        for block in self.blocks:
            x = block(x)
            maps.append(self.fc_norm(self.norm(x))[:, 1:].transpose(1, 2).unflatten(2, self.grid))
        return torch.cat(maps[-last:], dim=1)


class Decoder(nn.Module):
    """MAE's light decoder (section 3), with the parameter names of the released files. Grid, patch size,
    channels and input width come from the encoder.

    decoder(latent (B, 1+n, D), ids_restore (B, N)) → predicted patches (B, N, P·P·C).
    """

    def __init__(self, encoder, embed_dim=512, depth=8, num_heads=16):
        super().__init__()
        self.config = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)  # kept as args["decoder"]
        self.decoder_embed = nn.Linear(encoder.embed_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.decoder_pos_embed = fixed_positions(embed_dim, encoder.grid)
        self.decoder_blocks = nn.Sequential(*(Block(embed_dim, num_heads) for _ in range(depth)))
        self.decoder_norm = LayerNorm(embed_dim)
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


# ------------------------------------------------------------------------------------------ loading weights

# Every file is brought to timm's names first. The model is then built with the sizes that its tensors have,
# and the tensors are copied into it.

def read_checkpoint(path):
    """→ the dictionary in a checkpoint file, on the CPU. Nothing in a file can run code (`weights_only`).
    Raises UserError if the file is missing, damaged or something else."""
    if not os.path.isfile(path):                                      # a pipe or a device would never end
        raise UserError(f"there is no checkpoint file {path!r}")
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's release keeps its options in one
            return dict(torch.load(path, map_location="cpu", weights_only=True))
    except ImportError as error:
        raise UserError(f"{path}: {error}")
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or no checkpoint, or holds more than tensors ({type(error).__name__})")


RENAMES = {                          # Hugging Face's parameter names, old and new → timm's; the order matters
    r"^((module|_orig_mod|model|backbone|vit|embeddings|encoder(?!\.layer\.))\.)+": "",
    r"^decoder\.(?=decoder_|mask_token)": "",
    r"^position_embeddings": "pos_embed",
    r"^patch_embeddings\.projection": "patch_embed.proj",
    r"^(decoder_)?(encoder\.layer|layers)\.": r"\1blocks.",
    r"attention\.(attention\.)?(q|k|v)(uery|ey|alue|_proj)\.": r"attn.\2.",
    r"attention\.(output\.dense|o_proj)": "attn.proj",
    r"intermediate\.dense": "mlp.fc1",
    r"\.output\.dense": ".mlp.fc2",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"^layernorm": "norm",
    r"^classifier": "head",
}


def read_weights(path, part):
    """→ the tensors of a checkpoint's "encoder" or "decoder" under timm's names, and its options, {} if it
    has none. Raises UserError if a tensor holds something else than finite numbers."""
    # Files differ in how deep the tensors lie: in the file itself or behind one of these names. An average
    # over training ("ema") comes first, as in timm.
    state = read_checkpoint(path)
    args = state.get("args", {})
    if isinstance(args, argparse.Namespace):
        args = vars(args)
    for key in ("state_dict_ema", "state_dict", "model_ema", "model", part):
        state = state.get(key, state)

    # Integers, such as counters of batches, are no weights.
    renamed = {}
    for name, tensor in state.items():
        for pattern, replacement in RENAMES.items():
            name = re.sub(pattern, replacement, name)
        if torch.is_tensor(tensor) and tensor.is_floating_point():
            if not tensor.isfinite().all():
                raise UserError(f"{path}: {name} has numbers that are infinite or not a number")
            renamed[name] = tensor

    # Hugging Face keeps queries, keys and values in three layers; timm stacks them into one.
    for name in [name for name in renamed if ".attn.q." in name and name.replace(".q.", ".k.") in renamed]:
        parts = [renamed.pop(name.replace(".q.", f".{letter}.")) for letter in "qkv"]
        renamed[name.replace(".q.", ".qkv.")] = torch.cat(parts)
    return renamed, args


def count_blocks(state, prefix):
    """→ how many transformer blocks have names that begin with prefix."""
    return len({name.split(".")[1] for name in state if name.startswith(prefix)})


def stored_grid(table, patch_size, saved, given):
    """→ the (rows, columns) of patches that a position table (1, 1+N, D) was made for: 144 patches may be
    12×12 or 9×16. saved, given: image sizes, of the file and of the caller, or None. Raises UserError if
    nothing fits."""
    # A fixed sine-cosine table says so itself: try every shape that has as many patches.
    num_patches, dim = table[0, 1:].shape                             # without the class token's row
    for rows in range(1, num_patches + 1):
        grid = (rows, num_patches // rows)
        if num_patches % rows == 0 and torch.allclose(table.float(), fixed_positions(dim, grid), atol=1e-2):
            return grid

    # A learned table does not: take the first of these sizes that has as many patches.
    for size in (saved, math.isqrt(num_patches) * patch_size, given):
        if size and math.prod(to_pair(size)) == num_patches * patch_size ** 2:
            return patch_grid(size, patch_size)
    raise UserError(f"{num_patches} positions (without the class token's) fit no square image: give "
                    f"img_size=(height, width), unless the file has other special tokens")


def resize_positions(table, source, grid):
    """A position table (1, 1+N, D) for another grid, by bicubic interpolation, as MAE does for larger
    images."""
    if source == grid:
        return table
    say(f"positions resized from {source} to {grid} patches")
    patches = table[:, 1:].transpose(1, 2).unflatten(2, source)       # (1, D, rows, columns)
    patches = F.interpolate(patches, grid, mode="bicubic")
    return torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)


def load_tensors(module, state, path, optional=()):
    """Copies tensors into a module and prints what is left over. Raises UserError if a parameter is missing
    or of another shape; only those whose names begin with `optional` may be."""
    wanted = module.state_dict()
    fitting = {name: tensor for name, tensor in state.items()
               if name in wanted and tensor.shape == wanted[name].shape}
    missing, _ = module.load_state_dict(fitting, strict=False)
    if not all(name.startswith(optional) for name in missing):
        raise UserError(f"{path} does not fit this model: missing or of another shape are {missing[:4]}")
    unused = sorted(state.keys() - fitting)
    notes = f"; newly initialised: {missing}" if missing else ""
    notes += f"; not used here: {unused[:4]}" if unused else ""
    say(f"loaded {len(fitting)} tensors from {path}{notes}")


def load_encoder(path, img_size=None, **overrides):
    """→ a ViT built from what a file holds: a checkpoint of this project, of MAE's release (pre-trained or
    fine-tuned), of timm or of Hugging Face (ViTMAE, ViT). Any argument of `ViT` can be given instead; for
    another img_size the positions are resized. A fine-tuned file gives the whole classifier, head included.
    If a file does not say num_heads, it is that of our ViT of the same width, or width / 64.

    The ViT also has `classes` (names), `mean` and `std` (of its images, in pixel values 0 … 255) and
    `norm_pixels` (whether its decoder predicts normalised patches), or None where the file does not say.
    Raises UserError if there is no such encoder in the file, or it does not fit the overrides.
    """
    state, args = read_weights(path, "encoder")
    if not {"patch_embed.proj.weight", "pos_embed", "cls_token"} <= state.keys():
        raise UserError(f"{path} has no ViT with a class token, of this project, MAE, timm or Hugging Face")

    # Sizes come from the tensors themselves; the file's options are only asked for what tensors do not show:
    # the number of heads, and whether a grid is oblong.
    embed_dim, in_chans, patch_size, _ = state["patch_embed.proj.weight"].shape
    saved = args.get("vit", {})
    grid = stored_grid(state["pos_embed"], patch_size, saved.get("img_size"), img_size)
    usual_heads = {size["embed_dim"]: size["num_heads"] for size in VITS.values()}
    config = dict(
        img_size=img_size or [side * patch_size for side in grid],
        patch_size=patch_size,
        in_chans=in_chans,
        num_classes=len(state.get("head.weight", ())),
        embed_dim=embed_dim,
        depth=count_blocks(state, "blocks."),
        num_heads=saved.get("num_heads") or usual_heads.get(embed_dim, math.ceil(embed_dim / 64)),
        global_pool="avg" if "fc_norm.weight" in state else "token",
    )
    encoder = ViT(**(config | overrides))
    # DINOv2's layer scale, register tokens and the like: without them the features would be wrong.
    other = [name for name in state if name.startswith(("blocks.0.", "reg", "attn_pool", "norm_pre"))
             and name not in encoder.state_dict()]
    if other:
        raise UserError(f"{path} is of another architecture: it also has {other}")
    state["pos_embed"] = resize_positions(state["pos_embed"], grid, encoder.grid)
    load_tensors(encoder, state, path, optional=("head.", "norm.", "fc_norm."))
    for name in ("classes", "mean", "std"):                           # timm's are for pixels from 0 to 1
        setattr(encoder, name, args.get(name) if saved else None)
    encoder.norm_pixels = args.get("norm_pixels", args.get("norm_pix_loss"))  # the second is MAE's release
    return encoder


def load_for_run(path, args, **overrides):
    """`load_encoder` for a run: the number of channels and the patch size are always the encoder's. So are
    size, mean and std of images, unless an option sets them. All are written into args."""
    encoder = load_encoder(path, img_size=args.size, **overrides)
    args.size, args.patch, args.in_chans = encoder.img_size, encoder.patch_size, encoder.in_chans
    args.mean = args.mean or encoder.mean
    args.std = args.std or encoder.std
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
    saved_size = args.get("vit", {}).get("img_size")
    source = stored_grid(table, encoder.patch_size, saved_size, encoder.img_size)
    state["decoder_pos_embed"] = resize_positions(table, source, encoder.grid)
    load_tensors(decoder, state, path)
    return decoder


# --------------------------------------------------------------------------------------------------- images
# A dataset is anything with __len__ and __getitem__(i) → (uint8 image (C, H, W), label). If it also has
# `targets` (all labels), `classes` (their names), `mean` and `std` (per channel, in pixel values 0 … 255),
# these are used. For segmentation a label is a map, uint8 (H, W): the class of every pixel, 255 where
# unknown.

# Scenes: images drawn by this project, so that everything can be tried without a download. A shape is a
# function of the place (x, y) that is below zero inside the shape and grows with the distance from it.

def box(x, y, a, b):
    """Below zero inside a rectangle with half sides a and b."""
    return torch.maximum(x.abs() - a, y.abs() - b)


def star(x, y):
    """Below zero inside a star: on the inner side of at least four of its five lines."""
    sides = [math.sin(angle) * x + math.cos(angle) * y for angle in (0, 1.257, 2.513, 3.770, 5.027)]
    return torch.stack(sides).topk(2, dim=0).values[1] - 0.36


SHAPES = {                              # below zero inside the shape, in units of its radius, y pointing down
    "disc": lambda x, y: x.hypot(y) - 0.82,
    "square": lambda x, y: box(x, y, 0.74, 0.74),
    "triangle": lambda x, y: torch.maximum(y, 0.866 * x.abs() - 0.5 * y) - 0.54,
    "star": star,
    "cross": lambda x, y: torch.minimum(box(x, y, 0.3, 0.95), box(x, y, 0.95, 0.3)),
    "ring": lambda x, y: (x.hypot(y) - 0.66).abs() - 0.21,
    "crescent": lambda x, y: torch.maximum(x.hypot(y) - 0.95, 0.7 - (x - 0.48).hypot(y)),
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

    # Its colour is random, but clearly lighter on a dark background and darker on a light one, so that it can
    # be seen.
    brightness = background.mean(dim=1, keepdim=True)
    tint = colour()
    tint = 0.8 * (tint - tint.mean(dim=1, keepdim=True)) + brightness
    tint = tint + (1 - 2 * (brightness > 0.5)) * rand(0.35, 0.55)[:, None]
    texture = wave(x, y, 0.5, 2.5) * rand(0, 0.12)
    image.lerp_(tint + texture[:, None], opacity[:, None])
    return image.clamp_(0, 1).mul_(255).round_().byte(), label, opacity > 0.5


class InMemoryImages(TensorDataset):
    """A dataset in memory: images uint8 (M, C, H, W), targets (M,) with −1 for unknown, or maps (M, H, W),
    and names of the classes. Training keeps all of it on the device."""

    def __init__(self, images, targets, classes):
        self.images = images
        self.targets = torch.as_tensor(targets)
        self.classes = list(classes)
        super().__init__(self.images, self.targets)


class Scenes(InMemoryImages):
    """The `count` scenes from number `first` on. `masks` bool (M, size, size) are 1 on the object."""

    def __init__(self, count, size=64, seed=0, first=0):
        chunks = torch.arange(first, first + count).split(200)        # small enough for the processor's cache
        drawn = [draw_scenes(chunk, size, seed) for chunk in chunks]
        images, labels, self.masks = map(torch.cat, zip(*drawn))
        super().__init__(images, labels, SHAPES)


def label_objects(dataset):
    """Scenes → the same images with maps as labels: 1 on the object, 0 elsewhere. Any other dataset stays
    as it is."""
    if isinstance(dataset, Scenes):
        return InMemoryImages(dataset.images, dataset.masks.byte(), ["background", "object"])
    return dataset


def read_image(path):
    """An image file of any kind that Pillow reads → uint8 (3, H, W). Grey, palette, transparent and CMYK
    images become RGB. Grey files of more than 8 bits become float32 with every level kept, times 255
    over the file's largest value (at least 1). Raises OSError or another of Pillow's errors for a broken file
    or one of more than 179 million pixels."""
    with Image.open(path) as image:
        if image.mode[0] in "IF":
            levels = torch.from_numpy(np.array(image, dtype=np.float32))
            if not levels.isfinite().all():
                raise OSError("pixels that are infinite or not a number")
            return (levels * 255 / levels.max().clamp(min=1)).expand(3, -1, -1)
        return v2.functional.pil_to_tensor(image.convert("RGB"))


ENDINGS = (*torchvision.datasets.folder.IMG_EXTENSIONS, ".gif")


def is_image(path):
    """→ whether this is a file, not a pipe or a device, with the extension of an image."""
    return os.path.splitext(path)[1].lower() in ENDINGS and os.path.isfile(path)


class ImageFolder(torchvision.datasets.DatasetFolder):
    """All image files below a folder. Its sub-folders are the classes; if there are images beside them, or
    fewer than two sub-folders, all labels are −1. A validation folder takes over the `classes` of the
    training folder. The next image stands in for an unreadable one."""

    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]    # ImageNet's

    def __init__(self, root, classes=None):
        self.classes = classes
        self.skipped = Counter()
        super().__init__(root, read_image, is_valid_file=self.keep, allow_empty=True)
        say(f"{len(self)} images, {len(self.classes)} classes in {root}; files skipped: {dict(self.skipped)}")
        if not self.samples:
            raise UserError(f"there is no image in {root} or below it")

    def keep(self, path):
        """→ whether a file is an image. Counts the endings of those that are not."""
        if is_image(path):
            return True
        self.skipped[os.path.splitext(path)[1]] += 1

    def find_classes(self, root):
        """→ classes (names), and the number of each sub-folder: torchvision asks for them."""
        entries = list(os.scandir(root))
        folders = sorted(entry.name for entry in entries if entry.is_dir() and entry.name[0] != ".")
        if len(folders) < 2 or any(is_image(entry.path) for entry in entries):
            return [], {"": -1}                                       # all below root itself, with label −1
        classes = self.classes or folders
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


SPLITS = {                                                 # where the parts are not called "train" and "test"
    "STL10": ("train+unlabeled", "test"),
    "Imagenette": ("train", "val"),
    "OxfordIIITPet": ("trainval", "test"),
}


def torchvision_datasets(name, root):
    """→ torchvision's training and test images of this name ("cifar10", "fashion-mnist", …), downloaded to
    root if need be. Raises UserError if there is no such dataset, or it cannot be had."""
    names = {known.lower(): known for known in torchvision.datasets.__all__}
    try:
        known = names[name.replace("-", "").lower()]
        make = getattr(torchvision.datasets, known)
        # Some classes have an option train=True or False, the others name their parts.
        option, values = "split", SPLITS.get(known, ("train", "test"))
        if "train" in inspect.signature(make).parameters:
            option, values = "train", (True, False)
        return [make(root, download=True, transform=v2.PILToTensor(), **{option: value}) for value in values]
    except Exception as error:                                        # every dataset has its own kinds
        raise UserError(f"--data {name} is no folder, and torchvision cannot load such a dataset: {error}")


def labels_of(dataset):
    """→ all labels (M,), −1 for unknown. Goes through all images only if the dataset has no list of labels.
    Maps, or several labels per image, count as unknown."""
    labels = None
    of_torchvision = isinstance(dataset, torchvision.datasets.VisionDataset)
    for name in ("_labels", "labels", "targets") if of_torchvision else ["targets"]:
        labels = getattr(dataset, name, labels)
    if labels is None:
        labels = [dataset[i][1] for i in range(len(dataset))]
    if len(labels) and np.ndim(labels[0]):
        labels = [-1] * len(labels)
    return torch.as_tensor(labels)


def open_data(args):
    """--data → (training dataset, validation dataset or None). Raises UserError if there is no such data."""
    if args.data is None:
        # Validation scenes have numbers so high that no training scene has them.
        size = min(to_pair(args.size or 64))
        val = Scenes(min(args.limit or 4_000, 4_000), size, args.seed, first=1 << 40)
        return Scenes(min(args.limit or 20_000, 20_000), size, args.seed), val
    if not os.path.isdir(args.data):
        return torchvision_datasets(args.data, args.root)
    # ImageNet's layout is train/CLASS and val/CLASS. Any other folder is searched for images as it is.
    folder, val_folder = f"{args.data}/train", f"{args.data}/val"
    if not os.path.isdir(folder):
        return ImageFolder(args.data), None
    train = ImageFolder(folder)
    return train, ImageFolder(val_folder, train.classes) if os.path.isdir(val_folder) else None


def prepare_data(args, run, train=None, val=None, opener=open_data):
    """→ the training and validation dataset (or None) of --data, or those given. opener(args) opens them.
    Puts into args what only the data tell: in_chans, size and patch if they are open, mean and std. Raises
    UserError if images and options do not fit."""
    if train is None:
        # One process of a machine opens the data before the others, because it may have to download them.
        say(f"opening {args.data or 'scenes, drawn by this project'}")
        if run.local_rank:
            dist.barrier()
        train, val = opener(args)
        if run.world_size > 1 and not run.local_rank:
            dist.barrier()

    image, label = train[0]
    check_items(image, train, val)
    in_chans = getattr(args, "in_chans", len(image))
    if in_chans != len(image):
        raise UserError(f"the encoder takes {in_chans} channels, the images have {len(image)}")
    args.in_chans = in_chans
    choose_size(args, run, image)
    say(f"images of {args.size[0]}×{args.size[1]} pixels in patches of {args.patch}×{args.patch}")
    choose_mean_and_std(args, train, image)

    # Small images are decoded once and kept in memory at --size: decoding a photo takes longer than a
    # training step of a small model. Not if crops come from larger ones, nor with maps (np.ndim(label) > 0).
    num_pixels = len(train) * math.prod(args.size)
    no_files = args.data is None or isinstance(train, InMemoryImages)
    from_larger = args.crop < 1 and max(image.shape[1:]) > max(args.size)
    if no_files or max(args.size) > 96 or num_pixels > 500_000_000 or from_larger or np.ndim(label):
        return train, val
    return in_memory(train, run), val and in_memory(val, run)


def check_items(image, train, val):
    """Raises UserError if datasets do not give what they should, as those of other projects may. image: the
    first of the training images."""
    if not torch.is_tensor(image) or image.ndim != 3 or image.shape[2] <= 4 < len(image):
        raise UserError("a dataset has to give (image, label), the image a uint8 tensor (C, H, W)")
    if image.is_floating_point() and 0 < image.abs().max() < 20:
        raise UserError("a dataset has to give pixels from 0 to 255, not from 0 to 1 or normalised ones")
    names = [getattr(part, "classes", None) for part in (train, val)]
    names = [list(part) for part in names if part is not None and len(part)]
    if len(names) == 2 and names[0] != names[1]:
        raise UserError("the classes of the training and validation images differ in names or order")


def choose_size(args, run, image):
    """Puts size and patch into args, unless they are given. Without --size, images keep their size, rounded
    down to whole patches. Those of --data may differ in size: they become squares with the shorter side of
    the first one, at most 224 pixels (64 without CUDA)."""
    sides = to_pair(args.size or image.shape[1:])
    if args.data is not None and args.size is None:
        sides = to_pair(min(*sides, 224 if run.on_cuda else 64))
    if args.patch is None:                                            # 4, else 8, if at most 12 fit on a side
        largest = 14 if args.model == "huge" else 16
        args.patch = next((patch for patch in (4, 8) if min(sides) // patch <= 12), largest)
    if args.size is None:
        sides = [max(args.patch, side - side % args.patch) for side in sides]
    args.size = tuple(sides)


def choose_mean_and_std(args, train, image):
    """Puts the mean and standard deviation of each channel into args, by which pixels are normalised: those
    given, or those the dataset names, or else those of some 500 of its images."""
    mean = args.mean or getattr(train, "mean", None)
    std = args.std or getattr(train, "std", None)
    if mean is None or std is None:
        ids = evenly_spaced(len(train), 500).tolist()
        pixels = [center_crop(train[i][0], args.size).flatten(1).float() for i in ids]
        std, mean = torch.std_mean(torch.cat(pixels, dim=1), dim=1)   # of (C, all pixels)
        std = std.clamp(min=1)                                        # a channel may be the same everywhere
    args.mean = args.mean or [float(value) for value in mean]         # of a list, array or tensor
    args.std = args.std or [float(value) for value in std]
    if max(args.std) < 1 < image.max():
        raise UserError("mean and std have to be in pixel values, 0 to 255: multiply by 255")
    if not len(args.mean) == len(args.std) == args.in_chans:
        raise UserError(f"the images have {args.in_chans} channels, but mean and std have "
                        f"{len(args.mean)} and {len(args.std)} values: see --mean, --std, --init")


def in_memory(dataset, run):
    """→ the images of a dataset at --size, in memory; at most --limit of them."""
    ids = evenly_spaced(len(dataset), run.args.limit)
    say(f"reading {len(ids)} images into memory (fewer: --limit)")
    plan = ((part, 0) for part in ids.split(100))
    parts = file_batches(dataset, plan, run, view_transform(run.args, train=False))
    # Copies: what comes from a worker process keeps a file open, and there may be thousands of parts.
    parts = [(images.clone(), labels.clone()) for images, labels in parts]
    images, labels = map(torch.cat, zip(*parts))
    return InMemoryImages(images, labels, getattr(dataset, "classes", []))


def evenly_spaced(count, limit=None):
    """→ `limit` of the indices 0 … count − 1 (m,), evenly spaced; all of them without a limit."""
    return torch.linspace(0, count - 1, min(count, limit or count), dtype=torch.float64).round().long()


def seed_for(*numbers):
    """→ one seed made of several whole numbers, the same on every machine. Zeros at the end do not count."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def training_plan(ids, run, times=1):
    """Yields (ids (b,), seed) for each micro-batch of this process, from step run.step on.

    Which images a step sees, and the seed of its random numbers, depend only on (--seed, step) and on the
    place in the global batch. So a run that was killed continues exactly, and two processes with the same
    micro-batches see together what one would see. An epoch is a new order of all ids; those at its end that
    do not fill a batch are left out. times: a step sees that many times --batch images (FixMatch).
    """
    size = run.micro_batch * times
    order = None
    for step in range(run.step, run.total_steps):
        # All processes draw the same order, and each takes what is its own.
        epoch, step_in_epoch = divmod(step, run.steps_per_epoch)
        if order is None or step_in_epoch == 0:
            generator = torch.Generator().manual_seed(seed_for(run.args.seed, epoch))
            order = ids[torch.randperm(len(ids), generator=generator)]
        for i in range(run.accumulate):
            # The index of this micro-batch in the epoch, over all processes. If images are few, they repeat.
            index = (step_in_epoch * run.world_size + run.rank) * run.accumulate + i
            positions = index * size + torch.arange(size)
            yield order[positions % len(ids)], seed_for(run.args.seed, epoch, index)


def to_bytes(image):
    """Numbers around 0 to 255 → uint8. What is outside must not wrap around."""
    return image.clamp(0, 255).byte()


def view_transform(args, train, augment=None):
    """→ what is done to an image, and to the map that may come with it: a random crop and flip for training,
    then `augment`; for evaluation the centre."""
    crop = v2.Lambda(functools.partial(center_crop, size=args.size), tv_tensors.TVTensor)
    if not train:
        return crop
    if args.crop < 1:
        aspect = args.size[1] / args.size[0]
        crop = v2.RandomResizedCrop(
            args.size,
            scale=(args.crop, 1.0),
            ratio=(3 / 4 * aspect, 4 / 3 * aspect),
            interpolation=v2.InterpolationMode.BICUBIC,
        )
    steps = [crop, v2.RandomHorizontalFlip(0.5 * args.flip)]
    if augment:
        # 16-bit files come as floats, and interpolation may have left 0 to 255.
        steps += [v2.Lambda(to_bytes, tv_tensors.Image), augment]
    return v2.Compose(steps)


def center_crop(image, size):
    """image (…, H, W) → its centre (…, *size). The centre is cut out first, then resized [not in the paper];
    MAE's code resizes first. As in the paper, 7/8 of the shorter side is kept, or all of it if `size` is
    above 224 pixels. An image that has the size already stays as it is."""
    if image.shape[-2:] == size:
        return image
    scale = min(image.shape[-2] / size[0], image.shape[-1] / size[1])
    if min(size) <= 224:
        scale *= 0.875
    image = v2.functional.center_crop(image, [max(1, round(scale * side)) for side in size])
    return v2.functional.resize(image, size, v2.InterpolationMode.BICUBIC)


def apply_transform(transform, images, labels):
    """→ images and labels after a transform. Labels that are maps (…, H, W) are cropped and flipped with
    their images, and never interpolated; labels that are numbers stay as they are."""
    labels = torch.as_tensor(labels)
    if labels.ndim > 1:
        labels = tv_tensors.Mask(labels)
    return transform(tv_tensors.Image(images), labels)


@dataclass
class View:
    """A dataset seen through a transform: view[ids, seed] → images (b, C, H, W), labels (b,), seed. Random
    numbers for an image depend on the seed and its number alone, whichever worker process reads it. Images
    of 8 bits, uint8, and of 16, float32, make one batch of float32."""

    dataset: object
    transform: object

    def __getitem__(self, key):
        ids, seed = key
        samples = []
        for i in ids:
            torch.default_generator.manual_seed(seed_for(seed, i))    # as torch.manual_seed, without the GPUs
            samples.append(apply_transform(self.transform, *self.dataset[i]))
        images, labels = map(torch.stack, zip(*samples))
        return images, labels, seed


STOP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}  # not on Windows


def ignore_signals(worker):
    """A terminal's Ctrl-C, or its end, reaches worker processes too, but the main process wants to save
    first."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@atexit.register
def kill_workers():
    """Ends daemon processes together with the program. Python does so anyway, but with a signal that our
    workers ignore."""
    signal.signal(getattr(signal, "SIGCHLD", signal.SIGINT), signal.SIG_DFL)  # torch would call it a crash
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


def file_batches(dataset, plan, run, transform):
    """Worker processes read and crop the images of the next batches while the device computes with this
    one."""
    loader = DataLoader(
        View(dataset, transform),
        sampler=((ids.tolist(), seed) for ids, seed in plan),
        batch_size=None,                                              # one item of the view is a batch
        num_workers=run.args.workers,
        worker_init_fn=ignore_signals,
        pin_memory=run.on_cuda,                                       # for asynchronous copies
    )
    for images, labels, seed in loader:
        torch.manual_seed(seed)
        yield images, labels


def memory_batches(dataset, plan, run, transform):
    """First the whole dataset moves to the device, as uint8. For speed eight images are cropped at a time,
    all in the same way [not in the paper]."""
    tensors = [tensor.to(run.device) for tensor in dataset.tensors]   # images and targets
    for ids, seed in plan:
        torch.manual_seed(seed)
        ids = ids.to(run.device, non_blocking=run.on_cuda)
        eights = zip(*(tensor[ids].split(8) for tensor in tensors))
        parts = [apply_transform(transform, *eight) for eight in eights]
        yield map(torch.cat, zip(*parts))


def batches(dataset, plan, run, train=False, augment=None, transform=None):
    """Yields a batch on the run's device for each (ids (b,), seed) of the plan: images float (b, C, H, W),
    normalised, and labels (b,), or maps (b, H, W) with −100 where unknown. It sets torch's seed for each.
    train: random crops and flips; augment: uint8 image → uint8 image, after these, in worker processes;
    transform: replaces all this."""
    args = run.args
    mean, std = torch.tensor([args.mean, args.std], device=run.device)[..., None, None]
    source = file_batches
    if isinstance(dataset, InMemoryImages) and augment is None:
        source = memory_batches
    transform = transform or view_transform(args, train, augment)

    # Images arrive as uint8 (16-bit ones as float32), a quarter of the bytes to move, and become float on the
    # device. Copying without waiting is safe on CUDA; on a Mac's GPU the images could be freed too early.
    for images, labels in source(dataset, plan, run, transform):
        images = images.to(run.device, non_blocking=run.on_cuda)
        labels = labels.to(run.device, non_blocking=run.on_cuda).long()
        if labels.ndim > 1:
            labels = labels.where(labels != 255, -100)                # cross_entropy leaves these out
        yield (images.float() - mean) / std, labels


def to_pixels(images, args):
    """Normalised images (B, C, H, W) → uint8, on the CPU."""
    mean, std = torch.tensor([args.mean, args.std])[..., None, None]
    return to_bytes((images.float().cpu() * std + mean).round())


def save_image_rows(path, rows):
    """Writes a PNG, and says where. rows: {title: uint8 images (n, C, H, W)}, all of one shape; each row
    stands under its title. With other than 1 or 3 channels, only the first channel is shown."""
    # All rows are one grid, with gaps high enough for a line of text.
    images = torch.cat([*rows.values()])
    images = images if images.shape[1] == 3 else images[:, :1]
    images = F.interpolate(images, scale_factor=max(1, 128 // images.shape[3]))  # small images, larger
    gap, columns = 24, len(images) // len(rows)
    grid = torchvision.utils.make_grid(images, columns, padding=gap, pad_value=255)
    canvas = v2.functional.to_pil_image(grid)
    for k, title in enumerate(rows):
        place = (gap, 3 + k * (images.shape[2] + gap))
        ImageDraw.Draw(canvas).text(place, title, "black", ImageFont.load_default(15))
    canvas.save(path)
    say(f"images: {path}")


# ------------------------------------------------------------------------------------------------------ run

def learning_rate(step, peak, warmup_steps, total_steps, floor=0.0):
    """The schedule of MAE, and of the other papers [from memory]: linear warm-up to the peak, then cosine
    decay to the floor. The first step has 1/warmup_steps of the peak [not in the paper]; in MAE's code
    it has 0 and changes nothing."""
    if step < warmup_steps:
        return peak * min(1.0, (step + 1) / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(model, weight_decay, lr_scale=lambda name: 1.0):
    """→ parameter groups for AdamW. Biases, norms, class token, mask token and positions are not decayed
    [not in the paper]; MAE's pre-training code exempts only one-dimensional parameters, so not its tokens.
    lr_scale(name) is the factor of a parameter's learning rate."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            no_decay = parameter.ndim < 2 or name.endswith(("_token", "pos_embed"))
            key = (0.0 if no_decay else weight_decay, lr_scale(name))
            groups.setdefault(key, []).append(parameter)
    return [dict(params=parameters, weight_decay=decay, lr_scale=scale)
            for (decay, scale), parameters in groups.items()]


def matrix_rate(device, dtype):
    """→ operations per second in products of two large matrices: what this GPU can do at best."""
    from torch.utils.benchmark import Timer                           # here: without a GPU it may warn
    a = torch.randn(8192, 8192, device=device, dtype=dtype)
    seconds = Timer("a @ a", globals=dict(a=a)).timeit(10).mean       # it warms up, and waits for the GPU
    return 2 * len(a) ** 3 / seconds


class Run:
    """What a training loop needs around it: device, processes, precision, output folder, log, checkpoints.
    The loop stays the script's. Raises UserError if the options do not fit the machine or each other, or if
    the folder holds a run."""

    def __init__(self, args):
        self.args = args
        # A forgotten --out must not replace an older run: refuse at once.
        holds_run = any(os.path.exists(f"{args.out}/{name}") for name in ("args.json", "last.pt", "best.pt"))
        self.may_replace = args.resume or args.overwrite
        self.resumes = args.resume and os.path.exists(f"{args.out}/last.pt")
        if holds_run and not self.may_replace:
            raise UserError(
                f"{args.out} holds a run: --resume continues it from last.pt, if there is one yet; "
                f"--overwrite replaces it")
        # Nor may --overwrite remove a file that this run reads.
        options = vars(args)                                          # not every script has all of them
        needed = [args.init, options.get("prior"), options.get("augmentor"), *options.get("compare", ())]
        replaced = [os.path.realpath(folder) for folder in (args.out, f"{args.out}/baseline")]
        for path in filter(None, needed):
            if args.overwrite and os.path.realpath(f"{path}/..") in replaced:
                raise UserError(f"--overwrite would remove {path}: take another --out, or move it first")
        self.step = 0
        self.seconds = 0.0                                            # of training, over all resumed parts
        self.signal = 0                                          # the number of the signal that stops the run
        self.sums, self.numbers, self.history = {}, {}, []            # for log.jsonl
        self.peak_images_per_s = None                                 # at the GPU's matrix rate

        # torchrun starts a script several times; these variables tell each process which one it is.
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.on_cuda = self.device.type == "cuda"
        if self.world_size > 1 and not dist.is_initialized():
            # Gradients go from GPU to GPU (NCCL); some numbers stay on the CPU (Gloo).
            backend = "cpu:gloo,cuda:nccl" if self.on_cuda else "gloo"
            dist.init_process_group(backend, timeout=timedelta(hours=2))

        # Matrix products in 16 bits take half the time. bf16 has the range of float32. fp16 does not: small
        # gradients would vanish, so the scaler scales the loss up.
        precision = "fp32"
        if self.on_cuda:
            if self.local_rank >= torch.cuda.device_count():
                raise UserError(f"there is no GPU number {self.local_rank}: fewer processes, or --device cpu")
            torch.cuda.set_device(self.local_rank)
            torch.set_float32_matmul_precision("high")                # TF32 for what stays float32
            precision = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        precision = args.precision or precision
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        self.matrix_dtype = torch.float32 if precision == "fp32" else dtype
        self.autocast = torch.autocast(self.device.type, dtype, enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

        # --batch images per step, over all processes, so that learning does not depend on their number.
        # Each process takes its part in micro-batches that fit into memory; their gradients add up.
        self.accumulate = math.ceil(args.batch / self.world_size / (args.micro_batch or 256))
        self.micro_batch, rest = divmod(args.batch, self.world_size * self.accumulate)
        if rest:
            raise UserError(
                f"--batch {args.batch} does not divide into {self.world_size} processes × {self.accumulate} "
                f"micro-batches: change --batch or --micro-batch")

    def wrap(self, model, *inputs):
        """Moves a model to the device, compiles it, and under torchrun wraps it in DDP, which averages
        gradients. inputs: what `forward` takes besides images; with them a GPU run logs "mfu" (model FLOPs
        utilisation): its speed relative to large matrix products."""
        model.to(self.device)
        if inputs and self.on_cuda:
            images = torch.zeros(self.micro_batch, self.args.in_chans, *self.args.size, device=self.device)
            with FlopCounterMode(display=False) as counter, torch.no_grad(), self.autocast:
                model(images, *inputs)
            # The backward pass counts as twice the forward pass, as usual.
            flops_per_image = 3 * counter.get_total_flops() / len(images)
            peak_flops = self.world_size * matrix_rate(self.device, self.matrix_dtype)
            self.peak_images_per_s = peak_flops / flops_per_image
        # MixedAE's attention stores its accuracy in an attribute. In a block that is computed twice, the
        # compiler allows that only if the second pass may skip it.
        torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        for module in model.modules():
            # Keep only a block's input; the backward pass computes the rest once more.
            if self.args.checkpoint_blocks and isinstance(module, Block):
                module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)
        large = sum(parameter.numel() for parameter in model.parameters()) > 4_000_000
        learns = any(parameter.requires_grad for parameter in model.parameters())
        # For a small model compiling takes longer than it saves. It needs Triton, which is not for Windows.
        triton = self.on_cuda and importlib.util.find_spec("triton")
        if self.args.compile or (self.args.compile is None and large and triton):
            say("compiling: the first step takes about a minute")
            model.compile(dynamic=False)
        if self.world_size > 1 and learns:
            return nn.parallel.DistributedDataParallel(model)
        return model

    def start(self, count=0, **parts):
        """Begins or, with --resume, continues a run that trains on `count` images. parts: the modules and
        optimizers that make up a checkpoint, OUT/last.pt. From here on the folder belongs to this run."""
        args = self.args
        self.parts = parts
        self.steps_per_epoch = max(1, count // args.batch)
        if args.epochs is None:                                       # the preset says how many steps
            args.epochs = math.ceil(args.steps / self.steps_per_epoch)
        self.total_steps = args.epochs * self.steps_per_epoch
        self.warmup_steps = self.total_steps / 10
        if args.warmup is not None:                                   # too long for few --epochs? cut it
            self.warmup_steps = min(args.warmup * self.steps_per_epoch, self.total_steps / 5)

        # Random numbers are a function of (seed, step), so the step is all there is to know about them.
        if self.resumes:
            saved = read_checkpoint(f"{args.out}/last.pt")
            try:
                # AutoMAE's prior and MRA's augmentor resume without `parse_args`, which compares all options.
                names = "data seed batch lr limit crop flip weight_decay norm_pixels".split()
                if any(saved["args"].get(name) != vars(args).get(name) for name in names):
                    raise ValueError
                for name, part in parts.items():
                    if saved[name]:                                   # {} of a scaler that was not needed
                        part.load_state_dict(saved[name])
            except (KeyError, RuntimeError, ValueError):
                raise UserError(f"{args.out} holds a run of another script, of a model of another size, or "
                                f"with other options; --overwrite replaces it")
            self.step, self.seconds, self.history = saved["step"], saved["seconds"], saved["history"]
            self.sums = {name: value.to(self.device) for name, value in saved["sums"].items()}
        if self.rank == 0:
            self.begin_folder()
        if count:
            say(
                f"{count} images, {self.total_steps} steps of {args.batch} on {self.world_size} × "
                f"{self.device}; peak learning rate --lr × batch / 256 = {args.lr * args.batch / 256:.2g}")
            if self.total_steps < 300:
                say("fewer than 300 steps: enough for a try, too few to evaluate the method")

    def begin_folder(self):
        """Removes what an older run left, and writes OUT/args.json: options, versions, device and commit."""
        args = self.args
        os.makedirs(args.out, exist_ok=True)
        made_with = dict(
            torch=torch.__version__,
            cuda=torch.version.cuda,
            python=sys.version,
            commit=subprocess.getoutput(f"git -C '{os.path.dirname(__file__)}' rev-parse HEAD 2>/dev/null"),
            device_name=torch.cuda.get_device_name() if self.on_cuda else platform.machine(),
        )
        # "x" fails if there is such a file: of two runs that start at once, one is refused.
        with open(f"{args.out}/args.json", "w" if self.may_replace else "x") as file:
            json.dump(vars(args) | made_with, file, indent=1)
        if not self.resumes:
            self.clear()

    def clear(self, *names):
        """Removes what an older run left in OUT, and files of these names."""
        for name in ("last.pt", "best.pt", "log.jsonl", "baseline/last.pt", *names):
            pathlib.Path(self.args.out, name).unlink(missing_ok=True)

    def log(self, **values):
        """Collects values for the epoch's line in log.jsonl: of tensors the mean over its micro-batches,
        without waiting for the device; of numbers the last value."""
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
        """Writes a checkpoint OUT/name, from process 0 alone. A kill or a full disk leaves the one before it
        whole: the new one is written beside it, flushed to the disk, and renamed, which happens completely
        or not at all. Raises UserError if it cannot be written."""
        path = f"{self.args.out}/{name}"
        if self.rank == 0:
            try:
                with open(f"{path}.part", "wb") as file:
                    torch.save(values | dict(args=vars(self.args)), file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(f"{path}.part", path)
            except (OSError, RuntimeError) as error:
                raise UserError(f"could not write {path} (disk full?): {error}; a previous one is intact")

    def should_evaluate(self, step, num_images):
        """→ whether to evaluate `num_images` images after this step: at the end of every epoch, or less often
        if an epoch trains on fewer images than that."""
        epochs = math.ceil(num_images / (self.steps_per_epoch * self.args.batch))
        return (step + 1) % (epochs * self.steps_per_epoch) == 0 or step + 1 == self.total_steps

    def steps(self):
        """Yields the numbers of the steps still to do. Between two steps it prints, logs and saves. After
        SIGTERM, SIGHUP or Ctrl-C it saves and stops when the step is done; a second one stops at once."""
        # Stopping in the middle of a step would lose it, so the signal is only noted.
        def stop(number, frame):
            now = time.monotonic()
            if not self.signal:
                self.signal = number
                self.stopped_at = now
                say("stopping after this step; Ctrl-C again stops at once, without saving")
            elif now > self.stopped_at + 1:                           # torchrun sends a Ctrl-C twice
                raise KeyboardInterrupt

        # A signal that is ignored, as under nohup, stays ignored.
        handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS
                    if signal.getsignal(number) != signal.SIG_IGN}
        self.printed_at = time.monotonic()
        self.began = self.printed_at - self.seconds
        self.save_at = self.printed_at + 30
        try:
            while self.step < self.total_steps:
                yield self.step
                self.step += 1
                self.after_step()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def after_step(self):
        """When an epoch ends, eight seconds have passed, or a signal came: prints a line, logs a finished
        epoch, and saves if that is due."""
        # All processes must report after the same step, or they would wait for each other forever. So they
        # exchange the signal and the seconds since the last report.
        facts = torch.tensor([self.signal, time.monotonic() - self.printed_at])
        if self.world_size > 1:
            dist.all_reduce(facts, dist.ReduceOp.MAX)
        stop, waited = facts.tolist()
        done = self.step % self.steps_per_epoch or self.steps_per_epoch  # steps of this epoch
        ends_epoch = done == self.steps_per_epoch
        if not (stop or ends_epoch or waited > 8):
            return

        # The mean of each logged value over the epoch so far, and over all processes. This waits for the
        # GPU, which is why it is not done after every step.
        means = {}
        for name, value in self.sums.items():
            mean = value / (done * self.world_size)
            if self.world_size > 1:
                dist.all_reduce(mean)
                self.sums[name] = mean * done                         # process 0 saves the mean of all
            means[name] = mean.tolist()
        if not math.isfinite(means["loss"]):
            raise UserError(
                f"the loss is {means['loss']} at step {self.step}: try a lower --lr, a longer --warmup or "
                f"--precision fp32. {self.args.out}/last.pt, if there is one, is from before")

        # One line for the terminal, and at the end of an epoch for the log. The speed is that of the whole
        # run.
        now = time.monotonic()
        seconds = now - self.began
        last = self.step == self.total_steps
        line = dict(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            **means,
            **self.numbers,
            images_per_s=self.args.batch * self.step / seconds,
            seconds=seconds,
        )
        if self.peak_images_per_s:
            line["mfu"] = line["images_per_s"] / self.peak_images_per_s
        left = timedelta(seconds=round(seconds / self.step * (self.total_steps - self.step)))
        text = "  ".join(f"{name} {value:.5g}" for name, value in line.items() if not isinstance(value, list))
        if waited > 2 or stop or last:                              # not after every one of many short epochs
            say(f"{text}  left {left}")
            self.printed_at = now
        if ends_epoch:
            self.write_log(**line)
            self.sums, self.numbers = {}, {}

        # A checkpoint holds all that the next step depends on. Saving takes at most 2 % of the time.
        if stop or last or now > self.save_at:
            self.save(
                "last.pt",
                **{name: part.state_dict() for name, part in self.parts.items()},
                step=self.step,
                seconds=seconds,
                sums=self.sums,
                history=self.history,
            )
            self.save_at = now + max(30, 50 * (time.monotonic() - now))
        if stop:
            if self.world_size > 1:                                   # torchrun ends all when one has ended
                dist.barrier()
            say(f"stopped and saved at step {self.step}: add --resume to the same command to go on")
            raise SystemExit(128 + int(stop))                         # as the shell counts


def run_in_folder(function, args, folder, train, val, **overrides):
    """Calls a training function for a run of its own in OUT/folder, with some options replaced → what it
    returns. An interrupted run resumes, a finished one is only evaluated or drawn again; --overwrite starts
    over."""
    options = vars(args) | overrides | dict(out=f"{args.out}/{folder}", resume=not args.overwrite)
    result = function(argparse.Namespace(**options), train, val)
    if dist.is_initialized():
        dist.barrier()                                                # until process 0 has written it
    return result


def entry(main):
    """Runs a script's main. What a user can fix ends with one line on stderr instead of a traceback."""
    code, message = 0, None
    try:
        main()
    except (UserError, OSError, torch.OutOfMemoryError) as error:
        code, message = 2, str(error).strip().split("\n")[-1]         # of a worker's error the last line
        if isinstance(error, torch.OutOfMemoryError):
            message += " Try a smaller --micro-batch, then --checkpoint-blocks."
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    except SystemExit as stop:
        code = stop.code or 0
    if message:
        print(f"{os.path.basename(sys.argv[0])}: error: {message}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        kill_workers()
        os._exit(code)                                                # other processes may have gone already
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


def shared_options(description):
    """→ a parser with the options that mean the same in every script. A script adds its own and calls
    `parse_args`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False)
    switch = argparse.BooleanOptionalAction
    count, whole, amount = number(int, 1), number(int, 0), number(float, 0)
    add = parser.add_argument
    add("--data", help="a folder, or a torchvision dataset: cifar10 …; None: scenes, drawn on the spot")
    add("--out", help="folder for checkpoints, log and images; left out: runs/SCRIPT")
    add("--init", help="checkpoint to start from: ours, MAE's, timm's, Hugging Face's (not in mra.py)")
    add("--model", choices=VITS, help="size of the encoder (MAE: base)")
    add("--size", type=count, nargs="+",
        help="side, or height and width; None: the first image's, with --data at most 64 (CUDA: 224)")
    add("--patch", type=count, help="side of a patch in pixels; None: by the size (MAE: 16)")
    add("--epochs", type=count, help="times every image is seen; None: 600 steps or more in all (MAE: 800)")
    add("--batch", type=count, help="images per step, over all processes (MAE: 4096)")
    add("--lr", type=amount, help="peak learning rate is this × --batch / 256 (MAE: 1.5e-4)")
    add("--warmup", type=amount, help="epochs of linear warm-up, at most 1/5 of all; None: 1/10 (MAE: 40)")
    add("--limit", type=count, help="use only this many images; up to 50,000, with a small recipe")
    add("--seed", type=whole, default=0, help="decides weights, order, crops, masks and which scenes")
    add("--resume", action="store_true", help="continue the run in OUT, with the options it was started with")
    add("--overwrite", action="store_true", help="replace the run in OUT")

    add = parser.add_argument_group("advanced").add_argument
    add("--root", default="data", help="folder for torchvision's downloads")
    add("--weight-decay", type=amount, default=0.05, help="AdamW's, or SGD's (MAE: 0.05)")
    add("--crop", type=number(float, 0.01, 1), help="smallest area fraction of a random crop (MAE: 0.2)")
    add("--flip", action=switch, default=True, help="flip images at random")
    add("--mean", type=float, nargs="+", help="mean of each channel, in pixel values 0 to 255")
    add("--std", type=number(float, 1e-6), nargs="+", help="standard deviation, likewise")
    workers = min(8, os.cpu_count())
    add("--workers", type=whole, default=workers, help="processes that read images, for each that trains")
    add("--micro-batch", type=count, help="images at once on a device; gradients add up (None: at most 256)")
    add("--device", choices=("cpu", "cuda", "mps"), help="where to compute (cuda where there is one)")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="of matrix products; None: 16 bits on CUDA")
    add("--compile", action=switch, help="torch.compile models; None: large ones on GPUs")
    add("--checkpoint-blocks", action="store_true", help="less memory, a third slower: compute blocks twice")
    return parser


MAY_CHANGE = {"resume", "overwrite", "out", "epochs", "device", "precision", "workers", "compile", "root",
              "checkpoint_blocks", "micro_batch", "init", "augmentor", "prior"}


def kind_of_data(args):
    """→ "scenes", "small" or "imagenet": which defaults fit --data. A folder is small unless it has more than
    50,000 images (or --limit), with a median side of 100 pixels or more."""
    if args.data is None:
        return "scenes"
    folders = os.walk(args.data, followlinks=True)
    files = (f"{folder}/{name}" for folder, _, names in folders for name in names)
    paths = list(itertools.islice(filter(is_image, files), min(args.limit or 50_001, 50_001)))
    sides = [0]
    for path in paths[::500]:
        with contextlib.suppress(Exception):                          # whatever Pillow says of it
            sides.append(min(Image.open(path).size))
    return "imagenet" if len(paths) > 50_000 and np.median(sides) >= 100 else "small"


def parse_args(parser, script, preset, arguments=None):
    """→ the options of a run. Those that are not given come from preset(args, kind of data), a dictionary;
    with --resume all come from the run, and only those in MAY_CHANGE may be given anew."""
    # A first look at the command line: its data, model and task decide about the presets. --help has to
    # wait until these are known.
    args, _ = parser.parse_known_args(arguments)
    out = args.out or f"runs/{script}"
    task = getattr(args, "task", None)
    # Without --out, a task other than the default has a folder of its own.
    named_by_task = args.out is None and task != parser.get_default("task")
    if named_by_task:
        out += f"-{task}"
        if getattr(args, "eval", False):                              # it must not replace what it evaluates
            out += "-eval"

    # The values that are not given on the command line. AutoMAE's prior and MRA's augmentor are trained
    # first, in a folder inside OUT, and resume by themselves. Until they are done there is no OUT/last.pt.
    folder = pathlib.Path(out)
    trains_first = (folder / "prior").exists() or (folder / "augmentor").exists()
    resumes = args.resume and ((folder / "last.pt").exists() or not trains_first)
    if resumes:
        values = read_checkpoint(f"{out}/last.pt")["args"]
    else:
        values = dict(preset(args, kind_of_data(args)))
        # Small presets keep their peak learning rate when --batch is larger [not in the paper]. If it grew as
        # MAE's does, features would get worse (scenes, batches of 256, 3 epochs, seed 0: a linear classifier
        # reached 0.17 instead of 0.26).
        if args.batch and "steps" in values:
            values["lr"] *= min(1, values["batch"] / args.batch)
        if args.resume and (folder / "args.json").exists():           # it had begun, but not saved anything
            values |= json.loads((folder / "args.json").read_text())
    parser.set_defaults(**values)
    parser.add_argument("-h", "--help", action="help", help="show this and stop")
    args = parser.parse_args(arguments)
    if args.resume:
        args.overwrite = False
    args.out = out
    args.size = args.size and to_pair(args.size)

    # knn, reconstruct and --eval train nothing. Once finished (the last line of the log has "task"), they may
    # be replaced.
    log = folder / "log.jsonl"
    if named_by_task and log.exists() and '"task"' in log.read_text() and not any(folder.glob("*.pt")):
        args.overwrite = True
    for name, value in values.items():
        if resumes and getattr(args, name) != value and name not in MAY_CHANGE:
            raise UserError(f"the run in {out} has --{name.replace('_', '-')} {value}: leave that option out")
    return args
