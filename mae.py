"""Masked Autoencoders Are Scalable Vision Learners (He, Chen, Xie, Li, Dollár, Girshick; arXiv 2111.06377).

Cut a picture into patches and hide three quarters of them. The encoder, a transformer, sees only what is left; a light
decoder gets the encoder's output, with one learned token in place of every hidden patch, and paints the hidden pixels. So
much is hidden that copying from the neighbours is no help: to fill the holes the encoder has to know what it is looking at.
That knowledge is the product, and the decoder is thrown away. Hiding is also cheap: the encoder, the heavy part, computes on
a quarter of the tokens.

    images ─► patches ─┬─► visible quarter ─► ENCODER ─► latent ─┬─► all in place ─► DECODER ─► pixels ─► loss, on
    (B,C,H,W) (B,N,D)  │   (B,n,D)            heavy   (B,1+n,D)  │   (B,1+N,d)       light   (B,N,P·P·C)  hidden
                       └─► hidden rest ─► a mask token for each ─┘                                         patches

    python mae.py                                           on two CPU cores, under three minutes, nothing to download
    python mae.py --data fashion-mnist --epochs 3           a small torchvision data set
    torchrun --nproc_per_node=8 mae.py --data /imagenet     the paper's recipe, ViT-B/16; also --model large, --model huge

Measured, first command (2 cores of an AMD EPYC, torch 2.15, seeds 0 1 2): 2 min 35 s; a linear classifier on the frozen features
is right on 0.57 ± 0.03 of 3,000 new scenes, before training on 0.22, and on raw pixels on 0.17.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn

from common import (VITS, Batches, Decoder, Problem, Run, ViT, adamw, entry, keep_lowest, open_data, patchify, pixel_loss,
                    save_sheet, settings, take, unpatchify)

# ----------------------------------------------------------------------------------------------------------------- masking
# Each kind of mask is a score for every patch; the n lowest scores of a picture stay visible. So all kinds hide exactly as many.

def random_scores(batch, grid, device):
    """→ (B, N): every patch is as likely to stay as any other (section 3; the paper's choice)."""
    return torch.rand(batch, grid[0] * grid[1], device=device)

def grid_scores(batch, grid, device):
    """→ (B, N): of every 2×2 patches the upper left one stays (figure 6); what the ratio asks beyond that is random."""
    row, column = torch.arange(grid[0], device=device)[:, None] % 2, torch.arange(grid[1], device=device) % 2
    return torch.rand(batch, grid[0] * grid[1], device=device) + (row | column).flatten()

def block_scores(batch, grid, device, rectangles=24):
    """→ (B, N): large random rectangles are hidden one after another until the ratio is met (figure 6, after BEiT).

    The earlier a patch is covered, the higher its score; the last rectangle is cut off at a row, which makes the number exact.
    Rectangles cover 8 to 40 % of the patches (BEiT's 16 of 196, and its 75) with a height 0.3 to 1/0.3 times their width.
    """
    area, aspect, top, left = torch.rand(4, batch, rectangles, 1, 1, device=device)
    area, aspect = grid[0] * grid[1] * (0.08 + 0.32 * area), 0.3 ** (2 * aspect - 1)
    height, width = (area * aspect).sqrt().clamp(1, grid[0]).round(), (area / aspect).sqrt().clamp(1, grid[1]).round()
    top, left = (top * (grid[0] - height + 1)).floor(), (left * (grid[1] - width + 1)).floor()
    row, column = torch.arange(grid[0], device=device)[:, None], torch.arange(grid[1], device=device)
    covered = (row >= top) & (row < top + height) & (column >= left) & (column < left + width)   # (B, rectangles, h, w)
    turn = torch.arange(rectangles, 0, -1, device=device)[:, None, None]                    # the first rectangle scores highest
    return (covered * turn).amax(dim=1).flatten(1) + torch.linspace(0, 0.9, grid[0] * grid[1], device=device)

MASKINGS = {"random": random_scores, "block": block_scores, "grid": grid_scores}

# ------------------------------------------------------------------------------------------------------------------- model

class MAE(nn.Module):
    """An encoder that sees only the visible patches, and a light decoder that paints the hidden ones (section 3, figure 1)."""

    def __init__(self, encoder, decoder, norm_pixels=True, masking="random"):
        super().__init__()
        self.encoder, self.decoder, self.norm_pixels, self.scores = encoder, decoder, norm_pixels, MASKINGS[masking]

    def forward(self, images, mask_ratio=0.75, noise=None):
        """images (B, C, H, W) → loss (), prediction (B, N, P·P·C), mask (B, N), 1 where hidden.

        Of every picture int(N·(1 − mask_ratio)) patches stay visible: those where `noise` (B, N) is lowest, if it is given.
        """
        scores = self.scores(len(images), self.encoder.grid, images.device) if noise is None else noise
        keep, restore, mask = keep_lowest(scores, int(scores.shape[1] * (1 - mask_ratio)))  # (B, n), (B, N), (B, N)
        tokens = self.encoder.embed(images)                                                 # (B, N, D) patches with positions
        latent = self.encoder.encode(take(tokens, keep))                                    # (B, 1+n, D) only what is visible
        prediction = self.decoder(latent, restore)                                          # (B, N, P·P·C) every place
        return pixel_loss(images, prediction, mask, self.encoder.patch, self.norm_pixels), prediction, mask

    @torch.no_grad()
    def paint(self, images, mask_ratio=0.75, noise=None):
        """images (B, C, H, W) → the same with hidden patches left out (0), and with hidden patches painted by the model.

        With norm_pixels the model never learns a patch's mean and contrast. Here they come from the true patch, which gives part
        of the answer away: a caption has to say so.
        """
        _, prediction, mask = self.forward(images, mask_ratio, noise)                       # not compiled for this one batch
        patches, mask = patchify(images, self.encoder.patch), mask[..., None]               # (B, N, P·P·C), (B, N, 1)
        if self.norm_pixels:
            prediction = prediction * (patches.var(-1, keepdim=True) + 1e-6).sqrt() + patches.mean(-1, keepdim=True)
        return [unpatchify(patches * (1 - mask) + fill * mask, self.encoder.patch, self.encoder.size) for fill in (0, prediction)]

# ---------------------------------------------------------------------------------------------------------------- training

def build(args):
    """→ encoder and decoder as the options say, with the weights that --seed gives."""
    torch.manual_seed(args.seed)
    encoder = ViT(args.size, args.patch, args.channels, **args.vit)
    return encoder, Decoder(encoder, args.decoder_dim, args.decoder_depth, args.decoder_heads)

def pretrain(args):
    run = Run(args)
    train, val = run.first(lambda: open_data(args.data, args.root, args.size, args.seed, args.limit))
    args.channels, args.mean, args.std = train.channels, train.mean.flatten().tolist(), train.std.flatten().tolist()
    encoder, decoder = build(args)
    optimizer = adamw(model := MAE(encoder, decoder, args.norm_pixels, args.masking), args.weight_decay)
    wrapped = run.wrap(model)                                                               # device, torch.compile, DDP
    run.keep(encoder=encoder, decoder=decoder, optimizer=optimizer)                         # in last.pt
    size = sum(p.numel() for p in model.parameters()) / 1e6
    run.say(f"{size:.1f} M parameters, {len(train)} pictures of {args.size} pixels a side, on {run.world} × {run.device.type} in "
            f"{run.precision}, batches of {run.world} × {run.accumulate} × {run.micro}")

    if len(train) < args.batch:
        run.say(f"--batch {args.batch} is more than there are pictures, each is seen several times a step: try a smaller one")

    batches = Batches(train, run, args.size, args.crop)
    for step in run.steps(batches.per_epoch):
        for images, _, _ in batches.at(step):                                               # (b, C, H, W) a micro-batch
            with run.autocast():
                loss, _, _ = wrapped(images, args.mask_ratio)
            run.backward(loss)
            run.log(loss=loss)
        run.update(optimizer)

    if run.rank == 0:
        if broken := getattr(train, "broken", None):
            run.say(f"{len(broken)} unreadable pictures were replaced by their neighbours")
        draw(model, val or train, run, args)
        report(encoder, train, val, run, args)

def draw(model, data, run, args, count=10):
    """Writes OUT/reconstruction.png: originals, what the encoder sees of them, what the decoder makes of that."""
    index = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    images, *_ = next(data.stream([(index, 0)], run, args.size))
    torch.manual_seed(args.seed)
    masked, painted = model.eval().paint(images, args.mask_ratio)
    pixels = lambda x: (x * data.std + data.mean).clamp(0, 255).byte()
    title = "reconstruction, each hidden patch with its true mean and contrast" if args.norm_pixels else "reconstruction"
    save_sheet(f"{run.out}/reconstruction.png", {
        "original": pixels(images), f"{1 - args.mask_ratio:.0%} visible": pixels(masked), title: pixels(painted)})
    run.say(f"pictures: {run.out}/reconstruction.png")

@torch.no_grad()
def features(encoder, data, run, size, count):
    """Features (M, D), the mean patch token (our choice), and labels (M,) of `count` labelled pictures, always the same ones."""
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    index = index[data.labels.cpu()[index] >= 0][:count]
    found = []
    for images, labels, _ in data.stream(((part, 0) for part in index.split(250)), run, size):
        with run.autocast():
            found.append((encoder.encode(encoder.embed(images))[:, 1:].float().mean(1), labels))
    return [torch.cat(parts) for parts in zip(*found)]

def knn(bank, labels, queries, classes, k=20, temperature=0.07):
    """Features (M, D) with labels (M,) and queries (Q, D) → predicted classes (Q,): a vote of the k nearest by cosine, each with
    weight exp(cosine / temperature). Our choice: the paper does not use k-NN."""
    similarity, nearest = (F.normalize(queries) @ F.normalize(bank).T).topk(min(k, len(bank)))      # (Q, k)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    return votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp()).argmax(1)

def linear(bank, labels, queries, classes, ridge=10.0):
    """As `knn`, by the linear map closest to the one-hot labels in least squares: a quick probe in closed form, our choice."""
    x, q = (F.pad((part - bank.mean(0)) / (bank.std(0) + 1e-6), (0, 1), value=1.0).double() for part in (bank, queries))
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).to(x), x.T @ F.one_hot(labels, classes).double())
    return (q @ weights).argmax(1)

def report(encoder, train, val, run, args):
    """Says and logs how well frozen features tell the classes apart, beside those of the encoder as it was before training."""
    if not args.bank or val is None or len(set(train.labels[:len(train)].tolist()) - {-1}) < 2:
        return run.say("accuracy: not measured; it needs pictures of two classes or more in train/ and val/, and --bank above 0")
    share = {}
    for name, vit in (("trained", encoder), ("untrained", build(args)[0].to(run.device))):
        bank, labels = features(vit.eval(), train, run, args.size, args.bank)
        queries, truth = features(vit, val, run, args.size, args.bank // 2 + 1)
        for judge in (knn, linear):
            share[judge.__name__, name] = (judge(bank, labels, queries, len(train.classes)) == truth).float().mean().item()
    for judge in ("linear", "knn"):
        run.say(f"{judge} accuracy of the frozen features: {share[judge, 'trained']:.3f}, before training "
                f"{share[judge, 'untrained']:.3f}, chance {1 / len(train.classes):.3f}")
    run.write(step=run.step, epoch=args.epochs, **{f"{judge}_{name}": value for (judge, name), value in share.items()})

# ------------------------------------------------------------------------------------------------------------ command line

PRESETS = {  # what --data selects, for every option left open; imagenet is the paper's recipe (appendix A.1), the others are ours
    "scenes": dict(model="nano", size=64, patch=8, decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                   bank=6_000, epochs=4, batch=32, lr=1.6e-2, warmup=0.4),
    "small": dict(model="nano", decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                  bank=20_000, epochs=50, batch=64, lr=8e-3, warmup=0.5),
    "imagenet": dict(model="base", size=224, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pixels=True, crop=0.2,
                     bank=20_000, epochs=800, batch=4096, lr=1.5e-4, warmup=40.0),
}

def options():
    parser = argparse.ArgumentParser("mae.py", description="Pre-trains a masked autoencoder. What is left out comes from a "
                                     "preset: scenes (no --data), small (torchvision's small sets) or imagenet, the paper's. "
                                     "In brackets: the paper's value, or the default.")
    switch = argparse.BooleanOptionalAction

    data = parser.add_argument_group("data").add_argument
    data("--data", help="a torchvision name (fashion-mnist, cifar10, stl10, imagenette …) or a folder; left out: scenes")
    data("--root", default="data", help="folder that torchvision downloads to (data)")
    data("--limit", type=int, help="only the first so many pictures, for a quick try")
    data("--size", type=int, help="side of the pictures in pixels (224)")
    data("--crop", type=float, help="smallest share of a picture's area that a random crop takes, 1: no crops (0.2)")
    data("--workers", type=int, help="processes that decode pictures, for each training process (cores, at most 16)")

    model = parser.add_argument_group("model").add_argument
    model("--model", choices=VITS, help="size of the encoder (base)")
    model("--patch", type=int, help="side of a patch in pixels (16; huge 14)")
    model("--decoder-dim", type=int, help="width of the decoder (512)")
    model("--decoder-depth", type=int, help="blocks of the decoder (8)")
    model("--decoder-heads", type=int, help="attention heads of the decoder (16)")
    model("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (0.75)")
    model("--masking", choices=MASKINGS, default="random", help="which patches are hidden (random)")
    model("--norm-pixels", action=switch, help="predict each patch normalised by its own mean and contrast (on)")

    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=int, help="times that every picture is seen (800)")
    training("--batch", type=int, help="pictures a step, over all processes together (4096)")
    training("--micro-batch", type=int, help="pictures a process takes at once; gradients add up (at most 256)")
    training("--lr", type=float, help="peak learning rate for a batch of 256; × batch / 256 (1.5e-4)")
    training("--warmup", type=float, help="epochs of linear warm-up (40)")
    training("--weight-decay", type=float, default=0.05, help="of weight matrices (0.05)")
    training("--seed", type=int, default=0, help="decides weights, order, crops and masks (0)")

    machine = parser.add_argument_group("run").add_argument
    machine("--out", default="runs/mae", help="folder for last.pt, log.jsonl, args.json and pictures (runs/mae)")
    machine("--resume", action="store_true", help="go on from OUT/last.pt, with its options where none are given")
    machine("--overwrite", action="store_true", help="start again in a folder that holds a run")
    machine("--save-every", type=float, default=30.0, help="seconds between checkpoints, at least (30)")
    machine("--bank", type=int, help="labelled pictures that the accuracy at the end learns from, 0: none (not in the paper)")
    machine("--device", help="cuda, cpu … (cuda if there is one)")
    machine("--precision", choices=("bf16", "fp16", "fp32"), help="of matrix products (bf16 on GPUs that have it, fp32 on CPUs)")
    machine("--compile", action=switch, help="torch.compile the model (on GPUs)")
    return parser

def main(arguments=None):
    args = settings(options(), PRESETS, arguments)
    args.size = args.size or {"stl10": 96}.get(args.data, 32 if "cifar" in args.data else 28)
    args.vit = dict(VITS[args.model])
    args.patch = args.patch or next((p for p in (4, 8) if args.size // p <= 12), args.vit["patch"])
    del args.vit["patch"]
    if args.patch > args.size:
        raise Problem(f"--patch {args.patch} is larger than the pictures, {args.size} pixels")
    if not (0 < args.mask_ratio < 1 and int((args.size // args.patch) ** 2 * (1 - args.mask_ratio))):
        raise Problem(f"--mask-ratio {args.mask_ratio} must lie between 0 and 1 and leave a patch visible, of "
                      f"{(args.size // args.patch) ** 2}")
    pretrain(args)

if __name__ == "__main__":
    entry(main)
