"""How fast is it? python tests/benchmark.py [step paper input methods] [--model base] [--batch 8] [--rounds
5]

Candidates take turns, and every figure is a median, so ratios can be compared between machines; seconds
cannot.

    step     a pre-training step of ours, and of transformers' ViTMAE where it is installed
    paper    mask tokens in the encoder or not, and a decoder of one block (MAE, table 2 and section 4.1)
    input    images of 500×375 from files to crops of 224, on one core
    methods  a step of MAE with AutoMAE's, MixedAE's and MRA's extra work, in their own scripts' small presets
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import common
import mae

import numpy as np
import torch
from PIL import Image


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


def build(name, depth=8, kind=mae.MAE):
    encoder = common.ViT(**common.VITS[name])
    return kind(encoder, common.Decoder(encoder, depth=depth))


def make_step(model, images, device, loss_of=lambda output: output[0]):
    """→ a function that does one training step in bf16 on a GPU, in float32 on a CPU."""
    model.to(device).train()
    if device == "cuda":
        model.compile(dynamic=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = loss_of(model(images))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def compare(title, steps, batch, rounds, device):
    """Prints the median time of every candidate; they take turns, in another order each round."""
    seconds = {name: [] for name in steps}
    for step in steps.values():
        step()                                                        # warms up, and compiles
    for turn in range(rounds):
        names = list(steps)[turn % len(steps):] + list(steps)[:turn % len(steps)]
        for name in names:
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            steps[name]()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    print(f"\n{title}, batch {batch}, {device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    first = statistics.median(next(iter(seconds.values())))
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"  {name:<40}{1000 * median:>9.1f} ms{batch / median:>10.1f} images/s{first / median:>8.2f} ×")


def step(args, images):
    steps = {"ours": make_step(build(args.model), images, args.device)}
    try:
        from transformers import ViTMAEConfig, ViTMAEForPreTraining
    except ImportError:
        return compare(f"a step of ViT-{args.model}", steps, args.batch, args.rounds, args.device)
    size = common.VITS[args.model]
    config = ViTMAEConfig(
        hidden_size=size["embed_dim"], num_hidden_layers=size["depth"], num_attention_heads=size["num_heads"],
        intermediate_size=4 * size["embed_dim"], patch_size=size["patch_size"], norm_pix_loss=True)
    steps["transformers' ViTMAE"] = make_step(
        ViTMAEForPreTraining(config), images, args.device, lambda output: output.loss)
    compare(f"a step of ViT-{args.model}", steps, args.batch, args.rounds, args.device)


def paper(args, images):
    steps = {
        "mask tokens in the encoder": make_step(build(args.model, kind=FullMAE), images, args.device),
        "none": make_step(build(args.model), images, args.device),
        "none, a decoder of one block": make_step(build(args.model, depth=1), images, args.device),
    }
    title = f"ViT-{args.model} (paper, ViT-L: 1, 2.8, 3.7 times)"
    compare(title, steps, args.batch, args.rounds, args.device)


def read_files(args, images, count=64):
    """Files to crops, as a worker process does it, beside Pillow's decoding alone."""
    with tempfile.TemporaryDirectory() as folder:
        for i in range(count):
            smooth = torch.rand(1, 3, 24, 32)
            smooth = torch.nn.functional.interpolate(smooth, (375, 500), mode="bicubic").clamp(0, 1)
            pixels = (255 * smooth[0]).byte().permute(1, 2, 0).numpy()
            Image.fromarray(pixels).save(f"{folder}/{i}.jpg", quality=90)
        dataset = common.ImageFolder(folder)
        options = argparse.Namespace(size=(224, 224), crop=0.2, flip=True)
        transform = common.view_transform(options, train=True)

        def ours():
            for i in range(count):
                transform(dataset[i][0])

        def decode():
            for i in range(count):
                np.asarray(Image.open(f"{folder}/{i}.jpg"))

        steps = {"ours": ours, "decoding alone": decode}
        compare("500×375 JPEGs to crops of 224", steps, count, args.rounds, "cpu")


def methods(args, images):
    """Each script's default run for 40 steps: images/s as it logs them, its prior or augmentor apart."""
    import importlib
    import json

    for name in ("mae", "automae", "mixedae"):
        script = importlib.import_module(name)
        with tempfile.TemporaryDirectory() as out:
            options = ["--limit", "1280", "--epochs", "2", "--out", out, "--overwrite"]
            script.main(options)
            lines = [json.loads(line) for line in open(f"{out}/log.jsonl")]
        speed = [line["images_per_s"] for line in lines if "images_per_s" in line][-1]
        print(f"  {name:<40}{speed:>10.1f} images/s", flush=True)


QUESTIONS = {"step": step, "paper": paper, "input": read_files, "methods": methods}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions", nargs="*", choices=[*QUESTIONS, []], default=["step", "paper"])
    parser.add_argument("--model", choices=common.VITS, default="base")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    size = 224
    images = torch.randn(args.batch, 3, size, size, device=args.device)
    for question in args.questions:
        QUESTIONS[question](args, images)
