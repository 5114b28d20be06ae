"""Mixed Autoencoder for Self-supervised Visual Representation Learning
Kai Chen, Zhili Liu, Lanqing Hong, Hang Xu, Zhenguo Li, Dit-Yan Yeung, 2023, https://arxiv.org/abs/2303.17152

Mixing images helps supervised learning, so why not masked autoencoders? In MAE a hidden patch is simply gone.
Naive mixing puts a patch of another image there: the encoder sees more than before, reconstruction gets
easier, and the features get worse, says the paper. Its cure is a second task, homologous recognition: find
out which patches of the mixture come from the same image. Each image of a group (those mixed together) gets a
learned vector, its segment embedding, that is added to all its tokens. In every attention layer a query sees
only the keys most similar to it. They should come from its own image, and a contrastive loss teaches this.
Then each image gets its tokens back, and MAE's decoder predicts its hidden patches. Four images fit into one
sequence, so the encoder processes as many tokens as in MAE, in fewer and longer sequences. After pre-training
it is a plain vision transformer.

    4 images ──► a quarter of the ──► mixture ──► ENCODER ──┬──► un-mix ──► DECODER ──► loss on the hidden
    (B,C,H,W)    places each (B,n,D)  (B/4,N,D)  top K keys │    (B,1+n,D)  (B,N,P·P·C)   75 % of each image
                                                            └──► of one image or not? contrastive loss

    python mixedae.py                                           # scenes drawn here: minutes on a CPU
    python mixedae.py --data fashion-mnist --size 32 --out runs/fashion    # torchvision's, in 64 patches
    python mixedae.py --no-segments --no-homologous-attention --contrastive-weight 0 --out runs/naive
    torchrun --nproc_per_node=8 mixedae.py --data /imagenet     # MAE's recipe for ViT-B, as in the paper
    python mae.py --task probe --init runs/mixedae/last.pt      # evaluate the encoder, a plain ViT

Default run, seed 0, 7.5 minutes on one thread of an AMD EPYC with other jobs running: 0.26, 0.49, 0.51 and
0.52 of the chosen keys come from the same image, block by block (chance: 0.24). Accuracy of a linear
classifier (mae.linear) on the frozen mean patch token, one number per seed from 0 on, on the scenes of seed 0
(given as train=), one thread of an Intel Xeon:

                    5,000 steps              2,500 steps (--epochs 2)
    MAE             0.624 0.532 0.606        0.446 0.391 0.426 0.570 0.436 0.447
    naive mixing    0.573 0.591 0.583        0.499 0.470 0.498 0.509 0.511 0.509
    MixedAE         0.573 0.583 0.612        0.493 0.400 0.513 0.508 0.518 0.528

So on scenes naive mixing does no clear harm, early on it even helps, and the whole method does not beat it.
Without the projection head it was 0.380 0.325 0.349 after 2,500 steps (earlier code). Segment embeddings make
recognition easy: the contrastive loss reaches its minimum, 2.72, with a cosine of 1 between tokens of one
image and −1/3 between others.

Details that matter
1. The places (positions of patches) are shuffled and cut into one part per image: each place has one owner.
2. Tokens are mixed, not pixels, after positions are added [not in the paper]. For whole patches the result is
   the same, and a token keeps the position that it has in its image.
3. K, the number of keys that a query sees, is n, the visible patches of one image [from memory]. Each head
   of every block chooses for itself [from memory]. Ties with the K-th key are included [not in the paper].
   The choice has no gradient, so it is learned only indirectly.
4. The class token attends to all tokens, and all attend to it. It is none of the K keys [not in the paper].
5. Homologous attention has the parameters of plain attention, so the checkpoint holds a plain ViT, to be used
   with full attention.
6. Segment embeddings have mean 0 over a group and start small, so that the encoder hardly misses them after
   pre-training [not in the paper]. The decoder has none [not in the paper].
7. For decoding, all images of a group get the one class token of their mixture [not in the paper].
8. Temperature 0.25, weight 0.1 and mix ratio 0.25 are [from memory]. The contrastive loss reads the encoder's
   output through a projection head of two layers, which is thrown away [not in the paper]. Without it, the
   loss would act on the very tokens that a probe reads.
9. topk_accuracy leaves the query itself out: a query that chooses itself has found nothing.
10. The images of a group are different ones if there are enough, in random order [not in the paper].
"""

import argparse

from common import (                                                  # before torch: sets an OpenMP variable
    VITS, Attention, Decoder, Run, UserError, ViT, batches, decay_groups, entry, evenly_spaced, gather_tokens,
    learning_rate, load_for_run, number, parse_args, patchify, prepare_data, save_image_rows, say,
    shared_options, to_pixels, training_plan, unpatchify)

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------------------------------- mixing

def divide_places(noise, members, num_visible, turns=1):
    """noise (G, N) → ids_keep (B, n), ids_restore (B, N), mask (B, N), as in MAE, for B = turns·G·M images:
    each of the M = `members` images of a group owns n = num_visible of the N places. G is the number of
    groups. Row order: turn, group, member.

    In every further turn each image takes over the places of the next one. After M turns it has owned every
    place once: --mixing full [from memory].
    """
    # Rank the places of each group at random. In turn t member m owns ranks (m+t)·n to (m+t+1)·n − 1, modulo
    # N (detail 1). Subtracting (m+t)·n makes them 0 to n − 1: that is MAE's ids_restore.
    rank = noise.argsort().argsort()[:, None]                         # (G, 1, N)
    member = torch.arange(members, device=noise.device)[:, None]      # (M, 1)
    turned = [rank - num_visible * (member + turn) for turn in range(turns)]
    ids_restore = torch.cat(turned).flatten(0, 1) % noise.shape[1]    # (B, N)
    mask = (ids_restore >= num_visible).float()
    return ids_restore.argsort()[:, :num_visible], ids_restore, mask


# ----------------------------------------------------------------------------------- homologous recognition

def homologous_pairs(scores, num_visible):
    """scores (…, N, N), of which only the shape counts; every num_visible consecutive tokens are from one
    image → positive, bool (N, N): another token of the same image; not_self, bool (N, N): any other token."""
    token = torch.arange(scores.shape[-1], device=scores.device)
    not_self = token[:, None] != token
    owner = token // num_visible
    return (owner[:, None] == owner) & not_self, not_self


class HomologousAttention(Attention):
    """Self-attention in which each query sees only the top_k keys most similar to it, x (B, 1+N, D) → the
    same shape. It shares the parameters of a plain Attention (detail 5); with top_k = N it computes the
    same.

    `accuracy` () is the part of the chosen keys that are of the query's image, if every num_visible
    consecutive tokens are of one image. The query itself is not counted (detail 9). By chance it is
    (num_visible − 1) / (N − 1).
    """

    def __init__(self, plain, top_k, num_visible):
        super().__init__(plain.proj.in_features, plain.num_heads)
        self.qkv, self.proj = plain.qkv, plain.proj                   # shared, not copied
        self.top_k = top_k
        self.num_visible = num_visible

    def choose(self, q, k):
        """Queries, keys (B, heads, 1+N, D/heads) → bool (B, heads, 1+N, 1+N): does a query see a key?"""
        # Each query sees the K patches whose keys score highest, and ties (detail 3). Scaling the scores, as
        # attention does, would not change the choice.
        scores = (q @ k.mT)[..., 1:, 1:]                              # (B, heads, N, N)
        seen = scores >= scores.topk(self.top_k, sorted=False).values.amin(-1, True)

        # How good is the choice? The network never sees this number.
        positive, not_self = homologous_pairs(scores, self.num_visible)
        self.accuracy = (seen & positive).sum() / (seen & not_self).sum()

        # The class token sees everything, and everything sees it (detail 4).
        return F.pad(seen, (1, 0, 1, 0), value=True)

    def forward(self, x):
        # Keys that are not seen count as −∞ in the softmax. It is still the fused kernel, now with a mask.
        q, k, v = self.project(x)
        x = F.scaled_dot_product_attention(q, k, v, self.choose(q, k))
        return self.proj(x.transpose(1, 2).flatten(2))


def contrastive_loss(tokens, num_visible, temperature=0.25):
    """The homologous contrastive loss, tokens (G, N, D) → (); every num_visible consecutive tokens are from
    one image. For each token i it is the cross-entropy of choosing the other tokens j of its image among all
    others l by cosine similarity (detail 8):

        − mean_i mean_j log( exp(cos_ij / τ) / Σ_{l≠i} exp(cos_il / τ) )
    """
    with torch.autocast(tokens.device.type, enabled=False):           # bf16 has two to three digits
        tokens = F.normalize(tokens.float(), dim=-1)
        similarity = tokens @ tokens.mT / temperature                 # (G, N, N)
    positive, not_self = homologous_pairs(similarity, num_visible)
    log_probability = similarity.masked_fill(~not_self, -torch.inf).log_softmax(dim=-1)
    # Every token has n − 1 positives, so one division takes both means.
    return -log_probability.masked_fill(~positive, 0).sum() / (len(tokens) * positive.sum())


# ---------------------------------------------------------------------------------------------------- model

class MixedAE(nn.Module):
    """A masked autoencoder whose encoder sees the visible patches of several images, `members`, in one
    sequence. Each image owns one of `members` parts of the places; with `full` every part once, for `members`
    times the work.

    Without segments, homologous attention and contrastive loss (weight 0) this is naive mixing. The encoder's
    attention is replaced in place; `load_encoder` builds the plain encoder again, from a checkpoint. Raises
    UserError unless the places divide among the members.
    """

    def __init__(self, encoder, decoder, norm_pixels=True, members=4, full=False, segments=True,
                 homologous=True, contrastive_weight=0.1):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.norm_pixels = norm_pixels
        self.members = members                                        # M
        self.turns = members if full else 1
        self.contrastive_weight = contrastive_weight
        self.num_patches = encoder.pos_embed.shape[1] - 1             # N
        self.num_visible = self.num_patches // members                # n
        if self.num_patches % members or self.num_visible < 2:
            raise UserError(
                f"{self.num_patches} patches are too few for {members} images, or do not divide among them: "
                f"try --size 64, or another --mix-ratio")

        # An embedding for each member of a group (detail 6). Names that end in _token get no weight decay.
        width = encoder.embed_dim                                     # D
        embeddings = 0.1 * torch.randn(members, 1, width)
        self.segments = nn.ParameterDict({"segment_token": embeddings} if segments else {})

        # The encoder's weights, behind another attention (detail 5).
        top_k = self.num_visible if homologous else self.num_patches
        for block in encoder.blocks:
            block.attn = HomologousAttention(block.attn, top_k, self.num_visible)

        # The contrastive loss reads tokens through a small head, which is thrown away with the decoder
        # (detail 8).
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, images, noise=None):
        """images (B, C, H, W) → loss (), prediction (B, N, P·P·C), mask (B, N) with 1 where a patch is
        hidden, values for the log. B is G·M for G groups; with `full`, the results have M times as many rows.

        noise (G, N): divide the places of each group by it, instead of at random.
        """
        # Divide the places of each group among its images. With `full` every turn uses all images.
        if noise is None:
            noise = torch.rand(len(images) // self.members, self.num_patches, device=images.device)
        ids_keep, ids_restore, mask = divide_places(noise, self.members, self.num_visible, self.turns)
        images = images.repeat(self.turns, 1, 1, 1)                   # (B, C, H, W)

        # Every patch becomes a token with its position. Each image keeps the tokens at the places it owns
        # (detail 2).
        tokens = gather_tokens(self.encoder.embed(images), ids_keep)  # (B, n, D)

        # All tokens of an image get its segment embedding: without it, only what patches look like could tell
        # images apart. Then the images of a group become one sequence, member after member.
        tokens = tokens.unflatten(0, (-1, self.members))              # (G, M, n, D)
        if self.segments:
            embeddings = self.segments.segment_token                  # (M, 1, D)
            tokens = tokens + embeddings - embeddings.mean(0)

        # The encoder runs once for M images. Inside, each query chooses its keys (HomologousAttention).
        latent = self.encoder.encode(tokens.flatten(1, 2))            # (G, 1+N, D), class token first

        # Un-mix: each image gets its tokens back, and a copy of the class token (detail 7). The decoder is
        # MAE's.
        class_tokens = latent[:, :1].repeat_interleave(self.members, 0)
        patches = latent[:, 1:].unflatten(1, (self.members, -1)).flatten(0, 1)
        unmixed = torch.cat([class_tokens, patches], dim=1)           # (B, 1+n, D)
        prediction = self.decoder(unmixed, ids_restore)               # (B, N, P·P·C)

        # L = L_rec + λ · L_hom: MAE's loss, and one that makes tokens of one image alike.
        values = dict(
            reconstruction_loss=self.loss(images, prediction, mask),
            contrastive_loss=contrastive_loss(self.projector(latent[:, 1:]), self.num_visible),
            topk_accuracy=torch.stack([block.attn.accuracy for block in self.encoder.blocks]))
        loss = values["reconstruction_loss"] + self.contrastive_weight * values["contrastive_loss"]
        return loss, prediction, mask, values

    def loss(self, images, prediction, mask):
        """Mean squared error over hidden patches only, as in MAE."""
        target = patchify(images, self.encoder.patch_size).float()    # (B, N, P·P·C)
        if self.norm_pixels:
            mean = target.mean(-1, keepdim=True)
            variance = target.var(-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        error = (prediction.float() - target).square().mean(dim=-1)   # (B, N)
        return (error * mask).sum() / mask.sum()


# ------------------------------------------------------------------------------------------------- training

def pretrain(args, train=None, val=None):
    """Pre-trains a mixed autoencoder. args: as `main` makes them. train, val: datasets of your own, instead
    of --data. Raises UserError if a micro-batch does not divide into groups."""
    run = Run(args)
    members = round(1 / args.mix_ratio)
    if run.micro_batch % members:
        raise UserError(
            f"--batch, --micro-batch: {run.micro_batch} images do not divide into groups of {members}")
    encoder = None
    if args.init:                                                     # the decoder always starts anew
        encoder = load_for_run(args.init, args, num_classes=0, global_pool="token")
    train, val = prepare_data(args, run, train, val)
    torch.manual_seed(args.seed)
    encoder = encoder or ViT(args.size, args.patch, args.in_chans, **VITS[args.model])
    decoder = Decoder(encoder, **args.decoder)                        # sizes from SMALL or IMAGENET
    args.vit = encoder.config
    model = MixedAE(
        encoder,
        decoder,
        args.norm_pixels,
        members,
        args.mixing == "full",
        args.segments,
        args.homologous_attention,
        args.contrastive_weight)
    # To the device; compiled; DDP. With the other arguments of `forward`, here noise=None, `wrap` also
    # measures how well a GPU is used.
    wrapped = run.wrap(model, None)
    optimizer = torch.optim.AdamW(decay_groups(model, args.weight_decay), betas=(0.9, 0.95), fused=True)

    ids = evenly_spaced(len(train), args.limit)
    run.start(
        len(ids), encoder=encoder, decoder=decoder, segments=model.segments, projector=model.projector,
        optimizer=optimizer, scaler=run.scaler)
    loader = batches(train, training_plan(ids, run), run, train=True)
    for step in run.steps():
        # Linear warm-up for --warmup epochs, then cosine decay to zero.
        peak = args.lr * args.batch / 256
        lr = learning_rate(step, peak, run.warmup_steps, run.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # One step sees --batch images. A process takes its part in micro-batches, and the gradients add up.
        for i in range(run.accumulate):
            images, _ = next(loader)                                  # (b, C, H, W), detail 10
            wrapped.require_backward_grad_sync = i == run.accumulate - 1  # DDP averages gradients once a step
            with run.autocast:
                loss, _, _, values = wrapped(images)
            run.scaler.scale(loss / run.accumulate).backward()
            run.log(loss=loss, **values)

        run.scaler.step(optimizer)
        run.scaler.update()
        optimizer.zero_grad()
        run.log(lr=lr)

    if run.rank == 0:
        draw(model, val or train, run)
    best = max(run.history[-1]["topk_accuracy"])
    chance = (model.num_visible - 1) / (model.num_patches - 1)
    say(
        f"in the best block {best:.2f} of the chosen keys come from the same image, by chance {chance:.2f}")


@torch.no_grad()
def draw(model, dataset, run):
    """Writes OUT/mixture.png, a column for each image of a group: the image; its places in the mixture; where
    one of its patches looks in the last block, before and after TopK; the reconstruction (of normalised
    patches, if norm_pixels)."""
    encoder = model.encoder
    attention = encoder.blocks[-1].attn
    inputs = []                                                       # of the last attention
    attention.register_forward_pre_hook(lambda module, arguments: inputs.extend(arguments))
    # Far apart: folders are sorted by class, and neighbours look alike.
    ids = torch.linspace(0, len(dataset) - 1, model.members).long()
    images, _ = next(batches(dataset, [(ids, run.args.seed)], run))
    noise = torch.rand(1, model.num_patches, device=run.device)
    model.turns = 1                                                   # one mixture is enough
    _, prediction, mask, _ = model.forward(images, noise)

    patches = patchify(images, encoder.patch_size)                    # (M, N, P·P·C)
    owned = 1 - mask[..., None]                                       # (M, N, 1)
    mixture = (patches * owned).sum(dim=0)                            # (N, P·P·C)
    rows = {"image": patches, "its places in the mixture": mixture * (0.2 + 0.8 * owned)}

    # The first token of each image is the query: row 1 + m·n. `order` brings keys from the sequence's order
    # into the image's.
    order = divide_places(noise, model.members, model.num_visible)[0].flatten().argsort()
    weights = attention.attention_weights(inputs[0])                  # (1, H, 1+N, 1+N)
    seen = attention.choose(*attention.project(inputs[0])[:2])
    for title, shown in (("all keys", weights), ("TopK", weights * seen)):
        light = shown[0].mean(dim=0)[1::model.num_visible, 1:][:, order]  # (M, N)
        light = F.normalize(light, torch.inf)                         # 1 where it is highest
        rows[f"attention of one of its patches, {title}"] = mixture * light[..., None]

    rows["reconstruction"] = patches * owned + prediction * (1 - owned)
    save_image_rows(f"{run.args.out}/mixture.png", {
        title: to_pixels(unpatchify(row, encoder.patch_size, encoder.img_size), run.args)
        for title, row in rows.items()})


# --------------------------------------------------------------------------------------------- command line

# Defaults by kind of data. Scenes and small datasets take minutes on a CPU [not in the paper]. ImageNet gets
# MAE's recipe, as in the paper.
SMALL = dict(
    model="nano",
    decoder=dict(embed_dim=64, depth=1, num_heads=4),
    norm_pixels=False,
    crop=1.0,
    steps=5000,
    batch=16,
    lr=2.4e-2
)
IMAGENET = dict(
    model="base",
    size=[224],
    decoder={},                                                       # `Decoder`'s defaults are MAE's
    norm_pixels=True,
    crop=0.2,
    epochs=800,
    batch=4096,
    lr=1.5e-4,
    warmup=40.0
)


def options():
    """→ mixedae.py's parser."""
    parser = shared_options("Pre-trains a mixed autoencoder.")
    switch = argparse.BooleanOptionalAction
    add = parser.add_argument_group("mixedae").add_argument
    add("--mixing", choices=("compose", "full"), default="compose",
        help="an image shows one part of its patches, or all parts in turn, for 1 / ratio times the work")
    add("--mix-ratio", type=float, choices=(0.5, 0.25, 0.125), default=0.25,
        help="fraction of places an image owns; 1 / ratio images are mixed (paper: 0.25 [from memory])")
    add("--segments", action=switch, default=True, help="add segment embeddings to tokens (paper: yes)")
    add("--homologous-attention", action=switch, default=True,
        help="a query sees only the keys most similar to it (paper: yes)")
    add("--contrastive-weight", type=number(float, 0), default=0.1,
        help="of the loss that asks which tokens are of one image (paper: 0.1 [from memory])")
    add("--norm-pixels", action=switch, help="predict normalised patches (paper: yes)")
    return parser


def main(arguments=None, train=None, val=None):
    """arguments: a list of options; None: those of the command line. train, val: as for `pretrain`."""
    pretrain(parse_args(
        options(),
        "mixedae",
        lambda args, kind: IMAGENET if kind == "imagenet" else SMALL,
        arguments), train, val)


if __name__ == "__main__":
    entry(main)
