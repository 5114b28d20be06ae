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
    python mae.py --task finetune --init runs/mae/last.pt   what the encoder is worth; also --task knn, probe, reconstruct

Measured, first command (2 cores of an AMD EPYC, torch 2.15, seeds 0 1 2): 2 min 35 s; a linear classifier on the frozen features
is right on 0.57 ± 0.03 of 3,000 new scenes, before training on 0.22, and on raw pixels on 0.17.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2

from common import (TRUE_CONTRAST, VITS, Batches, Judge, Problem, Run, ViT, adamw, build, check_ratio, decoder_of, entry, erase,
                    finish, fit, keep_lowest, labelled, load_data, load_decoder, load_encoder, measure, patchify, pixel_loss,
                    save_sheet, settings, shared_options, take, tally, unpatchify, visible, vit_of, weights_in, with_contrast)

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

    The earlier a patch is covered, the higher its score; the last one is cut off in reading order, which makes the number exact.
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

        Of every picture `visible(N, mask_ratio)` patches stay visible: those where `noise` (B, N) is lowest, if it is given.
        """
        scores = self.scores(len(images), self.encoder.grid, images.device) if noise is None else noise
        keep, restore, mask = keep_lowest(scores, visible(scores.shape[1], mask_ratio))       # (B, n), (B, N), (B, N)
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
            prediction = with_contrast(prediction, patches)
        return [unpatchify(patches * (1 - mask) + fill * mask, self.encoder.patch, self.encoder.size) for fill in (0, prediction)]

# ---------------------------------------------------------------------------------------------------------------- training

def pretrain(args):
    """--task pretrain: hides, reconstructs, and in the end draws and measures."""
    run = Run(args)
    train, val = load_data(args, run)
    encoder, decoder = build(args)
    optimizer = adamw(model := MAE(encoder, decoder, args.norm_pixels, args.masking), args.weight_decay)
    wrapped = run.wrap(model)                                                               # device, torch.compile, DDP
    run.keep(encoder=encoder, decoder=decoder, optimizer=optimizer)                         # in last.pt
    run.introduce(model, train)

    batches = Batches(train, run, args.size, args.crop)
    for step in run.steps(batches.per_epoch):
        for images, _, _ in batches.at(step):                                               # (b, C, H, W) a micro-batch
            with run.autocast():
                loss, _, _ = wrapped(images, args.mask_ratio)
            run.backward(loss)
            run.log(loss=loss)
        run.update(optimizer)

    if run.rank == 0:
        draw(model, val or train, run, args)
        report(encoder, train, val, run, args)

def draw(model, data, run, args, count=10):
    """Writes OUT/reconstruction.png: originals, what the encoder sees of them, what the decoder makes of that."""
    index = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    images, *_ = next(data.stream([(index, 0)], run, args.size))
    torch.manual_seed(args.seed)
    masked, painted = model.eval().paint(images, args.mask_ratio)
    pixels = lambda x: (x * data.std + data.mean).clamp(0, 255).byte()
    save_sheet(f"{run.out}/reconstruction.png", {
        "original": pixels(images), f"{1 - args.mask_ratio:.0%} visible": pixels(masked),
        "reconstruction" + TRUE_CONTRAST * args.norm_pixels: pixels(painted)})
    run.say(f"pictures: {run.out}/reconstruction.png")

# -------------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def features(encoder, data, run, args, count=None):
    """Features (M, D) and labels (M,) of all labelled pictures, or of `count`, always the same ones. A feature is the mean patch
    token (our choice), or with --pool cls the class token."""
    index = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    index, found = index[data.labels.cpu()[index] >= 0][:count], []
    for images, labels, _ in data.stream(((part, 0) for part in index.split(250)), run, args.size):
        with run.autocast():
            tokens = encoder.encode(encoder.embed(images)).float()                          # (b, 1+N, D)
        found.append((tokens[:, 0] if args.pool == "cls" else tokens[:, 1:].mean(1), labels))
    return [torch.cat(parts) for parts in zip(*found)]

def knn(bank, labels, queries, classes, k=20, temperature=0.07):
    """Features (M, D) with labels (M,) and queries (Q, D) → scores (Q, K): a vote of the k nearest by cosine, each with weight
    exp(cosine / temperature). Our choice: the paper does not use k-NN."""
    bank, scores = F.normalize(bank).T, []
    for part in F.normalize(queries).split(1_000):
        similarity, nearest = (part @ bank).topk(min(k, bank.shape[1]))                     # (q, k)
        votes = torch.zeros(len(part), classes, device=bank.device)
        scores.append(votes.scatter_add_(1, labels[nearest], (similarity / temperature).exp()))
    return torch.cat(scores)

def linear(bank, labels, queries, classes, ridge=10.0):
    """As `knn`, by the linear map closest to the one-hot labels in least squares: a quick probe in closed form, our choice."""
    mean, std = bank.mean(0), bank.std(0, correction=0) + 1e-6
    x, q = (F.pad((part - mean) / std, (0, 1), value=1.0).cpu().double() for part in (bank, queries))
    weights = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1]).to(x), x.T @ F.one_hot(labels.cpu(), classes).double())
    return (q @ weights).to(bank.device)

def report(encoder, train, val, run, args):
    """Says and logs how well frozen features tell the classes apart, beside those of the encoder as it was before training."""
    if not args.bank or val is None or len(set(train.labels.tolist()) - {-1}) < 2:
        return run.say("accuracy: not measured; it needs pictures of two classes or more in train/ and val/, and --bank above 0")
    share, classes = {}, len(train.classes)
    for name, vit in (("trained", encoder), ("untrained", build(args)[0].to(run.device))):
        bank, labels = features(vit.eval(), train, run, args, args.bank)
        queries, truth = features(vit, val, run, args, args.bank // 2 + 1)
        for method in (knn, linear):
            share[method.__name__, name] = (method(bank, labels, queries, classes).argmax(1) == truth).float().mean().item()
    for method in ("linear", "knn"):
        run.say(f"{method} accuracy of the frozen features: {share[method, 'trained']:.3f}, before training "
                f"{share[method, 'untrained']:.3f}, chance {1 / classes:.3f}")
    run.write(step=run.step, epoch=args.epochs, **{f"{method}_{name}": value for (method, name), value in share.items()})

class LARS(torch.optim.Optimizer):
    """SGD with momentum in which a weight matrix moves by a fixed share of its own length (appendix A.1, after 1708.03888):
    v ← momentum · v + g · trust · |w| / |g|, w ← w − lr · v. Biases take their gradient as it is."""

    def __init__(self, params, trust=0.001, momentum=0.9):
        super().__init__(params, dict(lr=0.0, trust=trust, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                step, length, slope = p.grad, p.norm(), p.grad.norm()
                if p.ndim > 1:
                    step = step * torch.where((length > 0) & (slope > 0), group["trust"] * length / slope, 1.0)
                state = self.state[p]
                state["speed"] = step.clone() if "speed" not in state else state["speed"].mul_(group["momentum"]).add_(step)
                p.sub_(group["lr"] * state["speed"])

def classifier(args, classes):
    """→ a ViT with the head for --task. Probe (appendix A.1): only the head learns, behind a BatchNorm without weights.
    Fine-tuning: everything, or with --train-blocks the last blocks, the last norm and the head (section 4.3, figure 9). With
    --pool mean a new norm follows the mean of the patch tokens, and takes the place of the last one (as in MAE's code)."""
    torch.manual_seed(args.seed)
    vit = ViT(args.size, args.patch, args.channels, **args.vit, classes=classes, pool=args.pool,
              drop_path=args.drop_path if args.task == "finetune" else 0.0)
    first = 0 if args.train_blocks is None else len(vit.blocks) - args.train_blocks
    if first < 0:
        raise Problem(f"--train-blocks {args.train_blocks}: the encoder has {len(vit.blocks)}")
    learns = ("head", "fc_norm", "norm", *(f"blocks.{k}." for k in range(first, len(vit.blocks))))
    nn.init.trunc_normal_(vit.head.weight, std=0.01 if args.task == "probe" else 2e-5)
    if args.task == "probe":
        learns, vit.head = "head", nn.Sequential(nn.BatchNorm1d(vit.dim, affine=False, eps=1e-6), vit.head)
    for name, p in vit.named_parameters():                                                  # positions too, as in MAE's code
        p.requires_grad_(name.startswith(learns) or args.task == "finetune" and args.train_blocks is None)
    return vit

def classify(args):
    """--task probe and --task finetune: trains a classifier on an encoder, or from scratch; with --eval only measures."""
    run = Run(args)
    if args.task == "probe" and run.micro < 2:
        raise Problem("the probe's BatchNorm needs two pictures at once: a larger --batch or --micro-batch")
    train, val = labelled(args, run, args.labels)
    if not args.init:
        run.say(f"no --init: the encoder is {'random' if args.task == 'probe' else 'trained from scratch'}")
    model, probe, told = classifier(args, classes := len(train.classes)), args.task == "probe", ""
    if args.init and not args.resume:
        fresh = {name: value.clone() for name, value in model.head.state_dict().items()}
        run.say(told := load_encoder(model, args.init))
        if weights_in(args.init)[1].get("classes", args.classes) != args.classes:
            told += "; new: head, as the one there is for other classes"
            model.head.load_state_dict(fresh)
    if args.eval and "; new: " in told:
        raise Problem(f"{args.init} is no whole {args.task} classifier of these {classes} classes, --pool {args.pool}: train one")
    optimizer = LARS(model.head.parameters()) if probe else adamw(model, args.weight_decay, (0.9, 0.999), args.layer_decay)
    wrapped = run.wrap(model)
    run.keep(encoder=model, optimizer=optimizer)
    if args.eval:
        return finish(*measure(model, val, run, args), train.classes, run, args)
    run.introduce(model, train)

    # Of 10 magnitudes. The paper's, timm's, makes each of its two changes with probability 1/2 and varies their strength.
    change = v2.RandAugment(2, args.randaugment, num_magnitude_bins=11) if args.randaugment else None
    mixes = [mix(alpha=alpha, num_classes=classes) for mix, alpha in ((v2.MixUp, args.mixup), (v2.CutMix, args.cutmix)) if alpha]
    batches = Batches(train, run, args.size, args.crop, change)
    judge = Judge(model, val, run, args, batches.per_epoch, encoder=model)
    for step in run.steps(batches.per_epoch):
        for images, labels, _ in batches.at(step):                                          # (b, C, H, W), (b,) a micro-batch
            if args.erasing:
                images = erase(images, args.erasing)
            if mixes:                                                                       # labels become (b, K)
                images, labels = v2.RandomChoice(mixes)(images, labels)
            with run.autocast():
                loss = F.cross_entropy(wrapped(images), labels, label_smoothing=args.label_smoothing)
            run.backward(loss)
            run.log(loss=loss)
        run.update(optimizer)
        judge.after_step(step)
    judge.finish()

def nearest(args):
    """--task knn: a vote of the 20 nearest training pictures, by the features of the frozen encoder."""
    run = Run(args)
    train, val = labelled(args, run, args.labels)
    torch.manual_seed(args.seed)
    encoder = ViT(args.size, args.patch, args.channels, **args.vit)
    run.say(load_encoder(encoder, args.init) if args.init else "no --init: the encoder is random")
    run.keep()                                                                              # no checkpoint, only args.json
    if run.rank == 0:
        bank, labels = features(encoder.to(run.device).eval(), train, run, args)
        queries, truth = features(encoder, val, run, args)
        confusion, five = tally(knn(bank, labels, queries, len(train.classes)), truth)
        finish(confusion.diag().sum().item() / len(truth), five.item() / len(truth), confusion, train.classes, run, args)

def reconstruct(args):
    """--task reconstruct: draws what a pre-trained model makes of pictures."""
    run = Run(args)
    train, val = load_data(args, run)
    if args.norm_pixels is None:
        run.say("the file does not say what it predicts: drawn as plain pixels; if that is grey noise, give --norm-pixels")
        args.norm_pixels = False
    model = MAE(*build(args), args.norm_pixels, args.masking).to(run.device)
    run.say(load_encoder(model.encoder, args.init))
    run.say(load_decoder(model.decoder, args.init))
    run.keep()
    if run.rank == 0:
        draw(model, val or train, run, args)

TASKS = {"pretrain": pretrain, "knn": nearest, "probe": classify, "finetune": classify, "reconstruct": reconstruct}

# ------------------------------------------------------------------------------------------------------------ command line

PRESETS = {  # what --data selects, for every option left open; imagenet is the paper's recipe (appendix A.1), the others are ours
    "scenes": dict(model="nano", size=64, patch=8, decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                   bank=6_000, epochs=4, batch=32, lr=1.6e-2, warmup=0.4),
    "small": dict(model="nano", decoder_dim=64, decoder_depth=2, decoder_heads=4, norm_pixels=False, crop=1.0,
                  bank=20_000, epochs=50, batch=64, lr=8e-3, warmup=0.5),
    "imagenet": dict(model="base", size=224, decoder_dim=512, decoder_depth=8, decoder_heads=16, norm_pixels=True, crop=0.2,
                     bank=20_000, epochs=800, batch=4096, lr=1.5e-4, warmup=40.0),
    # LARS moves weights by 0.001 × lr of their length: hundreds of steps, not the paper's thousands, need a larger lr
    "probe scenes": dict(epochs=5, batch=128, lr=80.0, warmup=1.0),
    "probe small": dict(epochs=3, batch=128, lr=80.0, warmup=0.5),
    "probe imagenet": dict(pool="cls", epochs=90, batch=16384, lr=0.1, warmup=10.0, crop=0.08),
    "probe imagenet large": dict(epochs=50),
    "probe imagenet huge": dict(epochs=50),
    "finetune scenes": dict(epochs=10, batch=64, lr=4e-3, warmup=1.0, layer_decay=0.75, drop_path=0.1),
    "finetune small": dict(epochs=10, batch=64, lr=4e-3, warmup=1.0, layer_decay=0.75, drop_path=0.1),
    "finetune imagenet": dict(epochs=100, batch=1024, lr=5e-4, min_lr=1e-6, warmup=5.0, crop=0.08, layer_decay=0.65,
                              drop_path=0.1, label_smoothing=0.1, mixup=0.8, cutmix=1.0, randaugment=9, erasing=0.25),
    "finetune imagenet large": dict(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.2),
    "finetune imagenet huge": dict(epochs=50, lr=1e-3, layer_decay=0.75, drop_path=0.3),
}

def preset(args, kind):
    """→ the values of options left open, for a kind of data: those of the task go before, then what is in --init."""
    chosen = dict(mean=None, pool="mean", drop_path=0.0, label_smoothing=0.0, layer_decay=1.0, min_lr=0.0) | PRESETS[kind]
    chosen |= PRESETS.get(f"{args.task} {kind}", {})
    if not args.init:
        return chosen | (PRESETS.get(f"{args.task} {kind} {args.model}", {}))
    there = vit_of(args.init)
    model = next((name for name, vit in VITS.items() if all(there[part] == vit[part] for part in ("dim", "depth"))), None)
    chosen |= PRESETS.get(f"{args.task} {kind} {args.model or model}", {}) | dict(
        size=there["size"], patch=there["patch"], channels=there["channels"], model=None,
        vit={part: there[part] for part in ("dim", "depth", "heads")})
    old = weights_in(args.init)[1]
    chosen |= dict(mean=old.get("mean"), std=old.get("std"), pool=args.eval and old.get("pool") or chosen["pool"])
    if args.task == "reconstruct":
        chosen |= dict({f"decoder_{part}": value for part, value in decoder_of(args.init).items()},
                       norm_pixels=old.get("norm_pixels", old.get("norm_pix_loss")))
    return chosen

def options():
    parser, add = shared_options("mae.py", "Pre-trains a masked autoencoder, or judges one (--task).")
    switch = argparse.BooleanOptionalAction
    add["model"]("--mask-ratio", type=float, default=0.75, help="share of the patches that is hidden (0.75)")
    add["model"]("--masking", choices=MASKINGS, default="random", help="which patches are hidden (random)")
    add["model"]("--norm-pixels", action=switch, help="predict each patch normalised by its own mean and contrast (on)")
    add["run"]("--bank", type=int, help="labelled pictures that pre-training's accuracy learns from, 0: none (not in the paper)")

    task = parser.add_argument_group("evaluation; in brackets the paper's fine-tuning of ViT-B").add_argument
    task("--task", choices=TASKS, default="pretrain", help="what to do (pretrain)")
    task("--init", help="checkpoint with the encoder: of this project, of MAE's release or of timm; left out: from scratch")
    task("--eval", action="store_true", help="only measure what --init holds, head included")
    task("--labels", type=int, help="labelled pictures of each class to learn from (all)")
    task("--train-blocks", type=int, help="fine-tune only so many of the last blocks, and the head (all)")
    task("--pool", choices=("cls", "mean"), help="feature: class token or mean patch token (mean; probe of ImageNet cls)")
    task("--layer-decay", type=float, help="a layer's learning rate, as a share of the one's above it (0.65; L and H 0.75)")
    task("--drop-path", type=float, help="probability that a branch of the last block is left out, of those before less "
         "(0.1; L 0.2, H 0.3)")
    task("--label-smoothing", type=float, help="share of the target given to all classes alike (0.1)")
    task("--mixup", type=float, help="alpha of mixup (0.8)")
    task("--cutmix", type=float, help="alpha of cutmix; with both, one of them at random for each micro-batch (1.0)")
    task("--erasing", type=float, help="probability that a random rectangle becomes noise (0.25)")
    task("--randaugment", type=int, help="magnitude, up to 10, of two random changes to every picture (9)")
    task("--min-lr", type=float, help="where the cosine ends (1e-6)")
    return parser

ONLY = (  # options that do something with these values of another only
    ("task", "pretrain", "bank"),
    ("task", "pretrain reconstruct", "mask_ratio masking norm_pixels"),
    ("task", "pretrain probe finetune", "crop crops min_lr"),
    ("task", "pretrain finetune", "weight_decay"),
    ("task", "pretrain knn probe finetune", "pool"),
    ("task", "knn probe finetune reconstruct", "init"),
    ("task", "knn probe finetune", "labels"),
    ("task", "probe finetune", "eval label_smoothing mixup cutmix erasing randaugment"),
    ("task", "finetune", "train_blocks layer_decay drop_path"),
)

def main(arguments=None):
    args = fit(settings(options(), preset, arguments, ONLY))
    if args.task == "reconstruct" and not args.init:
        raise Problem("--task reconstruct needs --init, a checkpoint with encoder and decoder")
    if args.eval and (args.resume or not args.init):
        raise Problem("--eval measures the classifier in the checkpoint that --init names, without --resume")
    if args.task in ("pretrain", "reconstruct"):
        check_ratio(args)
    TASKS[args.task](args)

if __name__ == "__main__":
    entry(main)
