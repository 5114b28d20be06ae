"""python .github/pictures.py: draws .github/methods.png, what the four methods do to the same eight scenes, from the checkpoints
that `python mae.py`, `automae.py`, `mixedae.py` and `mra.py` left in runs/."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(root := Path(__file__).parents[1]))
import automae
import common
import mae
import mixedae
from mra import MRA

def whole(script, attention=common.Attention):
    """→ encoder and decoder of runs/SCRIPT/last.pt, and the rest of that file."""
    path = root / "runs" / script / "last.pt"
    encoder = common.ViT(**common.vit_of(path), attention=attention)
    decoder = common.Decoder(encoder, **common.decoder_of(path))
    common.load_encoder(encoder, path), common.load_decoder(decoder, path)
    return encoder, decoder, common.read_checkpoint(path)

@torch.no_grad()
def main():
    torch.manual_seed(3)
    pictures = common.Scenes(8, first=(1 << 40) + 20)                                       # of the validation set
    encoder, decoder, saved = whole("mae")
    mean, std = (torch.tensor(saved["args"][name]).view(-1, 1, 1) for name in ("mean", "std"))
    images = (pictures.images - mean) / std                                                 # (8, 3, 64, 64)
    patches, size = common.patchify(images, encoder.patch), encoder.size                    # (8, N, P·P·C)
    pixels = lambda x: ((common.unpatchify(x, encoder.patch, size) if x.ndim == 3 else x) * std + mean).clamp(0, 255).byte()
    light = lambda x: 255 * common.unpatchify((x / x.amax(1, True)).sqrt()[..., None].expand_as(patches), encoder.patch, size)

    masked, painted = mae.MAE(encoder, decoder, norm_pixels=False).eval().paint(images)
    rows = {"pictures": pictures.images, "MAE hides three quarters of the patches": pixels(masked),
            "and paints them": pixels(painted)}

    encoder, decoder, saved = whole("automae")
    vit = common.ViT(**common.vit_of(path := root / "runs/automae/prior/prior.pt"))
    common.load_encoder(vit, path)
    prior, places = automae.Prior(vit, saved["args"]["attention"] == "all"), len(patches[0])
    generator = automae.Generator(prior.maps, encoder.grid)
    generator.load_state_dict(saved["generator"])
    noise = torch.rand(len(images), places)
    chance, guide = automae.propose("learned", generator, prior(images), None, noise, encoder.grid, places // 4)
    model = automae.AutoMAE(encoder, decoder, norm_pixels=False).eval()
    _, _, mask = model(images, automae.highlight(guide, places // 4), noise)
    rows |= {"AutoMAE learns where to hide, without a label": light(chance).byte(),
             "and hides there more often": pixels(patches * (1 - mask[..., None]))}

    encoder, decoder, saved = whole("mixedae", mixedae.HomologousAttention)
    model = mixedae.MixedAE(encoder, decoder, norm_pixels=False).eval()
    model.segments.load_state_dict(saved["segments"])
    _, prediction, mask, _ = model(images, noise := torch.rand(2, places))
    own = patches * (1 - mask[..., None])                                                   # (8, N, P·P·C) a quarter of each
    mixture = own.unflatten(0, (2, 4)).sum(1).repeat_interleave(4, dim=0)
    rows |= {"MixedAE mixes four pictures": pixels(mixture), "finds out which patches belong together, and paints each picture":
             pixels(own + prediction * mask[..., None])}

    augment = MRA.load(root / "runs/mra-augmentor-scenes/augmentor.pt", mean=mean, std=std)
    rows |= {"MRA keeps what a frozen autoencoder attends to most": light(augment.attention(images)).byte(),
             "and paints the rest anew, to train a classifier on": pixels(augment(images))}
    common.save_sheet(root / ".github/methods.png", rows)

if __name__ == "__main__":
    common.entry(main)
