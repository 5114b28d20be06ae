"""How fast is it? Candidates take turns, and every figure is a median, so ratios can be compared between
machines; seconds cannot.

    python tests/benchmark.py [step paper input] [--model base] [--batch 8] [--rounds 5]
    python tests/benchmark.py --gpu                 # all parts for GPUs
    python tests/benchmark.py --gpu large sweep     # some of them

    step       a pre-training step of ours, and of transformers' ViTMAE where it is installed
    paper      mask tokens in the encoder or not, and a decoder of one block (MAE, table 2 and section 4.1)
    input      images of 500×375 from files to crops of 224, on one core

On a GPU, in bf16. The matrix rate is that of one large product of matrices, measured on the same card. A
step's part of it counts the operations that our step needs, whichever code computes it.

    kernels    MixedAE's attention and its choice of keys, the patch embedding
    large, base, huge   a step of ViT-L, B, H at 224 pixels: ours, ViTMAE, the layout of MAE's code
    epoch      50,000 images of 32 pixels from memory, ViT-tiny
    scripts    the scripts' loops at 224 pixels: MAE, MixedAE, AutoMAE, ResNet-50 with and without MRA
    sweep      a step of ViT-L by batch size
"""

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mae

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode


class FullMAE(mae.MAE):
    """MAE with mask tokens in the encoder, which the paper shows to be slow and worse: hidden patches
    become a learned token before the encoder."""

    def __init__(self, encoder, decoder):
        super().__init__(encoder, decoder)
        self.token = torch.nn.Parameter(torch.zeros(1, 1, encoder.embed_dim))

    def forward(self, images):
        tokens = self.encoder.embed(images)
        noise = mae.random_noise(len(images), self.encoder.grid, images.device)
        _, _, mask = mae.hide(noise, noise.shape[1] // 4)
        tokens = torch.where(mask[..., None] > 0, self.token + self.encoder.pos_embed[:, 1:], tokens)
        in_order = torch.arange(noise.shape[1], device=images.device).expand_as(noise)
        prediction = self.decoder(self.encoder.encode(tokens), in_order)
        return self.loss(images, prediction, mask), prediction, mask


PATCH = {"huge": 14}


def build(name, kind=mae.MAE, **decoder):
    """→ a masked autoencoder for images of 224 pixels with the paper's decoder, or another one."""
    encoder = common.ViT(patch_size=PATCH.get(name, 16), **common.VITS[name])
    return kind(encoder, common.Decoder(encoder, **decoder))


def vitmae(name):
    """→ transformers' ViTMAE of the same size, with its default attention. Raises ImportError without it."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining
    size = common.VITS[name]
    return ViTMAEForPreTraining(ViTMAEConfig(
        hidden_size=size["embed_dim"],
        num_hidden_layers=size["depth"],
        num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["embed_dim"],
        patch_size=PATCH.get(name, 16),
        norm_pix_loss=True,
    ))


def unfused(attention, x):
    """Attention in three operations, as in MAE's code: the T×T weights lie in memory."""
    q, k, v = attention.project(x)
    weights = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return attention.proj((weights @ v).transpose(1, 2).flatten(2))


def mae_layout(name):
    """→ our MAE with the attention of facebookresearch/mae. The rest of that code does what ours does."""
    model = build(name)
    for module in model.modules():
        if isinstance(module, common.Attention):
            module.forward = functools.partial(unfused, module)
    return model


def compile_blocks(model):
    """Compiles the blocks alone. All that have one shape need compiling once."""
    for module in model.modules():
        if isinstance(module, common.Block):
            module.compile(dynamic=False)
    return model


def make_step(model, images, device, loss_of=lambda output: output[0], compiled=None):
    """→ a function that does one training step in bf16 on a GPU, in float32 on a CPU. compiled: on GPUs, if
    left out."""
    model.to(device).train()
    forward = model
    if compiled or (compiled is None and device == "cuda"):
        forward = torch.compile(model, dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(forward(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def synchronize(device):
    """Waits until the GPU has done what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def guarded(name):
    """What fails, because memory is full or a package is missing, is printed and left out."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        print(f"  {name:<40} failed: {type(error).__name__}: {reason}", flush=True)
    gc.collect()
    torch.cuda.empty_cache()


def compare(args, title, steps, batch, repeat=1, work=None):
    """Prints the median time of every candidate; they take turns, in another order each round. repeat: calls
    in a row. work: operations of one image, for one more column."""
    device = args.device
    print(f"\n{title}, batch {batch}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    seconds = {}
    for name, step in steps.items():
        start = time.perf_counter()
        with guarded(name):
            # Warms up and compiles.
            for _ in range(3 if device == "cuda" else 1):
                step()
            synchronize(device)
            seconds[name] = []
        if time.perf_counter() - start > 5:
            print(f"  {name:<40} ready after {time.perf_counter() - start:.0f} s", flush=True)
    for turn in range(args.rounds):
        names = list(seconds)
        turn %= max(1, len(names))                                    # there may be none that works
        for name in names[turn:] + names[:turn]:
            start = time.perf_counter()
            for _ in range(repeat):
                steps[name]()
            synchronize(device)
            seconds[name].append((time.perf_counter() - start) / repeat)
    first = None
    for name, times in seconds.items():
        median = statistics.median(times)
        first = first or median
        speed = batch / median
        line = f"  {name:<40}{1000 * median:>10.2f} ms{speed:>12.1f} images/s{first / median:>8.2f} ×"
        if work:
            line += f"{work * speed / args.rate:>8.1%} of the matrix rate"
        print(line, flush=True)


def step(args, images):
    steps = {"ours": make_step(build(args.model), images, args.device)}
    with guarded("transformers' ViTMAE"):
        model = vitmae(args.model)
        steps["transformers' ViTMAE"] = make_step(model, images, args.device, lambda output: output.loss)
    compare(args, f"a step of ViT-{args.model}", steps, args.batch)


def paper(args, images):
    steps = {
        "mask tokens in the encoder": make_step(build(args.model, FullMAE), images, args.device),
        "none": make_step(build(args.model), images, args.device),
        "none, a decoder of one block": make_step(build(args.model, depth=1), images, args.device),
    }
    compare(args, f"ViT-{args.model} (paper, ViT-L: 1, 2.8, 3.7 times)", steps, args.batch)


def write_jpegs(folder, count):
    """JPEGs of 500×375 pixels, with colours that change slowly."""
    for i in range(count):
        smooth = F.interpolate(torch.rand(1, 3, 24, 32), (375, 500), mode="bicubic").clamp(0, 1)
        pixels = (255 * smooth[0]).byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(f"{folder}/{i}.jpg", quality=90)


def read_files(args, images, count=64):
    """Files to crops, as a worker process does it, beside Pillow's decoding alone."""
    torch.set_num_threads(1)                                          # as in a worker process
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(folder, count)
        dataset = common.ImageFolder(folder)
        options = argparse.Namespace(size=(224, 224), crop=0.2, flip=True)
        transform = common.view_transform(options, train=True)

        def ours():
            for i in range(count):
                transform(dataset[i][0])

        def decode():
            for i in range(count):
                np.asarray(Image.open(f"{folder}/{i}.jpg"))

        args = argparse.Namespace(rounds=args.rounds, device="cpu")
        compare(args, "500×375 JPEGs to crops of 224", {"ours": ours, "decoding alone": decode}, count)


# ------------------------------------------------------------------------------------------------- on a GPU

def work_of(name, args, count=4):
    """→ the operations of a training step per image, multiplications and additions counted one by one."""
    images = torch.randn(count, 3, 224, 224, device=args.device)
    with torch.device(args.device):                                   # where drawing weights takes no time
        step = make_step(build(name), images, args.device, compiled=False)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops() / count


def model_step(args, name, batch):
    """The whole step, optimizer included. All candidates lie in the card's memory side by side. ViTMAE
    compiled and not is one model."""
    images = torch.randn(batch, 3, 224, 224, device=args.device)
    make = functools.partial(make_step, images=images, device=args.device)
    steps = {}
    with guarded("ours"), torch.device(args.device):
        steps["ours, compiled"] = make(build(name))
        steps["ours, blocks compiled alone"] = make(compile_blocks(build(name)), compiled=False)
    with guarded("facebookresearch/mae"), torch.device(args.device):
        steps["facebookresearch/mae's layout"] = make(mae_layout(name), compiled=False)
    with guarded("ViTMAE"), torch.device(args.device):
        model = vitmae(name)
        for title, compiled in (("ViTMAE", False), ("ViTMAE, compiled", True)):
            steps[title] = make(model, loss_of=lambda output: output.loss, compiled=compiled)
    compare(args, f"a step of ViT-{name}", steps, batch, 5, work_of(name, args))


def kernels(args):
    """Forward and backward pass of single operations."""
    make = functools.partial(torch.randn, device=args.device, dtype=torch.bfloat16)

    def both_passes(function, *inputs):
        learned = [value.requires_grad_() for value in inputs]
        gradient = torch.randn_like(function(*inputs))
        return lambda: torch.autograd.grad(function(*inputs), learned, gradient)

    def attend_masked(*inputs):
        return F.scaled_dot_product_attention(*inputs, mask)

    batch = args.batch
    # MixedAE: a quarter of the sequences, and a mask that is made from the 49 highest of 196 scores.
    qkv = [make(batch // 4, 12, 197, 64) for _ in range(3)]
    scores = make(batch // 4, 12, 196, 196)
    mask = torch.rand(batch // 4, 12, 197, 197, device=args.device) < 0.25
    steps = {
        "attention without a mask": both_passes(F.scaled_dot_product_attention, *qkv),
        "attention with a mask": both_passes(attend_masked, *qkv),
        "topk": lambda: scores.topk(49).values,
        "sort": lambda: scores.sort().values,
    }
    compare(args, "one block of MixedAE", steps, batch, 20)

    # The patch embedding is a product of matrices. As a convolution, as in MAE's code, it is the same.
    images, weight = make(batch, 3, 224, 224), make(768, 3, 16, 16)
    steps = {
        "convolution": both_passes(lambda weight: F.conv2d(images, weight, stride=16), weight),
        "matrix product": both_passes(
            lambda weight: F.linear(common.patchify(images, 16), weight.flatten(1)), weight.clone()),
    }
    compare(args, "the patch embedding of ViT-B", steps, batch, 20)


class Enough(Exception):
    """Ends a script's loop."""


def pace(args, script, preset, train, first, last, words):
    """→ seconds a step between two steps of a script's loop, images, optimizer and log included."""
    train_on = script.classify if script.__name__ == "mra" else script.pretrain
    original, times = common.Run.steps, []

    def steps(run):
        for step in original(run):
            if step in (first, last):
                synchronize(args.device)
                times.append(time.perf_counter())
            if step == last:
                raise Enough
            yield step

    with tempfile.TemporaryDirectory() as out, mock.patch.object(common.Run, "steps", steps):
        words += f" --out {out} --device {args.device} --epochs 9 --lr 1e-5"
        words += " --mean 128 128 128 --std 74 74 74"
        options = common.parse_args(script.options(), script.__name__, lambda *_: preset, words.split())
        with contextlib.suppress(Enough), contextlib.redirect_stdout(sys.stderr):
            train_on(options, train, train)
    return (times[1] - times[0]) / (last - first)


def random_images(args, count, size):
    """→ a dataset that lies on the device already."""
    pixels = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=args.device)
    return common.InMemoryImages(pixels, torch.arange(count) % 10, range(10))


def scripts(args, steps=20):
    """With the recipe for ImageNet, but whole images: how long does a step take, beside MAE's? Only steps in
    the middle of an epoch count, after compiling and before evaluating."""
    import automae
    import mixedae
    import mra
    train = random_images(args, steps * args.batch, 224)
    shared = f"--size 224 --patch 16 --crop 1 --batch {args.batch} "
    with tempfile.TemporaryDirectory() as folder:
        # What AutoMAE and MRA would train first, untrained.
        prior = build(args.model)
        torch.save({"encoder": prior.encoder.state_dict()}, f"{folder}/prior.pt")
        light = build("light", embed_dim=192, depth=2, num_heads=3)
        torch.save(dict(
            encoder=light.encoder.state_dict(),
            decoder=light.decoder.state_dict(),
            args=dict(decoder=light.decoder.config),
        ), f"{folder}/light.pt")
        vit = f"--model {args.model} "
        augmentor = f"--augmentor {folder}/light.pt --augment "
        cases = [
            ("MAE", mae, mae.PRESETS["imagenet"], vit),
            ("MixedAE (aim: 1.03)", mixedae, mixedae.IMAGENET, vit),
            ("AutoMAE", automae, automae.IMAGENET, vit + f"--prior {folder}/prior.pt"),
            ("ResNet-50", mra, mra.PRESETS["imagenet"], augmentor + "none"),
            ("ResNet-50, MRA (aim: 1.10)", mra, mra.PRESETS["imagenet"], augmentor + "mra"),
        ]
        print(f"\na step of each script's loop, ViT-{args.model}, batch {args.batch}, {args.device}")
        base = {}                                                     # the first one of each is 1
        for name, script, preset, words in cases:
            with guarded(name):
                seconds = pace(args, script, preset, train, 5, steps - 2, shared + words)
                ratio = seconds / base.setdefault(script is mra, seconds)
                print(f"  {name:<40}{1000 * seconds:>10.1f} ms{ratio:>8.2f} ×", flush=True)
            torch.compiler.reset()


def epoch(args, count=50_000):
    """With the small decoder of the preset for scenes. Crops are made eight images at a time: does the GPU
    wait for them?"""
    train = random_images(args, count, 32)
    print(f"\nan epoch of {count} images of 32 pixels, ViT-tiny, {args.device} (aim: 2 s)")
    for batch in (256, 1024):
        for crop in ("1", "0.2"):
            name = f"batch {batch}, " + ("whole images" if crop == "1" else "random crops")
            words = f"--model tiny --size 32 --patch 4 --crop {crop} --batch {batch} --micro-batch {batch}"
            with guarded(name):
                steps = count // batch
                seconds = pace(args, mae, mae.PRESETS["scenes"], train, steps // 4, steps - 2, words)
                print(f"  {name:<40}{seconds * count / batch:>10.2f} s", flush=True)
            torch.compiler.reset()


def sweep(args):
    """From which batch size on is the card busy? Compiling the blocks alone keeps this short."""
    work = work_of("large", args)
    with torch.device(args.device):
        model = compile_blocks(build("large"))
    for batch in (32, 64, 128, 256, 512):
        torch.compiler.reset()
        with guarded(f"batch {batch}"):
            images = torch.randn(batch, 3, 224, 224, device=args.device)
            step = make_step(model, images, args.device, compiled=False)
            torch.cuda.reset_peak_memory_stats()
            compare(args, "a step of ViT-large", {"blocks compiled alone": step}, batch, 3, work)
            print(f"  {torch.cuda.max_memory_allocated() / 2 ** 30:.1f} GiB", flush=True)


def on_cuda(args, questions):
    """Runs parts for GPUs."""
    torch.set_float32_matmul_precision("high")                        # as the scripts do
    args.rate = common.matrix_rate(args.device, torch.bfloat16)
    name = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    print(f"{name}, CUDA {torch.version.cuda}, matrix rate {args.rate / 1e12:.0f} TFLOP/s in bf16")
    for question in questions:
        began = time.perf_counter()
        with guarded(question):
            ON_GPU[question](args)
        torch.compiler.reset()
        print(f"  ({question} took {time.perf_counter() - began:.0f} s)", flush=True)


QUESTIONS = {"step": step, "paper": paper, "input": read_files}
ON_GPU = {                                                            # in this order
    "kernels": kernels,
    "large": functools.partial(model_step, name="large", batch=256),
    "base": functools.partial(model_step, name="base", batch=256),
    "epoch": epoch,
    "scripts": scripts,
    "sweep": sweep,
    "huge": functools.partial(model_step, name="huge", batch=64),
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*")
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--model", choices=common.VITS, default="base")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    parts = ON_GPU if args.gpu else QUESTIONS
    if not set(args.questions) <= parts.keys():
        parser.error(f"choose from {', '.join(parts)}")
    if args.gpu and args.device != "cuda":
        parser.error("--gpu needs a GPU with CUDA")
    args.batch = args.batch or (256 if args.gpu else 8)
    if args.gpu:
        on_cuda(args, args.questions or ON_GPU)
    else:
        images = torch.randn(args.batch, 3, 224, 224, device=args.device)
        for question in args.questions or ["step", "paper"]:
            QUESTIONS[question](args, images)
